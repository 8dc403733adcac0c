"""What a run writes down while it trains: events, rollbacks and ticks."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from esper_jax.growth.reports import TickReport
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import Outcome, Stage
from esper_jax.monitor.words import Event, drain
from esper_jax.run.folder import (
    RunFolder,
    append_lines,
    finite_or_none,
    read_lines,
    write_lines,
)
from esper_jax.train.retreat import Rollback

__all__ = ["EventLog", "Metrics"]


class Metrics:
    """Appends the losses and the accuracy of each tick to ``ticks.jsonl``.

    Args:
      folder: of the run.
      keep_until: later ticks are dropped from the file.
    """

    def __init__(self, folder: RunFolder, keep_until: int) -> None:
        self._path = folder.ticks
        kept = [t for t in read_lines(self._path) if t["tick"] <= keep_until]
        write_lines(self._path, kept)

    def add(self, report: TickReport) -> None:
        """Appends a tick, given its report with host values."""
        line = {
            "tick": int(report.tick),
            "train_loss": finite_or_none(report.train_loss),
            "loss": finite_or_none(report.loss),
            "accuracy": finite_or_none(report.accuracy),
        }
        append_lines(self._path, [line])


class EventLog:
    """Keeps every requested transition and its outcome, in memory and on disk.

    Appends events to ``events.jsonl`` and rollbacks to ``rollbacks.jsonl``. Writes a
    refusal once, even if it repeats tick after tick.

    Args:
      folder: of the run.
      lifecycle: minima and gates in force; the words of the events quote them.
      keep_until: events of later ticks are dropped from the files.
      rollbacks: later rollbacks than this many, and their events, are dropped.

    Attributes:
      events: as dictionaries, oldest first.
      rollbacks: as dictionaries, oldest first.
    """

    def __init__(
        self,
        folder: RunFolder,
        lifecycle: LifecycleConfig,
        keep_until: int,
        rollbacks: int = 0,
    ) -> None:
        self._folder = folder
        self._lifecycle = lifecycle
        self.rollbacks = [
            r for r in read_lines(folder.rollbacks) if r["number"] <= rollbacks
        ]
        self._write_rollbacks()
        self.events = [
            e
            for e in read_lines(folder.events)
            if e["tick"] <= keep_until and e.get("rollback", 0) <= rollbacks
        ]
        self._last = dict(map(_seed_and_move, self.events))
        write_lines(folder.events, self.events)

    def add(self, report: TickReport) -> list[dict[str, Any]]:
        """Writes the new events of a tick, given its report with host values.

        Returns:
          Those events.
        """
        events = [
            _entry(int(report.tick), name, event)
            for name, layer in report.layers.items()
            for event in drain(layer, layer.signals, self._lifecycle)
        ]
        new = [event for event in events if self._is_new(event)]
        self._append(new)
        return new

    def add_rollback(self, rollback: Rollback) -> list[str]:
        """Writes a rollback and what it did to the seeds.

        Returns:
          Lines that tell of them.
        """
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
        new = list(self._rolled_back(rollback))
        self._append(new)
        return [text, *(f"tick {e['tick']}: {e['layer']} {e['text']}" for e in new)]

    def _rolled_back(self, rollback: Rollback) -> Iterator[dict[str, Any]]:
        for name, layer in rollback.layers.items():
            for event in drain(layer, Signals.unmeasured(), self._lifecycle):
                entry = _entry(rollback.tick, name, event)
                entry["text"] += f" (governor: {rollback.reason})"
                yield {**entry, "rollback": rollback.number}

    def _is_new(self, event: dict[str, Any]) -> bool:
        """False if the seed's last event was the same refusal."""
        seed, move = _seed_and_move(event)
        return event["outcome"] == Outcome.OK.name or self._last.get(seed) != move

    def _append(self, events: list[dict[str, Any]]) -> None:
        append_lines(self._folder.events, events)
        self.events += events
        self._last |= map(_seed_and_move, events)

    def _write_rollbacks(self) -> None:
        # A run without rollbacks has no such file.
        if self.rollbacks or self._folder.rollbacks.exists():
            write_lines(self._folder.rollbacks, self.rollbacks)


def _seed_and_move(
    event: dict[str, Any],
) -> tuple[tuple[str, int], tuple[str, str, str]]:
    """Which seed an event is about, and what happened to it."""
    return (
        (event["layer"], event["seed"]),
        (event["from"], event["to"], event["outcome"]),
    )


def _entry(tick: int, layer: str, event: Event) -> dict[str, Any]:
    """An event as it stands in the file."""
    return {
        "tick": tick,
        "layer": layer,
        "seed": event.seed,
        "slot": event.slot,
        "from": event.source.name,
        "to": Stage(event.target).name,
        "outcome": event.outcome.name,
        "measured": {
            name: value if np.isfinite(value) else None
            for name, value in event.measured.items()
        },
        "text": event.text,
    }
