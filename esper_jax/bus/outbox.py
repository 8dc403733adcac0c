"""`Outbox`: what waits to be sent, so that training never waits for a transport.

One thread sends. When there is no room, the oldest telemetry is dropped and counted.
Events and acknowledgements are never dropped: beyond the room they wait in a file, and
what is left at the end is sent by the next run that opens that file.
"""

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from esper_jax.bus.envelope import encode, new_id
from esper_jax.bus.messages import Message
from esper_jax.bus.spill import Spill
from esper_jax.bus.transport import Outgoing, Topic, Transport, TransportError

__all__ = ["Letter", "Outbox", "letters"]

_log = logging.getLogger(__name__)

_AT_ONCE = 64
"""Messages that are handed to a transport together."""

_PORTION = 1 << 18
"""Bytes of them, unless one alone has more: a slow link takes them in time."""

_FIRST_PAUSE, _LAST_PAUSE = 0.05, 5.0
"""Seconds between attempts: doubled each time, up to the last."""


class Letter(NamedTuple):
    """A message before it is numbered."""

    topic: Topic
    data: bytes
    settles: tuple[str, ...] = ()


def letters(
    topic: Topic, messages: Iterable[Message], source: str, name: str = ""
) -> Iterator[Letter]:
    """Messages as letters.

    Args:
      topic: where they go.
      messages: to send.
      source: who sends them.
      name: what their ids begin with; by default they are new.
    """
    for number, message in enumerate(messages):
        id = f"{name}-{number}" if name else None
        yield Letter(topic, encode(message, source, id))


Make = Callable[[], Iterable[Letter]]


