"""A directory of checkpoints: complete steps, one writer at a time.

A step is written into a hidden folder, which is then renamed. So the directory never
shows a part of a step, even if the writer is killed.
"""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from esper_jax.checkpoint import step_folder
from esper_jax.checkpoint.host_leaves import HostLeaf
from esper_jax.checkpoint.manifest import Damaged, Header
from esper_jax.checkpoint.retention import Retention

__all__ = ["CheckpointError", "StepDirectory"]

_log = logging.getLogger(__name__)


_SAVING, _REMOVING, _REPLACED = ".saving-", ".removing-", ".replaced-"


class CheckpointError(ValueError):
    """A checkpoint that cannot be saved or restored; says what to do."""


class StepDirectory:
    """The steps in a directory. Call `acquire` before writing or removing one.

    Args:
      path: made by `acquire`. Anything in it that is not named by a number is left
        alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None
        self._known: set[int] = set()  # steps whose contents have been checked

    def folder(self, step: int) -> Path:
        """The folder of a step, which may not exist."""
        return self.path / str(step)

    def steps(self) -> list[int]:
        """All steps, damaged ones included, oldest first.

        Raises:
          CheckpointError: if the directory cannot be read.
        """
        try:
            names = [path.name for path in self.path.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be read: {error.strerror}"
            ) from None
        return sorted(
            int(name) for name in names if name.isdecimal() and name == str(int(name))
        )

    def acquire(self) -> None:
        """Locks the directory, and removes what an interrupted save has left.

        Raises:
          CheckpointError: if the directory is locked or cannot be written to.
        """
        if self._lock is not None:
            return
        probe = self.path / f"{_SAVING}probe-{os.getpid()}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.mkdir()
            probe.rmdir()
            lock = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise self._cannot_write(error) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise CheckpointError(
                f"{self.path} is being written to by another process or "
                "Checkpointer; wait until it has ended, or save elsewhere"
            ) from None
        except OSError as error:  # some network file systems
            _log.warning(
                "%s cannot be locked (%s): make sure that nothing else saves there",
                self.path,
                error.strerror,
            )
        self._lock = lock
        try:
            self._clean_up()
        except OSError as error:
            raise self._cannot_write(error) from None

    def release(self) -> None:
        """Unlocks the directory."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write(self, leaves: Mapping[str, HostLeaf], header: Header) -> None:
        """Adds a step, or replaces the one of the same number.

        Args:
          leaves: by name.
          header: what the manifest says of the step beside its leaves and files.

        Raises:
          CheckpointError: if that fails for any reason. Nothing has changed then.
        """
        try:
            self._write(leaves, header)
        except Exception as error:
            raise self._cannot_save(header.step, error) from None

    def prune(self, retention: Retention, saved: int) -> None:
        """Removes sound steps that no rule keeps, but never the one just saved.

        Raises:
          CheckpointError: if the directory cannot be changed.
        """
        try:
            self._prune(retention, saved)
        except OSError as error:
            raise self._cannot_write(error) from None

    def _write(self, leaves: Mapping[str, HostLeaf], header: Header) -> None:
        step = header.step
        scratch = self.path / f"{_SAVING}{step}"
        try:
            scratch.mkdir()
            step_folder.write(scratch, leaves, header)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        final, old = self.folder(step), self.path / f"{_REPLACED}{step}"
        if final.exists() or final.is_symlink():
            final.rename(old)
        scratch.rename(final)
        assert self._lock is not None
        os.fsync(self._lock)
        _remove(old)
        self._known.add(step)

    def _prune(self, retention: Retention, saved: int) -> None:
        sound: dict[int, Mapping[str, float]] = {}
        for step in self.steps():
            with contextlib.suppress(Damaged):
                new = step not in self._known
                manifest = step_folder.check(self.folder(step), step, contents=new)
                sound[step] = manifest.metrics
                self._known.add(step)
        for step in set(sound) - retention.keeps(sound) - {saved}:
            doomed = self.path / f"{_REMOVING}{step}"
            self.folder(step).rename(doomed)  # no reader sees it half removed
            _remove(doomed)
            self._known.discard(step)

    def _clean_up(self) -> None:
        """Removes unfinished saves; puts back steps whose replacement failed."""
        for path in self.path.iterdir():
            if path.name.startswith(_REPLACED):
                final = self.path / path.name.removeprefix(_REPLACED)
                if not final.exists():
                    path.rename(final)
                    continue
            if path.name.startswith((_SAVING, _REMOVING, _REPLACED)):
                _remove(path)

    def _cannot_write(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.path} cannot be written to: {error.strerror}; make room or give "
            "permission, or save elsewhere"
        )

    def _cannot_save(self, step: int, error: BaseException) -> CheckpointError:
        return CheckpointError(
            f"step {step} could not be saved in {self.path}: {_reason(error)}; the "
            "steps there are unchanged. Make room or give permission, or save elsewhere"
        )


def _reason(error: BaseException) -> str:
    """Why a save failed: the system's message if Orbax's error contains one."""
    text = str(error)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
        if os.strerror(code) in text:
            return os.strerror(code)
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"


def _remove(path: Path) -> None:
    """Removes a folder or file if possible; never raises."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
