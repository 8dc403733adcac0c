"""The series that a monitor publishes: their names, and how reports give their values.

The names are those of Prometheus (base units, ``_total`` for what is counted); the
other writers use them as they are. No series has a label for single seeds, and those
with a label for layers have at most `MOST_LAYERS` of them and one for the others. So a
model of a million seeds has as many series as one of a hundred.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from esper_jax.growth.reports import LayerReport, TickReport
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import LIVING, NUM_STAGES, Outcome, Stage
from esper_jax.train.faults import Fault
from esper_jax.train.retreat import Rollback

__all__ = ["MOST_LAYERS", "OTHERS", "SERIES", "Meter", "Series", "Values"]

Values = Mapping[str, Mapping[str, float]]
"""Values by the series' name and the value of its label, ``""`` where it has none. What
was not measured is left out."""

MOST_LAYERS = 32
"""Layers with series of their own, the first of the model."""

OTHERS = "others"
"""Label that stands for all layers behind those."""


@dataclasses.dataclass(frozen=True)
class Series:
    """One name, and what it means."""

    name: str
    label: str
    """Name of its label; ``""`` for none."""
    unit: str
    meaning: str

    @property
    def kind(self) -> str:
        """``counter`` or ``gauge``."""
        return "counter" if self.name.endswith("_total") else "gauge"


SERIES = (
    Series("esper_ticks_total", "", "ticks", "ticks of the run"),
    Series("esper_steps_total", "", "steps", "steps of the run"),
    Series(
        "esper_train_loss",
        "",
        "the loss's",
        "mean over the steps since the last tick; NaN if it is not known",
    ),
    Series("esper_held_out_loss", "", "the loss's", "loss on held-out data"),
    Series(
        "esper_held_out_accuracy",
        "",
        "the score's",
        "score on the same data, by default a ratio from 0 to 1",
    ),
    Series(
        "esper_step_seconds",
        "",
        "seconds",
        "wall time from the last tick to this one, divided by the steps between",
    ),
    Series(
        "esper_last_tick_timestamp_seconds",
        "",
        "seconds",
        "when the last tick ended, since 1970",
    ),
    Series("esper_seeds", "stage", "seeds", "seeds in each stage"),
    Series(
        "esper_longest_stay_ticks",
        "stage",
        "ticks",
        "how long the seed that is longest in the stage is there; 0 without one",
    ),
    Series(
        "esper_blended_seeds",
        "",
        "seeds",
        "sum of all alphas: how many blueprints count in the output",
    ),
    Series(
        "esper_layer_living_seeds", "layer", "seeds", "seeds of a layer that own a slot"
    ),
    Series("esper_layer_blended_seeds", "layer", "seeds", "sum of a layer's alphas"),
    Series(
        "esper_signal_mean",
        "signal",
        "the signal's",
        "mean of a signal over the seeds that it was measured for",
    ),
    Series(
        "esper_seed_error_steps",
        "",
        "steps",
        "sum over living seeds of the steps whose gradients were not finite",
    ),
    Series(
        "esper_transitions_total",
        "to",
        "transitions",
        "transitions that happened, by the new stage",
    ),
    Series(
        "esper_refusals_total", "outcome", "requests", "refused requests, by the rule"
    ),
    Series(
        "esper_rollbacks_total",
        "fault",
        "rollbacks",
        "ticks that the governor undid, by what was wrong",
    ),
    Series(
        "esper_nonfinite_ticks_total",
        "",
        "ticks",
        "ticks whose held-out loss was NaN or infinite",
    ),
    Series(
        "esper_monitor_lost_total",
        "writer",
        "records",
        "records that a writer failed at, or was too slow for",
    ),
)
"""All of them."""

_STAGES = [stage.name for stage in Stage]
"""Names by code; an enum takes longer to tell them."""

_PASSING = {s.name: int(s) for s in Stage if LIVING[s] and s != Stage.FOSSILIZED}
"""Stages that a seed should leave again, and their codes."""

_COUNTED: dict[str, list[str]] = {
    "esper_transitions_total": _STAGES,
    "esper_refusals_total": [o.name for o in Outcome if o > Outcome.OK],
    "esper_rollbacks_total": [fault.name for fault in Fault if fault != Fault.NONE],
    "esper_nonfinite_ticks_total": [""],
}
"""Labels of what a meter counts. All begin at 0: a rate sees no first appearance."""

_SIGNALS = [
    field.name
    for field in dataclasses.fields(Signals)
    if not field.name.startswith("held_out")  # series of their own
]


class Meter:
    """Turns reports into values, and counts what happened since it was made.

    Args:
      clock: gives seconds; their origin does not matter.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._counts = {
            name: dict.fromkeys(labels, 0.0) for name, labels in _COUNTED.items()
        }
        self._last: tuple[float, int] | None = None
        self._values: dict[str, Mapping[str, float]] = {}

    def tick(self, report: TickReport) -> Values:
        """The values after a tick.

        Args:
          report: of one tick, with host values.
        """
        layers = report.layers
        stage, source = _joined(layers, "stage"), _joined(layers, "source")
        epochs, outcome = _joined(layers, "epochs"), _joined(layers, "outcome")
        alpha, errors = _joined(layers, "alpha"), _joined(layers, "errors")
        self._count("esper_transitions_total", Stage, stage[outcome == Outcome.OK])
        self._count("esper_refusals_total", Outcome, outcome[outcome > Outcome.OK])
        loss, accuracy = float(report.loss), float(report.accuracy)
        self._counts["esper_nonfinite_ticks_total"][""] += not np.isfinite(loss)
        # Epochs are counted in the stage that the seed was in before.
        stay = np.where(stage == source, epochs, 0)
        living = LIVING[stage]
        seeds = np.bincount(stage, minlength=NUM_STAGES).tolist()
        longest = np.zeros(NUM_STAGES)
        np.maximum.at(longest, stage, stay)
        self._values = {
            "esper_ticks_total": {"": float(report.tick)},
            "esper_steps_total": {"": float(report.step)},
            "esper_train_loss": {"": float(report.train_loss)},
            "esper_held_out_loss": {"": loss},
            "esper_held_out_accuracy": {} if np.isnan(accuracy) else {"": accuracy},
            "esper_step_seconds": self._step_seconds(int(report.step)),
            "esper_last_tick_timestamp_seconds": {"": time.time()},
            "esper_seeds": dict(zip(_STAGES, map(float, seeds), strict=True)),
            "esper_longest_stay_ticks": {
                name: float(longest[code]) for name, code in _PASSING.items()
            },
            "esper_blended_seeds": {"": float(alpha.sum(dtype=np.float64))},
            **_by_layer(layers),
            "esper_signal_mean": _signal_means(layers),
            "esper_seed_error_steps": {"": float(errors[living].sum(dtype=np.int64))},
        }
        return self._with_counts()

    def rollback(self, rollback: Rollback) -> Values:
        """The values of the last tick, with one more rollback counted."""
        self._counts["esper_rollbacks_total"][rollback.fault.name] += 1
        for layer in rollback.layers.values():
            outcome, target = np.ravel(layer.outcome), np.ravel(layer.target)
            done = target[outcome == Outcome.OK]
            self._count("esper_transitions_total", Stage, done)
        return self._with_counts()

    def _with_counts(self) -> Values:
        return self._values | {name: dict(c) for name, c in self._counts.items()}

    def _count(self, name: str, kind: Any, codes: Any) -> None:
        if not codes.size:
            return
        for code, number in zip(*np.unique(codes, return_counts=True), strict=True):
            self._counts[name][kind(code).name] += float(number)

    def _step_seconds(self, step: int) -> dict[str, float]:
        """Empty at first, and where no steps went by."""
        now, last = self._clock(), self._last
        self._last = now, step
        if last is None or step <= last[1]:
            return {}
        return {"": (now - last[0]) / (step - last[1])}


