"""A run on disk: train from a config into a folder, resume it, evaluate it.

`RunFolder` lists the files. ``summary.json`` and what ``compare`` asks for appear when
the run ends.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from esper_jax.blueprints import living_parameters, param_counts
from esper_jax.checkpoint import Retention
from esper_jax.checkpoint.checkpointer import Checkpointer, Restored
from esper_jax.data import Dataset
from esper_jax.growth.reports import TickReport
from esper_jax.growth.state import TrainState
from esper_jax.lifecycle.state import coefficients
from esper_jax.monitor import plot
from esper_jax.monitor.live import LiveView
from esper_jax.monitor.words import why
from esper_jax.parallel.processes import together
from esper_jax.policy.memory import Reason
from esper_jax.run.build import build_run, load_data
from esper_jax.run.compare import train_static
from esper_jax.run.config import ConfigError, RunConfig, check_resumable, to_dict
from esper_jax.run.devices import AXIS, mesh_of, over
from esper_jax.run.folder import (
    RunError,
    RunFolder,
    finite_or_none,
    read_config,
    read_lines,
    write_json,
)
from esper_jax.run.logs import EventLog, Metrics
from esper_jax.run.own import begins_anew, check_one_step, has_own_loss, is_own
from esper_jax.train.batches import is_iterable, stack
from esper_jax.train.governor import Governor
from esper_jax.train.loop import fit
from esper_jax.train.losses import common_rows
from esper_jax.train.program import Program
from esper_jax.train.retreat import Rollback, TrainingStopped
from esper_jax.trees import state_hash

__all__ = ["evaluate_run", "restore_run", "train_run"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Session:
    """Everything that a run works with while it trains, except its state."""

    config: RunConfig
    data: Dataset
    program: Program
    folder: RunFolder
    checkpoints: Checkpointer
    log: EventLog
    metrics: Metrics


def train_run(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    devices: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains into the folder ``out`` and returns what ``summary.json`` holds.

    Args:
      config: of the run.
      out: folder of the run; must be empty or absent, unless ``resume``.
      resume: go on from the newest sound checkpoint of the run in ``out``, or start
        over if there is no checkpoint yet. `check_resumable` says what may differ from
        the run's config. A smaller ``growth.capacity`` must hold all living seeds.
      devices: of each process, to train on; see `run.devices.mesh_of`.
      console: where the live view prints; standard output by default.

    Raises:
      RunError: if ``out`` cannot be used, or the governor stopped the run. A stopped
        run has saved its last good state.
      CheckpointError: if no checkpoint of a run to resume is sound, if one cannot be
        saved, or if another process is training into ``out``.
      ConfigError: if the config does not fit the data or the run to resume. Nothing
        has been written then.
    """
    data = load_data(config)
    _check_batch_size(config, data)
    folder = RunFolder(out)
    # All look before process 0 writes.
    if resume:
        together(lambda: check_resumable(config, read_config(folder)), RunError)
    else:
        together(lambda: _check_empty(out), RunError)
    mesh = mesh_of(config, data, devices)
    program = over(build_run(config, data, AXIS if mesh else None), mesh)
    state = program.init(jax.random.key(config.seed))
    if is_own(config):
        check_one_step(config, program, state, data)
    _make(out)
    with Checkpointer(folder.checkpoints, retention=_retention(config)) as checkpoints:
        checkpoints.acquire()
        if resume:
            state = _restored(checkpoints, state, data)
        _check_ticks(config, state)
        write_json(folder.config, to_dict(config))
        folder.summary.unlink(missing_ok=True)
        ticks = int(state.ticks)
        session = _Session(
            config=config,
            data=data,
            program=program,
            folder=folder,
            checkpoints=checkpoints,
            log=EventLog(folder, program.gates, ticks, int(state.governor.rollbacks)),
            metrics=Metrics(folder, ticks),
        )
        state = _train(session, state, console)
    return _conclude(session, state)


