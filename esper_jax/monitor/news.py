"""Events as they are written down, each told once."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from esper_jax.growth.reports import By, TickReport
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import Outcome, Stage
from esper_jax.monitor.words import Event, drain, folds
from esper_jax.train.retreat import Rollback

__all__ = ["News", "rollback_entry", "slot_entries"]


class News:
    """Finds what is new: a refusal that repeats tick after tick is told once.

    Args:
      lifecycle: minima and gates in force; the words of the events quote them.
      past: events that were told before, oldest first.
    """

    def __init__(
        self, lifecycle: LifecycleConfig, past: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self._lifecycle = lifecycle
        self._last = dict(map(_seed_and_move, past))

    def tick(self, report: TickReport) -> list[dict[str, Any]]:
        """The new events of a tick, as JSON, given its report with host values."""
        events = [
            _entry(int(report.tick), name, event)
            for name, layer in report.layers.items()
            for event in drain(layer, layer.signals, self._lifecycle)
        ]
        events += [
            _entry(int(report.tick), name, event)
            for name, layer in report.layers.items()
            for event in folds(layer)
        ]
        return self._told([event for event in events if self._is_new(event)])

    def rollback(self, rollback: Rollback) -> list[dict[str, Any]]:
        """What a rollback did to the seeds, as JSON."""
        events = []
        for name, layer in rollback.layers.items():
            for event in drain(layer, Signals.unmeasured(), self._lifecycle):
                entry = _entry(rollback.tick, name, event)
                entry["text"] += f" (governor: {rollback.reason})"
                events.append({**entry, "rollback": rollback.number})
        return self._told(events)

    def _told(self, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self._last |= map(_seed_and_move, events)
        return events

    def _is_new(self, event: Mapping[str, Any]) -> bool:
        """False if the seed's last event was the same refusal, and nobody waits."""
        seed, move = _seed_and_move(event)
        told = self._last.get(seed) == move and "by" not in event
        return event["outcome"] == Outcome.OK.name or not told


def rollback_entry(rollback: Rollback) -> dict[str, Any]:
    """A rollback as JSON."""
    return {
        "number": rollback.number,
        "failed_tick": rollback.failed_tick,
        "tick": rollback.tick,
        "fault": rollback.fault.name,
        "text": f"rollback {rollback.number}, from tick {rollback.failed_tick} to "
        f"{rollback.tick}: {rollback.reason}",
    }


def slot_entries(
    tick: int, changed: Mapping[str, tuple[int, int]]
) -> list[dict[str, Any]]:
    """Slots that layers gave back, as JSON.

    Args:
      tick: after which.
      changed: slots before and after, by layer, as `growth.shrink` returns them.
    """
    return [
        {
            "tick": tick,
            "layer": layer,
            "seed": -1,
            "slot": -1,
            "from": str(before),
            "to": str(after),
            "outcome": Outcome.OK.name,
            "measured": {},
            "text": f"gives back {before - after} of {before} slots, since nothing "
            "germinates any more",
            "slots": [before, after],
        }
        for layer, (before, after) in changed.items()
    ]


def _seed_and_move(
    event: Mapping[str, Any],
) -> tuple[tuple[str, int], tuple[str, str, str]]:
    """Which seed an event is about, and what happened to it."""
    return (
        (event["layer"], event["seed"]),
        (event["from"], event["to"], event["outcome"]),
    )


def _entry(tick: int, layer: str, event: Event) -> dict[str, Any]:
    by = {} if event.by is By.POLICY else {"by": event.by.name}
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
        **by,
    }
