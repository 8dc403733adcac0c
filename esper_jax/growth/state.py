"""All that a run is, as one frozen pytree."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Key

from esper_jax.blueprints import Bank
from esper_jax.growth.gradients import GradientSums
from esper_jax.lifecycle.state import SeedState

__all__ = ["LOSS_WINDOW", "Arrays", "GovernorMemory", "Monitor", "TrainState"]

Arrays = dict[str, Any]


@struct.dataclass
class Monitor:
    """Running measurements of the whole model between ticks."""

    initial_loss: Float[Array, ""]
    """First finite held-out loss, the scale of the stability; NaN before it."""
    loss_mean: Float[Array, ""]
    loss_variance: Float[Array, ""]
    accuracy_mean: Float[Array, ""]
    accuracy_variance: Float[Array, ""]
    host_mean: Arrays
    """Running mean of the host weights of the layers that can grow, by name."""
    train_loss: Float[Array, ""]
    """Training loss, summed over the tick's steps."""
    grad_norm: Float[Array, ""]
    """Global norm of the host's gradient, summed over the tick's steps."""
    gradients: dict[str, GradientSums]
    """Gradient norms of each layer, summed over the tick's steps."""
    steps: Int[Array, ""]

    @classmethod
    def start(
        cls, host_mean: dict[str, Arrays], num_seeds: Mapping[str, int]
    ) -> "Monitor":
        """A monitor that has measured nothing yet."""
        # One array a field: the state is donated, so no two leaves may share one.
        unknown = {
            name: jnp.full((), jnp.nan, jnp.float32)
            for name in (
                "initial_loss",
                "loss_mean",
                "loss_variance",
                "accuracy_mean",
                "accuracy_variance",
            )
        }
        return cls(
            **unknown,
            host_mean=host_mean,
            train_loss=jnp.zeros((), jnp.float32),
            grad_norm=jnp.zeros((), jnp.float32),
            gradients={name: GradientSums.start(s) for name, s in num_seeds.items()},
            steps=jnp.zeros((), jnp.int32),
        )


LOSS_WINDOW = 16
"""Ticks whose losses the governor remembers."""


@struct.dataclass
class GovernorMemory:
    """What the governor remembers; part of the state, so that a restored run judges as
    one that was never stopped."""

    losses: Float[Array, "W 2"]
    """Train and held-out loss of the last good ticks, newest first; NaN for none."""
    best: Float[Array, " 2"]
    """The lowest of each."""
    rollbacks: Int[Array, ""]
    """Since the beginning of the run; part of the order of the rows."""
    consecutive: Int[Array, ""]
    """Since the last good tick."""

    @classmethod
    def start(cls) -> "GovernorMemory":
        """A memory without any tick."""
        return cls(
            losses=jnp.full((LOSS_WINDOW, 2), jnp.nan, jnp.float32),
            best=jnp.full((2,), jnp.inf, jnp.float32),
            rollbacks=jnp.zeros((), jnp.int32),
            consecutive=jnp.zeros((), jnp.int32),
        )


@struct.dataclass
class TrainState:
    """All that a run is: restored, it goes on as if it had never stopped.

    The dictionaries are keyed by the path of the variable (``layers/0/base/kernel``) or
    of the layer (``layers/0``) in the model.
    """

    step: Int[Array, ""]
    """Steps done: with the seed of the data order, the position in the data."""
    ticks: Int[Array, ""]
    rng: Key[Array, ""]
    params: Arrays
    opt_state: Any
    banks: dict[str, Bank]
    bank_opt: dict[str, Any]
    seeds: dict[str, SeedState]
    rest: Arrays
    """Every other variable of the model: batch statistics, random streams, probes."""
    memory: Any
    """`ControllerMemory`, or what another policy than `policy.decide` remembers."""
    monitor: Monitor
    governor: GovernorMemory
