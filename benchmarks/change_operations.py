"""Counts what the arms of `change.py` spend: floating-point operations, parameters."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from change_arms import Arm, grown
from change_tasks import Task, bare_host, host_size, layer_names
from flax import nnx

from esper_jax.blueprints import operations, param_counts
from esper_jax.data import Dataset
from esper_jax.layers import SeedBed
from esper_jax.lifecycle import Stage
from esper_jax.lifecycle.stages import LIVING

__all__ = [
    "COUNTS",
    "bed_options",
    "epoch_operations",
    "most_grown",
    "run_operations",
    "steps_per_tick",
]

COUNTS = np.array([Stage.GRAFTING <= s <= Stage.FOSSILIZED for s in Stage])
"""``COUNTS[stage]``: whether the seed's blueprint is part of the model."""


def most_grown(task: Task, data: Dataset) -> tuple[int, float]:
    """The largest grown model's parameters, and the operations of a run with it.

    In that run all that the budget allows lives from the first tick to the last, and
    the gates and the controller read held-out data at each tick.
    """
    host = host_size(task, task.widths)
    room = task.budget - host if task.budget else np.inf
    total, stages, costs = host, {}, _costs(task)
    for name, cost in reversed(costs.items()):
        fits = np.cumsum(cost) <= room
        room -= (cost * fits).sum()
        total += int((cost * fits).sum())
        living = np.where(fits, Stage.FINE_TUNING, Stage.DORMANT)
        shape = (1, _num_ticks(task, task.epochs), len(living))
        stages[name] = np.broadcast_to(living, shape)
    return total, float(run_operations(task, grown(task), data, stages, costs)[0])


def epoch_operations(task: Task, arm: Arm, data: Dataset) -> float:
    """Operations of one epoch in every phase, for an arm that decides nothing.

    All seeds of the arm, if it has any, learn throughout.
    """
    costs = _costs(task)
    living = Stage.FINE_TUNING if arm.grows else Stage.DORMANT
    shape = (1, _num_ticks(task, 1))
    stages = {name: np.full((*shape, len(c)), living) for name, c in costs.items()}
    return float(run_operations(task, arm, data, stages, costs)[0])


def run_operations(
    task: Task,
    arm: Arm,
    data: Dataset,
    stages: dict[str, np.ndarray],
    costs: dict[str, np.ndarray],
) -> np.ndarray:
    """Floating-point operations of each run, (R,).

    Counts training and, in judged arms, evaluations of held-out data and of
    counterfactuals. A backward pass counts as two forward passes. A living seed counts
    in full in every stage.

    Args:
      task: what is learned.
      arm: how.
      data: the three-way split.
      stages: stage of each seed by layer, (R, T, S).
      costs: parameters of the blueprint on each chunk by layer, (S,).
    """
    sizes = _layer_sizes(task, arm.widths)
    row = sum(operations(p) * n for p, n in zip(sizes, task.positions, strict=True))
    forward = np.full(next(iter(stages.values())).shape[:2], float(row))
    asked = np.zeros_like(forward)
    for (name, stage), places in zip(
        sorted(stages.items()), task.positions, strict=False
    ):
        forward += operations(LIVING[stage] @ costs[name]) * places
        tuned = stage == Stage.FINE_TUNING
        # A tick measures the seeds as they were before its transitions, when they were
        # one tick younger.
        age = _ages(tuned) - 1
        early = age + task.gates.worth_window < task.gates.min_epochs[Stage.FINE_TUNING]
        asked += (COUNTS[stage] & (stage != Stage.FOSSILIZED) & ~(tuned & early)).sum(
            axis=-1
        )
    steps = np.full(forward.shape[1], steps_per_tick(task, len(data.train[0])))
    steps[:: len(steps) // task.phases] = 0  # a phase's first tick is before any step
    spent = 3 * task.batch * steps * forward
    if arm.judged:
        spent += len(data.held_out[0]) * forward * (1 + asked)
    return spent.sum(axis=1)


def bed_options(task: Task, arm: Arm) -> dict[str, Any]:
    """The options that ``task.make`` passes to the layers' `SeedBed`."""
    return {
        "num_seeds": task.num_seeds if arm.grows else 1,
        "capacity": task.num_seeds if arm.grows else 1,
        "blueprints": task.blueprints if arm.grows else ("noop",),
    }


def steps_per_tick(task: Task, rows: int) -> int:
    """Train steps between two ticks, with so many rows of training data."""
    return rows // task.ticks_per_epoch // task.batch


def _num_ticks(task: Task, epochs: int) -> int:
    return task.phases * (epochs * task.ticks_per_epoch + 1)


def _costs(task: Task) -> dict[str, np.ndarray]:
    """Parameters of the first blueprint on each chunk, by layer."""
    model = nnx.eval_shape(
        lambda: task.make(nnx.Rngs(0), task.widths, **bed_options(task, grown(task)))
    )
    beds = [n for _, n in nnx.iter_graph(model) if isinstance(n, SeedBed)]
    return {
        name: param_counts(bed.blueprints, bed.layout.sizes)[0]
        for name, bed in zip(layer_names(task), beds, strict=True)
    }


def _ages(flags: np.ndarray) -> np.ndarray:
    """How many ticks in a row each of ``flags`` (R, T, S) has been set, this tick
    included; 0 where it is not set."""
    ages = np.zeros_like(flags, int)
    for tick in range(flags.shape[1]):
        before = ages[:, tick - 1] if tick else 0
        ages[:, tick] = np.where(flags[:, tick], before + 1, 0)
    return ages


def _layer_sizes(task: Task, widths: Sequence[int]) -> list[int]:
    """Parameters of each layer of the host, the readout last."""

    def values() -> Any:
        model: Any = bare_host(task, widths)
        layers = [nnx.state(layer.base, nnx.Param) for layer in model.layers]
        return [*layers, nnx.state(model.readout, nnx.Param)]

    return [
        sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(layer))
        for layer in jax.eval_shape(values)
    ]
