"""Checkpoints that are whole, or found to be damaged: never silently wrong.

A `Checkpointer` holds one directory with a folder for each step, named by its number.
How it is written to is in ``step_directory.py``; what is in a folder, and how it is
checked, in ``step_folder.py``; which steps are kept, in ``retention.py``; how saved
arrays follow another capacity, in ``resizing.py``.
"""

import contextlib
import json
import logging
import operator
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax

from esper_jax.checkpoint import step_folder
from esper_jax.checkpoint.host_leaves import (
    HostLeaf,
    LeafError,
    check_equal_in_all,
    place,
    to_host,
)
from esper_jax.checkpoint.manifest import Damaged, Header, Manifest
from esper_jax.checkpoint.newest import agreed
from esper_jax.checkpoint.resizing import resized
from esper_jax.checkpoint.retention import Retention
from esper_jax.checkpoint.step_directory import CheckpointError, StepDirectory
from esper_jax.checkpoint.upgrading import upgraded
from esper_jax.migrations.chain import CURRENT
from esper_jax.migrations.schema import MigrationError
from esper_jax.parallel.processes import together

__all__ = ["Checkpointer", "Restored", "Verdict"]

_log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """What `Checkpointer.restore` found."""

    state: Any
    step: int
    damaged: dict[int, str]
    """Newer steps that were passed over, and what is wrong with each."""
    manifest: Manifest
    resized: dict[str, tuple[int, int]]
    """Capacity as saved and as restored, of each layer where they differ."""


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
    this object until `close`; another one, in this or any other program, is refused
    until then.

    In a program of several processes (`jax.distributed`) each makes one, on a directory
    that all of them see, and all call the same methods in the same order; `steps` and
    `describe` alone may be called by some. Process 0 writes, checks and holds the lock,
    in the background as ever; the others wait for it where they would for a save of
    their own. What fails in one process is raised in all. Leaves that are spread over
    processes are gathered by `save`; those that each process has for itself must be
    equal in all.

    Args:
      directory: made by the first save. Anything in it that is not named by a number
        is left alone.
      retention: which steps are kept. What was saved last is always kept. Damaged
        steps count for nothing and are left where they are.
    """

    def __init__(
        self, directory: Path | str, *, retention: Retention | None = None
    ) -> None:
        self.retention = retention or Retention()
        self._steps = StepDirectory(Path(directory))
        self._writes = jax.process_index() == 0
        self._pending = False  # the same in all processes
        self._saving: threading.Thread | None = None
        self._failure: Exception | None = None

    @property
    def directory(self) -> Path:
        """Where the steps are."""
        return self._steps.path

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
        else:  # which is what the caller must hear of, and may be of one process alone
            self._pending = False
            with contextlib.suppress(Exception):
                self._join()
            self._steps.release()

    def steps(self) -> list[int]:
        """All steps in the directory, damaged ones included, oldest first.

        Raises:
          CheckpointError: if it cannot be read.
        """
        return self._steps.steps()

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
          state: any tree of arrays, random keys and numbers, however they are sharded.
          metrics: what was measured of it, for `Retention.best`.
          config: of the run, as JSON can hold it.

        Raises:
          CheckpointError: if the directory cannot be written to or is in use, if the
            state or config cannot be saved, or if the save before failed.
        """
        self.wait()
        header = together(
            lambda: self._prepared(step, metrics or {}, config), CheckpointError
        )
        try:
            check_equal_in_all(state)
            leaves = to_host(state)
        except LeafError as error:
            raise CheckpointError(f"step {step} cannot be saved: {error}") from None
        self._pending = True
        if self._writes:
            self._saving = threading.Thread(
                target=self._save, args=(leaves, header), name="esper-jax-save"
            )
            self._saving.start()

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          CheckpointError: if it failed. Said once.
        """
        if self._pending:
            self._pending = False
            together(self._join, CheckpointError)

    def close(self) -> None:
        """Waits, and lets others write to the directory.

        Raises:
          CheckpointError: if the last save failed.
        """
        try:
            self.wait()
        finally:
            self._steps.release()

    def acquire(self) -> None:
        """Takes the directory for this object to write to; `save` does it by itself.

        Cleans up what a save that was cut off has left.

        Raises:
          CheckpointError: if it is in use or cannot be written to.
        """
        together(self._acquire, CheckpointError)

    def verify(self, step: int) -> Verdict:
        """Reads a step and compares every byte with what was saved."""
        self.wait()
        try:
            manifest, _ = step_folder.read(self._steps.folder(step), step)
        except Damaged as damage:
            return Verdict(step, str(damage), None)
        return Verdict(step, None, manifest)

    def describe(self, step: int) -> str:
        """One line of what the manifest says of a step; its arrays are not read."""
        folder = self._steps.folder(step)
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
        With several processes it is the newest that is sound for process 0.

        Where ``like`` is or holds a `TrainState` whose layers have another capacity
        than was saved, they get it as `functional.grow_capacity` would give it to them;
        new slots are as ``like`` has them.

        Args:
          like: a state of the same structure, shapes (but for the capacity) and dtypes,
            which says where each array goes: on whichever devices and in whichever
            sharding it was when it was saved. Not changed.
          step: restore this one or none.

        Raises:
          CheckpointError: if there is no sound step, naming what is wrong with each; or
            if the step does not fit ``like``, naming the leaves that do not, or the
            layer that would lose a living seed; or if it was saved by a newer program.
        """
        self.wait()
        found = agreed(self._steps, step)
        folder = self._steps.folder(found.step)

        def fitted() -> Restored:
            leaves, notes = _upgraded(folder, found.manifest, found.leaves, like)
            for note in notes:
                _log.warning("%s: %s", folder, note)
            try:
                leaves, changed = resized(leaves, like)
                state = place(leaves, like)
            except LeafError as error:
                raise CheckpointError(
                    f"{folder} does not fit the state to restore into: {error}. Use "
                    "the config that it was saved with"
                ) from None
            return Restored(state, found.step, found.damaged, found.manifest, changed)

        return together(fitted, CheckpointError)

    def migrate(self, step: int) -> list[str]:
        """Replaces a sound step of an older schema by the same in today's.

        The old one is removed only when the new one has been read back.

        Returns:
          What was dropped or assumed; nothing if the step is of today's schema.

        Raises:
          CheckpointError: if the step is damaged or of a newer schema, if it cannot be
            written, or if the program has several processes.
        """
        if jax.process_count() > 1:
            raise CheckpointError(
                "migrate: expected a program of one process, got "
                f"{jax.process_count()}; use esper-jax checkpoint migrate"
            )
        self.wait()
        self.acquire()
        folder = self._steps.folder(step)
        try:
            manifest, leaves = step_folder.read(folder, step)
        except Damaged as damage:
            raise CheckpointError(f"{folder} is damaged: {damage}") from None
        leaves, notes = _upgraded(folder, manifest, leaves)
        if manifest.schema < CURRENT or notes:
            header = Header(
                schema=CURRENT,
                step=step,
                saved=manifest.saved,
                metrics=manifest.metrics,
                config=manifest.config,
            )
            self._steps.write(leaves, header)
        return notes

    def _prepared(self, step: int, metrics: Mapping[str, float], config: Any) -> Header:
        """What is saved beside the state, once this object holds the directory."""
        step = operator.index(step)
        if step < 0:
            raise CheckpointError(f"step must be at least 0, got {step}")
        try:
            json.dumps(config)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"config must be JSON: {error}") from None
        self._acquire()
        return Header(
            schema=CURRENT,
            step=step,
            saved=time.time(),
            metrics={name: float(v) for name, v in metrics.items()},
            config=config,
        )

    def _acquire(self) -> None:
        if self._writes:
            self._steps.acquire()

    def _save(self, leaves: dict[str, HostLeaf], header: Header) -> None:
        """What a save does in the background."""
        try:
            self._steps.write(leaves, header)
            self._steps.prune(self.retention, header.step)
        except Exception as error:  # surfaces at the next call
            self._failure = error

    def _join(self) -> None:
        if self._saving is not None:
            self._saving.join()
            self._saving = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def _upgraded(
    folder: Path, manifest: Manifest, leaves: dict[str, HostLeaf], like: Any = None
) -> tuple[dict[str, HostLeaf], list[str]]:
    """`upgraded`, with errors that name the folder of the step."""
    if manifest.schema > CURRENT:
        raise CheckpointError(
            f"{folder} is of schema {manifest.schema}, newer than {CURRENT}, the "
            "newest that this program knows: use the esper_jax that wrote it, or later"
        )
    try:
        return upgraded(manifest, leaves, like)
    except MigrationError as error:
        raise CheckpointError(f"{folder} cannot be migrated: {error}") from None
