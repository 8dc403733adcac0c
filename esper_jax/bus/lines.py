"""The transport of files and pipes: one message a line, in a folder.

    out.jsonl    what the run says
    in.jsonl     commands to it
    dead.jsonl   commands that could not be read

``out.jsonl`` and ``in.jsonl`` may be named pipes. How far ``in.jsonl`` is answered
stands in ``in.settled``.
"""

import contextlib
import io
import logging
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from esper_jax.bus.envelope import MOST_BYTES
from esper_jax.bus.transport import Deliver, Delivery, Outgoing, TransportError
from esper_jax.monitor.writers import append_whole, ends_within_a_line

__all__ = ["Lines", "LinesClient", "Splitter", "Tail"]

_log = logging.getLogger(__name__)

_PAUSE = 0.05
"""Seconds between looks at a file."""

_CHUNK = 1 << 20


class Splitter:
    """Bytes as lines, each with where it ends. Empty ones are passed over.

    Args:
      most: bytes of a line; one that is longer is given cut, once. None for any number.
      offset: of the first byte.
    """

    def __init__(self, most: int | None, offset: int = 0) -> None:
        self.offset = offset  # of what comes next
        self._most = most
        self._rest = b""
        self._skips = False

    def feed(self, data: bytes) -> Iterator[tuple[bytes, int]]:
        """The lines that end in some more bytes."""
        start = self.offset - len(self._rest)
        self.offset += len(data)
        whole, end, self._rest = (self._rest + data).rpartition(b"\n")
        for line in whole.split(b"\n") if end else []:
            start += len(line) + 1
            if not self._skips and line.strip():
                yield line, start
            self._skips = False
        if self._most is not None and len(self._rest) > self._most:
            if not self._skips:
                yield self._rest, self.offset
            self._skips, self._rest = True, b""


class Tail:
    """The lines of a file or a named pipe, as they come; each with where it ends.

    Args:
      path: of the file, which need not be there yet.
      offset: where to begin. A file that is shorter was made anew, and is read from its
        beginning.
      most: bytes of a line, beyond which it is cut; None for any number.
    """

    def __init__(
        self, path: Path, offset: int = 0, most: int | None = MOST_BYTES
    ) -> None:
        self._path, self._most = path, most
        self._lines = Splitter(most, offset)
        self._pipe: int | None = None

    def read(self) -> Iterator[tuple[bytes, int]]:
        """What has come since the last time.

        Raises:
          OSError: if the file cannot be read.
        """
        while data := self._more():
            yield from self._lines.feed(data)

    def close(self) -> None:
        """Lets go of the pipe."""
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None

    def _more(self) -> bytes:
        if self._pipe is None:
            try:
                found = self._path.stat()
            except FileNotFoundError:
                return b""
            if stat.S_ISFIFO(found.st_mode):
                self._pipe = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
            elif found.st_size < self._lines.offset:
                self._lines = Splitter(self._most)
        if self._pipe is not None:
            try:
                return os.read(self._pipe, _CHUNK)
            except BlockingIOError:
                return b""
        with self._path.open("rb") as file:
            file.seek(self._lines.offset)
            return file.read(_CHUNK)


