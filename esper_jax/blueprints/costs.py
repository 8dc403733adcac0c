"""What blueprints cost: parameters and operations."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from esper_jax.blueprints.kinds import Blueprint

__all__ = ["living_parameters", "operations", "param_counts"]


def param_counts(
    blueprints: Sequence[Blueprint], sizes: np.ndarray
) -> Int[np.ndarray, "N S"]:
    """Parameters that each blueprint has on each chunk.

    Args:
      blueprints: the layer's ``N`` blueprints.
      sizes: width of each of its ``S`` chunks.

    Returns:
      The count for every blueprint id and seed.
    """
    widths = [int(w) for w in sizes]
    counts = {
        w: [b.param_count(w, max(widths), sum(widths)) for b in blueprints]
        for w in set(widths)
    }
    return np.stack([counts[w] for w in widths], axis=1)


def operations(parameters: Any) -> Any:
    """Floating-point operations of one row's forward pass through a blueprint.

    Counts one multiplication and one addition for each parameter, since each is used
    once. Activations are not counted.
    """
    return 2 * parameters


def living_parameters(
    costs: Int[np.ndarray, "N S"],
    blueprint: Int[Array, " S"],
    living: Bool[Array, " S"],
) -> Int[Array, " S"]:
    """Parameters of each living seed's blueprint; 0 for a seed that does not live.

    Args:
      costs: as `param_counts` counts them.
      blueprint: each seed's blueprint id.
      living: which seeds count.
    """
    kind = jnp.clip(blueprint.astype(jnp.int32), 0, len(costs) - 1)
    own = jnp.asarray(costs, jnp.int32)[kind, jnp.arange(costs.shape[1])]
    return jnp.where(living, own, 0)