def evaluate_run(out: Path) -> dict[str, Any]:
    """Step, accuracy and loss on test data of the newest sound checkpoint in ``out``.

    Newer checkpoints that are damaged are named in the log.

    Raises:
      RunError: if ``out`` holds no run.
      CheckpointError: if there is no sound checkpoint.
    """
    program, data, found = restore_run(RunFolder(out))
    loss, accuracy = _test(program, found.state, data)
    return {"step": int(found.state.step), "accuracy": accuracy, "loss": loss}


def restore_run(folder: RunFolder) -> tuple[Program, Dataset, Restored]:
    """Program and data of a run, and its newest sound checkpoint.

    Raises:
      RunError: if the folder holds no run.
      CheckpointError: if there is no sound checkpoint.
    """
    config = read_config(folder)
    data = load_data(config)
    program = build_run(config, data)
    like = program.init(jax.random.key(config.seed))
    return program, data, Checkpointer(folder.checkpoints).restore(like)


def _check_batch_size(config: RunConfig, data: Dataset) -> None:
    if is_iterable(data.train):
        return
    if config.train.steps_per_tick:
        raise ConfigError(
            "train.steps_per_tick: expected 0, since the training data are arrays, "
            f"which have a tick an epoch; got {config.train.steps_per_tick}"
        )
    rows = common_rows(data.train) or 0
    if config.train.batch_size > rows:
        raise ConfigError(
            f"train.batch_size: expected at most the {rows} training rows of "
            f"{config.data.factory or config.data.name}, got {config.train.batch_size}"
        )


def _check_empty(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is no folder: choose another --out")
    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out} is not empty: choose another --out, or --resume the run")


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{out} cannot be written to ({error.strerror}): choose another --out"
        ) from None


def _retention(config: RunConfig) -> Retention:
    rules = config.checkpoint
    modes = {"": None, "loss": ("loss", "min"), "accuracy": ("accuracy", "max")}
    return Retention(
        keep_last=rules.keep,
        best=modes[rules.keep_best],
        every=rules.keep_every or None,
        pinned=rules.pinned,
    )


def _iterator(data: Dataset) -> Any:
    """The training data, if they are an iterator, which has a position or lacks it."""
    train = data.train
    return train if is_iterable(train) and not begins_anew(train) else None


def _restored(
    checkpoints: Checkpointer, state: TrainState, data: Dataset
) -> TrainState:
    """The newest sound checkpoint, or ``state`` if there is no checkpoint yet."""
    if not checkpoints.steps():
        _log.warning("%s holds no checkpoint: starts anew", checkpoints.directory)
        return state
    found = checkpoints.restore(state, data=_iterator(data))
    for name, (before, after) in found.resized.items():
        _log.warning(
            "layer %s of step %d goes on with capacity %d instead of %d",
            name,
            found.step,
            after,
            before,
        )
    return found.state


def _check_ticks(config: RunConfig, state: TrainState) -> None:
    if config.train.ticks < int(state.ticks):
        raise ConfigError(
            f"train.ticks: expected at least {int(state.ticks)}, which the run to "
            f"resume has done; got {config.train.ticks}"
        )


def _train(session: _Session, state: TrainState, console: Console | None) -> TrainState:
    """Trains to the last tick, with live view, logs, checkpoints and governor."""
    config, data = session.config, session.data
    batches = is_iterable(data.train)
    if jax.process_index():  # one of several processes shows it
        console = Console(quiet=True)
    with LiveView(config.train.ticks, console) as view:
        reporter = _Reporter(session, view)
        try:
            return fit(
                session.program,
                state,
                data.train,
                data.held_out,
                ticks=config.train.ticks,
                batch_size=None if batches else config.train.batch_size,
                steps_per_tick=config.train.steps_per_tick or None,
                seed=config.seed,
                on_tick=reporter.on_tick,
                governor=_governor(session, reporter),
            )
        except TrainingStopped as stop:
            step = int(stop.state.step)
            checkpoints = session.checkpoints
            checkpoints.save(
                step, stop.state, config=to_dict(config), data=_iterator(data)
            )
            checkpoints.wait()  # the message below claims that it is saved
            raise RunError(
                f"{stop}. The last good state is saved as step {step} in "
                f"{checkpoints.directory}; once the cause is gone, --resume goes on "
                "from it"
            ) from None