class Outbox:
    """Sends messages in a thread of its own.

    Args:
      transport: where they go.
      spill: file for what there is no room for; None keeps it in memory.
      room: how many of `tell` wait at most, and messages of `post` outside of the file.

    Attributes:
      dropped: how many of `tell` were dropped.
      error: why the last attempt failed; empty while all is well.
      outages: how often sending began to fail.
      answered: tokens that the messages settle which the file held at first.

    Raises:
      OSError: if the file cannot be read.
    """

    def __init__(
        self, transport: Transport, spill: Path | None = None, *, room: int = 256
    ) -> None:
        self.dropped = self.outages = self._given = 0
        self.error = ""
        self._transport, self._room = transport, room
        self._number, self._epoch = 0, new_id()
        # With the number of the last message of `post` before each.
        self._loose: deque[tuple[int, Make]] = deque()
        self._loose_numbers, self._loose_epoch = itertools.count(1), new_id()
        self._hand: list[Outgoing] = []  # of one `tell`; the thread's own
        self._kept: deque[Outgoing] = deque()
        self._spill = Spill(spill)
        self.answered = self._spill.settles
        self._changed = threading.Condition()
        self._open = self._sends = True
        self._busy = False
        self._thread = threading.Thread(
            target=self._run, name="esper-jax-bus", daemon=True
        )
        self._thread.start()

    def tell(self, make: Make) -> None:
        """Takes telemetry, and drops the oldest if there is no room.

        Args:
          make: makes the messages, in the outbox's thread.
        """
        with self._changed:
            self._given += 1
            if len(self._loose) >= self._room:
                self._loose.popleft()
                self.dropped += 1
            self._loose.append((self._number, make))
            self._changed.notify_all()

    def post(self, *letters: Letter) -> None:
        """Takes what must not be lost."""
        with self._changed:
            self._given += len(letters)
            for letter in letters:
                self._number += 1
                message = Outgoing(self._epoch, self._number, *letter)
                if len(self._kept) < self._room and not len(self._spill):
                    self._kept.append(message)
                else:
                    self._spill.add(message)
            self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """Messages of `post` that are not sent yet."""
        with self._changed:
            return len(self._kept) + len(self._spill)

    @property
    def account(self) -> dict[str, Any]:
        """What became of what it was given, as JSON."""
        error = self.error or None
        return {"records": self.dropped, "given": self._given, "error": error}

    def flush(self, patience: float) -> bool:
        """Waits until all is sent, but no longer than some seconds.

        Returns:
          Whether all is.
        """
        with self._changed:
            return self._changed.wait_for(
                lambda: not (self._busy or self._something()), patience
            )

    def close(self, patience: float) -> int:
        """Sends what is left within some seconds, and keeps the rest in the file.

        Returns:
          How many messages of `post` are lost, as they could be neither sent nor kept.
        """
        with self._changed:
            self._open = False
            self._changed.notify_all()
        self._thread.join(patience)
        with self._changed:
            # A transport that hangs is left alone. What it was given may have been
            # sent; it is kept with its numbers, so that it is not sent twice.
            self._sends = False
            self._changed.notify_all()
            self.dropped += len(self._loose) + bool(self._hand)
            return self._spill.keep(self._kept)

    def _something(self) -> bool:
        return bool(self._hand or self._kept or self._loose or len(self._spill))

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._something() or not self._open)
                if not (self._something() and self._sends):
                    return
                self._busy = True
            sent = self._advanced()
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                if not sent:
                    self._changed.wait_for(lambda: not self._sends, pause)
                if not self._sends:
                    return
            pause = _FIRST_PAUSE if sent else min(2 * pause, _LAST_PAUSE)

    def _advanced(self) -> bool:
        """Tries to send what comes first; returns whether that went well.

        Telemetry that cannot be sent is dropped where events or answers wait behind it.
        """
        kept: list[Outgoing] = []
        if not self._hand:
            try:
                with self._changed:
                    kept, make = self._next()
            except OSError as error:  # the file of what waits cannot be read now
                self._failed(error)
                return False
            self._hand = self._made(make)
        portion = _portion(kept or self._hand)
        sent = self._sent(portion)
        with self._changed:
            if not self._sends:  # what was given up is counted, and the rest is kept
                return sent
            if sent and kept:
                self._drop(len(portion))
            elif sent:
                del self._hand[: len(portion)]
            elif self._hand and (self._kept or len(self._spill)):
                self._hand.clear()
                self.dropped += 1
        return sent

    def _next(self) -> tuple[list[Outgoing], Make | None]:
        """What was taken first: some messages of `post`, or one `tell`."""
        kept = self._next_kept()
        if not self._loose:
            return kept, None
        last = self._loose[0][0]
        early = [m for m in kept if m.epoch != self._epoch or m.number <= last]
        return (early, None) if early else ([], self._loose.popleft()[1])

    def _next_kept(self) -> list[Outgoing]:
        if self._kept:
            return list(itertools.islice(self._kept, _AT_ONCE))
        return self._spill.peek(_AT_ONCE)

    def _drop(self, count: int) -> None:
        if self._kept:
            for _ in range(count):
                self._kept.popleft()
        else:
            self._spill.drop(count)

    def _made(self, make: Make | None) -> list[Outgoing]:
        """Numbered telemetry; none, and counted, where it cannot be made."""
        try:
            letters = list(make()) if make is not None else []
        except Exception as error:  # whatever it is, it stops no acknowledgement
            self.dropped += 1
            _log.warning("the bus: telemetry of a tick cannot be made (%r)", error)
            return []
        return [
            Outgoing(self._loose_epoch, next(self._loose_numbers), *letter)
            for letter in letters
        ]

    def _sent(self, messages: list[Outgoing]) -> bool:
        """Tries to send messages; says once when that fails, and when it works again.

        What a transport raises beside `TransportError` ends no training either.
        """
        try:
            if messages:
                self._transport.publish(messages)
        except Exception as error:
            if self._sends:  # else it was let go of at the end
                self._failed(error)
            return False
        if self.error:
            _log.warning("the bus can be reached again")
            self.error = ""
        return True

    def _failed(self, error: Exception) -> None:
        said = (str(error).splitlines() or [""])[0][:300]
        if not isinstance(error, TransportError):
            said = f"{type(error).__name__}: {said}"
        if not self.error:
            self.outages += 1
            _log.warning("the bus cannot be reached (%s); the run goes on", said)
        self.error = said


def _portion(messages: list[Outgoing]) -> list[Outgoing]:
    """The first of some messages, as many as are handed to a transport together."""
    size = 0
    for count, message in enumerate(messages[:_AT_ONCE]):
        size += len(message.data)
        if count and size > _PORTION:
            return messages[:count]
    return messages[:_AT_ONCE]
