"""Layers of Flax without their last step, which adds a bias."""

import copy
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import canonicalize_dtype, promote_dtype
from jaxtyping import Array, Float

__all__ = ["without_bias"]


def without_bias(
    base: Any, x: Any, features: int
) -> tuple[Any, Float[Array, " F"]] | None:
    """A layer that returns on ``x`` what ``base`` does before it adds its bias.

    It shares the variables of ``base``, which stays as it is, and belongs to no graph.

    Args:
      base: any layer.
      x: its only argument.
      features: width of its output.

    Returns:
      The layer, and the bias in the dtype that ``base`` computes in; None if ``base``
      is of another type than `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Conv` and
      `nnx.Einsum`, or its bias is no vector over the last axis.
    """
    if type(base) not in (nnx.Linear, nnx.LinearGeneral, nnx.Conv, nnx.Einsum):
        return None
    if type(base) is nnx.Einsum and not _last_axis_alone(base.einsum_str):
        return None
    if not isinstance(base.bias, nnx.Variable) or base.bias.shape != (features,):
        return None
    # What may give the output, or the sum, another dtype than that of all factors.
    if base.promote_dtype is not promote_dtype or base.preferred_element_type:
        return None
    if getattr(base, "mask", None) is not None:
        return None
    bias = base.bias[...]
    dtype = canonicalize_dtype(x, base.kernel[...], bias, dtype=base.dtype)
    bare = copy.copy(base)
    # Not by attributes, which would look for a change of the graph. The dtype is fixed
    # because it may follow from the bias.
    vars(bare).update(bias=None, use_bias=False, dtype=dtype)
    return bare, jnp.asarray(bias, dtype)


def _last_axis_alone(einsum: str) -> bool:
    """Whether a product's last axis, and no other one, comes from its kernel."""
    factors, result = einsum.replace(" ", "").split("->")
    kernel = factors.split(",")[-1]
    return "." not in kernel and [a for a in result if a in kernel] == [result[-1]]
