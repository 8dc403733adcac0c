"""A run on disk: train from a config into a folder, resume it, evaluate it.

A run's folder holds ``config.json``, ``events.jsonl`` (one event a line, as they
happened), ``ticks.jsonl`` (the metrics of each tick), ``checkpoints/`` and, when it has
ended, ``summary.json`` and what ``compare`` asks for.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console

from esper_jax.blueprints import param_counts
from esper_jax.checkpoint import Retention
from esper_jax.checkpoint.checkpointer import Checkpointer
from esper_jax.data import DATASETS, Dataset
from esper_jax.growth.reports import TickReport
from esper_jax.growth.state import TrainState
from esper_jax.hosts import MLP
from esper_jax.lifecycle.grafting import Strategy
from esper_jax.lifecycle.state import coefficients
from esper_jax.monitor import plot
from esper_jax.monitor.live import LiveView
from esper_jax.monitor.words import why
from esper_jax.policy.memory import Reason
from esper_jax.run.compare import train_static
from esper_jax.run.config import ConfigError, RunConfig, to_dict
from esper_jax.run.folder import (
    EventLog,
    Metrics,
    RunError,
    check_same,
    number,
    read_config,
    read_lines,
    write_json,
)
from esper_jax.train.governor import Governor
from esper_jax.train.loop import fit
from esper_jax.train.program import Program, build
from esper_jax.train.retreat import Rollback, TrainingStopped
from esper_jax.trees import state_hash

__all__ = ["build_run", "evaluate_run", "train_run"]

_log = logging.getLogger(__name__)


def build_run(config: RunConfig, data: Dataset) -> Program:
    """The program of a config: an MLP with AdamW for host and blueprints."""
    growth, train = config.growth, config.train

    @nnx.jit  # one program instead of one for each operation
    def make() -> MLP:
        return MLP(
            data.train[0].shape[-1],
            config.model.hidden,
            data.num_classes,
            activation=config.model.activation,
            num_seeds=growth.num_seeds,
            capacity=growth.capacity,
            blueprints=growth.blueprints,
            strategy=Strategy[growth.strategy.upper()],
            incubation=growth.incubation,
            rngs=nnx.Rngs(config.seed),
        )

    return build(
        make(),
        optax.adamw(train.learning_rate, weight_decay=train.weight_decay),
        optax.adamw(
            train.blueprint_learning_rate, weight_decay=train.blueprint_weight_decay
        ),
        lifecycle_config=config.lifecycle,
        controller_config=config.controller,
    )


def train_run(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains into the folder ``out`` and returns what ``summary.json`` holds.

    Args:
      config: of the run.
      out: must not hold a run yet, unless ``resume``.
      resume: go on from the newest sound checkpoint of the run in ``out``, or from the
        beginning if it was stopped before the first. Its config must be the same but
        for ``train.ticks``, ``governor``, ``checkpoint`` and ``growth.capacity``. A
        smaller capacity must hold all living seeds.
      console: for the live view.

    Raises:
      RunError: if ``out`` cannot be used so, or the governor stopped the run, whose
        state has been saved then.
      CheckpointError: if no checkpoint of a run to resume is sound, if one cannot be
        saved, or if another process is training into ``out``.
      ConfigError: if the config does not fit the data. Nothing has been written then.
    """
    data = _dataset(config)
    rows = len(data.train[0])
    if config.train.batch_size > rows:
        raise ConfigError(
            f"train.batch_size: expected at most the {rows} training rows of "
            f"{config.data.name}, got {config.train.batch_size}"
        )
    if resume:
        check_same(config, read_config(out))
    elif out.exists() and not out.is_dir():
        raise RunError(f"{out} is no folder: choose another --out")
    elif out.exists() and any(out.iterdir()):
        raise RunError(f"{out} is not empty: choose another --out, or --resume the run")
    program = build_run(config, data)
    state = program.init(jax.random.key(config.seed))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{out} cannot be written to ({error.strerror}): choose another --out"
        ) from None
    with Checkpointer(out / "checkpoints", retention=_retention(config)) as checkpoints:
        checkpoints.acquire()
        if resume and not checkpoints.steps():
            _log.warning("%s holds no checkpoint: starts anew", checkpoints.directory)
        elif resume:
            found = checkpoints.restore(state)
            state = found.state
            for name, (before, after) in found.resized.items():
                _log.warning(
                    "layer %s of step %d goes on with capacity %d instead of %d",
                    name,
                    found.step,
                    after,
                    before,
                )
        if config.train.ticks < int(state.ticks):
            raise ConfigError(
                f"train.ticks: expected at least {int(state.ticks)}, which the run to "
                f"resume has done; got {config.train.ticks}"
            )
        write_json(out / "config.json", to_dict(config))
        (out / "summary.json").unlink(missing_ok=True)
        log = EventLog(
            out / "events.jsonl",
            program.gates,
            keep_until=int(state.ticks),
            rollbacks=int(state.governor.rollbacks),
        )
        metrics = Metrics(out / "ticks.jsonl", keep_until=int(state.ticks))
        state = _train(program, state, config, data, log, metrics, checkpoints, console)
    summary = _summary(program, state, data, log)
    if config.compare.static:
        parameters = summary["host_params"] + summary["grown_params"]
        summary["static"] = train_static(config, data, parameters, build_run)
    if config.compare.plot:
        plot.accuracy(
            out / "accuracy.png",
            read_lines(out / "ticks.jsonl"),
            summary["events"],
            summary.get("static"),
        )
    write_json(out / "summary.json", summary)
    return summary