class _Reporter:
    """Writes down, shows and saves what `fit` hands over after each tick.

    Remembers which reason for not germinating it has shown, to show each once in a row.
    """

    def __init__(self, session: _Session, view: LiveView) -> None:
        self._session = session
        self._view = view
        self._shown = Reason.NOT_YET

    def on_tick(self, state: TrainState, report: TickReport) -> None:
        self._view.update(report, self._session.log.add(report))
        self._session.metrics.add(report)
        reason = Reason(int(report.reason))
        if reason not in (self._shown, Reason.NOT_YET, Reason.GERMINATED):
            self._view.note(f"tick {int(report.tick)}: {why(reason)}")
            self._shown = reason
        config = self._session.config
        last = report.tick == config.train.ticks
        if last or report.tick % config.checkpoint.every == 0:
            self._save(state, report)

    def on_rollback(self, rollback: Rollback) -> None:
        for line in self._session.log.add_rollback(rollback):
            self._view.note(line)

    def _save(self, state: TrainState, report: TickReport) -> None:
        self._session.checkpoints.save(
            int(report.step),
            state,
            metrics={"loss": float(report.loss), "accuracy": float(report.accuracy)},
            config=to_dict(self._session.config),
            data=_iterator(self._session.data),
        )


def _governor(session: _Session, reporter: _Reporter) -> Governor | None:
    config = session.config
    if not config.governor.enabled:
        return None
    return Governor(
        session.program,
        config.governor,
        num_classes=None if has_own_loss(config) else session.data.num_classes,
        on_rollback=reporter.on_rollback,
    )


def _conclude(session: _Session, state: TrainState) -> dict[str, Any]:
    """Writes the summary, and beside it what ``compare`` asks for."""
    compare, folder = session.config.compare, session.folder
    summary = _summary(session, state)
    if compare.static:
        parameters = summary["host_params"] + summary["grown_params"]
        summary["static"] = train_static(session.config, session.data, parameters)
    if compare.plot and jax.process_index() == 0:
        plot.accuracy(
            folder.picture,
            read_lines(folder.ticks),
            summary["events"],
            summary.get("static"),
        )
    write_json(folder.summary, summary)
    return summary


def _summary(session: _Session, state: TrainState) -> dict[str, Any]:
    program, log = session.program, session.log
    loss, accuracy = _test(program, state, session.data)
    return {
        "final_accuracy": accuracy,
        "final_loss": loss,
        "state_hash": state_hash(state),
        "host_params": sum(int(np.size(p)) for p in state.params.values()),
        "grown_params": _grown_params(program, state),
        "recompiles": program.recompiles(),
        "rollbacks": log.rollbacks,
        "controller": why(int(state.memory.reason)),
        "events": log.events,
    }


def _test(
    program: Program, state: TrainState, data: Dataset
) -> tuple[float | None, float | None]:
    """Loss and accuracy on the test data, as JSON can hold them."""
    test = data.test
    if is_iterable(test):
        test = stack("test", test, program.check)
    loss, accuracy = program.evaluate(state, program.place("test", test, True))
    return finite_or_none(loss), finite_or_none(accuracy)


def _grown_params(program: Program, state: TrainState) -> int:
    """Parameters of the blueprints that count in the output."""
    total = 0
    for name, seeds in state.seeds.items():
        costs = param_counts(program.kinds[name], program.layouts[name].sizes)
        alpha, _ = coefficients(seeds)
        own = living_parameters(costs, seeds.blueprint, alpha != 0)
        total += int(np.asarray(own).sum())
    return total
