"""The lock of a directory: one object of one process writes at a time.

It is a ``flock``, which the system takes back when the process ends. It is also given
back when the object is collected, and a forked child does not keep it.
"""

import contextlib
import fcntl
import gc
import logging
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

from esper_jax.checkpoint.background import settle
from esper_jax.checkpoint.location import CheckpointError

__all__ = ["FolderLock", "in_use", "shared"]

_log = logging.getLogger(__name__)


class FolderLock:
    """The lock of one folder, held or not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        _locks.add(self)

    def __del__(self) -> None:
        try:
            self.release()
        except TypeError:  # the interpreter ends, and has taken functions away
            return

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def take(self) -> None:
        """Locks the folder, which must exist.

        Raises:
          CheckpointError: if another process or object holds it, or if another folder
            has come to this path since it was locked.
          OSError: if the folder cannot be opened.
        """
        if self._descriptor is not None:
            if not _is_at(self._descriptor, self.path):
                raise CheckpointError(
                    f"{self.path} was moved or removed since this Checkpointer locked "
                    "it: put it back, or close() and save elsewhere"
                )
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            self._lock(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def release(self) -> None:
        """Unlocks the folder, for children forked while it was locked, too."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def sync(self) -> None:
        """Flushes the names in the folder to disk."""
        assert self._descriptor is not None
        os.fsync(self._descriptor)

    def forget(self) -> None:
        """In a forked child: leaves the lock to the parent."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        for last in (False, True):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                own = any(
                    lock._descriptor is not None and _is_at(lock._descriptor, self.path)
                    for lock in list(_locks)
                )
                if own and not last:
                    gc.collect()  # it may be garbage in a cycle,
                    settle()  # or kept by a last save that goes on
                    continue
                hint = " (one of this process: close() it)" if own else ""
                raise CheckpointError(
                    f"{self.path} is being written to by another process or "
                    f"Checkpointer{hint}; wait until it has ended, or save elsewhere"
                ) from None
            except OSError as error:  # some network file systems
                _log.warning(
                    "%s cannot be locked (%s): make sure that nothing else saves there",
                    self.path,
                    error.strerror,
                )
                return


_locks: "weakref.WeakSet[FolderLock]" = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_locks):
        lock.forget()


os.register_at_fork(after_in_child=_forget_all)


@contextlib.contextmanager
def shared(folder: Path) -> Iterator[int]:
    """Keeps a folder from being removed by a `FolderLock`'s holder; see `in_use`.

    Yields:
      A descriptor of the folder.

    Raises:
      OSError: if it is not a folder, or gone.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    descriptor = os.open(folder, flags)
    try:
        with contextlib.suppress(OSError):  # being removed, or there are no locks
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield descriptor
    finally:
        os.close(descriptor)


def in_use(folder: Path) -> bool:
    """Whether somebody reads the folder at this moment (`shared`)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether a path leads to the file of a descriptor."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False
