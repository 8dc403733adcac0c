"""A directory of checkpoints: complete steps, one writer at a time.

A step is written into a hidden folder, which is then renamed. So the directory never
shows a part of a step, even if the writer is killed. A step that is replaced is out of
the way for a moment; readers find it there.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from esper_jax.checkpoint import step_folder
from esper_jax.checkpoint.host_leaves import HostLeaf
from esper_jax.checkpoint.location import CheckpointError, words
from esper_jax.checkpoint.lock import FolderLock, in_use
from esper_jax.checkpoint.manifest import Damaged, Header
from esper_jax.checkpoint.retention import Retention

__all__ = ["CheckpointError", "StepDirectory", "by_age"]

_log = logging.getLogger(__name__)


_SAVING, _REMOVING, _REPLACED = ".saving-", ".removing-", ".replaced-"


def by_age(orders: Mapping[int, int | None]) -> list[int]:
    """Steps from the newest: the branch of the step saved last, then all others.

    The number of a step grows along a branch. So the step saved last, the one saved
    last before it with a smaller number, and so on, are its branch. Steps between with
    a larger number belong to a branch that was given up: a run went on from before
    them.

    Args:
      orders: in which each step was saved. Equal ones are told apart by their numbers.
        None if it cannot be read; the step then counts as saved with the latest of the
        steps with a smaller number.
    """
    known, latest = {}, 0
    for step in sorted(orders):
        order = orders[step]
        known[step] = latest if order is None else order
        latest = max(latest, known[step])
    branch: list[int] = []
    others: list[int] = []
    for step in sorted(known, key=lambda s: (known[s], s), reverse=True):
        (branch if not branch or step < branch[-1] else others).append(step)
    return branch + others


class StepDirectory:
    """The steps in a directory. Call `acquire` before writing or removing one.

    Args:
      path: absolute; made by `acquire`. Anything in it that is not named by a number is
        left alone.
      key: signs what is written. What is read must be signed with it.
    """

    def __init__(self, path: Path, key: bytes | None = None) -> None:
        self.path = path
        self.key = key
        self._lock = FolderLock(path)
        # What only the holder of the lock changes is read once.
        self._orders: dict[int, int | None] = {}
        self._metrics: dict[int, Mapping[str, float]] = {}
        self._checked: set[int] = set()  # steps whose contents have been checked

    def folder(self, step: int) -> Path:
        """The folder of a step, which may not exist."""
        final, old = self.path / str(step), self.path / f"{_REPLACED}{step}"
        # A writer is about to put the new one there, or was killed before it could.
        return old if not os.path.lexists(final) and old.is_dir() else final

    def steps(self) -> list[int]:
        """All steps, damaged ones included, by number.

        Raises:
          CheckpointError: if the directory cannot be read.
        """
        try:
            names = os.listdir(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be read: {error.strerror}"
            ) from None
        numbers = {name.removeprefix(_REPLACED) for name in names}
        return sorted(
            int(name) for name in numbers if name.isdecimal() and name == str(int(name))
        )

    def newest_first(self) -> list[int]:
        """All steps, damaged ones included, as `by_age` orders them.

        Raises:
          CheckpointError: if the directory cannot be read.
        """
        return by_age(self._known_orders())

    def acquire(self) -> None:
        """Locks the directory, and removes what an interrupted save has left.

        Raises:
          CheckpointError: if the directory is locked or cannot be written to.
        """
        if self._lock.held:
            self._lock.take()
            return
        probe = self.path / f"{_SAVING}probe-{os.getpid()}"
        try:
            _make(self.path)
            probe.mkdir()
            probe.rmdir()
            self._lock.take()
            self._clean_up()
        except OSError as error:
            raise self._cannot_write(error) from None
        for cache in (self._orders, self._metrics, self._checked):
            cache.clear()  # another object may have written since

    def release(self) -> None:
        """Unlocks the directory."""
        self._lock.release()

    def write(
        self, leaves: Mapping[str, HostLeaf], header: Header, *, last: bool = True
    ) -> None:
        """Adds a step, or replaces the one of the same number.

        Args:
          leaves: by name.
          header: what the manifest says of the step beside its leaves and files.
          last: it becomes the newest step. If not, it keeps the order in the header.

        Raises:
          CheckpointError: if that fails for any reason. Nothing has changed then.
        """
        try:
            if last:
                orders = self._known_orders().values()
                order = 1 + max((order or 0 for order in orders), default=0)
                header = dataclasses.replace(header, order=order)
            self._write(leaves, header)
        except Exception as error:
            raise self._cannot_save(header.step, error) from None

    def prune(self, retention: Retention, saved: int) -> None:
        """Removes sound steps that no rule keeps, but never the one just saved.

        Steps that a reader has open are left for the next time.

        Raises:
          CheckpointError: if the directory cannot be changed.
        """
        try:
            for step in self._doomed(retention, saved):
                folder = self.folder(step)
                if in_use(folder):
                    continue
                doomed = self.path / f"{_REMOVING}{step}"
                folder.rename(doomed)  # no reader sees it half removed
                _remove(doomed)
                self._forget(step)
        except OSError as error:
            raise CheckpointError(
                f"step {saved} is saved in {self.path}, but an older one cannot be "
                f"removed: {words(error)}; give permission"
            ) from None

    def _write(self, leaves: Mapping[str, HostLeaf], header: Header) -> None:
        step = header.step
        scratch = self.path / f"{_SAVING}{step}"
        try:
            _remove(scratch)  # another save may have failed to
            scratch.mkdir()
            manifest = step_folder.write(scratch, leaves, header)
            if self.key is not None:
                step_folder.sign(scratch, manifest, self.key)
        except BaseException:
            _remove(scratch)
            raise
        final, old = self.path / str(step), self.path / f"{_REPLACED}{step}"
        if os.path.lexists(final):
            _remove(old)
            final.rename(old)
        scratch.rename(final)
        self._lock.sync()
        _remove(old)
        self._orders[step], self._metrics[step] = header.order, header.metrics
        self._checked.add(step)

    def _known_orders(self) -> dict[int, int | None]:
        steps = self.steps()
        cache = self._orders if self._lock.held else {}
        for step in steps:
            if step not in cache:
                cache[step] = step_folder.order(self.folder(step), step)
        return {step: cache[step] for step in steps}

    def _doomed(self, retention: Retention, saved: int) -> Iterator[int]:
        """Sound steps to remove.

        Only steps that push others out for being newer or better are read to see if
        they are sound, and those that are pushed out.
        """
        if retention.keep_last is None:
            return
        metrics = {}
        for step in reversed(self.newest_first()):
            with contextlib.suppress(Damaged):
                metrics[step] = self._metrics_of(step) if retention.best else {}
        if retention.best and not any(retention.best[0] in m for m in metrics.values()):
            _log.warning(
                "%s: no step has the metric %r that Retention.best names, so none is "
                "removed",
                self.path,
                retention.best[0],
            )
            return
        while True:
            doomed = metrics.keys() - retention.keeps(metrics) - {saved}
            if not doomed:
                return
            rivals = retention.ranked(metrics) | doomed
            damaged = [step for step in sorted(rivals) if not self._is_sound(step)]
            if not damaged:
                break
            for step in damaged:
                del metrics[step]
        yield from sorted(doomed)

    def _metrics_of(self, step: int) -> Mapping[str, float]:
        if step not in self._metrics:
            manifest = step_folder.manifest_of(self.folder(step), step, self.key)
            self._metrics[step] = manifest.metrics
        return self._metrics[step]

    def _is_sound(self, step: int) -> bool:
        new = step not in self._checked
        try:
            step_folder.check(self.folder(step), step, contents=new, key=self.key)
        except Damaged:
            return False
        self._checked.add(step)
        return True

    def _forget(self, step: int) -> None:
        self._orders.pop(step, None)
        self._metrics.pop(step, None)
        self._checked.discard(step)

    def _clean_up(self) -> None:
        """Removes unfinished saves; puts back steps whose replacement failed."""
        for path in self.path.iterdir():
            if path.name.startswith(_REPLACED):
                final = self.path / path.name.removeprefix(_REPLACED)
                if not os.path.lexists(final):
                    path.rename(final)
                    continue
            if path.name.startswith((_SAVING, _REMOVING, _REPLACED)):
                _remove(path)

    def _cannot_write(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.path} cannot be written to: {words(error)}; make room or give "
            "permission, or save elsewhere"
        )

    def _cannot_save(self, step: int, error: BaseException) -> CheckpointError:
        return CheckpointError(
            f"step {step} could not be saved in {self.path}: {_reason(error)}; the "
            "steps there are unchanged. Make room or give permission, or save elsewhere"
        )


def _make(directory: Path) -> None:
    """Makes a directory with its parents, so that they outlast a loss of power."""
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in new:
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: BaseException) -> str:
    """Why a save failed: the system's message if Orbax's error contains one."""
    if isinstance(error, OSError):
        return words(error)
    text = str(error)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
        if os.strerror(code) in text:
            return os.strerror(code)
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"


def _remove(path: Path) -> None:
    """Removes a folder or file if possible; never raises."""
    if path.is_dir() and not path.is_symlink():
        # RecursionError: thousands of folders in one another, which no save makes.
        with contextlib.suppress(RecursionError):
            shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
