"""What is measured about a seed. Gates and policies read nothing else."""

import dataclasses

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Shaped

__all__ = [
    "DECAY",
    "Health",
    "Signals",
    "Statistics",
    "health",
    "running_mean",
    "running_moments",
]

DECAY = 0.9
"""Of every running mean over ticks."""


@struct.dataclass
class Signals:
    """Measurements of one tick, float32, of shape (S,); () where all seeds share one.

    NaN means "not measured". Every gate that reads a NaN refuses.
    """

    reconstruction_loss: Float[Array, "..."]
    """``mean((f(y) - y)**2)`` over the seed's chunk, in squared activation units."""
    worth: Float[Array, "..."]
    """Held-out loss with the seed's alpha at 0, less the loss as it is. The gates call
    it ``performance_delta``."""
    mean_worth: Float[Array, "..."]
    """``worth`` averaged over the ticks in the seed's stage that measured it. The gates
    call it ``total_improvement``."""
    stability: Float[Array, "..."]
    """1 less the standard deviation of the held-out loss over its first value; at most
    1. The gates call it ``stability_score`` and ``final_stability``."""
    error_rate: Float[Array, "..."]
    """Share of this tick's steps in which the seed's gradients were not finite."""
    drift: Float[Array, "..."]
    """``|w - ema| / |ema|`` of the layer's host weights."""
    loss_variance: Float[Array, "..."]
    """Variance of the held-out loss over recent ticks."""
    accuracy_variance: Float[Array, "..."]
    """Variance of the held-out accuracy over recent ticks."""
    grad_norm: Float[Array, "..."]
    """Global norm of the host's gradient, averaged over this tick's steps."""
    held_out_loss: Float[Array, "..."]
    held_out_accuracy: Float[Array, "..."]
    gain: Float[Array, "..."]
    """First-order gain of grafting the seed: minus the training loss's gradient with
    respect to its alpha, averaged over this tick's steps."""
    gradient_ratio: Float[Array, "..."]
    """Gradient norm of a living seed's blueprint over that of its host layer's weights,
    each averaged over this tick's steps."""
    chunk_gradient: Float[Array, "..."]
    """Gradient norm of the host weights that write the chunk, averaged over this tick's
    steps."""
    weight_gradient: Float[Array, "..."]
    """Squared Frobenius norm of the gradient of the layer's kernel, averaged over the
    steps in which a newborn blueprint that starts in the gradient's direction has
    collected it. The ticks that it waits are taken to have as many steps as this."""
    parameters: Float[Array, "..."]
    """Parameters of a living seed's blueprint."""
    operations: Float[Array, "..."]
    """Floating-point operations that the seed adds to the forward pass of one row."""

    @classmethod
    def unmeasured(cls, **measured: Shaped[Array, "*#S"] | float) -> "Signals":
        """Signals that are NaN except those given by name.

        Raises:
          TypeError: if a name is no signal.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(measured) - set(names))
        if unknown:
            raise TypeError(f"unknown signal {unknown[0]!r}; expected one of {names}")
        return cls(
            **{n: jnp.asarray(measured.get(n, jnp.nan), jnp.float32) for n in names}
        )


@struct.dataclass
class Statistics:
    """Sums over the activations of each chunk, float32."""

    count: Float[Array, "*S"]
    total: Float[Array, "*S"]
    squares: Float[Array, "*S"]
    near_zero: Float[Array, "*S"]
    """How many activations have ``|x| < 1e-6``."""


@struct.dataclass
class Health:
    """How alive the activations of each chunk are; NaN where nothing was counted."""

    mean: Float[Array, "*S"]
    variance: Float[Array, "*S"]
    dead: Float[Array, "*S"]
    """Share of activations with ``|x| < 1e-6``."""
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


def running_mean(
    mean: Float[Array, "*N"], value: Float[Array, "*N"]
) -> Float[Array, "*N"]:
    """The exponential running mean with one more value.

    Args:
      mean: the mean so far; NaN before the first value.
      value: the new value. One that is not finite leaves the mean as it was.
    """
    moved = jnp.where(jnp.isnan(mean), value, DECAY * mean + (1 - DECAY) * value)
    return jnp.where(jnp.isfinite(value), moved, mean)


def running_moments(
    mean: Float[Array, "*N"], variance: Float[Array, "*N"], value: Float[Array, "*N"]
) -> tuple[Float[Array, "*N"], Float[Array, "*N"]]:
    """The exponential running mean and variance with one more value.

    Follows T. Finch, Incremental calculation of weighted mean and variance, 2009. The
    mean is that of `running_mean` to rounding.

    Args:
      mean: the mean so far; NaN before the first value.
      variance: the variance so far; NaN before the first value.
      value: the new value. One that is not finite leaves both as they were.
    """
    first, measured = jnp.isnan(mean), jnp.isfinite(value)
    change = value - mean
    new_mean = jnp.where(first, value, mean + (1 - DECAY) * change)
    new_variance = jnp.where(first, 0.0, DECAY * (variance + (1 - DECAY) * change**2))
    return (
        jnp.where(measured, new_mean, mean),
        jnp.where(measured, new_variance, variance),
    )
