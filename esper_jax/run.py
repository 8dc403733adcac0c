"""A run on disk: train from a config into a folder, resume it, evaluate it.

A run's folder holds ``config.json``, ``events.jsonl`` (one event a line, as they
happened), ``ticks.jsonl`` (the metrics of each tick), ``checkpoints/`` and, when it has
ended, ``summary.json`` and what ``compare`` asks for.
"""

import json
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
from esper_jax.checkpoint import Checkpointer, Retention
from esper_jax.compare import train_static
from esper_jax.config import ConfigError, RunConfig, parse_config, to_dict
from esper_jax.controller import Reason
from esper_jax.data import DATASETS, Dataset
from esper_jax.events import Event, drain, why
from esper_jax.functional import TrainState, state_hash
from esper_jax.governor import Governor, LayerRetreat, Rollback, TrainingStopped
from esper_jax.grafting import Strategy
from esper_jax.hosts import MLP
from esper_jax.lifecycle import LifecycleConfig
from esper_jax.monitor import plot
from esper_jax.monitor.live import LiveView
from esper_jax.signals import Signals
from esper_jax.stages import Outcome, Stage
from esper_jax.state import coefficients
from esper_jax.tick import LayerReport, TickReport
from esper_jax.train import Program, build, fit

__all__ = ["EventLog", "RunError", "build_run", "evaluate_run", "train_run"]

_log = logging.getLogger(__name__)


class RunError(ValueError):
    """A run's folder that cannot be used as asked; says what to do."""


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
        _check_same(config, _read_config(out))
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
        _write_json(out / "config.json", to_dict(config))
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
            _read_lines(out / "ticks.jsonl"),
            summary["events"],
            summary.get("static"),
        )
    _write_json(out / "summary.json", summary)
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
    config = _read_config(out)
    data = _dataset(config)
    program = build_run(config, data)
    like = program.init(jax.random.key(config.seed))
    state = Checkpointer(out / "checkpoints").restore(like).state
    loss, accuracy = program.evaluate(state, jax.tree.map(jnp.asarray, data.test))
    return {
        "step": int(state.step),
        "accuracy": _number(accuracy),
        "loss": _number(loss),
    }


class Metrics:
    """The losses and the accuracy of each tick, a line of JSON each.

    Args:
      path: file to append to.
      keep_until: ticks after this one are dropped from the file.
    """

    def __init__(self, path: Path, keep_until: int) -> None:
        self._path = path
        kept = [line for line in _read_lines(path) if line["tick"] <= keep_until]
        _write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))

    def add(self, report: TickReport) -> None:
        """Writes a tick down, given its report with host values."""
        line = {
            "tick": int(report.tick),
            "train_loss": _number(report.train_loss),
            "loss": _number(report.loss),
            "accuracy": _number(report.accuracy),
        }
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class EventLog:
    """Every requested transition and its outcome, kept in memory and on disk.

    A refusal that repeats itself tick after tick is written once.

    Args:
      path: JSON-lines file to append to.
      lifecycle: the gates, which the words of the events tell of.
      keep_until: events after this tick in the file are dropped,
      rollbacks: and those of later rollbacks than this many. What the rollbacks were
        is kept beside the file, in ``rollbacks.jsonl``.
    """

    def __init__(
        self,
        path: Path,
        lifecycle: LifecycleConfig,
        keep_until: int,
        rollbacks: int = 0,
    ) -> None:
        self._path = path
        self._lifecycle = lifecycle
        self._rollback_path = path.with_name("rollbacks.jsonl")
        self.rollbacks = [
            r for r in _read_lines(self._rollback_path) if r["number"] <= rollbacks
        ]
        self._write_rollbacks()
        self.events = [
            e
            for e in _read_lines(path)
            if e["tick"] <= keep_until and e.get("rollback", 0) <= rollbacks
        ]
        self._last: dict[tuple[str, int], tuple[str, str, str]] = {}
        for event in self.events:
            self._is_news(event)
        _write_whole(path, "".join(json.dumps(e) + "\n" for e in self.events))

    def add(self, report: TickReport) -> list[dict[str, Any]]:
        """The new events of a tick, given its report with host values."""
        new = [event for event in self._read(report) if self._is_news(event)]
        with self._path.open("a") as file:
            file.writelines(json.dumps(event) + "\n" for event in new)
        self.events += new
        return new

    def add_rollback(self, rollback: Rollback) -> list[str]:
        """Writes down a rollback and what it did to the seeds; returns its lines."""
        text = (
            f"rollback {rollback.number}, from tick {rollback.failed_tick} to "
            f"{rollback.tick}: {rollback.reason}"
        )
        self.rollbacks.append(
            {
                "number": rollback.number,
                "failed_tick": rollback.failed_tick,
                "tick": rollback.tick,
                "fault": rollback.fault.name,
                "text": text,
            }
        )
        self._write_rollbacks()
        new = []
        for name, layer in rollback.layers.items():
            for event in _drain(layer, Signals.unmeasured(), self._lifecycle):
                line = _event(rollback.tick, name, event)
                line["text"] += f" (governor: {rollback.reason})"
                new.append({**line, "rollback": rollback.number})
                self._is_news(line)
        with self._path.open("a") as file:
            file.writelines(json.dumps(event) + "\n" for event in new)
        self.events += new
        return [text, *(f"tick {e['tick']}: {e['layer']} {e['text']}" for e in new)]

    def _write_rollbacks(self) -> None:
        if self.rollbacks or self._rollback_path.exists():
            lines = "".join(json.dumps(r) + "\n" for r in self.rollbacks)
            self._rollback_path.write_text(lines)

    def _is_news(self, event: dict[str, Any]) -> bool:
        key = (event["layer"], event["seed"])
        what = (event["from"], event["to"], event["outcome"])
        known = self._last.get(key) == what and event["outcome"] != Outcome.OK.name
        self._last[key] = what
        return not known

    def _read(self, report: TickReport) -> list[dict[str, Any]]:
        return [
            _event(int(report.tick), name, event)
            for name, layer in report.layers.items()
            for event in _drain(layer, layer.signals, self._lifecycle)
        ]


