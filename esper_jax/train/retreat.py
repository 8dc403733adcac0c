"""The way back to the last good state."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from esper_jax import lifecycle
from esper_jax.growth.reports import SeedMoves, moves_of
from esper_jax.growth.state import TrainState
from esper_jax.lifecycle.commands import Commands
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import NO_REQUEST, Stage, is_active
from esper_jax.lifecycle.state import SeedState
from esper_jax.train.faults import Fault

__all__ = ["Rollback", "TrainingStopped", "retreat"]


@dataclasses.dataclass(frozen=True)
class Rollback:
    """One return to the last good state."""

    number: int
    """Counted from 1 since the beginning of the run."""
    failed_tick: int
    tick: int
    """The tick that training went back to."""
    fault: Fault
    reason: str
    layers: dict[str, SeedMoves]
    """What became of the seeds of each layer, as host arrays."""


class TrainingStopped(RuntimeError):
    """Rollbacks did not help.

    Attributes:
      state: the last good state with its active seeds rolled back. Save it: training
        can go on from it, with rows in another order.
      rollback: the last rollback.
    """

    def __init__(self, message: str, state: TrainState, rollback: Rollback) -> None:
        super().__init__(message)
        self.state = state
        self.rollback = rollback


def retreat(
    state: TrainState,
    rollbacks: Int[Array, ""],
    consecutive: Int[Array, ""],
    gates: LifecycleConfig,
) -> tuple[TrainState, dict[str, SeedMoves]]:
    """Leaves a good state on another way than the one that failed; pure and jittable.

    Args:
      state: the good state.
      rollbacks: number of rollbacks in all, this one included.
      consecutive: number of rollbacks in a row, this one included.
      gates: the rules of the lifecycle.

    Returns:
      The state with its active seeds rolled back and another random key, and what
      became of the seeds of each layer.
    """
    seeds, report = {}, {}
    for name, layer in state.seeds.items():
        seeds[name], report[name] = _roll_back(layer, gates)
    return dataclasses.replace(
        state,
        rng=jax.random.fold_in(state.rng, rollbacks),
        seeds=seeds,
        governor=dataclasses.replace(
            state.governor, rollbacks=rollbacks, consecutive=consecutive
        ),
    ), report


def _roll_back(layer: SeedState, gates: LifecycleConfig) -> tuple[SeedState, SeedMoves]:
    waiting = layer.stage == Stage.GERMINATED
    nothing = jnp.full(layer.stage.shape, NO_REQUEST, jnp.int8)
    target = jnp.where(is_active(layer.stage), jnp.int8(Stage.ROLLED_BACK), nothing)
    target = jnp.where(waiting, jnp.int8(Stage.CANCELLED), target)
    after, outcome = lifecycle.transition(
        layer,
        Commands(target=target, blueprint=nothing, strategy=nothing),
        Signals.unmeasured(),
        gates,
    )
    return after, SeedMoves(**moves_of(layer, after, target, outcome))
