"""Statistics of columns: sums over the rows, for the chunks that no slot computes."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from esper_jax.kernels.blend.triton.blocks import Blocks
from esper_jax.kernels.blend.triton.refs import (
    Found,
    Span,
    both,
    chunk,
    f32,
    index_range,
    near_zero,
    order_of,
    plus_bias,
    read,
    write,
)
from esper_jax.kernels.blend.triton.static import TritonStatic

__all__ = [
    "ColumnTiles",
    "column_sums_kernel",
    "column_tiles",
    "dormant_sums",
    "span_of",
    "statistics_of",
]

_UNROLL = 4
"""Number of tiles that a program reads at once, to have more reads under way."""


def span_of(rows: int, blocks: Blocks, tiles: int, unroll: int = 1) -> int:
    """Number of rows that a program goes over.

    Args:
      rows: rows of the batch.
      blocks: how the kernel cuts its work.
      tiles: number of programs side by side, over the same rows.
      unroll: number of tiles of rows that a program reads at once.
    """
    step = blocks.rows * unroll
    parts = max(1, blocks.programs // tiles)
    return step * -(-rows // (parts * step))


@dataclasses.dataclass(frozen=True)
class ColumnTiles:
    """How the sums of columns are divided among programs.

    Args:
      rows: rows of the batch.
      tiles: number of tiles of columns, side by side.
      parts: number of parts that the sampled rows are cut into.
      span: number of rows of a part.
    """

    rows: int
    tiles: int
    parts: int
    span: int


def column_tiles(s: TritonStatic, rows: int) -> ColumnTiles:
    """Divides the sums of columns over a batch of ``rows``."""
    blocks = s.config.statistics
    tiles = int(pl.cdiv(s.layout.features, blocks.across))
    sampled, _ = s.sampled(rows)
    span = span_of(sampled, blocks, tiles, _UNROLL)
    return ColumnTiles(rows, tiles, int(pl.cdiv(sampled, span)), span)


def column_sums_kernel(s: TritonStatic, cut: ColumnTiles, *refs: Any) -> None:
    """Sum, sum of squares and near-zero count of each column."""
    *y, sums_ref = refs
    walk = _Walk(s, cut, tuple(y), pl.program_id(0), pl.program_id(1))
    walk.sums(walk.load(0), walk.bias(), sums_ref)


def dormant_sums(
    s: TritonStatic,
    cut: ColumnTiles,
    found: Found,
    y: tuple[Any, ...],
    sums_ref: Any,
    program: Any,
) -> None:
    """Sums of columns, except of tiles in which every chunk lives.

    Args:
      s: what is fixed while tracing.
      cut: how the tiles are divided among programs.
      found: the slots.
      y: the activation, (N, F); and its bias, if that comes apart.
      sums_ref: the sums, (parts, 3, F).
      program: index of the program: of its tile of columns, then of its part.
    """
    across, features = s.config.statistics.across, s.layout.features
    turn, part = lax.rem(program, cut.tiles), lax.div(program, cut.tiles)
    walk = _Walk(s, cut, y, turn, part)
    # Starts the reads before it is known whether anybody wants them.
    first, bias = walk.load(0), walk.bias()
    order = order_of(found)
    begin = walk.turn * across
    start, size = chunk(s.layout, jnp.maximum(order.owner, 0))
    end = jnp.minimum(begin + across, features)
    shared = jnp.minimum(start + size, end) - jnp.maximum(start, begin)
    covered = jnp.sum(jnp.where(order.living, jnp.maximum(shared, 0), 0))

    @pl.when(covered < end - begin)
    def _dormant() -> None:
        walk.sums(first, bias, sums_ref)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """A tile of columns, and the part of the rows that a program walks over."""

    s: TritonStatic
    cut: ColumnTiles
    y: tuple[Any, ...]
    """The activation; and its bias, if that comes apart."""
    turn: Any
    """Index of the tile of columns."""
    part: Any
    """Index of the part of the rows."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.s.config.statistics.rows, self.s.config.statistics.across

    @property
    def steps(self) -> int:
        return self.cut.span // (self.shape[0] * _UNROLL)

    @property
    def columns(self) -> Array:
        return self.turn * self.shape[1] + index_range(self.shape[1])

    @property
    def column_mask(self) -> Array | None:
        features = self.s.layout.features
        return None if features % self.shape[1] == 0 else self.columns < features

    def _start(self, i: Any) -> Any:
        # The last rows first: what was written last may be in a cache.
        step = (self.steps - 1 - i) * self.cut.parts + self.part
        return step * (self.shape[0] * _UNROLL)

    def _mask(self, start: Any) -> Array | None:
        sampled, _ = self.s.sampled(self.cut.rows)
        index = start + index_range(self.shape[0])
        row_mask = None if sampled % self.cut.span == 0 else index < sampled
        return both(row_mask, self.column_mask, self.shape)

    def load(self, i: Any) -> tuple[Array, ...]:
        """The tiles of a step."""
        place = jnp.broadcast_to(self.columns[None, :], self.shape)
        _, stride = self.s.sampled(self.cut.rows)
        tiles = []
        for j in range(_UNROLL):
            start = self._start(i) + j * self.shape[0]
            index = (start + index_range(self.shape[0])) * stride
            where = (jnp.broadcast_to(index[:, None], self.shape), place)
            tiles.append(read(self.y[0], where, self._mask(start)))
        return tuple(tiles)

    def bias(self) -> Array | None:
        """The bias of the tile's columns; None if ``y`` has it already."""
        if not self.s.biased:
            return None
        across = Span(self.turn * self.shape[1], self.shape[1])
        return read(self.y[1], (across,), self.column_mask)

    def _add(
        self,
        i: Any,
        tiles: tuple[Array, ...],
        bias: Array | None,
        sums: tuple[Array, ...],
    ) -> tuple[Array, ...]:
        for j, value in enumerate(tiles):
            mask = self._mask(self._start(i) + j * self.shape[0])
            new = statistics_of(self.s, plus_bias(value, bias, mask), mask)
            sums = tuple(a + b for a, b in zip(sums, new, strict=True))
        return sums

    def sums(self, first: tuple[Array, ...], bias: Array | None, sums_ref: Any) -> None:
        """Adds up all steps; ``first`` holds the tiles of the first one."""

        def body(i: Any, carry: Any) -> Any:
            tiles, sums = carry
            # Reads the next tiles while it adds these.
            return self.load(i + 1), self._add(i, tiles, bias, sums)

        zero = jnp.zeros(self.shape, jnp.float32)
        carry: Any = (first, (zero, zero, zero))
        if self.steps > 1:
            carry = lax.fori_loop(np.int32(0), np.int32(self.steps - 1), body, carry)
        across = Span(self.turn * self.shape[1], self.shape[1])
        tiles, sums = carry
        for j, x in enumerate(self._add(self.steps - 1, tiles, bias, sums)):
            index = (self.part, j, across)
            write(sums_ref, index, jnp.sum(x, axis=0), self.column_mask)


def statistics_of(
    s: TritonStatic, value: Array, mask: Array | None
) -> tuple[Array, ...]:
    """What each element adds to the sum, sum of squares and near-zero count."""
    x = f32(value)
    squares = x * x
    near = near_zero(s, x, squares)
    if mask is not None:
        near = near & mask
    return x, squares, jnp.where(near, 1.0, 0.0)
