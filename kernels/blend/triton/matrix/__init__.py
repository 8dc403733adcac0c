"""Chunks as matrices: a program multiplies tiles of one slot's chunk by its weights."""

from esper_jax.kernels.blend.triton.matrix.passes import backward_pass, forward_pass

__all__ = ["backward_pass", "forward_pass"]
