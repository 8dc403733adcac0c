"""Checkpoints that are whole, or found to be damaged: never silently wrong.

A `Checkpointer` holds one directory with a folder for each step, named by its number.
What is in a folder, and how it is checked, is in ``step_folder.py``; which steps are
kept, in ``retention.py``.
"""

import contextlib
import errno
import fcntl
import json
import logging
import operator
import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np

from esper_jax import step_folder
from esper_jax.host_leaves import HostLeaf, LeafError, flatten, nest, place, to_host
from esper_jax.migrations import CURRENT, MigrationError, migrate
from esper_jax.retention import Retention
from esper_jax.step_folder import Damaged, Manifest

__all__ = ["CheckpointError", "Checkpointer", "Restored", "Retention", "Verdict"]

_log = logging.getLogger(__name__)

_SAVING, _REMOVING, _REPLACED = ".saving-", ".removing-", ".replaced-"


class CheckpointError(ValueError):
    """A checkpoint that cannot be saved or restored; says what to do."""


class Restored(NamedTuple):
    """What `Checkpointer.restore` found."""

    state: Any
    step: int
    damaged: dict[int, str]
    """Newer steps that were passed over, and what is wrong with each."""
    manifest: Manifest


class Verdict(NamedTuple):
    """What `Checkpointer.verify` found."""

    step: int
    damage: str | None
    """What is wrong with it; None if it is sound."""
    manifest: Manifest | None
    """Of a sound step."""

    def __str__(self) -> str:
        if self.manifest is None:
            return f"step {self.step}: damaged: {self.damage}"
        return f"step {self.step}: sound (schema {self.manifest.schema})"


