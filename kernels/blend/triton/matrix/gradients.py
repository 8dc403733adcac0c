"""Last kernel of the backward pass: adds up the gradients that programs left."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from esper_jax.kernels.blend.triton.blocks import power_of_two
from esper_jax.kernels.blend.triton.refs import (
    Span,
    chunk,
    f32,
    find,
    index_range,
    loop,
    order_of,
    parts_of,
    read,
    write,
)
from esper_jax.kernels.blend.triton.static import TritonStatic

__all__ = ["SEGMENT", "gradients_kernel"]

SEGMENT = 256
"""Number of elements of each weight matrix that a program adds up."""
_TALL = 32
"""Number of programs' sums that are read at once."""


@dataclasses.dataclass(frozen=True)
class _Unit:
    """One slot's tile of hidden units, whose sums this program adds up."""

    k: Any
    """Index of the slot."""
    block: Any
    """Index of the tile of hidden units."""
    many: int
    """Number of such tiles."""
    rank: Any
    """Number of living slots before this one."""
    parts: Any
    """Number of programs that left sums of the tile."""
    owner: Any
    lives: Any
    learns: Any
    counts: Any
    """Whether it lives and alpha is not 0."""
    zero: Any
    """0 as a traced value."""


def _unit(
    s: TritonStatic, total: int, programs: int, zero: Any, slots: tuple[Any, ...]
) -> _Unit:
    """Finds what this program adds up; ``slots`` are alpha, beta and owner."""
    blocks = s.config.backward
    many = pl.cdiv(s.hidden, blocks.across)
    tiles = pl.cdiv(total, blocks.rows)
    unit = pl.program_id(0)
    k, block = lax.div(unit, many), lax.rem(unit, many)
    found = find(*slots)
    order = order_of(found)
    parts = parts_of(order, programs, tiles, many)
    mine = order.slots == k
    rank = jnp.sum(jnp.where(mine, order.rank, 0)) - 1
    lives, learns, counts = (
        jnp.sum(jnp.where(mine & which, 1, 0)) > 0
        for which in (order.living, order.learning, order.living & (found.alpha != 0))
    )
    owner = jnp.sum(jnp.where(mine, order.owner, 0))
    return _Unit(k, block, many, rank, parts, owner, lives, learns, counts, zero)


def gradients_kernel(s: TritonStatic, total: int, programs: int, *refs: Any) -> None:
    """Adds up what the programs of each slot left: the gradients of its parameters.

    A program does one segment of the flat weight matrices of one tile of hidden units.
    The last program of each tile does the vectors.

    Args:
      s: what is fixed while tracing.
      total: rows of the batch.
      programs: number of programs of the backward kernel.
      refs: alpha, beta and owner of the slots; sums of w1, b1, w2, b2, scale and alpha;
        with a bias, what the correction adds to its gradient, and the sum of the
        cotangent; and the gradients of all these. That of the bias overwrites the sum
        of the cotangent.
    """
    w1_ref, b1_ref, w2_ref, b2_ref, scale_ref, gain_ref = refs[3:9]
    outs = refs[11:] if s.biased else refs[9:]
    w1_out, b1_out, w2_out, b2_out, scale_out, gain_out = outs[:6]
    blocks = s.config.backward
    unit, segment = pl.program_id(0), pl.program_id(1)
    zero, segments = unit * 0, pl.num_programs(1) - 1
    u = _unit(s, total, programs, zero, refs[:3])

    @pl.when(segment < segments)
    def _matrices() -> None:
        size = min(SEGMENT, w1_ref.shape[1])
        place = (unit, Span(segment * size, size))
        _put(u, [(w1_ref, w1_out), (w2_ref, w2_out)], place)

    @pl.when(segment == segments)
    def _vectors() -> None:
        biases = _put if s.uses("bias") else _put_zeros
        biases(u, [(b1_ref, b1_out)], (unit, Span(u.zero, blocks.across)))

        @pl.when(u.block == 0)
        def _once() -> None:
            scales = _put if s.uses("scale") else _put_zeros
            place = (u.k, Span(u.zero, s.columns))
            biases(u, [(b2_ref, b2_out)], place)
            scales(u, [(scale_ref, scale_out)], place)
            most = min(programs, pl.cdiv(total, blocks.rows) * u.many)
            index = index_range(power_of_two(most))
            mask = u.lives & (index < u.parts * u.many)
            gains = read(gain_ref, (u.rank * u.many * u.parts + index,), mask)
            gain_out[u.k] = jnp.sum(gains)
            if s.biased:
                _add_to_bias(s, u, refs[9], refs[10], outs[6])


def _add_to_bias(
    s: TritonStatic, u: _Unit, sums_ref: Any, total_ref: Any, out_ref: Any
) -> None:
    """Adds a slot's sums to its chunk of the bias's gradient, if the slot counts."""

    @pl.when(u.counts)
    def _counting() -> None:
        start, size = chunk(s.layout, u.owner)
        column = index_range(s.columns)
        exact = s.layout.even and s.width == s.columns
        mask = None if exact else column < size
        place = (Span(start, s.columns),)
        # Those of all tiles of hidden units.
        first, count = u.rank * u.many * u.parts, u.parts * u.many
        (more,) = _added_up(u, [sums_ref], (first, count), column)
        write(out_ref, place, f32(read(total_ref, place, mask)) + more, mask)


def _put(u: _Unit, pairs: list[tuple[Any, Any]], place: tuple[Any, Span]) -> None:
    """Writes the sums over programs; 0 where the slot does not learn.

    Args:
      u: whose programs.
      pairs: programs' sums, and where their sum goes.
      place: row of the output, and columns of both.
    """
    _, (start, size) = place

    @pl.when(u.learns)
    def _learning() -> None:
        programs = (u.rank * u.many + u.block) * u.parts, u.parts
        column = start + index_range(size)
        sums = _added_up(u, [ref for ref, _ in pairs], programs, column)
        for x, (_, out) in zip(sums, pairs, strict=True):
            write(out, place, x)

    @pl.when(jnp.logical_not(u.learns))
    def _frozen() -> None:
        _put_zeros(u, pairs, place)


def _added_up(
    u: _Unit, refs: list[Any], programs: tuple[Any, Any], column: Array
) -> list[Array]:
    """Columns of several arrays, summed over programs.

    Args:
      u: what this program adds up.
      refs: the arrays, (programs, columns).
      programs: the first of the programs, and their number.
      column: which columns.
    """
    first, count = programs
    shape = (_TALL, column.shape[0])
    columns = jnp.broadcast_to(column[None, :], shape)

    def body(i: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        part = i * _TALL + index_range(_TALL)
        at = (jnp.broadcast_to((first + part)[:, None], shape), columns)
        mask = jnp.broadcast_to((part < count)[:, None], shape)
        return tuple(x + read(ref, at, mask) for x, ref in zip(sums, refs, strict=True))

    steps = lax.div(count + (_TALL - 1), _TALL)
    zeros = (jnp.zeros(shape, jnp.float32),) * len(refs)
    return [jnp.sum(x, axis=0) for x in loop(u.zero, steps, body, zeros)]


def _put_zeros(u: _Unit, pairs: list[tuple[Any, Any]], place: tuple[Any, Span]) -> None:
    for _, out in pairs:
        write(out, place, jnp.zeros((place[1].size,), jnp.float32))
