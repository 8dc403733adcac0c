"""Statistics of the chunks: sums of columns, then of chunks."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from esper_jax.kernels.blend.config import Blocks, power_of_two
from esper_jax.kernels.blend.triton.refs import (
    Found,
    Order,
    Span,
    both,
    chunk,
    f32,
    find,
    index_range,
    loop,
    near_zero,
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
    "dormant_sums",
    "finish_kernel",
    "span_of",
    "statistics_of",
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


def dormant_sums(
    s: Static,
    rows: int,
    span: int,
    found: Found,
    y_ref: Any,
    sums_ref: Any,
    program: Any,
) -> None:
    """`column_sums`, except of tiles in which every chunk lives."""
    across, features = s.config.statistics.across, s.layout.features
    tiles = pl.cdiv(features, across)
    walk = _Walk(s, rows, span, y_ref, lax.rem(program, tiles), lax.div(program, tiles))
    # Under way before it is known whether anybody wants them.
    first = walk.load(0)
    order = order_of(found)
    begin = walk.turn * across
    start, size = chunk(s.layout, jnp.maximum(order.owner, 0))
    end = jnp.minimum(begin + across, features)
    shared = jnp.minimum(start + size, end) - jnp.maximum(start, begin)
    covered = jnp.sum(jnp.where(order.living, jnp.maximum(shared, 0), 0))

    @pl.when(covered < end - begin)
    def _dormant() -> None:
        walk.sums(first, sums_ref)


def column_sums(
    s: Static, rows: int, span: int, y_ref: Any, sums_ref: Any, turn: Any, part: Any
) -> None:
    """Sums of the columns of a tile over a part of the rows, ``span`` of them."""
    walk = _Walk(s, rows, span, y_ref, turn, part)
    walk.sums(walk.load(0), sums_ref)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """A tile of columns, and the part of the rows that a program walks over."""

    s: Static
    rows: int
    span: int
    y: Any
    turn: Any
    part: Any

    @property
    def shape(self) -> tuple[int, int]:
        return self.s.config.statistics.rows, self.s.config.statistics.across

    @property
    def steps(self) -> int:
        return self.span // (self.shape[0] * UNROLL)

    @property
    def columns(self) -> Array:
        return self.turn * self.shape[1] + index_range(self.shape[1])

    @property
    def column_mask(self) -> Array | None:
        features = self.s.layout.features
        return None if features % self.shape[1] == 0 else self.columns < features

    def _start(self, i: Any) -> Any:
        # The last rows first: what was written last may be in a cache.
        parts = pl.cdiv(self.s.sampled(self.rows)[0], self.span)
        return ((self.steps - 1 - i) * parts + self.part) * (self.shape[0] * UNROLL)

    def _mask(self, start: Any) -> Array | None:
        sampled, _ = self.s.sampled(self.rows)
        index = start + index_range(self.shape[0])
        row_mask = None if sampled % self.span == 0 else index < sampled
        return both(row_mask, self.column_mask, self.shape)

    def load(self, i: Any) -> tuple[Array, ...]:
        """The tiles of a step."""
        place = jnp.broadcast_to(self.columns[None, :], self.shape)
        _, stride = self.s.sampled(self.rows)
        tiles = []
        for j in range(UNROLL):
            start = self._start(i) + j * self.shape[0]
            index = (start + index_range(self.shape[0])) * stride
            where = (jnp.broadcast_to(index[:, None], self.shape), place)
            tiles.append(read(self.y, where, self._mask(start)))
        return tuple(tiles)

    def _add(
        self, i: Any, tiles: tuple[Array, ...], sums: tuple[Array, ...]
    ) -> tuple[Array, ...]:
        for j, value in enumerate(tiles):
            mask = self._mask(self._start(i) + j * self.shape[0])
            new = statistics_of(self.s, value, mask)
            sums = tuple(a + b for a, b in zip(sums, new, strict=True))
        return sums

    def sums(self, first: tuple[Array, ...], sums_ref: Any) -> None:
        """Adds up all steps, of which the tiles of the first are given."""

        def body(i: Any, carry: Any) -> Any:
            tiles, sums = carry
            # The next tiles are on their way while these are added.
            return self.load(i + 1), self._add(i, tiles, sums)

        zero = jnp.zeros(self.shape, jnp.float32)
        carry = (first, (zero, zero, zero))
        if self.steps > 1:
            carry = lax.fori_loop(np.int32(0), np.int32(self.steps - 1), body, carry)
        across = Span(self.turn * self.shape[1], self.shape[1])
        for j, x in enumerate(self._add(self.steps - 1, *carry)):
            index = (self.part, j, across)
            write(sums_ref, index, jnp.sum(x, axis=0), self.column_mask)


def statistics_of(s: Static, value: Array, mask: Array | None) -> tuple[Array, ...]:
    """What each element adds to sum, sum of squares and near-zero count."""
    x = f32(value)
    squares = x * x
    near = near_zero(s, x, squares)
    if mask is not None:
        near = near & mask
    return x, squares, jnp.where(near, 1.0, 0.0)


def finish_kernel(
    s: Static, rows: int, parts: int, programs: int, kept_step: int, *refs: Any
) -> None:
    """Adds up what other programs left: a program is a slot, or one after those a seed.

    Args:
      s: what is known.
      rows: of the batch.
      parts: of the columns' sums, if statistics are over all rows.
      programs: of the forward kernel.
      kept_step: from one sampled row to the next among the kept ones.
      refs: coefficients and owners of the slots, the forward kernel's sums; the
        columns' sums or, if statistics are over a sample of the rows, the output and
        rows kept of the living chunks as they were; and the results.
    """
    alpha_ref, beta_ref, owner_ref, sums_ref, *seen, count_ref = refs[:-4]
    outs, means_ref = refs[-4:-1], refs[-1]
    slots = alpha_ref.shape[0]
    me = pl.program_id(0)
    # All reads are under way before anything is made of these.
    found = find(alpha_ref, beta_ref, owner_ref)

    @pl.when(me < slots)
    def _slot() -> None:
        _finish_slot(s, rows, programs, found, me, sums_ref, means_ref, outs)

    @pl.when(me >= slots)
    def _seed() -> None:
        seed = me - slots
        _, size = chunk(s.layout, seed)
        count_ref[seed] = f32(jnp.asarray(size)) * float(s.sampled(rows)[0])
        if s.statistics_rows == 0:
            _put(outs, seed, (jnp.float32(0.0),) * 3)
        elif s.statistics_rows is None:
            _finish_columns(s, parts, found, seed, seen[0], outs)
        else:
            _finish_sample(s, rows, kept_step, found, seed, seen, outs)


def _finish_columns(
    s: Static,
    parts: int,
    found: Found,
    seed: Any,
    sums_ref: Any,
    outs: Any,
) -> None:
    """Statistics over all rows of a dormant chunk; a living one's slot has them."""
    sums = _sums_of_columns(s, parts, seed, sums_ref)

    @pl.when(jnp.logical_not(_owns(order_of(found), seed)[0]))
    def _dormant() -> None:
        _put(outs, seed, sums)


