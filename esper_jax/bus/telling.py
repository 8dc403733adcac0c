"""Messages of what a tick or a rollback did."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from esper_jax.bus.messages import (
    CapacityChanged,
    LayerHealth,
    Message,
    RolledBack,
    SeedMoved,
    TickReported,
)
from esper_jax.growth.reports import TickReport
from esper_jax.lifecycle.stages import NUM_STAGES, Stage
from esper_jax.monitor.words import why

__all__ = ["events_told", "rollback_told", "tick_told"]


def tick_told(report: TickReport) -> Iterator[Message]:
    """What a tick measured: one message for it, and one for each layer.

    Args:
      report: with host values.
    """
    counts = np.zeros(NUM_STAGES, np.int64)
    for layer in report.layers.values():
        counts += np.bincount(layer.stage, minlength=NUM_STAGES)
    yield TickReported(
        tick=int(report.tick),
        step=int(report.step),
        train_loss=_number(report.train_loss),
        loss=_number(report.loss),
        accuracy=_number(report.accuracy),
        seeds={stage.name: int(counts[stage]) for stage in Stage},
        reason=why(int(report.reason)),
    )
    for name, layer in report.layers.items():
        shape = np.shape(layer.stage)
        yield LayerHealth(
            tick=int(report.tick),
            layer=name,
            stage=np.asarray(layer.stage).tolist(),
            health=_column(np.nan if layer.health is None else layer.health, shape),
            alpha=_column(layer.alpha, shape),
            worth=_column(layer.signals.worth, shape),
        )


def events_told(
    events: Sequence[Mapping[str, Any]],
) -> Iterator[SeedMoved | CapacityChanged]:
    """The events of seeds and slots, as ``events.jsonl`` has them, as messages.

    What is of no layer, as a change of the config, is passed over.
    """
    for event in events:
        if "slots" in event:
            before, after = event["slots"]
            yield CapacityChanged(
                tick=event["tick"],
                layer=event["layer"],
                before=before,
                after=after,
                text=event["text"],
            )
        elif event["layer"] and event["seed"] >= 0:
            by = "GOVERNOR" if "rollback" in event else event.get("by", "POLICY")
            yield SeedMoved(
                tick=event["tick"],
                layer=event["layer"],
                seed=event["seed"],
                source=event["from"],
                to=event["to"],
                outcome=event["outcome"],
                measured=dict(event.get("measured", {})),
                by=by,
                text=event.get("text", ""),
            )


def rollback_told(entry: Mapping[str, Any]) -> RolledBack:
    """A rollback, as ``rollbacks.jsonl`` has it, as a message."""
    return RolledBack(
        number=entry["number"],
        failed_tick=entry["failed_tick"],
        tick=entry["tick"],
        fault=entry["fault"],
        text=entry["text"],
    )


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _column(values: Any, shape: tuple[int, ...]) -> list[float | None]:
    """One number a seed. JSON gets null for what is not finite."""
    return _short(np.broadcast_to(np.asarray(values), shape)).tolist()


def _short(values: np.ndarray) -> np.ndarray:
    """float32 values as doubles that JSON writes in nine digits, and none is lost."""
    exact = values.astype(np.float64)
    with np.errstate(all="ignore"):
        power = 10.0 ** np.clip(8 - np.floor(np.log10(np.abs(exact))), 0, 22)
        rounded = np.round(exact * power) / power
        same = rounded.astype(np.float32) == exact
    return np.where(same, rounded, exact)
