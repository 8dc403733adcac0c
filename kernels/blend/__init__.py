"""Blend: the one operator that computes chunks."""

from esper_jax.kernels.blend.api import blend, takes_bias, tapped
from esper_jax.kernels.blend.checks import check_statistics_rows
from esper_jax.kernels.blend.registry import check_implementation
from esper_jax.kernels.blend.sharded import check_sharding

__all__ = [
    "blend",
    "check_implementation",
    "check_sharding",
    "check_statistics_rows",
    "takes_bias",
    "tapped",
]
