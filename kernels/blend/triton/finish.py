"""Last launch of the forward pass: adds up what its programs left."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from esper_jax.kernels.blend.triton.blocks import power_of_two
from esper_jax.kernels.blend.triton.refs import (
    Found,
    Order,
    both,
    chunk,
    f32,
    find,
    index_range,
    loop,
    order_of,
    parts_of,
    plus_bias,
    read,
)
from esper_jax.kernels.blend.triton.static import TritonStatic
from esper_jax.kernels.blend.triton.statistics import statistics_of

__all__ = ["Left", "finish_kernel"]


@dataclasses.dataclass(frozen=True)
class Left:
    """What the forward kernel left to be added up.

    Args:
      rows: rows of the batch.
      programs: number of its programs that blend.
      parts: number of parts of the columns' sums, if statistics are over all rows.
      kept_step: stride between the sampled rows among the kept rows.
    """

    rows: int
    programs: int
    parts: int
    kept_step: int


def finish_kernel(s: TritonStatic, left: Left, *refs: Any) -> None:
    """Adds up what other programs left.

    The first programs each do one slot, the others one seed each.

    Args:
      s: what is fixed while tracing.
      left: what there is to add up.
      refs: alpha, beta and owner of the slots; the forward kernel's sums; the columns'
        sums (statistics over all rows), or the output, the kept rows of the living
        chunks as they were, and the bias, if that comes apart (statistics over a
        sample); and the results.
    """
    alpha_ref, beta_ref, owner_ref, sums_ref, *seen, count_ref = refs[:-4]
    outs, means_ref = refs[-4:-1], refs[-1]
    slots = alpha_ref.shape[0]
    me = pl.program_id(0)
    # Starts all reads before computing anything from them.
    found = find(alpha_ref, beta_ref, owner_ref)

    @pl.when(me < slots)
    def _slot() -> None:
        sums, owner, lives = _slot_sums(s, left, found, me, sums_ref)
        elements = f32(jnp.asarray(chunk(s.layout, owner)[1])) * float(left.rows)
        means_ref[me] = jnp.where(lives, sums[0] / elements, 0.0)
        if len(sums) > 1:

            @pl.when(lives)
            def _living() -> None:
                _put(outs, owner, tuple(sums[1:]))

    @pl.when(me >= slots)
    def _seed() -> None:
        seed = me - slots
        _, size = chunk(s.layout, seed)
        count_ref[seed] = f32(jnp.asarray(size)) * float(s.sampled(left.rows)[0])
        if s.statistics_rows == 0:
            _put(outs, seed, (jnp.float32(0.0),) * 3)
        elif s.statistics_rows is None:
            _finish_columns(s, left, found, seed, seen[0], outs)
        else:
            _finish_sample(s, left, found, seed, seen, outs)


def _slot_sums(
    s: TritonStatic, left: Left, found: Found, slot: Any, sums_ref: Any
) -> tuple[list[Array], Array, Array]:
    """A slot's sums, its owner, and whether it lives.

    The first sum is of ``r**2``; the others, if statistics are over all rows, are those
    of its chunk.
    """
    most = sums_ref.shape[2]
    part = index_range(power_of_two(most))
    exists = None if most == len(part) else part < most
    partial = [
        read(sums_ref, (slot, which, part), exists)
        for which in range(sums_ref.shape[1])
    ]
    order = order_of(found)
    tiles = pl.cdiv(left.rows, s.config.forward.rows)
    shares = parts_of(order, left.programs, tiles, 1)
    sums = [jnp.sum(jnp.where(part < shares, x, 0.0)) for x in partial]
    mine = order.slots == slot
    lives = jnp.sum(jnp.where(mine & order.living, 1, 0)) > 0
    return sums, jnp.sum(jnp.where(mine, order.owner, 0)), lives


def _finish_columns(
    s: TritonStatic, left: Left, found: Found, seed: Any, sums_ref: Any, outs: Any
) -> None:
    """Statistics over all rows of a dormant chunk; a slot writes those of its own."""
    sums = _sums_of_columns(s, left.parts, seed, sums_ref)

    @pl.when(jnp.logical_not(_owns(order_of(found), seed)[0]))
    def _dormant() -> None:
        _put(outs, seed, sums)


def _finish_sample(
    s: TritonStatic, left: Left, found: Found, seed: Any, seen: Any, outs: Any
) -> None:
    """Statistics of a chunk over a sample of the rows."""
    out_ref, kept_ref, *bias_refs = seen
    # The output holds a dormant chunk as the input did.
    count, step = s.sampled(left.rows)
    rows = _rows_of(s, out_ref, bias_refs, seed, step)
    sums = _sums_of_rows(s, count, seed, rows)
    lives, slot = _owns(order_of(found), seed)

    @pl.when(jnp.logical_not(lives))
    def _unchanged() -> None:
        _put(outs, seed, sums)

    @pl.when(lives)
    def _overwritten() -> None:
        kept = _rows_kept(kept_ref, slot, left.kept_step)
        _put(outs, seed, _sums_of_rows(s, count, seed, kept))


def _owns(order: Order, seed: Any) -> tuple[Array, Array]:
    """Whether a seed lives, and its slot."""
    mine = order.living & (order.owner == seed)
    slot = jnp.sum(jnp.where(mine, order.slots, 0))
    return jnp.sum(jnp.where(mine, 1, 0)) > 0, slot


def _put(outs: Any, seed: Any, values: tuple[Array, ...]) -> None:
    for out, value in zip(outs, values, strict=True):
        out[seed] = value


_TILE = 2048
"""Number of elements of a tile."""
_UNROLL = 8
"""Number of tiles of rows that a program reads at once."""


def _tile_of(s: TritonStatic, seed: Any, count: int) -> tuple[Any, int, int, Any]:
    """A tile of a seed's chunk: first column, height, width, mask of its columns."""
    wide = power_of_two(s.width)
    start, size = chunk(s.layout, seed)
    exact = wide == s.width and s.layout.even
    inside = None if exact else index_range(wide) < size
    return start, min(power_of_two(count), max(1, _TILE // wide)), wide, inside


def _sums_of_columns(s: TritonStatic, parts: int, seed: Any, sums_ref: Any) -> Any:
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


def _rows_of(
    s: TritonStatic, out_ref: Any, bias_refs: list[Any], seed: Any, step: int
) -> Callable[..., Array]:
    start, _, wide, inside = _tile_of(s, seed, 1)
    bias = None
    if bias_refs:
        bias = read(bias_refs[0], (start + index_range(wide),), inside)

    def get(row: Array, column: Array, mask: Array | None) -> Array:
        y = read(out_ref, (row * step, start + column), mask)
        return plus_bias(y, bias, mask)

    return get


def _rows_kept(kept_ref: Any, slot: Any, step: int) -> Callable[..., Array]:
    return lambda row, column, mask: read(
        kept_ref, (jnp.full_like(row, slot), row * step, column), mask
    )


def _sums_of_rows(
    s: TritonStatic, count: int, seed: Any, get: Callable[..., Array]
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
        # Starts all reads before the first use.
        for value, mask in [load(i * unroll + j) for j in range(unroll)]:
            new = statistics_of(s, value, mask)
            sums = tuple(a + b for a, b in zip(sums, new, strict=True))
        return sums

    zero = jnp.zeros(shape, jnp.float32)
    sums = loop(0, pl.cdiv(tiles, unroll), body, (zero, zero, zero))
    return tuple(jnp.sum(jnp.sum(x, axis=1)) for x in sums)
