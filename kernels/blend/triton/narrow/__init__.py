"""Narrow chunks: a program is a tile of slots, one a lane, and a span of rows."""

from esper_jax.kernels.blend.triton.narrow.passes import backward_pass, forward_pass

__all__ = ["backward_pass", "forward_pass"]
