"""`Checkpointer`: saves the state of a run in the background and restores it.

A directory holds one folder a step, named by its number. ``step_directory.py`` adds and
removes folders, ``step_folder.py`` writes and checks one, ``newest.py`` chooses the
step to restore, ``upgrading.py`` brings its leaves to today's schema, ``resizing.py``
to another capacity, and ``retention.py`` says which steps stay.
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
from esper_jax.checkpoint.position import (
    PositionError,
    go_to,
    has_position,
    position_of,
)
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
    """Newer steps that were skipped, and what is wrong with each."""
    manifest: Manifest
    resized: dict[str, tuple[int, int]]
    """Capacity as saved and as restored, for each layer where they differ."""


class Verdict(NamedTuple):
    """What `Checkpointer.verify` found."""

    step: int
    damage: str | None
    """What is wrong with the step; None if it is sound."""
    manifest: Manifest | None
    """None if the step is damaged."""

    def __str__(self) -> str:
        if self.manifest is None:
            return f"step {self.step}: damaged: {self.damage}"
        return f"step {self.step}: sound (schema {self.manifest.schema})"


class Checkpointer:
    """Saves the state of a run in a directory, and restores the newest sound step.

    Any number of objects may read a directory; one at a time may write to it. The first
    `save` locks the directory for this object until `close`. Another `Checkpointer`, in
    this or any other program, cannot save there until then.

    With several processes (`jax.distributed`) each process makes a `Checkpointer` on a
    directory that all of them see, and all call the same methods in the same order;
    only `steps` and `describe` may be called by some. Process 0 holds the lock and
    writes in the background. The other processes wait for it where they would wait for
    a save of their own. An error in one process is raised in all. `save` gathers leaves
    that are spread over processes; leaves that each process holds for itself must be
    equal in all.

    Args:
      directory: made by the first save. Anything in it that is not named by a number
        is left alone.
      retention: which steps to keep. The step saved last is always kept. Damaged steps
        do not count, and are never removed.
    """

    def __init__(
        self, directory: Path | str, *, retention: Retention | None = None
    ) -> None:
        self.retention = retention or Retention()
        self._steps = StepDirectory(Path(directory))
        self._writes = jax.process_index() == 0
        self._pending = False  # the same in all processes
        self._warned = False
        self._saving: threading.Thread | None = None
        self._saved = threading.Event()
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
        else:  # the caller's error matters more, and may be in one process alone
            self._pending = False
            with contextlib.suppress(Exception):
                self._join()
            self._steps.release()

    def steps(self) -> list[int]:
        """All steps in the directory, damaged ones included, oldest first.

        Raises:
          CheckpointError: if the directory cannot be read.
        """
        return self._steps.steps()

    def save(
        self,
        step: int,
        state: Any,
        *,
        metrics: Mapping[str, float] | None = None,
        config: Any = None,
        data: Any = None,
    ) -> None:
        """Starts a save, and returns as soon as the state may be changed or donated.

        Waits for the save before, if it is not finished. A step appears in the
        directory only when it is complete and has been read back and compared. It
        replaces a step of the same number.

        Args:
          step: number, at least 0.
          state: any tree of arrays, random keys and numbers, in any sharding.
          metrics: measurements of the state, for `Retention.best`.
          config: of the run; anything that JSON can hold.
          data: an iterator whose position is saved too, if it has ``get_state`` and
            ``set_state``, as grain's iterators do. If it has not, a warning is logged
            once: whoever resumes sees other batches.

        Raises:
          CheckpointError: if the directory cannot be written to or is in use, if the
            state, the config or the position cannot be saved, or if the save before
            failed.
        """
        self.wait()
        header = together(
            lambda: self._prepared(step, metrics or {}, config, data), CheckpointError
        )
        try:
            check_equal_in_all(state)
            leaves = to_host(state)
        except LeafError as error:
            raise CheckpointError(f"step {step} cannot be saved: {error}") from None
        self._pending = True
        if self._writes:
            self._saved.clear()
            self._saving = threading.Thread(
                target=self._save, args=(leaves, header), name="esper-jax-save"
            )
            self._saving.start()

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          CheckpointError: if the save failed; raised once for each failure.
        """
        if self._pending:
            self._pending = False
            together(self._join, CheckpointError)

    def close(self) -> None:
        """Waits for the last save and unlocks the directory.

        Raises:
          CheckpointError: if the last save failed.
        """
        try:
            self.wait()
        finally:
            self._steps.release()

    def acquire(self) -> None:
        """Locks the directory for this object; `save` calls it by itself.

        Removes what an interrupted save has left.

        Raises:
          CheckpointError: if the directory is locked or cannot be written to.
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
        """One line about a step from its manifest; the arrays are not read."""
        folder = self._steps.folder(step)
        try:
            manifest = step_folder.check(folder, step, contents=False)
        except Damaged as damage:
            return str(Verdict(step, str(damage), None))
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.saved))
        size = sum(file.size for file in manifest.files.values())
        metrics = "".join(f", {k} {v:.6g}" for k, v in manifest.metrics.items())
        return f"step {step}: schema {manifest.schema}, {saved}, {size} bytes{metrics}"

    def restore(
        self, like: Any, *, step: int | None = None, data: Any = None
    ) -> Restored:
        """Restores the newest sound step, or the given one, into the form of ``like``.

        A damaged step is logged as a warning, and the next older one is tried. With
        several processes, process 0 decides which step is the newest sound one.

        A step of an older schema is brought to today's in memory, and what had to be
        assumed is logged; the files stay as they are (see `migrate`).

        If ``like`` is or holds a `TrainState` whose layers have another capacity than
        was saved, `restore` adapts the checkpoint to it, as `grow_capacity` would. New
        slots get the values that ``like`` has there.

        Args:
          like: a state with the structure, shapes (but for the capacity) and dtypes to
            restore. Each restored array is placed on the devices, and in the sharding,
            that it has in ``like``, wherever it was when it was saved. Not changed.
          step: restore exactly this step; by default the newest sound one.
          data: an iterator that goes to the position that was saved. If there is
            none, a warning is logged, and it stays where it is.

        Raises:
          CheckpointError: if there is no sound step, naming what is wrong with each;
            if the step does not fit ``like``, naming the leaves that do not, or the
            layer that would lose a living seed; if a newer program saved it; or if
            ``data`` refuses the position.
        """
        self.wait()
        found = agreed(self._steps, step)
        folder = self._steps.folder(found.step)

        def fitted() -> Restored:
            leaves, _ = _upgraded(folder, found.manifest, found.leaves, like)
            try:
                leaves, changed = resized(leaves, like)
                state = place(leaves, like)
                if not go_to(data, found.manifest.position) and data is not None:
                    _log.warning(
                        "step %d has no position of data, which goes on as it is: the "
                        "batches are not those of a run that was never stopped",
                        found.step,
                    )
            except PositionError as error:
                raise CheckpointError(f"{folder}: {error}") from None
            except LeafError as error:
                raise CheckpointError(
                    f"{folder} does not fit the state to restore into: {error}. Use "
                    "the config that it was saved with"
                ) from None
            return Restored(state, found.step, found.damaged, found.manifest, changed)

        return together(fitted, CheckpointError)

    def migrate(self, step: int) -> list[str]:
        """Rewrites a sound step of an older schema in today's.

        The old files are removed only when the new ones have been read back.

        Returns:
          Notes on what was dropped or assumed; none if the step is in today's schema
          already, and then it is left as it is.

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
                position=manifest.position,
            )
            self._steps.write(leaves, header)
        return notes

    def _prepared(
        self, step: int, metrics: Mapping[str, float], config: Any, data: Any
    ) -> Header:
        """What is saved beside the state, once this object holds the directory."""
        step = operator.index(step)
        if step < 0:
            raise CheckpointError(f"step must be at least 0, got {step}")
        try:
            json.dumps(config)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"config must be JSON: {error}") from None
        try:
            position = position_of(data)
        except PositionError as error:
            raise CheckpointError(str(error)) from None
        if data is not None and not has_position(data) and not self._warned:
            self._warned = True
            _log.warning(
                "data (%s) has no get_state and set_state, so checkpoints do not hold "
                "its position: a resumed run sees other batches",
                type(data).__name__,
            )
        self._acquire()
        return Header(
            schema=CURRENT,
            step=step,
            saved=time.time(),
            metrics={name: float(v) for name, v in metrics.items()},
            config=config,
            position=position,
        )

    def _acquire(self) -> None:
        if self._writes:
            self._steps.acquire()

    def _save(self, leaves: dict[str, HostLeaf], header: Header) -> None:
        """The part of a save that runs in the background."""
        try:
            self._steps.write(leaves, header)
            self._steps.prune(self.retention, header.step)
        except Exception as error:  # raised by the next call
            self._failure = error
        finally:
            self._saved.set()

    def _join(self) -> None:
        if self._saving is not None:
            # Before Python 3.13 a Ctrl-C in Thread.join() makes the next join() return
            # at once, with the save still going on. A wait can be interrupted safely.
            self._saved.wait()
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
