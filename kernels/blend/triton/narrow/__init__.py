"""Narrow chunks as matrices: neighbours share a tile, by block-diagonal weights.

A program is a group of neighbouring seeds and a span of rows. The zeros between blocks
keep slots apart, but for numbers that are not finite, whose products with 0 are NaN. A
tile in which one turns up is done again at the end, slot by slot.
"""

from esper_jax.kernels.blend.triton.narrow.passes import backward_pass, forward_pass

__all__ = ["backward_pass", "forward_pass"]
