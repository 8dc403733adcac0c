"""`Checkpointer`: saves the state of a run in the background and restores it.

A directory holds one folder a step, named by its number. ``step_directory.py`` adds and
removes folders, ``step_folder.py`` writes and checks one, ``newest.py`` chooses the
step to restore, ``upgrading.py`` brings its leaves to today's schema, ``resizing.py``
to another capacity, and ``retention.py`` says which steps stay.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from esper_jax.checkpoint import step_folder
from esper_jax.checkpoint.background import Background
from esper_jax.checkpoint.host_leaves import (
    HostLeaf,
    LeafError,
    check_equal_in_all,
    place,
    to_host,
)
from esper_jax.checkpoint.location import absolute
from esper_jax.checkpoint.manifest import Damaged, Header, Manifest
from esper_jax.checkpoint.newest import Gone, agreed, look
from esper_jax.checkpoint.position import PositionError, go_to, has_position
from esper_jax.checkpoint.preparing import prepared
from esper_jax.checkpoint.resizing import resized
from esper_jax.checkpoint.results import Restored, Verdict
from esper_jax.checkpoint.retention import Retention
from esper_jax.checkpoint.step_directory import CheckpointError, StepDirectory
from esper_jax.checkpoint.upgrading import upgraded
from esper_jax.migrations.chain import CURRENT
from esper_jax.migrations.schema import MigrationError
from esper_jax.parallel.processes import together

__all__ = ["Checkpointer", "Restored", "Verdict"]

_log = logging.getLogger(__name__)


class Checkpointer:
    """Saves the state of a run in a directory, and restores the newest sound step.

    Any number of objects may read a directory; one at a time may write to it. The first
    `save` locks the directory for this object until `close`, or until the object is
    garbage. Another `Checkpointer`, in this or any other program, cannot save there
    until then. A forked child has no part in it.

    The newest step is the one that was saved last, whatever its number: a run that goes
    on from an older step leaves the later ones behind as an abandoned branch
    (`step_directory.by_age`).

    A failed save is raised by the next call that waits for it, or else printed when the
    interpreter ends. That waits for a save that is going on.

    With several processes (`jax.distributed`) each process makes a `Checkpointer` on a
    directory that all of them see, and all call the same methods in the same order;
    only `steps` and `describe` may be called by some. Process 0 holds the lock and
    writes in the background. The other processes wait for it where they would wait for
    a save of their own. An error in one process is raised in all. `save` gathers leaves
    that are spread over processes; leaves that each process holds for itself must be
    equal in all.

    Args:
      directory: made by the first save; a local path, made absolute at once. Anything
        in it that is not named by a number is left alone.
      retention: which steps to keep. The step saved last is always kept. Damaged steps
        do not count, and are never removed.
      key: secret of at least 16 bytes, the same whenever the directory is used. Each
        manifest is signed with it (HMAC-SHA256), and nothing else of a step is read
        before its signature is compared. Without a key, checksums find damage, but
        whoever can write to the directory can change a step unnoticed.

    Raises:
      CheckpointError: if an argument is of another kind.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        retention: Retention | None = None,
        key: bytes | None = None,
    ) -> None:
        if not isinstance(retention, Retention | None):
            raise CheckpointError(f"retention: expected a Retention, got {retention!r}")
        if key is not None and not (isinstance(key, bytes) and len(key) >= 16):
            raise CheckpointError(
                "key: expected at least 16 secret bytes, such as those of "
                f"secrets.token_bytes(32), got {type(key).__name__}"
                + (f" of length {len(key)}" if isinstance(key, bytes) else "")
            )
        self.retention = retention or Retention()
        self._steps = StepDirectory(absolute(directory), key)
        self._writes = jax.process_index() == 0
        self._pending = False  # the same in all processes
        self._warned = False
        self._background = Background()
        self._listed: set[int] = set()

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
            return
        # The caller's error matters more, and may be in one process alone.
        self._pending = False
        try:
            self._join()
        except CheckpointError as failure:
            if isinstance(error, SystemExit) and not error.code:
                raise  # this program must not end as if all were well
            error.add_note(f"And: {failure}")
            _log.error("%s", failure)
        finally:
            self._steps.release()

    def steps(self) -> list[int]:
        """All steps in the directory, damaged ones included, by number.

        Raises:
          CheckpointError: if the directory cannot be read.
        """
        steps = self._steps.steps()
        self._listed.update(steps)
        return steps

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
          metrics: measurements of the state, for `Retention.best`. If there are any,
            the one that it names must be among them.
          config: of the run; anything that JSON can hold.
          data: an iterator whose position is saved too, if it has ``get_state`` and
            ``set_state``, as grain's iterators do. If it has not, a warning is logged
            once: whoever resumes sees other batches.

        Raises:
          CheckpointError: if the directory cannot be written to or is in use, if the
            state, metrics, config or position cannot be saved, or if the save before
            failed.
        """
        self.wait()
        header = together(
            lambda: self._prepared(step, (metrics, config, data)), CheckpointError
        )
        try:
            check_equal_in_all(state)
            leaves = to_host(state)
        except LeafError as error:
            raise CheckpointError(f"step {step} cannot be saved: {error}") from None
        self._pending = True
        if self._writes:
            self._start(leaves, header)

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          CheckpointError: if the save failed; raised once for each failure.
        """
        if self._pending:
            try:
                together(self._join, CheckpointError)
            except Exception:
                self._pending = False
                raise
            self._pending = False  # not if Ctrl-C ended the wait: the save goes on

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
        return self._verdict(
            step, lambda folder: step_folder.read(folder, step, self._steps.key)[0]
        )

    def describe(self, step: int) -> str:
        """One line about a step from its manifest; the arrays are not read.

        ``save 7`` is the seventh save in the directory, whatever the step's number.
        """
        key = self._steps.key
        return self._verdict(
            step,
            lambda folder: step_folder.check(folder, step, contents=False, key=key),
        ).in_full()

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
          step: restore exactly this step; by default the newest sound one, that is, the
            one saved last. Saves that follow belong to this step's branch.
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
            manifest, leaves = step_folder.read(folder, step, self._steps.key)
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
                order=manifest.order,
            )
            self._steps.write(leaves, header, last=False)
        return notes

    def _prepared(self, step: int, beside: tuple[Any, Any, Any]) -> Header:
        """What is saved beside the state, once this object holds the directory.

        Args:
          step: its number.
          beside: metrics, config and data of `save`.
        """
        header = prepared(step, beside, self.retention)
        data = beside[2]
        if data is not None and not has_position(data) and not self._warned:
            self._warned = True
            _log.warning(
                "data (%s) has no get_state and set_state, so checkpoints do not hold "
                "its position: a resumed run sees other batches",
                type(data).__name__,
            )
        self._acquire()
        return header

    def _acquire(self) -> None:
        if self._writes:
            self._steps.acquire()

    def _start(self, leaves: dict[str, HostLeaf], header: Header) -> None:
        """Starts the part of a save that runs in the background."""
        steps, retention = self._steps, self.retention

        def work() -> None:  # not of this object, which may be dropped meanwhile
            steps.write(leaves, header)
            steps.prune(retention, header.step)

        try:
            self._background.start(work)
        except RuntimeError as error:
            raise CheckpointError(
                f"step {header.step} cannot be saved: {error}; the steps in "
                f"{self.directory} are unchanged"
            ) from None

    def _join(self) -> None:
        try:
            self._background.join()
        except CheckpointError:
            raise
        except BaseException as error:
            if not self._background.done:  # Ctrl-C in the wait
                raise
            raise CheckpointError(
                f"the last save in {self.directory} failed: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _verdict(self, step: int, work: Callable[[Path], Manifest]) -> Verdict:
        try:
            return Verdict(step, None, look(self._steps, step, work))
        except Gone as gone:
            return Verdict(step, None if step in self._listed else str(gone), None)
        except Damaged as damage:
            return Verdict(step, str(damage), None)


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
    except Exception as error:  # leaves of a sound manifest that no run has
        raise CheckpointError(
            f"{folder} cannot be brought to schema {CURRENT}: "
            f"{type(error).__name__}: {error}"
        ) from error
