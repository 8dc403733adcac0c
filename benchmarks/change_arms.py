"""The arms of `change.py`: ways to spend parameters on one task.

An `Arm` says how a run starts and which policy decides. `change_runs.Runner` runs it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from change_tasks import Task, layer_names
from flax import struct

from esper_jax import policy
from esper_jax.growth.state import TrainState
from esper_jax.lifecycle import Stage, no_commands

__all__ = ["Arm", "chosen", "grown", "renewed", "static"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train.

    Args:
      name: of the arm, for a reader of the results.
      widths: of the host's layers.
      grows: whether the model has seeds.
      begin: ``begin(state, extra) -> state``, called before the first step.
      extra: ``extra(task, count) -> extra``, the value for each of ``count`` runs when
        the caller of the runner passes none. Each leaf has a leading axis of runs.
      decide: the policy, with the signature of `policy.decide`.
      epochs: passes over the training data in each phase.
      judged: whether counterfactual evaluations decide about its seeds.
      renews: whether all blueprints are drawn afresh when the data change.
    """

    name: str
    widths: tuple[int, ...]
    grows: bool
    begin: Callable[[TrainState, Any], TrainState]
    extra: Callable[[Task, int], Any]
    decide: Callable[..., Any]
    epochs: int
    judged: bool = False
    renews: bool = False


def grown(task: Task) -> Arm:
    """The controller decides when, where and what grows."""
    return Arm(
        name="grown",
        widths=task.widths,
        grows=True,
        begin=lambda state, _: state,
        extra=_no_extra,
        decide=policy.decide,
        epochs=task.epochs,
        judged=True,
    )


def static(
    task: Task, name: str, widths: tuple[int, ...], epochs: int | None = None
) -> Arm:
    """A host in which nothing grows."""
    return Arm(
        name=name,
        widths=widths,
        grows=False,
        begin=lambda state, _: _without_memory(state),
        extra=_no_extra,
        decide=_hold,
        epochs=epochs or task.epochs,
    )


def chosen(task: Task, name: str, epochs: int | None = None) -> Arm:
    """Given seeds learn and count from the first step to the last.

    ``extra`` (bool[S] by layer) names them: all seeds unless the caller passes others,
    such as those of a grown run's final topology.
    """

    def begin(state: TrainState, extra: Any) -> TrainState:
        return _without_memory(_alive(state, extra))

    return Arm(
        name=name,
        widths=task.widths,
        grows=True,
        begin=begin,
        extra=_every_seed,
        decide=_hold,
        epochs=epochs or task.epochs,
    )


def renewed(task: Task) -> Arm:
    """All seeds count throughout; their blueprints are redrawn when the data change."""
    return dataclasses.replace(chosen(task, "renewed"), renews=True)


def _no_extra(task: Task, count: int) -> Any:
    return np.zeros(count)


def _every_seed(task: Task, count: int) -> dict[str, np.ndarray]:
    flags = np.ones((count, task.num_seeds), bool)
    return dict.fromkeys(layer_names(task), flags)


def _alive(state: TrainState, where: dict[str, jax.Array]) -> TrainState:
    """``state`` with the seeds of ``where`` (bool[S] by layer) in FINE_TUNING."""
    seeds = {}
    for name, layer in state.seeds.items():
        flags = where[name]
        slot = jnp.where(flags, jnp.arange(layer.num_seeds), -1).astype(jnp.int32)
        seeds[name] = dataclasses.replace(
            layer,
            stage=jnp.where(flags, Stage.FINE_TUNING, layer.stage).astype(jnp.int8),
            slot_of_seed=slot,
            seed_of_slot=slot,  # as many slots as seeds
        )
    return dataclasses.replace(state, seeds=seeds)


@struct.dataclass
class _Nothing:
    """Memory of `_hold`; a tick reports its reason."""

    reason: jax.Array


def _without_memory(state: TrainState) -> TrainState:
    memory = _Nothing(reason=jnp.asarray(policy.Reason.DISABLED, jnp.int8))
    return dataclasses.replace(state, memory=memory)


def _hold(seeds: Any, signals: Any, memory: Any, *_: Any) -> Any:
    """A policy that never requests anything."""
    return {name: no_commands(s.num_seeds) for name, s in seeds.items()}, memory
