"""What a policy asks of the seeds of one layer."""

import operator
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int

from esper_jax.lifecycle.grafting import Strategy
from esper_jax.lifecycle.stages import NO_REQUEST, NUM_STAGES, Stage
from esper_jax.lifecycle.state import MAX_BLUEPRINTS

__all__ = ["Commands", "commands_for", "no_commands"]


@struct.dataclass
class Commands:
    """What is asked of each seed, int8; -1 asks for nothing.

    ``blueprint`` is read at germination. ``strategy`` may change at any time. Where a
    transition is requested too, a refusal drops both.
    """

    target: Int[Array, "*S"]
    """`Stage` to go to."""
    blueprint: Int[Array, "*S"]
    strategy: Int[Array, "*S"]


def no_commands(num_seeds: int) -> Commands:
    """Commands that ask for nothing."""
    nothing = jnp.full((num_seeds,), NO_REQUEST, jnp.int8)
    return Commands(target=nothing, blueprint=nothing, strategy=nothing)


def commands_for(
    num_seeds: int,
    targets: Mapping[int, Stage] | None = None,
    *,
    blueprints: Mapping[int, int] | None = None,
    strategies: Mapping[int, Strategy] | None = None,
) -> Commands:
    """Builds commands from dictionaries and checks them on the host.

    Args:
      num_seeds: number of seeds of the layer.
      targets: seed to requested stage.
      blueprints: seed to index into the layer's blueprints.
      strategies: seed to grafting strategy.

    Raises:
      IndexError: if a seed does not exist.
      ValueError: if a stage, blueprint index or strategy does not exist.
    """

    def column(name: str, requests: Mapping[int, Any] | None, limit: int) -> np.ndarray:
        values = np.full(num_seeds, NO_REQUEST, np.int8)
        for seed, value in (requests or {}).items():
            if not 0 <= operator.index(seed) < num_seeds:
                raise IndexError(
                    f"{name}: there is no seed {seed}; the layer has seeds 0 to "
                    f"{num_seeds - 1}"
                )
            if not 0 <= operator.index(value) < limit:
                raise ValueError(
                    f"{name}: value for seed {seed} must be from 0 to {limit - 1}, "
                    f"got {value!r}"
                )
            values[seed] = value
        return values

    return Commands(
        target=jnp.asarray(column("targets", targets, NUM_STAGES)),
        blueprint=jnp.asarray(column("blueprints", blueprints, MAX_BLUEPRINTS)),
        strategy=jnp.asarray(column("strategies", strategies, len(Strategy))),
    )
