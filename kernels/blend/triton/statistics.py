"""Statistics of the chunks: sums of columns, then of chunks."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
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

    def start_of(i: Any) -> Any:
        # The last rows first: what was written last may be in a cache.
        return ((steps - 1 - i) * parts + part) * (blocks.rows * UNROLL)

    def mask_of(start: Any) -> Array | None:
        index = start + index_range(blocks.rows)
        row_mask = None if sampled == parts * span else index < sampled
        return both(row_mask, column_mask, shape)

    def load(i: Any) -> tuple[Array, ...]:
        tiles = []
        for j in range(UNROLL):
            start = start_of(i) + j * blocks.rows
            index = (start + index_range(blocks.rows)) * stride
            where = (jnp.broadcast_to(index[:, None], shape), place)
            tiles.append(read(y_ref, where, mask_of(start)))
        return tuple(tiles)

    def add(
        i: Any, tiles: tuple[Array, ...], sums: tuple[Array, ...]
    ) -> tuple[Array, ...]:
        total, squares, count = sums
        for j, value in enumerate(tiles):
            x, mask = f32(value), mask_of(start_of(i) + j * blocks.rows)
            near = jnp.abs(x) < NEAR_ZERO
            if mask is not None:
                near = near & mask
            total, squares = total + x, squares + x * x
            count = count + jnp.where(near, 1.0, 0.0)
        return total, squares, count

    def body(i: Any, carry: Any) -> Any:
        tiles, sums = carry
        # The next tiles are on their way while these are added.
        return load(i + 1), add(i, tiles, sums)

    zero = jnp.zeros(shape, jnp.float32)
    carry = (load(0), (zero, zero, zero))
    if steps > 1:
        carry = lax.fori_loop(np.int32(0), np.int32(steps - 1), body, carry)
    sums = add(steps - 1, *carry)
    for j in range(3):
        index = (part, j, Span(first, across))
        write(sums_ref, index, jnp.sum(sums[j], axis=0), column_mask)


def finish_kernel(s: Static, rows: int, parts: int, programs: int, *refs: Any) -> None:
    """Adds up what other programs left: a program is a seed, and a slot.

    Args:
      rows: of the batch.
      parts: of the columns' sums, if statistics are over all rows.
      programs: of the forward kernel.
      refs: coefficients and owners of the slots, the forward kernel's sums, the
        columns' sums or, if statistics are over a sample of the rows, the output; and
        the results.
    """
    alpha_ref, beta_ref, owner_ref, chunk_sums_ref, sums_ref, *outs = refs
    seeds, slots = s.layout.num_seeds, alpha_ref.shape[0]
    sampled, stride = s.sampled(rows)
    if s.statistics_rows is None:
        stride = 1
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
        outs[0][me] = f32(jnp.asarray(size)) * float(sampled)
        mine = order.living & (order.owner == me)
        lives = jnp.sum(jnp.where(mine, 1, 0)) > 0

        def from_columns() -> None:
            wide = power_of_two(s.width)
            count = parts if s.statistics_rows is None else sampled
            tall = min(power_of_two(count), max(1, 4096 // wide))
            columns = start + index_range(wide)
            exact = wide == s.width and s.layout.even
            inside = None if exact else columns < start + size
            shape = (tall, wide)
            place = jnp.broadcast_to(columns[None, :], shape)

            def body(i: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
                row = i * tall + index_range(tall)
                mask = both(None if count % tall == 0 else row < count, inside, shape)
                where = jnp.broadcast_to((row * stride)[:, None], shape)
                if s.statistics_rows is None:
                    new = tuple(
                        read(sums_ref, (where, jnp.full_like(where, j), place), mask)
                        for j in range(3)
                    )
                else:
                    # No living seed's chunk: so the output is what the input was.
                    x = f32(read(sums_ref, (where, place), mask))
                    near = jnp.abs(x) < NEAR_ZERO
                    if mask is not None:
                        near = near & mask
                    new = x, x * x, jnp.where(near, 1.0, 0.0)
                return tuple(a + b for a, b in zip(sums, new, strict=True))

            zero = jnp.zeros(shape, jnp.float32)
            sums = loop(0, pl.cdiv(count, tall), body, (zero, zero, zero))
            for j in range(3):
                outs[1 + j][me] = jnp.sum(jnp.sum(sums[j], axis=1))

        if not s.own_statistics:
            for j in range(3):
                outs[1 + j][me] = jnp.float32(0.0)
        else:

            @pl.when(lives)
            def _from_slot() -> None:
                for j in range(3):
                    outs[1 + j][me] = of_slot(mine, 1 + j)

            @pl.when(jnp.logical_not(lives))
            def _from_columns() -> None:
                from_columns()
