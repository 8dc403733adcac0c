"""The tasks of `change.py`: data, hosts, what may grow in them, and what is tuned.

All settings that were chosen by looking at results are in this file.
`benchmarks/RESULTS.md` says what else was tried, and how.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from esper_jax import data
from esper_jax.data import Dataset
from esper_jax.hosts import MLP
from esper_jax.lifecycle import GraftConfig, LifecycleConfig, Stage
from esper_jax.policy import ControllerConfig

__all__ = [
    "TASKS",
    "Task",
    "bare_host",
    "host_size",
    "layer_names",
    "widen",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A data set, a host, and how it grows.

    Args:
      data: makes the three-way split from a random seed.
      make: ``make(rngs, widths, **options) -> model``; the options are ``num_seeds``
        and those of the layers' `SeedBed`.
      widths: width of each of the host's layers.
      num_seeds: seeds, and slots, of each layer.
      blueprints: names of the blueprints that may grow.
      positions: how often each layer, the readout last, is applied to one row.
      budget: most parameters of a grown model, host included; 0 for no limit.
      epochs: passes over the training data in each phase.
      batch: rows a step.
      grid: the points that every arm is tuned over, each ``(learning rate, weight
        decay, blueprints' rate over the host's)``.
      policy: numbers of the controller; the runner fills in its ``budget``.
      gates: numbers of the lifecycle.
      ticks_per_epoch: ticks an epoch.
      phases: how many data sets a run learns one after the other.
      change: ``change(key, rows) -> rows`` makes a phase's data.
    """

    data: Callable[[int], Dataset]
    make: Callable[..., nnx.Module]
    widths: tuple[int, ...]
    num_seeds: int
    blueprints: tuple[str, ...]
    positions: tuple[int, ...]
    budget: int
    epochs: int
    batch: int
    grid: tuple[tuple[float, float, float], ...]
    policy: ControllerConfig
    gates: LifecycleConfig
    ticks_per_epoch: int
    phases: int
    change: Callable[[Any, Any], Any]


def _mlp(inputs: int) -> Callable[..., nnx.Module]:
    def make(rngs: nnx.Rngs, widths: Sequence[int], **options: Any) -> nnx.Module:
        return MLP(inputs, widths, 10, activation="gelu", rngs=rngs, **options)

    return make


def _fresh_mnist1d(seed: int) -> Dataset:
    """`data.mnist1d` with the test data that the recipe makes from random seed 43.

    No setting was chosen by looking at results on them.
    """
    from mnist1d.data import get_dataset_args, make_dataset

    arguments = get_dataset_args()
    arguments.seed = 43
    other = make_dataset(arguments)
    test = other["x_test"].astype(np.float32), other["y_test"].astype(np.int32)
    return data.mnist1d(seed)._replace(test=test)


_AT_ONCE = ControllerConfig(
    when="period",
    period=1,
    where="gradient",
    births=16,
    max_training=16,
    training_limit=1,
    evaluation_limit=6,
    tuning_limit=65535,
    keep_tolerance=1.0,
    shift_tolerance=0.5,
)
"""Grows every seed at the first tick, and again whenever the data have changed."""

_AGES = dict.fromkeys(Stage, 0) | {
    Stage.TRAINING: 1,
    Stage.GRAFTING: 1,
    Stage.STABILIZATION: 1,
    Stage.EVALUATING: 1,
    Stage.FINE_TUNING: 65535,
}
_BY_WORTH = LifecycleConfig(
    min_epochs=tuple(_AGES[s] for s in Stage),
    reconstruction_threshold=1e9,
    min_stability=-1e9,
    min_improvement=0.0,
    min_final_stability=-1e9,
    worth_window=5,
    grafting=GraftConfig(ramp_duration=1, min_alpha=0.5),
)
"""Gates of short lives that judge a seed by its worth alone.

The gates on reconstruction and stability are wide open. The worth of a seed in
FINE_TUNING is measured only when a decision is near, since each measurement costs an
evaluation.
"""


def _grid(
    rates: Sequence[float], decays: Sequence[float], shares: Sequence[float]
) -> tuple[tuple[float, float, float], ...]:
    return tuple(itertools.product(rates, decays, shares))


def _other_labels(key: Any, rows: Any) -> Any:
    """``rows`` with the ten labels permuted."""
    x, y = rows
    return x, jax.random.permutation(key, 10)[y]


def _other_inputs(key: Any, rows: Any) -> Any:
    """``rows`` with the inputs permuted."""
    x, y = rows
    return x[:, jax.random.permutation(key, x.shape[1])], y


_LABELS = Task(
    data=data.mnist1d,
    make=_mlp(40),
    widths=(32, 32),
    num_seeds=4,
    blueprints=("context",),
    positions=(1, 1, 1),
    budget=0,
    epochs=30,
    ticks_per_epoch=10,
    batch=85,
    phases=6,
    grid=_grid((1e-2, 2e-2), (0.1, 0.3, 0.6), (0.3, 1.0)),
    policy=_AT_ONCE,
    gates=_BY_WORTH,
    change=_other_labels,
)
TASKS = {
    "mnist1d-labels": _LABELS,
    "mnist1d-inputs": dataclasses.replace(_LABELS, change=_other_inputs),
    "digits-labels": dataclasses.replace(
        _LABELS,
        data=data.digits,
        make=_mlp(64),
        widths=(16, 16),
        ticks_per_epoch=2,
        batch=49,
    ),
}
for _name in ("mnist1d-labels", "mnist1d-inputs"):
    TASKS[f"{_name}-fresh"] = dataclasses.replace(TASKS[_name], data=_fresh_mnist1d)


def bare_host(task: Task, widths: Sequence[int]) -> nnx.Module:
    """A host of the given widths with as little in it that can grow as possible."""
    return task.make(nnx.Rngs(0), widths, num_seeds=1, capacity=1, blueprints=("noop",))


def host_size(task: Task, widths: Sequence[int]) -> int:
    """Parameters of the host with the given widths, counted on the model itself."""

    def values() -> Any:
        return nnx.state(bare_host(task, widths), nnx.All(nnx.Param, _not_blueprint))

    shapes = jax.tree.leaves(jax.eval_shape(values))
    return sum(int(np.prod(leaf.shape)) for leaf in shapes)


def layer_names(task: Task) -> list[str]:
    """Names of the layers that can grow, as in ``state.seeds`` of a `TrainState`."""
    return [f"layers/{i}" for i in range(len(task.widths))]


def _not_blueprint(path: Any, value: Any) -> bool:
    return "bed" not in path


def widen(task: Task, parameters: float) -> tuple[int, ...]:
    """Widths of the narrowest host with at least so many parameters.

    They keep the proportions of the task's widths, to rounding.
    """
    step = 0
    while True:
        widths = tuple(w + round(step * w / max(task.widths)) for w in task.widths)
        if host_size(task, widths) >= parameters:
            return widths
        step += 1
