"""Blend: the one operator that computes chunks."""

from esper_jax.kernels.blend.api import blend

__all__ = ["blend"]
