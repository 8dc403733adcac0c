"""Statistics of the chunks: sums of columns, then of chunks."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from esper_jax.kernels.blend.config import Blocks, power_of_two
from esper_jax.kernels.blend.triton.refs import (
    NEAR_ZERO,
    Order,
    Span,
    both,
    chunk,
    f32,
    index_range,
    loop,
    order_of,
    parts_of,
    read,
    write,
)
from esper_jax.kernels.blend.triton.static import Static

__all__ = [
    "UNROLL",
    "column_sums",
    "column_sums_kernel",
    "dormant",
    "finish_kernel",
    "span_of",
]

UNROLL = 4
"""Tiles of statistics that are read at once, so that more reads are under way."""


def span_of(rows: int, blocks: Blocks, tiles: int, unroll: int = 1) -> int:
    """Rows a program walks over, where ``tiles`` of them stand side by side."""
    step = blocks.rows * unroll
    parts = max(1, blocks.programs // tiles)
    return step * -(-rows // (parts * step))


def column_sums_kernel(s: Static, rows: int, span: int, *refs: Any) -> None:
    """Sum, sum of squares and near-zero count of each column."""
    y_ref, sums_ref = refs
    column_sums(s, rows, span, y_ref, sums_ref, pl.program_id(0), pl.program_id(1))


def dormant(s: Static, order: Order, turn: Any) -> Array:
    """Whether a tile of columns has any that no living chunk covers."""
    first = turn * s.config.statistics.across
    start, size = chunk(s.layout, jnp.maximum(order.owner, 0))
    end = jnp.minimum(first + s.config.statistics.across, s.layout.features)
    shared = jnp.minimum(start + size, end) - jnp.maximum(start, first)
    covered = jnp.sum(jnp.where(order.living, jnp.maximum(shared, 0), 0))
    return covered < end - first


def column_sums(
    s: Static, rows: int, span: int, y_ref: Any, sums_ref: Any, turn: Any, part: Any
) -> None:
    """Sums of the columns of a tile over a part of the rows, ``span`` of them."""
    blocks = s.config.statistics
    across = blocks.across
    first = turn * across
    features = s.layout.features
    columns = first + index_range(across)
    shape = (blocks.rows, across)
    sampled, stride = s.sampled(rows)
    steps, parts = span // (blocks.rows * UNROLL), pl.cdiv(sampled, span)
    column_mask = None if features % across == 0 else columns < features
    place = jnp.broadcast_to(columns[None, :], shape)

    def tile(start: Any) -> tuple[Array, Array | None]:
        index = start + index_range(blocks.rows)
        row_mask = None if sampled == parts * span else index < sampled
        mask = both(row_mask, column_mask, shape)
        where = (jnp.broadcast_to((index * stride)[:, None], shape), place)
        return read(y_ref, where, mask), mask

    def body(i: Any, sums: tuple[Array, Array, Array]) -> tuple[Array, ...]:
        # The last rows first: what was written last may be in a cache.
        start = ((steps - 1 - i) * parts + part) * (blocks.rows * UNROLL)
        tiles = [tile(start + j * blocks.rows) for j in range(UNROLL)]
        total, squares, count = sums
        for value, mask in tiles:
            x = f32(value)
            near = jnp.abs(x) < NEAR_ZERO
            if mask is not None:
                near = near & mask
            total, squares = total + x, squares + x * x
            count = count + jnp.where(near, 1.0, 0.0)
        return total, squares, count

    zero = jnp.zeros(shape, jnp.float32)
    sums = loop(0, steps, body, (zero, zero, zero))
    for j in range(3):
        index = (part, j, Span(first, across))
        write(sums_ref, index, jnp.sum(sums[j], axis=0), column_mask)


def finish_kernel(s: Static, rows: int, parts: int, programs: int, *refs: Any) -> None:
    """Adds up what other programs left: a program is a seed, and a slot.

    Args:
      rows: of the batch.
      parts: of the columns' sums; 0 if there are none.
      programs: of the forward kernel.
      refs: coefficients and owners of the slots, the forward kernel's sums, the
        columns' sums, and the results.
    """
    alpha_ref, beta_ref, owner_ref, chunk_sums_ref, sums_ref, *outs = refs
    seeds, slots = s.layout.num_seeds, alpha_ref.shape[0]
    me = pl.program_id(0)
    order = order_of(alpha_ref, beta_ref, owner_ref)
    tiles = pl.cdiv(rows, s.config.forward.rows)
    shares = parts_of(order, programs, tiles, 1)
    most = power_of_two(min(programs, tiles))

    def of_slot(mine: Array, which: int) -> Array:
        # The programs of a living slot stand side by side.
        rank = jnp.sum(jnp.where(mine, order.rank, 0)) - 1
        part = index_range(most)
        mask = part < shares
        return jnp.sum(read(chunk_sums_ref, (which, rank * shares + part), mask))

    @pl.when(me < slots)
    def _slot() -> None:
        mine = order.slots == me
        lives = jnp.sum(jnp.where(mine & order.living, 1, 0)) > 0
        owner = jnp.sum(jnp.where(mine, order.owner, 0))
        elements = f32(jnp.asarray(chunk(s.layout, owner)[1])) * float(rows)

        @pl.when(lives)
        def _living() -> None:
            outs[4][me] = of_slot(mine, 0) / elements

        @pl.when(jnp.logical_not(lives))
        def _dead() -> None:
            outs[4][me] = jnp.float32(0.0)

    @pl.when(me < seeds)
    def _seed() -> None:
        start, size = chunk(s.layout, me)
        outs[0][me] = f32(jnp.asarray(size)) * float(s.sampled(rows)[0])
        mine = order.living & (order.owner == me)
        lives = jnp.sum(jnp.where(mine, 1, 0)) > 0

        def from_columns() -> None:
            wide = power_of_two(s.width)
            tall = min(power_of_two(parts), max(1, 4096 // wide))
            columns = start + index_range(wide)
            inside = (
                None if wide == s.width and s.layout.even else columns < start + size
            )

            def body(i: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
                part = i * tall + index_range(tall)
                mask = both(None if parts % tall == 0 else part < parts, inside, shape)
                where = jnp.broadcast_to(part[:, None], shape)
                place = jnp.broadcast_to(columns[None, :], shape)
                return tuple(
                    x + read(sums_ref, (where, jnp.full_like(where, j), place), mask)
                    for j, x in enumerate(sums)
                )

            shape = (tall, wide)
            zero = jnp.zeros(shape, jnp.float32)
            sums = loop(0, pl.cdiv(parts, tall), body, (zero, zero, zero))
            for j in range(3):
                outs[1 + j][me] = jnp.sum(jnp.sum(sums[j], axis=1))

        if parts == 0:
            for j in range(3):
                outs[1 + j][me] = jnp.float32(0.0)
        elif not s.own_statistics:
            from_columns()
        else:

            @pl.when(lives)
            def _from_slot() -> None:
                for j in range(3):
                    outs[1 + j][me] = of_slot(mine, 1 + j)

            @pl.when(jnp.logical_not(lives))
            def _from_columns() -> None:
                from_columns()
