"""What a tick measured and did; leaves the device once a tick."""

from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt

from esper_jax.lifecycle.signals import Signals

__all__ = ["LayerReport", "TickReport"]


@struct.dataclass
class LayerReport:
    """What a tick did to the seeds of one layer, each field one entry a seed."""

    outcome: Int[Array, " S"]
    source: Int[Array, " S"]
    target: Int[Array, " S"]
    """The stage requested, -1 for none."""
    slot: Int[Array, " S"]
    """The slot owned before or after."""
    stage: Int[Array, " S"]
    """The stage after the tick."""
    alpha: Float[Array, " S"]
    epochs: UInt[Array, " S"]
    """Epochs in the source stage."""
    errors: UInt[Array, " S"]
    signals: Signals


@struct.dataclass
class TickReport:
    """What a tick measured and did; leaves the device once a tick."""

    tick: Int[Array, ""]
    step: Int[Array, ""]
    train_loss: Float[Array, ""]
    loss: Float[Array, ""]
    """On the held-out data that the gates read."""
    accuracy: Float[Array, ""]
    reason: Int[Array, ""]
    """Why the controller germinated something, or did not: `Reason`."""
    replicas_agree: Bool[Array, ""]
    """False if devices were found to have different states; only looked for in debug
    mode."""
    layers: dict[str, LayerReport]
