"""`TrainState`: the whole state of a run, as one frozen pytree."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Key

from esper_jax.blueprints import Bank
from esper_jax.growth.gradients import GradientSums
from esper_jax.lifecycle.state import SeedState

__all__ = [
    "LOSS_WINDOW",
    "Arrays",
    "GovernorMemory",
    "GrowthState",
    "Monitor",
    "TrainState",
]

Arrays = dict[str, Any]
"""Arrays or pytrees of arrays by the name of a variable or a layer."""


@struct.dataclass
class Monitor:
    """Running measurements of the whole model between ticks."""

    initial_loss: Float[Array, ""]
    """First finite held-out loss, which scales the stability; NaN before it."""
    loss_mean: Float[Array, ""]
    """Running mean of the held-out loss; NaN before the first."""
    loss_variance: Float[Array, ""]
    """Running variance of the held-out loss; NaN before the first."""
    accuracy_mean: Float[Array, ""]
    """Running mean of the held-out accuracy; NaN before the first."""
    accuracy_variance: Float[Array, ""]
    """Running variance of the held-out accuracy; NaN before the first."""
    host_mean: Arrays
    """Running mean of the host weights of each layer that can grow, by layer."""
    train_loss: Float[Array, ""]
    """Training loss, summed over the steps since the last tick."""
    grad_norm: Float[Array, ""]
    """Global norm of the host's gradient, summed over the steps since the last tick."""
    gradients: dict[str, GradientSums]
    """Gradient norms of each layer, summed over the steps since the last tick."""
    steps: Int[Array, ""]
    """Steps since the last tick."""

    @classmethod
    def start(
        cls, host_mean: dict[str, Arrays], num_seeds: Mapping[str, int]
    ) -> "Monitor":
        """A monitor that has measured nothing yet.

        Args:
          host_mean: host weights of the layers whose drift is measured, by layer.
          num_seeds: seeds of the layers whose gradients are measured, by layer.
        """
        # One array per field: the state is donated, so no two leaves may share one.
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


@struct.dataclass
class GrowthState:
    """What growth remembers beside the seeds and their banks."""

    step: Int[Array, ""]
    """Steps so far."""
    ticks: Int[Array, ""]
    rng: Key[Array, ""]
    """Draws newborn blueprints."""
    memory: Any
    """What the policy remembers."""
    monitor: Monitor


LOSS_WINDOW = 16
"""``W``, the number of good ticks whose losses the governor remembers."""


@struct.dataclass
class GovernorMemory:
    """What the governor remembers.

    It is part of the state, so that a restored run judges exactly like one that never
    stopped.
    """

    losses: Float[Array, "W 2"]
    """Train and held-out loss of the last good ticks, newest first; NaN if missing."""
    best: Float[Array, " 2"]
    """Lowest train and held-out loss so far; infinite before the first."""
    rollbacks: Int[Array, ""]
    """Rollbacks since the beginning of the run. The order of the rows depends on it."""
    consecutive: Int[Array, ""]
    """Rollbacks since the last good tick."""

    @classmethod
    def start(cls) -> "GovernorMemory":
        """A memory that has seen no tick yet."""
        return cls(
            losses=jnp.full((LOSS_WINDOW, 2), jnp.nan, jnp.float32),
            best=jnp.full((2,), jnp.inf, jnp.float32),
            rollbacks=jnp.zeros((), jnp.int32),
            consecutive=jnp.zeros((), jnp.int32),
        )


@struct.dataclass
class TrainState:
    """The whole state of a run. A restored run continues as if it had never stopped.

    The keys of the dictionaries are paths in the model: of a variable
    (``layers/0/base/kernel``) or of a layer (``layers/0``).
    """

    step: Int[Array, ""]
    """Steps done. With the seed of the row order, it gives the position in the data."""
    ticks: Int[Array, ""]
    """Ticks done."""
    rng: Key[Array, ""]
    """The run's random key."""
    params: Arrays
    """Parameters of the host, by variable."""
    opt_state: Any
    """Optimizer state of ``params``."""
    banks: dict[str, Bank]
    """Parameters of the blueprints, by layer."""
    bank_opt: dict[str, Any]
    """Optimizer state of each bank, by layer."""
    seeds: dict[str, SeedState]
    """Seeds of each layer, by layer."""
    rest: Arrays
    """Every other variable of the model: batch statistics, random streams, probes."""
    memory: Any
    """Memory of the policy: `ControllerMemory` for `policy.decide`, else its own."""
    monitor: Monitor
    """Running measurements of the whole model."""
    governor: GovernorMemory
    """Memory of the governor."""