def _train(
    program: Program,
    state: TrainState,
    config: RunConfig,
    data: Dataset,
    log: "EventLog",
    metrics: "Metrics",
    checkpoints: Checkpointer,
    console: Console | None,
) -> TrainState:
    """Trains to the last tick, with live view, events, checkpoints and governor."""
    ticks = config.train.ticks
    tables = to_dict(config)
    with LiveView(ticks, console) as view:
        said = Reason.NOT_YET

        def on_tick(state: TrainState, report: TickReport) -> None:
            nonlocal said
            view.update(report, log.add(report))
            metrics.add(report)
            reason = Reason(int(report.reason))
            if reason not in (said, Reason.NOT_YET, Reason.GERMINATED):
                view.note(f"tick {int(report.tick)}: {why(reason)}")
                said = reason
            if report.tick % config.checkpoint.every == 0 or report.tick == ticks:
                checkpoints.save(
                    int(report.step),
                    state,
                    metrics={
                        "loss": float(report.loss),
                        "accuracy": float(report.accuracy),
                    },
                    config=tables,
                )

        def on_rollback(rollback: Rollback) -> None:
            for line in log.add_rollback(rollback):
                view.note(line)

        try:
            return fit(
                program,
                state,
                data.train,
                data.held_out,
                ticks=ticks,
                batch_size=config.train.batch_size,
                seed=config.seed,
                on_tick=on_tick,
                governor=_governor(config, program, data, on_rollback),
            )
        except TrainingStopped as stop:
            step = int(stop.state.step)
            checkpoints.save(step, stop.state, config=tables)
            checkpoints.wait()  # so that what is said next is true
            raise RunError(
                f"{stop}. The last good state is saved as step {step} in "
                f"{checkpoints.directory}; once the cause is gone, --resume goes on "
                "from it"
            ) from None


def _dataset(config: RunConfig) -> Dataset:
    try:
        return DATASETS[config.data.name](config.data.seed)
    except ImportError as error:
        raise ConfigError(f"data.name: {error}") from None


def _retention(config: RunConfig) -> Retention:
    rules = config.checkpoint
    modes = {"": None, "loss": ("loss", "min"), "accuracy": ("accuracy", "max")}
    return Retention(
        keep_last=rules.keep,
        best=modes[rules.keep_best],
        every=rules.keep_every or None,
        pinned=rules.pinned,
    )


def evaluate_run(out: Path) -> dict[str, Any]:
    """Step, accuracy and loss on the test data of the newest checkpoint in ``out``.

    A damaged checkpoint is named in the log, and the next older one used.

    Raises:
      RunError: if there is no run.
      CheckpointError: if there is no sound checkpoint.
    """
    config = read_config(out)
    data = _dataset(config)
    program = build_run(config, data)
    like = program.init(jax.random.key(config.seed))
    state = Checkpointer(out / "checkpoints").restore(like).state
    loss, accuracy = program.evaluate(state, jax.tree.map(jnp.asarray, data.test))
    return {
        "step": int(state.step),
        "accuracy": number(accuracy),
        "loss": number(loss),
    }


def _governor(
    config: RunConfig,
    program: Program,
    data: Dataset,
    on_rollback: Callable[[Rollback], None],
) -> Governor | None:
    if not config.governor.enabled:
        return None
    return Governor(
        program,
        config.governor,
        num_classes=data.num_classes,
        on_rollback=on_rollback,
    )


def _summary(
    program: Program, state: TrainState, data: Dataset, log: EventLog
) -> dict[str, Any]:
    loss, accuracy = program.evaluate(state, jax.tree.map(jnp.asarray, data.test))
    return {
        "final_accuracy": number(accuracy),
        "final_loss": number(loss),
        "state_hash": state_hash(state),
        "host_params": sum(int(np.size(p)) for p in state.params.values()),
        "grown_params": _grown_params(program, state),
        "recompiles": program.recompiles(),
        "rollbacks": log.rollbacks,
        "controller": why(int(state.memory.reason)),
        "events": log.events,
    }


def _grown_params(program: Program, state: TrainState) -> int:
    """Parameters of the blueprints that count in the output."""
    total = 0
    for name, seeds in state.seeds.items():
        counts = param_counts(program.kinds[name], program.layouts[name].sizes)
        grown = np.flatnonzero(coefficients(seeds)[0] != 0)
        total += int(counts[np.asarray(seeds.blueprint)[grown], grown].sum())
    return total
