"""What carries messages: one small protocol, and the transport within a process."""

import dataclasses
import json
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol

from esper_jax.bus.envelope import Envelope, decode, encode, new_id
from esper_jax.bus.messages import Command, Message

__all__ = [
    "TOPICS",
    "Deliver",
    "Delivery",
    "Local",
    "Outgoing",
    "Topic",
    "Transport",
    "TransportError",
    "buried",
]

Topic = Literal["telemetry", "events", "acks", "dead"]
"""Where a run's messages go: what each tick measured, what happened, what became of
commands, and commands that could not be read."""

TOPICS: tuple[Topic, ...] = ("telemetry", "events", "acks", "dead")


_MOST_DEAD = 1000
"""Bytes that are kept of a command that cannot be read."""


class TransportError(Exception):
    """Nothing can be sent or received now; it is tried again."""


@dataclasses.dataclass(frozen=True)
class Delivery:
    """A command as it arrives."""

    data: bytes
    token: str = ""
    """What the transport knows it by; settled when the command's effect is there."""
    size: int = 0
    """Bytes that were sent, if the data are cut."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """The token, if there is one."""
        return (self.token,) if self.token else ()


def buried(delivery: Delivery, why: str) -> bytes:
    """What the topic ``dead`` gets of a command that cannot be read."""
    entry = {
        "reason": why,
        "bytes": max(delivery.size, len(delivery.data)),
        "begins": delivery.data[:_MOST_DEAD].decode(errors="replace"),
    }
    return json.dumps(entry).encode()


@dataclasses.dataclass(frozen=True)
class Outgoing:
    """A message to send."""

    epoch: str
    """Whose numbers these are."""
    number: int
    """Grows by one with each message of the epoch, so that none is sent twice."""
    topic: Topic
    data: bytes
    settles: tuple[str, ...] = ()
    """Tokens of deliveries that are settled in the moment that this is sent."""


Deliver = Callable[[Delivery], None]


class Transport(Protocol):
    """Carries messages of one run. `publish` is called in a thread of its own."""

    def listen(self, deliver: Deliver, answered: Iterable[str] = ()) -> None:
        """Hands on commands from now on, in any thread.

        Args:
          deliver: takes each command. One that was taken comes again only if somebody
            sends it again.
          answered: tokens of commands whose answers are still to be sent, by this
            process, which are not handed on either.
        """

    def publish(self, messages: Sequence[Outgoing]) -> None:
        """Sends messages in their order; those that were sent before are passed over.

        Raises:
          TransportError: if some may not have been sent: all of them come again.
        """

    def close(self) -> None:
        """Lets go of connections and files."""


class Local:
    """The transport within a process: no server, no files, no network.

        bus = Local()
        id = bus.send(Move(layer="layers/0", seed=3, stage="CULLED"))
        ...
        bus.acknowledged(id)

    Args:
      room: messages that are kept, the newest.
    """

    def __init__(self, room: int = 10_000) -> None:
        self._lock = threading.Condition()
        self._kept: deque[tuple[Topic, bytes]] = deque(maxlen=room)
        self._early: list[Delivery] = []
        self._deliver: Deliver | None = None

    def send(self, command: Command, id: str | None = None) -> str:
        """Sends a command to the run, which joins its next tick; returns its id."""
        id = id or new_id()
        self.put(encode(command, "local", id))
        return id

    def put(self, data: bytes) -> None:
        """The same for a message as bytes."""
        with self._lock:
            if self._deliver is None:
                self._early.append(Delivery(data))
                return
            deliver = self._deliver
        deliver(Delivery(data))

    def messages(self, kind: type[Message] = Message) -> list[Envelope]:
        """What the run has said so far, oldest first, of one kind or of all."""
        with self._lock:
            kept = [data for topic, data in self._kept if topic != "dead"]
        found = [decode(data) for data in kept]
        return [e for e in found if isinstance(e.message, kind)]

    def dead(self) -> list[bytes]:
        """Commands that could not be read, as they came."""
        with self._lock:
            return [data for topic, data in self._kept if topic == "dead"]

    def listen(self, deliver: Deliver, answered: Iterable[str] = ()) -> None:
        """See `Transport`."""
        with self._lock:
            self._deliver = deliver
            early, self._early = self._early, []
        for delivery in early:
            deliver(delivery)

    def publish(self, messages: Sequence[Outgoing]) -> None:
        """See `Transport`."""
        with self._lock:
            self._kept.extend((m.topic, m.data) for m in messages)

    def close(self) -> None:
        """See `Transport`. What is sent from now on is for who listens next."""
        with self._lock:
            self._deliver = None
