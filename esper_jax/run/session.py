"""A run while it trains: what it is made of, and how it begins or goes on."""

import dataclasses
import logging
from typing import Any

import jax

from esper_jax.checkpoint.checkpointer import Checkpointer
from esper_jax.checkpoint.position import has_position
from esper_jax.data import Dataset
from esper_jax.growth.state import TrainState
from esper_jax.parallel.processes import together
from esper_jax.run.changes import differences
from esper_jax.run.config import RunConfig, to_dict
from esper_jax.run.folder import RunError, RunFolder, read_config, sync, write_json
from esper_jax.run.logs import EventLog, History, Metrics, read_history
from esper_jax.run.opening import Opening
from esper_jax.run.own import begins_anew
from esper_jax.run.record import Record, check_seal, seal_of, sealed, warn_unlike
from esper_jax.run.references import failure
from esper_jax.train.batches import is_iterable
from esper_jax.train.program import Program

__all__ = ["Session", "Start", "begin", "restored"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run is made of before anything is written."""

    config: RunConfig
    data: Dataset
    program: Program
    folder: RunFolder
    checkpoints: Checkpointer

    @property
    def iterator(self) -> Any:
        """The training data, if they are an iterator, with or without a position."""
        train = self.data.train
        return train if is_iterable(train) and not begins_anew(train) else None


@dataclasses.dataclass(frozen=True)
class Session(Start):
    """Everything that a run works with while it trains, except its state."""

    record: Record
    log: EventLog
    metrics: Metrics
    missing: tuple[str, ...]
    """What the logs have lost, in words."""

    def save(self, state: TrainState, loss: float, accuracy: float) -> None:
        """Starts to save a state, after the logs are on the disk.

        The data's position is saved as it is, so no batch may have been taken since
        the step that gave the state. The state that a governor went back to is an
        exception: as after any rollback, the data go on behind the step that failed.
        """
        logs = together(self._seal_logs, RunError)
        self.checkpoints.save(
            int(state.step),
            state,
            metrics={"loss": loss, "accuracy": accuracy},
            config=sealed(self.config, self.record, logs, self.missing),
            data=self.iterator,
        )

    def _seal_logs(self) -> dict[str, Any]:
        journals = {**self.log.journals, "ticks": self.metrics.journal}
        logs = {name: journal.seal() for name, journal in journals.items()}
        sync(self.folder.path)
        return logs


def restored(
    start: Start, opening: Opening, state: TrainState
) -> tuple[TrainState, History]:
    """The newest sound checkpoint, or ``state`` without one, and what came before it.

    The iterator of the data goes to the position that was saved.

    Raises:
      RunError: if a log is damaged, or the checkpoint is of another run.
      CheckpointError: if no checkpoint is sound.
    """
    folder, checkpoints = start.folder, start.checkpoints
    if not checkpoints.steps():
        _log.warning("%s holds no checkpoint: starts anew", checkpoints.directory)
        return state, History()
    found = checkpoints.restore(state, data=_going_on(start, opening))
    seal = seal_of(found.manifest)

    def past() -> History:
        check_seal(folder, read_config(folder), opening.record, seal)
        ticks, rollbacks = found.state.ticks, found.state.governor.rollbacks
        return read_history(folder, int(ticks), int(rollbacks), seal.logs)

    history = together(past, RunError)
    # A run that gave slots back goes on without them, and has told so.
    state, _ = start.program.shrink(found.state)
    for name, (before, _) in found.resized.items():
        if (after := state.seeds[name].capacity) != before:
            _log.warning(
                "layer %s of step %d goes on with capacity %d instead of %d",
                name,
                found.step,
                after,
                before,
            )
    for lost in history.missing:
        _log.warning(
            "the history of this run is incomplete, and summary.json will say so: %s",
            lost,
        )
    missing = (*seal.missing, *history.missing)
    return state, dataclasses.replace(history, missing=missing)


class _Changed:
    """An iterator of data that were changed on purpose.

    They may be the old ones, read in another way. If they refuse the old position, they
    begin anew.
    """

    def __init__(self, data: Any) -> None:
        self._data = data
        self.get_state = data.get_state

    def set_state(self, state: Any) -> None:
        try:
            self._data.set_state(state)
        except Exception as error:  # the iterator is the user's
            _log.warning(
                "the data were changed and cannot go to the position that was saved: "
                "they begin anew (%s)",
                failure(error),
            )


def _going_on(start: Start, opening: Opening) -> Any:
    """The iterator of the data as `Checkpointer.restore` takes it."""
    data, seal = start.iterator, opening.seal
    if seal is None or not has_position(data):
        return data
    changed = [key for key, *_ in differences(start.config, seal.config)]
    return _Changed(data) if any(k.startswith("data.") for k in changed) else data


def begin(
    start: Start, opening: Opening, state: TrainState, history: History
) -> Session:
    """Writes what a run writes before its first step, in an order that can be cut.

    Raises:
      RunError: if that fails; in all processes.
    """
    return together(lambda: _begun(start, opening, state, history), RunError)


def _begun(
    start: Start, opening: Opening, state: TrainState, history: History
) -> Session:
    folder, record = start.folder, opening.record
    tick = int(state.ticks)
    devices = {"devices": str(len(state.step.sharding.device_set))}
    if opening.seal is not None:
        warn_unlike(opening.seal.settings, devices)
    record = dataclasses.replace(
        record,
        settings={**record.settings, **devices},
        changes=[
            *record.changes,
            *(
                {"key": key, "from": was, "to": now, "tick": tick}
                for key, was, now in opening.changes
            ),
        ],
        layers={
            name: {
                "features": layout.features,
                "num_seeds": layout.num_seeds,
                "capacity": state.seeds[name].capacity,
                "blueprints": [b.name for b in start.program.kinds[name]],
            }
            for name, layout in start.program.layouts.items()
        },
    )
    # The record first: it says which changes of the config are meant.
    write_json(folder.record, dataclasses.asdict(record))
    write_json(folder.config, to_dict(start.config))
    session = Session(
        **vars(start),
        record=record,
        log=EventLog(folder, start.program.gates, history),
        metrics=Metrics(folder, history),
        missing=history.missing,
    )
    session.log.add_changes(record.changes)
    if tick < start.config.train.ticks and not jax.process_index():
        folder.summary.unlink(missing_ok=True)
    sync(folder.path)
    return session
