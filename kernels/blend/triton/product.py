"""Kernels of the products that adapters take, each of which can be left out.

What decides is a flag on the device. A branch of XLA's would decide the same, but the
device rests at each, and what a branch returns is written or copied either way.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from esper_jax.kernels.blend.backend import Product, Products, once_differentiable
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

__all__ = ["PRODUCTS", "add", "rows", "sums"]

_PROGRAMS = 264
"""About as many as a device holds at once."""


class _Tile(NamedTuple):
    """Sizes of a program's tile: of the result, and of a step of its sum."""

    tall: int
    broad: int
    deep: int

    @classmethod
    def fits(cls, most: tuple[int, int, int], sizes: tuple[int, int, int]) -> "_Tile":
        """Powers of two, no larger than the arrays need, at least 16 for a dot."""
        pairs = zip(most, sizes, strict=True)
        return cls(*(min(m, max(16, power_of_two(size))) for m, size in pairs))


def _launched(
    s: TritonStatic,
    body: Callable[..., None],
    how: Launch,
    where: Bool[Array, ""],
    inputs: list[Array],
) -> Any:
    """Runs ``body(place, *refs)`` in every program, or in none.

    ``place`` is the program's place in the grid: Pallas knows it only out here.
    """

    def kernel(flag: Any, *refs: Any) -> None:
        place = tuple(pl.program_id(axis) for axis in range(len(how.grid)))

        @pl.when(read(flag, (0,)) != 0)
        def _work() -> None:
            body(place, *refs)

    return launch(s, kernel, how, [where.astype(jnp.int32)[None], *inputs])


def _blocks(tile: _Tile) -> Blocks:
    return Blocks(rows=tile.tall, across=tile.broad, programs=1, warps=4, stages=3)


def rows(
    s: TritonStatic,
    x: Float[Array, "N D"],
    w: Float[Array, "D M"],
    where: Bool[Array, ""],
) -> Float[Array, "N M"]:
    """`RowsProduct`."""
    (count, depth), units = x.shape, w.shape[1]
    tile = _Tile.fits((64, 64, 64), (count, units, depth))

    def body(place: Any, x: Any, w: Any, out: Any) -> None:
        down, across = (
            Span(place[0] * tile.tall, tile.tall),
            Span(place[1] * tile.broad, tile.broad),
        )
        in_rows, in_units = _inside(down, count), _inside(across, units)

        def step(i: Any, total: Array) -> Array:
            deep = Span(i * tile.deep, tile.deep)
            inside = _inside(deep, depth)
            a = read(x, (down, deep), both(in_rows, inside, tile[::2]))
            b = read(w, (deep, across), both(inside, in_units, (tile.deep, tile.broad)))
            return total + dot(a, b)

        zero = place[0] * 0
        nothing = jnp.zeros(tile[:2], jnp.float32)
        total = loop(zero, zero + pl.cdiv(depth, tile.deep), step, nothing)
        write(out, (down, across), total, both(in_rows, in_units, tile[:2]))

    how = Launch(
        name="esper_rows_product",
        grid=(pl.cdiv(count, tile.tall), pl.cdiv(units, tile.broad)),
        blocks=_blocks(tile),
        outputs=[struct((count, units))],
    )
    return _launched(s, body, how, where, [x, w])[0]


def sums(
    s: TritonStatic,
    a: Float[Array, "N M"],
    x: Float[Array, "N D"],
    where: Bool[Array, ""],
) -> tuple[Float[Array, "M D"], Float[Array, " D"]]:
    """`SumsProduct`: programs share the rows, and their sums are added in order."""
    (count, units), width = a.shape, x.shape[1]
    tile = _Tile.fits((64, 64, 64), (units, width, count))
    grid = pl.cdiv(width, tile.broad), pl.cdiv(units, tile.tall)
    turns = pl.cdiv(count, tile.deep)
    parts = max(1, min(turns, _PROGRAMS // (grid[0] * grid[1])))

    def body(place: Any, a: Any, x: Any, out: Any, total: Any) -> None:
        across, down, part = place
        columns = Span(across * tile.broad, tile.broad)
        mine = Span(down * tile.tall, tile.tall)
        in_units, in_columns = _inside(mine, units), _inside(columns, width)

        def step(i: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            deep = Span((part + i * parts) * tile.deep, tile.deep)
            inside = _inside(deep, count)
            left = read(a, (deep, mine), both(inside, in_units, (tile.deep, tile.tall)))
            right = read(
                x, (deep, columns), both(inside, in_columns, (tile.deep, tile.broad))
            )
            product, column = carry
            column += jnp.sum(f32(right), axis=0)
            return product + dot(left, right, (0, 0)), column

        nothing = jnp.zeros(tile[:2], jnp.float32), jnp.zeros(tile.broad, jnp.float32)
        last = pl.cdiv(turns - part, parts)
        product, column = loop(part * 0, last, step, nothing)
        mask = both(in_units, in_columns, tile[:2])
        write(out, (part, mine, columns), product, mask)

        @pl.when(down == 0)
        def _once() -> None:
            write(total, (part, columns), column, in_columns)

    how = Launch(
        name="esper_sums_product",
        grid=(*grid, parts),
        blocks=_blocks(tile),
        outputs=[struct((parts, units, width)), struct((parts, width))],
    )
    found = _launched(s, body, how, where, [a, x])
    product, total = (jnp.sum(each, axis=0) for each in found)
    return product, total


def add(
    s: TritonStatic, to: Float[Array, "N F"], product: Product, where: Bool[Array, ""]
) -> Float[Array, "N F"]:
    """`AddProduct`: reads and writes ``to`` once, if at all."""
    (count, width), units = to.shape, product.left.shape[1]
    # Float32 factors are twice as large on the chip.
    deep = 64 if product.left.dtype.itemsize < 4 else 32
    tile = _Tile.fits((64, 128, deep), (count, width, units))

    def body(place: Any, left: Any, right: Any, row: Any, to: Any, out: Any) -> None:
        down, across = (
            Span(place[0] * tile.tall, tile.tall),
            Span(place[1] * tile.broad, tile.broad),
        )
        in_rows, in_columns = _inside(down, count), _inside(across, width)

        def step(i: Any, total: Array) -> Array:
            deep = Span(i * tile.deep, tile.deep)
            inside = _inside(deep, units)
            a = read(left, (down, deep), both(in_rows, inside, tile[::2]))
            b = read(
                right, (deep, across), both(inside, in_columns, (tile.deep, tile.broad))
            )
            return total + dot(a, b)

        mask = both(in_rows, in_columns, tile[:2])
        before = f32(read(to, (down, across), mask))
        before += f32(read(row, (across,), in_columns))[None, :]
        zero = place[0] * 0
        added = loop(zero, zero + pl.cdiv(units, tile.deep), step, before)
        write(out, (down, across), added, mask)

    how = Launch(
        name="esper_add_product",
        grid=(pl.cdiv(count, tile.tall), pl.cdiv(width, tile.broad)),
        blocks=_blocks(tile),
        outputs=[struct(to.shape, to.dtype)],
        aliases={4: 0},
    )
    return _launched(s, body, how, where, [*product, to])[0]


PRODUCTS = Products(
    *(once_differentiable(f, "triton", static=1) for f in (rows, sums, add))
)
"""Products for adapters."""


def _inside(span: Span, size: int) -> Array | None:
    """Which of a span's indices are less than ``size``; None if tracing knows all."""
    if size % span.size == 0:
        return None
    return span.start + index_range(span.size) < size