def _finish_sample(
    s: Static,
    rows: int,
    kept_step: int,
    found: Found,
    seed: Any,
    seen: Any,
    outs: Any,
) -> None:
    """Statistics of a chunk over a sample of the rows."""
    out_ref, kept_ref = seen
    # What the output holds of a dormant chunk is what the input was.
    count, step = s.sampled(rows)
    sums = _sums_of_rows(s, count, seed, _rows_of(s, out_ref, seed, step))
    lives, slot = _owns(order_of(found), seed)

    @pl.when(jnp.logical_not(lives))
    def _unchanged() -> None:
        _put(outs, seed, sums)

    @pl.when(lives)
    def _overwritten() -> None:
        kept = _rows_kept(kept_ref, slot, kept_step)
        _put(outs, seed, _sums_of_rows(s, count, seed, kept))


def _owns(order: Order, seed: Any) -> tuple[Array, Array]:
    """Whether a seed lives, and in which slot."""
    mine = order.living & (order.owner == seed)
    slot = jnp.sum(jnp.where(mine, order.slots, 0))
    return jnp.sum(jnp.where(mine, 1, 0)) > 0, slot


def _put(outs: Any, seed: Any, values: tuple[Array, ...]) -> None:
    for out, value in zip(outs, values, strict=True):
        out[seed] = value


