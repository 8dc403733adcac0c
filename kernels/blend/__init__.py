"""Blend: the one operator that computes chunks."""

from esper_jax.kernels.blend.api import blend, check_implementation

__all__ = ["blend", "check_implementation"]