class Checkpointer:
    """Saves the state of a run in a directory, and restores the newest sound step.

    Any number may read a directory; one at a time writes to it. `save` takes it for
    this object until `close`; another one, in this or any other process, is refused
    until then.

    Args:
      directory: made by the first save. Anything in it that is not named by a number
        is left alone.
      retention: which steps are kept. What was saved last is always kept. Damaged
        steps count for nothing and are left where they are.

    Raises:
      CheckpointError: if several processes run this program.
    """

    def __init__(
        self, directory: Path | str, *, retention: Retention | None = None
    ) -> None:
        if jax.process_count() > 1:
            raise CheckpointError(
                "Checkpointer: expected a program of one process, got "
                f"{jax.process_count()}; gather the state and save it in one"
            )
        self.directory = Path(directory)
        self.retention = retention or Retention()
        self._lock: int | None = None
        self._saving: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._known: set[int] = set()  # steps whose contents were checked

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:  # which is what the caller must hear of
            with contextlib.suppress(CheckpointError):
                self.close()

    def steps(self) -> list[int]:
        """All steps in the directory, damaged ones included, oldest first."""
        try:
            names = [path.name for path in self.directory.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise CheckpointError(
                f"{self.directory} cannot be read: {error.strerror}"
            ) from None
        return sorted(
            int(name) for name in names if name.isdecimal() and name == str(int(name))
        )

    def save(
        self,
        step: int,
        state: Any,
        *,
        metrics: Mapping[str, float] | None = None,
        config: Any = None,
    ) -> None:
        """Starts to save a state, and returns as soon as it may be changed or donated.

        If the save before is not finished, waits for it first. A step is in the
        directory whole or not at all; one that was there under the same number is
        replaced. It has been read back and compared before it appears there.

        Args:
          step: number, at least 0.
          state: any tree of arrays, random keys and numbers.
          metrics: what was measured of it, for `Retention.best`.
          config: of the run, as JSON can hold it.

        Raises:
          CheckpointError: if the directory cannot be written to or is in use, if the
            state or config cannot be saved, or if the save before failed.
        """
        self.wait()
        step = operator.index(step)
        if step < 0:
            raise CheckpointError(f"step must be at least 0, got {step}")
        try:
            json.dumps(config)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"config must be JSON: {error}") from None
        self.acquire()
        content = {
            "schema": CURRENT,
            "step": step,
            "saved": time.time(),
            "metrics": {name: float(v) for name, v in (metrics or {}).items()},
            "config": config,
        }
        try:
            leaves = to_host(state)
        except LeafError as error:
            raise CheckpointError(f"step {step} cannot be saved: {error}") from None
        self._saving = threading.Thread(
            target=self._save, args=(leaves, content), name="esper-jax-save"
        )
        self._saving.start()

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          CheckpointError: if it failed. Said once.
        """
        if self._saving is not None:
            self._saving.join()
            self._saving = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Waits, and lets others write to the directory.

        Raises:
          CheckpointError: if the last save failed.
        """
        try:
            self.wait()
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def acquire(self) -> None:
        """Takes the directory for this object to write to; `save` does it by itself.

        Cleans up what a save that was cut off has left.

        Raises:
          CheckpointError: if it is in use or cannot be written to.
        """
        if self._lock is not None:
            return
        probe = self.directory / f"{_SAVING}probe-{os.getpid()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.mkdir()
            probe.rmdir()
            lock = os.open(self.directory, os.O_RDONLY)
        except OSError as error:
            raise self._cannot_write(error) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise CheckpointError(
                f"{self.directory} is being written to by another process or "
                "Checkpointer; wait until it has ended, or save elsewhere"
            ) from None
        except OSError as error:  # some network file systems
            _log.warning(
                "%s cannot be locked (%s): make sure that nothing else saves there",
                self.directory,
                error.strerror,
            )
        self._lock = lock
        try:
            self._clean_up()
        except OSError as error:
            raise self._cannot_write(error) from None

    def verify(self, step: int) -> Verdict:
        """Reads a step and compares every byte with what was saved."""
        self.wait()
        try:
            manifest, _ = step_folder.read(self._folder(step), step)
        except Damaged as damage:
            return Verdict(step, str(damage), None)
        return Verdict(step, None, manifest)

    def describe(self, step: int) -> str:
        """One line of what the manifest says of a step; its arrays are not read."""
        folder = self._folder(step)
        try:
            manifest = step_folder.check(folder, step, contents=False)
        except Damaged as damage:
            return str(Verdict(step, str(damage), None))
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.saved))
        size = sum(file.size for file in manifest.files.values())
        metrics = "".join(f", {k} {v:.6g}" for k, v in manifest.metrics.items())
        return f"step {step}: schema {manifest.schema}, {saved}, {size} bytes{metrics}"

    def restore(self, like: Any, *, step: int | None = None) -> Restored:
        """The newest sound step, or the given one, in the form of ``like``.

        A damaged step is named in the log, as a warning, and the next older one used.

        Args:
          like: a state of the same structure, shapes and dtypes, which says where each
            array goes. Not changed.
          step: restore this one or none.

        Raises:
          CheckpointError: if there is no sound step, naming what is wrong with each; or
            if the step does not fit ``like``, naming the leaves that do not; or if it
            was saved by a newer program.
        """
        self.wait()
        steps = self.steps()[::-1] if step is None else [step]
        damaged: dict[int, str] = {}
        for number in steps:
            try:
                manifest, leaves = step_folder.read(self._folder(number), number)
            except Damaged as damage:
                damaged[number] = str(damage)
                _log.warning(
                    "checkpoint %s is damaged: %s", self._folder(number), damage
                )
                continue
            if damaged:
                _log.warning("fell back to step %d of %s", number, self.directory)
            folder = self._folder(number)
            leaves, _ = _migrated(folder, manifest, leaves, like)
            try:
                state = place(leaves, like)
            except LeafError as error:
                raise CheckpointError(
                    f"{folder} does not fit the state to restore into: {error}. Use "
                    "the config that it was saved with"
                ) from None
            return Restored(state, number, damaged, manifest)
        if not damaged:
            raise CheckpointError(f"{self.directory} holds no checkpoint")
        reasons = "; ".join(f"step {n}: {why}" for n, why in damaged.items())
        raise CheckpointError(
            f"{self.directory} holds no sound checkpoint: {reasons}. Restore the "
            "directory from a copy, or start the run anew elsewhere"
        )

    def migrate(self, step: int) -> list[str]:
        """Replaces a sound step of an older schema by the same in today's.

        The old one is removed only when the new one has been read back.

        Returns:
          What was dropped or assumed; nothing if the step is of today's schema.

        Raises:
          CheckpointError: if the step is damaged or of a newer schema, or if it cannot
            be written.
        """
        self.wait()
        self.acquire()
        folder = self._folder(step)
        try:
            manifest, leaves = step_folder.read(folder, step)
        except Damaged as damage:
            raise CheckpointError(f"{folder} is damaged: {damage}") from None
        if manifest.schema == CURRENT:
            return []
        leaves, notes = _migrated(folder, manifest, leaves)
        content = {
            "schema": CURRENT,
            "step": step,
            "saved": manifest.saved,
            "metrics": manifest.metrics,
            "config": manifest.config,
        }
        try:
            self._write(leaves, content)
        except Exception as error:
            raise self._cannot_save(step, error) from None
        return notes

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _save(self, leaves: dict[str, HostLeaf], content: dict[str, Any]) -> None:
        """What a save does in the background."""
        step = content["step"]
        try:
            self._write(leaves, content)
            self._prune(step)
        except Exception as error:  # surfaces at the next call
            self._failure = self._cannot_save(step, error)

    def _write(self, leaves: dict[str, HostLeaf], content: dict[str, Any]) -> None:
        step = content["step"]
        scratch = self.directory / f"{_SAVING}{step}"
        try:
            scratch.mkdir()
            step_folder.write(scratch, leaves, **content)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        final, old = self._folder(step), self.directory / f"{_REPLACED}{step}"
        if final.exists() or final.is_symlink():
            final.rename(old)
        scratch.rename(final)
        assert self._lock is not None
        os.fsync(self._lock)
        _remove(old)
        self._known.add(step)

    def _prune(self, saved: int) -> None:
        """Removes the steps that no rule keeps."""
        sound: dict[int, dict[str, float]] = {}
        for step in self.steps():
            with contextlib.suppress(Damaged):
                new = step not in self._known
                manifest = step_folder.check(self._folder(step), step, contents=new)
                sound[step] = manifest.metrics
                self._known.add(step)
        for step in set(sound) - self.retention.keeps(sound) - {saved}:
            doomed = self.directory / f"{_REMOVING}{step}"
            self._folder(step).rename(doomed)  # at once gone for any reader
            _remove(doomed)
            self._known.discard(step)

    def _clean_up(self) -> None:
        """Removes what was cut off; puts back a step whose replacement was."""
        for path in self.directory.iterdir():
            if path.name.startswith(_REPLACED):
                final = self.directory / path.name.removeprefix(_REPLACED)
                if not final.exists():
                    path.rename(final)
                    continue
            if path.name.startswith((_SAVING, _REMOVING, _REPLACED)):
                _remove(path)

    def _cannot_write(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.directory} cannot be written to: {error.strerror}; give it room "
            "and permission, or save elsewhere"
        )

    def _cannot_save(self, step: int, error: BaseException) -> CheckpointError:
        return CheckpointError(
            f"step {step} could not be saved in {self.directory}: {_reason(error)}; "
            "what was there before is as it was. Give it room and permission, or save "
            "elsewhere"
        )