def _drain(
    layer: LayerReport | LayerRetreat, signals: Signals, config: LifecycleConfig
) -> list[Event]:
    return drain(
        source=layer.source,
        target=layer.target,
        outcome=layer.outcome,
        slot=layer.slot,
        epochs=layer.epochs,
        errors=layer.errors,
        signals=signals,
        config=config,
    )


def _event(tick: int, layer: str, event: Event) -> dict[str, Any]:
    measured = {k: v if np.isfinite(v) else None for k, v in event.measured.items()}
    return {
        "tick": tick,
        "layer": layer,
        "seed": event.seed,
        "slot": event.slot,
        "from": event.source.name,
        "to": Stage(event.target).name,
        "outcome": event.outcome.name,
        "measured": measured,
        "text": event.text,
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
        "final_accuracy": _number(accuracy),
        "final_loss": _number(loss),
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


def _read_config(out: Path) -> RunConfig:
    path = out / "config.json"
    try:
        return parse_config(json.loads(path.read_text()))
    except OSError as error:
        raise RunError(
            f"{out} holds no run ({path.name}: {error.strerror}); start one with "
            "esper-jax train"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged: {error}") from None
    except ConfigError as error:
        raise RunError(f"{path}: {error}") from None


def _check_same(config: RunConfig, saved: RunConfig) -> None:
    new, old = _flat(to_dict(config)), _flat(to_dict(saved))
    for key in sorted(set(new) | set(old)):
        free = key in ("train.ticks", "growth.capacity")
        free |= key.startswith(("governor.", "checkpoint.", "compare."))
        if not free and new.get(key) != old.get(key):
            raise ConfigError(
                f"{key}: expected {old.get(key)!r}, as the run to resume has it; "
                f"got {new.get(key)!r}"
            )


def _flat(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    # The last line of a run that was killed may be half written.
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is damaged: {error}; mend or remove it") from None


def _number(value: Any) -> float | None:
    """A number as JSON can hold it: None if it is not finite."""
    return float(value) if np.isfinite(value) else None


def _write_json(path: Path, content: Any) -> None:
    _write_whole(path, json.dumps(content, indent=2) + "\n")


def _write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text)
    scratch.replace(path)