def _joined(layers: Mapping[str, LayerReport], field: str) -> Any:
    """A field of all seeds, one layer after the other."""
    columns = [np.ravel(getattr(layer, field)) for layer in layers.values()]
    return np.concatenate(columns) if columns else np.zeros(0, np.int32)


def _by_layer(layers: Mapping[str, LayerReport]) -> dict[str, Mapping[str, float]]:
    living: dict[str, float] = {}
    blended: dict[str, float] = {}
    for number, (name, layer) in enumerate(layers.items()):
        label = name if number < MOST_LAYERS else OTHERS
        alive = np.count_nonzero(LIVING[layer.stage])
        living[label] = living.get(label, 0.0) + float(alive)
        blended[label] = blended.get(label, 0.0) + float(np.sum(layer.alpha))
    return {"esper_layer_living_seeds": living, "esper_layer_blended_seeds": blended}


def _signal_means(layers: Mapping[str, LayerReport]) -> dict[str, float]:
    if not layers:
        return {}
    # All signals at once: most of the time goes into calls, not into numbers.
    table = np.concatenate([_signals(layer) for layer in layers.values()], axis=1)
    measured = ~np.isnan(table)
    with np.errstate(invalid="ignore", divide="ignore"):  # infinities; none measured
        sums = np.where(measured, table, 0).sum(axis=1, dtype=np.float64)
        means = sums / measured.sum(axis=1)
    return {n: m for n, m in zip(_SIGNALS, means.tolist(), strict=True) if m == m}


def _signals(layer: LayerReport) -> Float[np.ndarray, "signals S"]:
    """The signals of a layer's seeds, one row each."""
    table = np.empty((len(_SIGNALS), np.size(layer.stage)), np.float32)
    for row, name in zip(table, _SIGNALS, strict=True):
        row[:] = np.ravel(getattr(layer.signals, name))  # one, or one a seed
    return table