def _reason(error: BaseException) -> str:
    """Why a save failed; in the system's words where they are in Orbax's."""
    text = str(error)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
        if os.strerror(code) in text:
            return os.strerror(code)
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"


def _remove(path: Path) -> None:
    """Removes a folder or file, if it is there and can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _migrated(
    folder: Path, manifest: Manifest, leaves: dict[str, HostLeaf], like: Any = None
) -> tuple[dict[str, HostLeaf], list[str]]:
    """The leaves of a step in today's schema, and what was dropped or assumed.

    Args:
      folder: of the step.
      manifest: of the step.
      leaves: of the step.
      like: what it is restored into, whose layers say how many slots they have.
    """
    if manifest.schema == CURRENT:
        return leaves, []
    if manifest.schema > CURRENT:
        raise CheckpointError(
            f"{folder} is of schema {manifest.schema}, newer than {CURRENT}, the "
            "newest that this program knows: use the esper_jax that wrote it, or later"
        )
    slots = {name: np.shape(leaf) for name, (_, leaf) in flatten(like).items()}
    notes: list[str] = []

    def walk(branch: Any, path: tuple[str, ...]) -> Any:
        """``branch`` with the seeds of each layer in it migrated."""
        if not isinstance(branch, dict):
            return branch
        if "state_tensor" not in branch:
            return {key: walk(value, (*path, key)) for key, value in branch.items()}
        arrays = {key: leaf.array for key, leaf in branch.items()}
        (capacity,) = slots.get("/".join((*path, "seed_of_slot")), (None,))
        new, more = migrate(manifest.schema, arrays, capacity=capacity)
        notes.extend(more)
        return new

    try:
        tree = walk(nest(leaves), ())
    except MigrationError as error:
        raise CheckpointError(f"{folder} cannot be migrated: {error}") from None
    return to_host(tree), notes
