"""What is measured about a seed; gates and controller read nothing else."""

import dataclasses

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Shaped

__all__ = ["Health", "Signals", "Statistics", "health"]


@struct.dataclass
class Signals:
    """Measurements of one tick, float32, of shape (S,) or () where all seeds share one.

    NaN is "not measured", and fails every gate that reads it.
    """

    reconstruction_loss: Float[Array, "*#S"]
    """``mean((f(y) - y)**2)`` over the seed's chunk, in squared activation units."""
    performance_delta: Float[Array, "*#S"]
    """Worth of the seed: held-out loss with its alpha at 0 less the loss as it is."""
    stability_score: Float[Array, "*#S"]
    """1 less the deviation of the held-out loss over its first value; at most 1."""
    error_rate: Float[Array, "*#S"]
    """Share of this tick's steps in which the seed's gradients were not finite."""
    total_improvement: Float[Array, "*#S"]
    """Worth of the seed, averaged over the ticks in its stage that measured it."""
    final_stability: Float[Array, "*#S"]
    """As ``stability_score``, read by the last gate."""
    drift: Float[Array, "*#S"]
    """``|w - ema| / |ema|`` of the layer's host weights."""
    loss_variance: Float[Array, "*#S"]
    """Variance of the held-out loss over recent ticks."""
    accuracy_variance: Float[Array, "*#S"]
    """Variance of the held-out accuracy over recent ticks."""
    grad_norm: Float[Array, "*#S"]
    """Mean global norm of the host's gradient over this tick's steps."""
    held_out_loss: Float[Array, "*#S"]
    held_out_accuracy: Float[Array, "*#S"]
    gain: Float[Array, "*#S"]
    """First-order gain of grafting the seed: minus the training loss's gradient with
    respect to its alpha, averaged over this tick's steps."""
    gradient_ratio: Float[Array, "*#S"]
    """Norm of the gradient of a living seed's blueprint over that of its host layer's
    weights, each averaged over this tick's steps."""
    chunk_gradient: Float[Array, "*#S"]
    """Norm of the gradient of the host weights that write the chunk, averaged over this
    tick's steps."""
    parameters: Float[Array, "*#S"]
    """Parameters of a living seed's blueprint."""
    operations: Float[Array, "*#S"]
    """Floating-point operations that it adds to the forward pass of one row."""

    @classmethod
    def unmeasured(cls, **measured: Shaped[Array, "*#S"] | float) -> "Signals":
        """Signals that are NaN but for those given by name."""
        names = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(measured) - set(names))
        if unknown:
            raise TypeError(f"unknown signal {unknown[0]!r}; expected one of {names}")
        return cls(
            **{n: jnp.asarray(measured.get(n, jnp.nan), jnp.float32) for n in names}
        )


@struct.dataclass
class Statistics:
    """Sums over the activations of each chunk, in float32."""

    count: Float[Array, "*S"]
    total: Float[Array, "*S"]
    squares: Float[Array, "*S"]
    near_zero: Float[Array, "*S"]
    """How many ``|x| < 1e-6``."""


@struct.dataclass
class Health:
    """How alive the activations of each chunk are; NaN where nothing was counted."""

    mean: Float[Array, "*S"]
    variance: Float[Array, "*S"]
    dead: Float[Array, "*S"]
    """Share of ``|x| < 1e-6``."""
    score: Float[Array, "*S"]
    """``0.5 * min(1, variance / 0.01) + 0.5 * (1 - dead)``, in [0, 1]."""


def health(statistics: Statistics) -> Health:
    """Health of each chunk from its accumulated statistics."""
    count = jnp.where(statistics.count > 0, statistics.count, jnp.nan)
    mean = statistics.total / count
    variance = jnp.maximum(0.0, statistics.squares / count - mean**2)
    dead = statistics.near_zero / count
    score = 0.5 * jnp.minimum(1.0, variance / 0.01) + 0.5 * (1.0 - dead)
    return Health(mean=mean, variance=variance, dead=dead, score=score)
