"""What blueprints cost: parameters and operations."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from esper_jax.blueprints.custom import Blueprint

__all__ = ["operations", "param_counts"]


def param_counts(
    blueprints: Sequence[Blueprint], sizes: np.ndarray
) -> Int[np.ndarray, "N S"]:
    """Parameters that each blueprint would have on each chunk, for every (id, seed)."""
    widths = [int(w) for w in sizes]
    counts = {
        w: [b.param_count(w, max(widths), sum(widths)) for b in blueprints]
        for w in set(widths)
    }
    return np.stack([counts[w] for w in widths], axis=1)


def operations(parameters: Any) -> Any:
    """Floating-point operations of one forward pass of a row through a blueprint.

    A multiplication and an addition for each parameter, which every network that uses
    each of its parameters once comes to; activations are not counted.
    """
    return 2 * parameters