class Lines:
    """A run's end of the folder.

    Args:
      folder: made if it is not there.

    Raises:
      OSError: if it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._files: dict[str, io.RawIOBase] = {}
        self._settled = folder / "in.settled"
        self._done = self._read_settled()
        self._ahead: set[int] = set()  # settled, with others before that are not
        self._given: list[int] = []
        self._answered: frozenset[str] = frozenset()
        self._lock = threading.Lock()
        self._open, self._told = True, False

    def listen(self, deliver: Deliver, answered: Iterable[str] = ()) -> None:
        """See `Transport`. What is there already is handed on before this returns."""
        self._answered = frozenset(answered)
        tail = Tail(self._folder / "in.jsonl", self._done)
        self._hand_on(tail, deliver)
        self._settle([])  # what was sent meanwhile
        threading.Thread(
            target=self._run,
            args=(tail, deliver),
            name="esper-jax-commands",
            daemon=True,
        ).start()

    def publish(self, messages: Sequence[Outgoing]) -> None:
        """See `Transport`. A batch is appended whole, or not at all."""
        try:
            self._append("dead.jsonl", [m.data for m in messages if m.topic == "dead"])
        except TransportError as error:  # no answer waits for it
            if not self._told:
                _log.warning("%s: what cannot be read is not kept there", error)
            self._told = True
        self._append("out.jsonl", [m.data for m in messages if m.topic != "dead"])
        # Another bus may have given the tokens of what a run before could not send.
        tokens = [token for m in messages for token in m.settles]
        self._settle([int(token) for token in tokens if token.isdecimal()])

    def _append(self, name: str, lines: Sequence[bytes]) -> None:
        if not lines:
            return
        try:
            append_whole(self._file(name), b"".join(data + b"\n" for data in lines))
        except OSError as error:
            self._let_go(name)
            raise TransportError(
                f"{self._folder / name} cannot be written: {error.strerror}"
            ) from None

    def close(self) -> None:
        """See `Transport`."""
        self._open = False
        for name in [*self._files]:
            self._let_go(name)

    def _let_go(self, name: str) -> None:
        file = self._files.pop(name, None)
        with contextlib.suppress(OSError):
            if file is not None:
                file.close()

    def _file(self, name: str) -> io.RawIOBase:
        if name not in self._files:
            path = self._folder / name
            pipe = path.is_fifo()
            flags = os.O_NONBLOCK | os.O_WRONLY if pipe else os.O_RDWR | os.O_CREAT
            number = os.open(path, flags | os.O_APPEND, 0o666)
            os.set_blocking(number, True)
            file = os.fdopen(number, "wb" if pipe else "ab+", buffering=0)
            if not pipe and ends_within_a_line(file):  # a process was killed
                append_whole(file, b"\n")
            self._files[name] = file
        return self._files[name]

    def _run(self, tail: Tail, deliver: Deliver) -> None:
        while self._open:
            self._hand_on(tail, deliver)
            time.sleep(_PAUSE)
        tail.close()

    def _hand_on(self, tail: Tail, deliver: Deliver) -> None:
        with contextlib.suppress(OSError):  # it is looked at again
            for line, end in tail.read():
                with self._lock:
                    self._given.append(end)
                if str(end) not in self._answered:
                    deliver(Delivery(line, str(end)))

    def _read_settled(self) -> int:
        try:
            return max(0, int(self._settled.read_text()))
        except (OSError, ValueError):
            return 0

    def _settle(self, ends: Sequence[int]) -> None:
        """Moves the mark to where everything before is answered."""
        with self._lock:
            self._ahead.update(ends)
            before = self._done
            while self._given and self._given[0] in self._ahead:
                self._done = self._given.pop(0)
                self._ahead.discard(self._done)
            if self._done == before:
                return
        scratch = self._settled.with_name("in.settled.tmp")
        with contextlib.suppress(OSError):  # else commands come again, and are known
            scratch.write_text(f"{self._done}\n")
            scratch.replace(self._settled)


class LinesClient:
    """Another program's end of the folder: sends commands and reads what is said.

    Args:
      folder: of the run's bus.
      last: how many messages to begin with, the newest; None for all.

    Raises:
      TransportError: if there is no such folder.
    """

    def __init__(self, folder: Path, last: int | None = 0) -> None:
        self._folder = folder
        if not folder.is_dir():
            raise TransportError(f"there is no folder {folder}")
        out, start = folder / "out.jsonl", 0
        if out.is_file() and last is not None:
            with out.open("rb") as file:
                recent = deque((0, *map(len, file)), maxlen=last)
                start = file.tell() - sum(recent)
        self._tail = Tail(out, start, most=None)

    def send(self, data: bytes) -> None:
        """Sends a command.

        Raises:
          TransportError: if it cannot be written.
        """
        path = self._folder / "in.jsonl"
        pipe = path.is_fifo()
        flags = os.O_NONBLOCK | os.O_WRONLY if pipe else os.O_WRONLY | os.O_CREAT
        try:
            number = os.open(path, flags | os.O_APPEND, 0o666)
            with os.fdopen(number, "wb", buffering=0) as file:
                append_whole(file, data + b"\n")
        except OSError as error:
            raise TransportError(
                f"{path} cannot be written: {error.strerror}"
            ) from None

    def receive(self, patience: float) -> list[bytes]:
        """What the run has said since the last time; waits for it some seconds.

        Raises:
          TransportError: if it cannot be read.
        """
        until = time.monotonic() + patience
        while True:
            try:
                found = [line for line, _ in self._tail.read()]
            except OSError as error:
                raise TransportError(f"{self._folder}: {error.strerror}") from None
            if found or time.monotonic() >= until:
                return found
            time.sleep(min(_PAUSE, patience))

    def close(self) -> None:
        """Lets go of the files."""
        self._tail.close()
