"""What a tick measured of single seeds, as the records of a run keep it."""

from typing import Any

import numpy as np

from esper_jax.growth.reports import LayerReport, TickReport
from esper_jax.lifecycle.stages import Stage

__all__ = ["seeds_of_tick"]


def seeds_of_tick(report: TickReport) -> dict[str, dict[str, list[Any]]]:
    """What events alone do not tell of the seeds in a tick.

    A seed has an entry if it germinated, is being grafted (its alpha is on the way), or
    its worth was measured. Those are at most as many as there are slots, and fossils,
    which grow in number, are not among them.

    Args:
      report: of the tick, with host values.

    Returns:
      By layer, columns of equal length, in the order of the seeds: ``seed``, ``alpha``
      after the tick, ``worth`` at its beginning, ``blueprint`` (its id) and
      ``parameters``. None is not measured. Layers without an entry are left out.
    """
    columns = {name: _columns(layer) for name, layer in report.layers.items()}
    return {name: found for name, found in columns.items() if found["seed"]}


def _columns(layer: LayerReport) -> dict[str, list[Any]]:
    stage = np.asarray(layer.stage)
    worth = np.broadcast_to(layer.signals.worth, stage.shape)
    parameters = np.broadcast_to(layer.signals.parameters, stage.shape)
    told = (stage == Stage.GERMINATED) | (stage == Stage.GRAFTING) | np.isfinite(worth)
    seeds = np.flatnonzero(told)
    return {
        "seed": seeds.tolist(),
        "alpha": [_short(x) for x in np.asarray(layer.alpha)[seeds]],
        "worth": [_short(x) for x in worth[seeds]],
        "blueprint": np.asarray(layer.blueprint)[seeds].tolist(),
        "parameters": [
            int(x) if np.isfinite(x) else None for x in parameters[seeds].tolist()
        ],
    }


def _short(value: Any) -> float | None:
    """A float32 in as few digits as give it back."""
    return float(f"{float(value):.9g}") if np.isfinite(value) else None
