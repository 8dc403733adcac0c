"""A queue that continues in a file, for messages that must not be lost."""

import contextlib
import json
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from esper_jax.bus.transport import TOPICS, Outgoing
from esper_jax.monitor.writers import append_whole, ends_within_a_line

__all__ = ["Spill"]


class Spill:
    """First in, first out: in a file, and in memory behind what the disk takes.

    Begins with what an earlier process has left in the file. Not safe for threads.

    Args:
      path: of the file, which is there only while something is in it; None for memory
        alone.

    Attributes:
      lost: messages that others have taken out of the file, or damaged.

    Raises:
      OSError: if the file cannot be read.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self.lost = path, 0
        self._ends: list[int] = []  # of the messages that were peeked at
        self._read = 0  # bytes of the file that are done
        self._tail: deque[Outgoing] = deque()
        self._in_file = 0
        if path is not None and path.is_file():
            self._in_file = -1  # not known
            self._in_file = len(self._peek_file(None))
            if self._in_file:
                with path.open("a+b", buffering=0) as file:
                    if ends_within_a_line(file):  # a process was killed
                        append_whole(file, b"\n")
            else:
                self._clear()

    def __len__(self) -> int:
        return self._in_file + len(self._tail)

    def add(self, message: Outgoing) -> None:
        """Adds a message at the end."""
        if self._path is not None and not self._tail:
            try:
                with self._path.open("ab", buffering=0) as file:
                    append_whole(file, _line(message))
            except OSError:  # the disk is full, or the folder is gone
                pass
            else:
                self._in_file += 1
                return
        self._tail.append(message)

    @property
    def settles(self) -> set[str]:
        """Tokens that are settled when all of this is sent.

        Raises:
          OSError: if the file cannot be read.
        """
        messages = [*(m for m, _ in self._peek_file(None)), *self._tail]
        return {token for message in messages for token in message.settles}

    def peek(self, most: int) -> list[Outgoing]:
        """The first messages.

        Raises:
          OSError: if the file cannot be read.
        """
        lines = self._peek_file(most)
        gone = min(most, self._in_file) - len(lines)
        if gone > 0:  # nothing comes behind these
            self.lost += self._in_file - len(lines)
            self._in_file = len(lines)
            if not lines:
                self._clear()
        self._ends = [end for _, end in lines]
        return [*(message for message, _ in lines), *self._tail][:most]

    def drop(self, count: int) -> None:
        """Takes away the first messages, which were peeked at."""
        done = self._ends[:count]
        if done:
            self._read = done[-1]
            self._in_file -= len(done)
            self._ends = self._ends[len(done) :]
        for _ in range(count - len(done)):
            self._tail.popleft()
        if not self._in_file and self._read:
            self._clear()

    def keep(self, first: Sequence[Outgoing]) -> int:
        """Leaves everything in the file for the next process.

        Args:
          first: what comes before it.

        Returns:
          How many messages could not be written, and are lost.
        """
        if not (first or self._tail):
            return self.lost
        if self._path is None:
            return len(first) + len(self._tail)
        scratch = self._path.with_name(self._path.name + ".tmp")
        try:
            left = self.peek(self._in_file)[: self._in_file]
            with scratch.open("wb") as file:
                file.writelines(map(_line, [*first, *left, *self._tail]))
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)
            return self.lost + len(first) + len(self._tail)
        return self.lost

    def _clear(self) -> None:
        assert self._path is not None
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
            self._read = 0
            self._ends = []

    def _peek_file(self, most: int | None) -> list[tuple[Outgoing, int]]:
        """Messages of the file that are not done, and where each ends.

        Half a line, which a process that was killed may leave, is passed over.
        """
        found: list[tuple[Outgoing, int]] = []
        if self._path is None or most == 0 or not self._in_file:
            return found
        try:
            with self._path.open("rb") as file:
                end = file.seek(self._read)
                for line in file:
                    end += len(line)
                    message = _message(line)
                    if message is not None:
                        found.append((message, end))
                        if len(found) == most:
                            break
        except FileNotFoundError:
            pass
        return found


def _line(message: Outgoing) -> bytes:
    entry = {
        "epoch": message.epoch,
        "number": message.number,
        "topic": message.topic,
        "data": message.data.decode(errors="surrogateescape"),
        "settles": message.settles,
    }
    return json.dumps(entry).encode() + b"\n"


def _message(line: bytes) -> Outgoing | None:
    try:
        entry = json.loads(line)
        if entry["topic"] not in TOPICS:
            return None
        return Outgoing(
            epoch=str(entry["epoch"]),
            number=int(entry["number"]),
            topic=entry["topic"],
            data=entry["data"].encode(errors="surrogateescape"),
            settles=tuple(map(str, entry["settles"])),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
