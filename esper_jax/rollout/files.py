"""Changing a small text file: one writer at a time, the whole file or nothing."""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from esper_jax.rollout.flags import FlagError

__all__ = ["locked", "replace_text", "sync_folder"]

_log = logging.getLogger(__name__)

PATIENCE = 30.0
"""Seconds to wait for another writer, who takes milliseconds."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other writers of a file waiting.

    The lock is on the file's folder, since the file itself is replaced. The system
    takes it back when the process ends.

    Raises:
      FlagError: if the folder is not there, or another writer holds it for long.
    """
    folder = path.resolve().parent
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise FlagError(f"{path}: {folder}: {error.strerror}") from None
    try:
        _lock(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                raise FlagError(
                    f"{path}: another process has been writing in its folder for "
                    f"{PATIENCE:g} seconds; end that one, and try again"
                ) from None
            time.sleep(0.01)
        except OSError as error:  # some network file systems
            _log.warning(
                "%s cannot be locked (%s): make sure that nothing else changes it",
                path,
                error.strerror,
            )
            return


def replace_text(path: Path, text: str) -> None:
    """Replaces a file, or what a link leads to, as a whole or not at all.

    Its permissions stay. Call it within `locked`.

    Raises:
      FlagError: if that fails; the file is unchanged then.
    """
    target = path.resolve()
    scratch = target.with_name(f".{target.name}.tmp")
    try:
        with scratch.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fchmod(file.fileno(), target.stat().st_mode & 0o7777)
            os.fsync(file.fileno())
        scratch.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise FlagError(
            f"{path}: cannot be written: {error.strerror}; make room or give permission"
        ) from None


def sync_folder(folder: Path) -> None:
    """Returns when the names in a folder are on the disk.

    Raises:
      OSError: if that fails.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
