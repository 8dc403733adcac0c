"""A journal: entries that are only ever appended, and outlive a crash at any byte.

One JSON object a line, numbered from 0, with a checksum. `Journal.append` returns when
the entry is on the disk. What a crash leaves of the entry in hand, if anything, is the
last line: it was never acted upon, and is cut off when the journal is next opened.
"""

import fcntl
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esper_jax.rollout.canary.plan import CanaryError
from esper_jax.rollout.files import sync_folder

__all__ = ["Journal", "read_journal"]


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The entries of a journal, without a last one that was cut off.

    Raises:
      CanaryError: if it cannot be read, or is damaged elsewhere.
    """
    try:
        return _parsed(path, path.read_bytes())[0]
    except OSError as error:
        raise CanaryError(f"{path}: cannot be read: {error.strerror}") from None


def _parsed(path: Path, data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The entries, and how many bytes they take."""
    entries: list[dict[str, Any]] = []
    size = 0
    *lines, _ = data.split(b"\n")
    for number, line in enumerate(lines):
        entry = _entry(line, number)
        if entry is None:
            if size + len(line) + 1 == len(data):
                break  # the power failed before all of it was on the disk
            raise CanaryError(
                f"{path}: line {number + 1} is damaged: put the journal back from a "
                "copy, or set the flag by hand and start another canary"
            )
        entries.append(entry)
        size += len(line) + 1
    return entries, size


def _line(entry: Mapping[str, Any]) -> bytes:
    """An entry as it stands in the file; the checksum is of all that is before it."""
    text = json.dumps(entry)[:-1]
    return f'{text}, "sum": {zlib.crc32(text.encode())}}}\n'.encode()


def _entry(line: bytes, number: int) -> dict[str, Any] | None:
    """What a line says; None if it is damaged."""
    text, _, rest = line.rpartition(b', "sum": ')
    if rest != b"%d}" % zlib.crc32(text):
        return None
    entry: dict[str, Any] = json.loads(text + b"}")
    return entry if entry.get("entry") == number else None


class Journal:
    """A journal that is held open for appending, by one process at a time.

    Args:
      path: of the file; its folder must be there.

    Attributes:
      entries: oldest first.

    Raises:
      CanaryError: if another process holds it, it is damaged, or cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            new = not path.exists()
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._file = os.open(path, flags, 0o666)
        except OSError as error:
            raise CanaryError(f"{path}: cannot be opened: {error.strerror}") from None
        try:
            self._lock()
            if new:
                sync_folder(path.parent)
            self.entries, size = _parsed(path, path.read_bytes())
            os.ftruncate(self._file, size)
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CanaryError(
                f"{self.path}: another process is at work on this canary; wait until "
                "it has ended"
            ) from None

    def append(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Appends an entry; returns it when it is on the disk.

        Raises:
          CanaryError: if that fails; the journal is as before then.
        """
        entry = {"entry": len(self.entries), "kind": kind, **fields}
        data = _line(entry)
        end = os.fstat(self._file).st_size
        try:
            if os.write(self._file, data) != len(data):
                raise OSError(0, "the disk is full")
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, end)
            raise CanaryError(
                f"{self.path}: cannot be written: {error.strerror}; make room, then "
                "go on"
            ) from None
        self.entries.append(entry)
        return entry

    def close(self) -> None:
        """Lets others write."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
