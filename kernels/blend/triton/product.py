"""Kernel that adds a product to a layer's output or gradient in place."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from esper_jax.kernels.blend.backend import Product
from esper_jax.kernels.blend.triton.blocks import Blocks, power_of_two
from esper_jax.kernels.blend.triton.launch import Launch, launch, struct
from esper_jax.kernels.blend.triton.matrix.tiles import dot
from esper_jax.kernels.blend.triton.refs import (
    Span,
    both,
    f32,
    index_range,
    loop,
    read,
    write,
)
from esper_jax.kernels.blend.triton.static import TritonStatic

__all__ = ["add_product"]

_ROWS, _COLUMNS, _UNITS = 64, 128, 64
"""Most of a tile, and of the hidden units that one step multiplies."""


def add_product(
    s: TritonStatic, to: Float[Array, "N F"], product: Product, where: Bool[Array, ""]
) -> Float[Array, "N F"]:
    """`AddProduct`: reads and writes ``to`` once, if at all."""
    (rows, columns), units = to.shape, product.left.shape[1]
    if not units:
        return to

    def fits(most: int, size: int) -> int:
        return min(most, max(16, power_of_two(size)))

    tile = fits(_ROWS, rows), fits(_COLUMNS, columns), fits(_UNITS, units)

    def kernel(*refs: Any) -> None:
        _kernel(tile, refs)

    how = Launch(
        name="esper_add_product",
        grid=(pl.cdiv(rows, tile[0]), pl.cdiv(columns, tile[1])),
        blocks=Blocks(rows=tile[0], across=tile[1], programs=1, warps=4, stages=2),
        outputs=[struct(to.shape, to.dtype)],
        aliases={4: 0},
    )
    flag = where.astype(jnp.int32)[None]
    return launch(s, kernel, how, [flag, *product, to])[0]


def _kernel(tile: tuple[int, int, int], refs: tuple[Any, ...]) -> None:
    """One tile of the sum.

    Args:
      tile: rows, columns, and hidden units of a step.
      refs: whether to add, `Product`, and what it is added to, twice.
    """
    where, left, right, row, to, out = refs
    tall, broad, deep = tile
    across, down = pl.program_id(1), pl.program_id(0)

    @pl.when(read(where, (0,)) != 0)
    def _add() -> None:
        top, edge = down * tall, across * broad
        rows, columns = Span(top, tall), Span(edge, broad)
        inside_rows = _inside(rows, to.shape[0])
        inside_columns = _inside(columns, to.shape[1])

        def step(i: Any, total: Array) -> Array:
            units = Span(i * deep, deep)
            inside = _inside(units, left.shape[1])
            a = read(left, (rows, units), both(inside_rows, inside, (tall, deep)))
            b = read(
                right, (units, columns), both(inside, inside_columns, (deep, broad))
            )
            return total + dot(a, b)

        mask = both(inside_rows, inside_columns, (tall, broad))
        before = f32(read(to, (rows, columns), mask))
        before += f32(read(row, (columns,), inside_columns))[None, :]
        # A traced 0: Pallas refuses a span that may end outside if its start is known.
        zero = down * 0
        turns = pl.cdiv(left.shape[1], deep)
        added = loop(zero, zero + turns, step, before)
        write(out, (rows, columns), added, mask)


def _inside(span: Span, size: int) -> Array | None:
    """Which of a span's indices are less than ``size``; None if tracing knows all."""
    if size % span.size == 0:
        return None
    return span.start + index_range(span.size) < size
