"""What a tick measured and did. A report leaves the device once a tick."""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt

from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.state import SeedState

__all__ = ["LayerReport", "SeedMoves", "TickReport", "moves_of"]


@struct.dataclass
class SeedMoves:
    """What was asked of one layer's seeds and what came of it, one entry a seed."""

    outcome: Int[Array, "*S"]
    """`Outcome` of the request."""
    source: Int[Array, "*S"]
    """The stage before."""
    target: Int[Array, "*S"]
    """The stage requested, -1 for none."""
    slot: Int[Array, "*S"]
    """The slot owned before or after, -1 for none."""
    epochs: UInt[Array, "*S"]
    """Epochs in the source stage."""
    errors: UInt[Array, "*S"]
    """Steps with gradients that were not finite, since germination."""


@struct.dataclass
class LayerReport(SeedMoves):
    """What a tick did to the seeds of one layer, one entry a seed."""

    stage: Int[Array, "*S"]
    """The stage after the tick."""
    alpha: Float[Array, "*S"]
    """How much each seed's blueprint counts after the tick."""
    blueprint: Int[Array, "*S"]
    """Id of the blueprint in the seed's slot. Only meaningful while the seed lives."""
    signals: Signals


@struct.dataclass
class TickReport:
    """What a tick measured and did."""

    tick: Int[Array, ""]
    step: Int[Array, ""]
    train_loss: Float[Array, ""]
    """Mean over the steps since the last tick; NaN if there were none."""
    loss: Float[Array, ""]
    """On the held-out data that the gates read."""
    accuracy: Float[Array, ""]
    """Score on the same data."""
    reason: Int[Array, ""]
    """`Reason` that the policy gave for germinating or not; -1 if it gave none."""
    replicas_agree: Bool[Array, ""]
    """False if devices were found to have different states. Only looked for in debug
    mode."""
    layers: dict[str, LayerReport]


def moves_of(
    before: SeedState,
    after: SeedState,
    target: Int[Array, "*S"],
    outcome: Int[Array, "*S"],
) -> dict[str, Array]:
    """The fields of `SeedMoves` for a transition from ``before`` to ``after``."""
    return {
        "outcome": outcome,
        "source": before.stage,
        "target": target,
        "slot": jnp.maximum(before.slot_of_seed, after.slot_of_seed),
        "epochs": before.epochs_in_stage,
        "errors": before.error_count,
    }
