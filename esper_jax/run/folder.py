"""The files of a run's folder: events, ticks, config."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from esper_jax.growth.reports import SeedMoves, TickReport
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import Outcome, Stage
from esper_jax.monitor.words import Event, drain
from esper_jax.run.config import ConfigError, RunConfig, parse_config, to_dict
from esper_jax.train.retreat import Rollback

__all__ = [
    "EventLog",
    "RunError",
    "check_same",
    "number",
    "read_config",
    "read_lines",
    "write_json",
]


class RunError(ValueError):
    """A run's folder that cannot be used as asked; says what to do."""


class Metrics:
    """The losses and the accuracy of each tick, a line of JSON each.

    Args:
      path: file to append to.
      keep_until: ticks after this one are dropped from the file.
    """

    def __init__(self, path: Path, keep_until: int) -> None:
        self._path = path
        kept = [line for line in read_lines(path) if line["tick"] <= keep_until]
        _write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))

    def add(self, report: TickReport) -> None:
        """Writes a tick down, given its report with host values."""
        line = {
            "tick": int(report.tick),
            "train_loss": number(report.train_loss),
            "loss": number(report.loss),
            "accuracy": number(report.accuracy),
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
            r for r in read_lines(self._rollback_path) if r["number"] <= rollbacks
        ]
        self._write_rollbacks()
        self.events = [
            e
            for e in read_lines(path)
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


def _drain(layer: SeedMoves, signals: Signals, config: LifecycleConfig) -> list[Event]:
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


def read_config(out: Path) -> RunConfig:
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


def check_same(config: RunConfig, saved: RunConfig) -> None:
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


def read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    # The last line of a run that was killed may be half written.
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is damaged: {error}; mend or remove it") from None


def number(value: Any) -> float | None:
    """A number as JSON can hold it: None if it is not finite."""
    return float(value) if np.isfinite(value) else None


def write_json(path: Path, content: Any) -> None:
    _write_whole(path, json.dumps(content, indent=2) + "\n")


def _write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text)
    scratch.replace(path)