def _finish_slot(
    s: Static,
    rows: int,
    programs: int,
    found: Found,
    slot: Any,
    sums_ref: Any,
    means_ref: Any,
    outs: Any,
) -> None:
    """The slot's mean of ``r**2``; its chunk's statistics too, if over all rows."""
    most = sums_ref.shape[2]
    part = index_range(power_of_two(most))
    exists = None if most == len(part) else part < most
    partial = [
        read(sums_ref, (slot, which, part), exists)
        for which in range(sums_ref.shape[1])
    ]
    order = order_of(found)
    tiles = pl.cdiv(rows, s.config.forward.rows)
    shares = parts_of(order, programs, tiles, 1)
    sums = [jnp.sum(jnp.where(part < shares, x, 0.0)) for x in partial]
    mine = order.slots == slot
    lives = jnp.sum(jnp.where(mine & order.living, 1, 0)) > 0
    owner = jnp.sum(jnp.where(mine, order.owner, 0))
    elements = f32(jnp.asarray(chunk(s.layout, owner)[1])) * float(rows)
    means_ref[slot] = jnp.where(lives, sums[0] / elements, 0.0)
    if len(sums) > 1:

        @pl.when(lives)
        def _living() -> None:
            _put(outs, owner, tuple(sums[1:]))


_TILE = 2048
"""Elements of a tile of what is added up; `_UNROLL` of them are read at once."""
_UNROLL = 8


def _tile_of(s: Static, seed: Any, count: int) -> tuple[Any, int, int, Any]:
    """First column, rows and columns of a tile, and which columns the chunk has."""
    wide = power_of_two(s.width)
    start, size = chunk(s.layout, seed)
    exact = wide == s.width and s.layout.even
    inside = None if exact else index_range(wide) < size
    return start, min(power_of_two(count), max(1, _TILE // wide)), wide, inside


def _sums_of_columns(s: Static, parts: int, seed: Any, sums_ref: Any) -> Any:
    start, tall, wide, inside = _tile_of(s, seed, parts)
    shape = (tall, wide)
    place = jnp.broadcast_to((start + index_range(wide))[None, :], shape)

    def body(i: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        row = i * tall + index_range(tall)
        mask = both(None if parts % tall == 0 else row < parts, inside, shape)
        where = jnp.broadcast_to(row[:, None], shape)
        return tuple(
            x + read(sums_ref, (where, jnp.full_like(where, j), place), mask)
            for j, x in enumerate(sums)
        )

    zero = jnp.zeros(shape, jnp.float32)
    sums = loop(0, pl.cdiv(parts, tall), body, (zero, zero, zero))
    return tuple(jnp.sum(jnp.sum(x, axis=1)) for x in sums)


def _rows_of(s: Static, out_ref: Any, seed: Any, step: int) -> Callable[..., Array]:
    start, _ = chunk(s.layout, seed)
    return lambda row, column, mask: read(out_ref, (row * step, start + column), mask)


def _rows_kept(kept_ref: Any, slot: Any, step: int) -> Callable[..., Array]:
    return lambda row, column, mask: read(
        kept_ref, (jnp.full_like(row, slot), row * step, column), mask
    )


def _sums_of_rows(
    s: Static, count: int, seed: Any, get: Callable[..., Array]
) -> tuple[Array, ...]:
    """Sum, sum of squares and near-zero count of sampled rows of a chunk."""
    _, tall, wide, inside = _tile_of(s, seed, count)
    shape = (tall, wide)
    column = jnp.broadcast_to(index_range(wide)[None, :], shape)
    tiles = pl.cdiv(count, tall)
    unroll = min(_UNROLL, tiles)

    def load(i: Any) -> tuple[Array, Array | None]:
        row = i * tall + index_range(tall)
        mask = both(None if count % tall == 0 else row < count, inside, shape)
        return get(jnp.broadcast_to(row[:, None], shape), column, mask), mask

    def body(i: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        # All reads before the first use.
        for value, mask in [load(i * unroll + j) for j in range(unroll)]:
            new = statistics_of(s, value, mask)
            sums = tuple(a + b for a, b in zip(sums, new, strict=True))
        return sums

    zero = jnp.zeros(shape, jnp.float32)
    sums = loop(0, pl.cdiv(tiles, unroll), body, (zero, zero, zero))
    return tuple(jnp.sum(jnp.sum(x, axis=1)) for x in sums)
