"""The way back to the last good state."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from esper_jax import lifecycle
from esper_jax.growth.state import TrainState
from esper_jax.lifecycle.commands import Commands
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import NO_REQUEST, Stage
from esper_jax.lifecycle.state import SeedState
from esper_jax.train.faults import Fault

__all__ = ["LayerRetreat", "Rollback", "TrainingStopped", "retreat"]


@struct.dataclass
class LayerRetreat:
    """What a rollback did to the seeds of one layer, each field one entry a seed."""

    source: Int[Array, " S"]
    target: Int[Array, " S"]
    """The stage requested, -1 for none."""
    outcome: Int[Array, " S"]
    slot: Int[Array, " S"]
    epochs: Int[Array, " S"]
    errors: Int[Array, " S"]


@dataclasses.dataclass(frozen=True)
class Rollback:
    """One return to the last good state."""

    number: int
    """Counted from the beginning of the run, from 1."""
    failed_tick: int
    tick: int
    """The tick that training went back to."""
    fault: Fault
    reason: str
    layers: dict[str, LayerRetreat]
    """Host arrays, by layer."""


class TrainingStopped(RuntimeError):
    """Rollbacks did not help.

    Attributes:
      state: the last good state, its active seeds rolled back; to be saved. It may go
        on from there, with rows in another order.
      rollback: the last one.
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
) -> tuple[TrainState, dict[str, LayerRetreat]]:
    """Leaves a good state on another way than the one that failed. Pure and jittable.

    Args:
      state: the good state.
      rollbacks: how many there were in all, this one included.
      consecutive: how many in a row, this one included.
      gates: of the lifecycle.

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


def _roll_back(
    layer: SeedState, gates: LifecycleConfig
) -> tuple[SeedState, LayerRetreat]:
    active = (layer.stage >= Stage.TRAINING) & (layer.stage <= Stage.FINE_TUNING)
    waiting = layer.stage == Stage.GERMINATED
    nothing = jnp.full(layer.stage.shape, NO_REQUEST, jnp.int8)
    target = jnp.where(active, jnp.int8(Stage.ROLLED_BACK), nothing)
    target = jnp.where(waiting, jnp.int8(Stage.CANCELLED), target)
    after, outcome = lifecycle.transition(
        layer,
        Commands(target=target, blueprint=nothing, strategy=nothing),
        Signals.unmeasured(),
        gates,
    )
    return after, LayerRetreat(
        source=layer.stage,
        target=target,
        outcome=outcome,
        slot=layer.slot_of_seed,
        epochs=layer.epochs_in_stage,
        errors=layer.error_count,
    )
