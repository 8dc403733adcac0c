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
from esper_jax.lifecycle import LifecycleConfig, Stage, no_commands

__all__ = ["Arm", "chosen", "grown", "renewed", "replay", "static"]


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
      gates: of the lifecycle; None for the task's.
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
    gates: LifecycleConfig | None = None
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


def replay(task: Task) -> Arm:
    """Seeds germinate when ``extra`` says, and all of them are kept.

    ``extra`` (int32[S] by layer) holds the tick at which each seed germinates, or -1
    for never.
    """

    def begin(state: TrainState, extra: Any) -> TrainState:
        plan = _Plan(state.memory, jnp.zeros((), jnp.int32), extra)
        return dataclasses.replace(state, memory=plan)

    return Arm(
        name="random",
        widths=task.widths,
        grows=True,
        begin=begin,
        extra=_never,
        decide=_decide_by_plan,
        epochs=task.epochs,
        judged=True,
        gates=dataclasses.replace(task.gates, min_improvement=-1e9),
    )


def _no_extra(task: Task, count: int) -> Any:
    return np.zeros(count)


def _every_seed(task: Task, count: int) -> dict[str, np.ndarray]:
    flags = np.ones((count, task.num_seeds), bool)
    return dict.fromkeys(layer_names(task), flags)


def _never(task: Task, count: int) -> dict[str, np.ndarray]:
    plan = np.full((count, task.num_seeds), -1, np.int32)
    return dict.fromkeys(layer_names(task), plan)


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


@struct.dataclass
class _Plan:
    """Memory of `_decide_by_plan`."""

    memory: Any
    """What `policy.decide` remembers."""
    tick: jax.Array
    born: dict[str, jax.Array]
    """Tick at which each seed germinates, -1 for never."""

    @property
    def reason(self) -> jax.Array:
        """The controller's own reason, which a tick reports."""
        return self.memory.reason


def _decide_by_plan(
    seeds: Any, signals: Any, plan: _Plan, config: Any, gates: Any, costs: Any
) -> Any:
    """A policy that germinates seeds by a plan and removes none.

    The controller advances the seeds. It is shown signals of a seed worth keeping, so
    it never requests a removal. A seed whose measured worth is not above 0 is then
    refused by the lifecycle's gate, and stays in its stage.
    """
    keep = dataclasses.replace(
        config,
        enabled=False,
        max_training=10**6,
        keep_tolerance=1e9,
        shift_tolerance=-1.0,
        training_limit=65535,
        evaluation_limit=65535,
        tuning_limit=65535,
    )
    worthy = {
        name: dataclasses.replace(
            s,
            worth=jnp.ones_like(s.worth),
            mean_worth=jnp.ones_like(s.mean_worth),
        )
        for name, s in signals.items()
    }
    commands, memory = policy.decide(seeds, worthy, plan.memory, keep, gates, costs)
    commands = {
        name: dataclasses.replace(
            c,
            target=jnp.where(
                plan.born[name] == plan.tick, Stage.GERMINATED, c.target
            ).astype(jnp.int8),
        )
        for name, c in commands.items()
    }
    return commands, _Plan(memory, plan.tick + 1, plan.born)
