"""A run while it trains: what it is made of, and how it begins or goes on."""

import dataclasses
import logging

from esper_jax.checkpoint.checkpointer import Checkpointer
from esper_jax.data import Dataset
from esper_jax.growth.state import TrainState
from esper_jax.run.config import RunConfig, to_dict
from esper_jax.run.folder import RunFolder, read_config, sync, write_json
from esper_jax.run.logs import EventLog, History, Metrics, read_history
from esper_jax.run.opening import Opening
from esper_jax.run.record import Record, check_seal, seal_of, sealed
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


@dataclasses.dataclass(frozen=True)
class Session(Start):
    """Everything that a run works with while it trains, except its state."""

    record: Record
    log: EventLog
    metrics: Metrics
    missing: tuple[str, ...]
    """What the logs have lost, in words."""

    def save(self, state: TrainState, loss: float, accuracy: float) -> None:
        """Starts to save a state, after the logs are on the disk."""
        journals = {**self.log.journals, "ticks": self.metrics.journal}
        logs = {name: journal.seal() for name, journal in journals.items()}
        sync(self.folder.path)
        self.checkpoints.save(
            int(state.step),
            state,
            metrics={"loss": loss, "accuracy": accuracy},
            config=sealed(self.config, self.record, logs, self.missing),
        )


def restored(
    folder: RunFolder, opening: Opening, checkpoints: Checkpointer, state: TrainState
) -> tuple[TrainState, History]:
    """The newest sound checkpoint, or ``state`` without one, and what came before it.

    Raises:
      RunError: if a log is damaged, or the checkpoint is of another run.
      CheckpointError: if no checkpoint is sound.
    """
    if not checkpoints.steps():
        _log.warning("%s holds no checkpoint: starts anew", checkpoints.directory)
        return state, History()
    found = checkpoints.restore(state)
    seal = seal_of(found.manifest)
    check_seal(folder, read_config(folder), opening.record, seal)
    for name, (before, after) in found.resized.items():
        _log.warning(
            "layer %s of step %d goes on with capacity %d instead of %d",
            name,
            found.step,
            after,
            before,
        )
    ticks, rollbacks = int(found.state.ticks), int(found.state.governor.rollbacks)
    history = read_history(folder, ticks, rollbacks, seal.logs)
    for lost in history.missing:
        _log.warning(
            "the history of this run is incomplete, and summary.json will say so: %s",
            lost,
        )
    missing = (*seal.missing, *history.missing)
    return found.state, dataclasses.replace(history, missing=missing)


def begin(
    start: Start, opening: Opening, state: TrainState, history: History
) -> Session:
    """Writes what a run writes before its first step, in an order that can be cut."""
    folder, record = start.folder, opening.record
    tick = int(state.ticks)
    record = dataclasses.replace(
        record,
        changes=[
            *record.changes,
            *(
                {"key": key, "from": was, "to": now, "tick": tick}
                for key, was, now in opening.changes
            ),
        ],
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
    if tick < start.config.train.ticks:
        folder.summary.unlink(missing_ok=True)
    sync(folder.path)
    return session
