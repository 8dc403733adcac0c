"""Backward kernel of groups."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from esper_jax.kernels.blend.triton.matrix.tiles import Tile, dot, every_eighth
from esper_jax.kernels.blend.triton.narrow.tiles import (
    Group,
    Lanes,
    Members,
    both_masks,
    entries,
    group_of,
    only,
    over_tiles,
    same,
)
from esper_jax.kernels.blend.triton.refs import Refs, Span, biased, f32, read, write
from esper_jax.kernels.blend.triton.static import TritonStatic

__all__ = ["VECTORS", "backward_kernel"]

VECTORS = ("b2", "scale", "alpha", "bias")
"""Gradients that programs leave by column; the last only where ``y`` has a bias."""


class _Sums(NamedTuple):
    """Sums of the gradients over rows; of vectors, in parts.

    Of the matrices, what lies off the blocks means nothing.
    """

    w1: Array
    b1: Array
    w2: Array
    b2: Array
    scale: Array
    alpha: Array


@dataclasses.dataclass(frozen=True)
class _Backward:
    """What a program of the backward kernel holds."""

    group: Group
    total: int
    span: int
    saved: Any
    g: Any
    dy: Any

    @property
    def s(self) -> TritonStatic:
        return self.group.s

    @property
    def reconstructs(self) -> bool:
        return self.s.incubation == "reconstruction"


def backward_kernel(s: TritonStatic, total: int, span: int, *all_refs: Any) -> None:
    """Partial gradients of the bank and alpha, and ``dy``, of living groups.

    Args:
      s: what is fixed while tracing.
      total: rows of the batch.
      span: rows that a program goes over.
      all_refs: inputs and outputs.
    """
    refs, (of_seed, groups, saved_ref, g_ref, *rest, dy_ref) = Refs.split(all_refs)
    # The sum of the cotangent passes through.
    outs = rest[1:] if s.biased else rest
    program = pl.program_id(0), pl.program_id(1)
    index = groups[program[0]]

    @pl.when(index >= 0)
    def _living() -> None:
        group = group_of(s, refs, of_seed, index, program)
        p = _Backward(group, total, span, saved_ref, g_ref, dy_ref)

        body, turns = functools.partial(_add_tile, p), span // s.config.backward.rows
        sums = over_tiles(group, turns, body, _no_sums(p))
        sums = sums._replace(
            **{
                name: jnp.sum(getattr(sums, name), axis=0)
                for name in ("b1", "b2", "scale", "alpha")
            }
        )
        _write_matrices(p, sums, refs.alpha.shape[0], outs)
        _write_vectors(p, sums, outs[3])


def _no_sums(p: _Backward) -> _Sums:
    """Sums of nothing; a single row of 0 for what is not summed."""
    rows, s = p.s.config.backward.rows, p.s
    columns, units = s.group_columns, s.group_units

    def zeros(tall: int, wide: int, wanted: bool = True) -> Array:
        return jnp.zeros((tall if wanted else 1, wide), jnp.float32)

    return _Sums(
        w1=zeros(columns, units),
        b1=zeros(8, units),
        w2=zeros(units, columns),
        b2=zeros(rows, columns),
        scale=zeros(rows, columns, s.uses("scale")),
        alpha=zeros(rows, columns, p.reconstructs),
    )


def _add_tile(
    p: _Backward, i: Any, members: Members, alone: bool, sums: _Sums
) -> tuple[_Sums, Array]:
    """The body of `over_tiles`; also writes the gradient of y."""
    s, group, w = p.s, p.group, p.group.weights
    rows = s.config.backward.rows
    tile = group.tile(group.part * p.span + i * rows, rows, p.total)
    columns, units = group.lanes_of(members)
    y = only(columns, read(p.saved, tile.saved, tile.mask))
    given = read(p.g, tile.place, tile.mask)
    g = only(columns, given)
    before = dot(y, w.w1) + w.b1[None, :]
    pulled, gain = g, jnp.zeros((1, 1), jnp.float32)
    if p.reconstructs:
        r = group.correct(y, tile, members)
        counts = jnp.broadcast_to((group.columns.alpha != 0.0)[None, :], r.shape)
        pulled, gain = jnp.where(counts, f32(g), r).astype(g.dtype), f32(g) * r
    dh = dot(pulled, w.w2, (1, 1))
    h, slope = s.activate(group.units.kind, before)
    d_before = dh * slope
    # Each shows what entered the products before it.
    largest = jnp.max(jnp.maximum(jnp.abs(h), jnp.abs(d_before)))
    fine = largest <= float(jnp.finfo(s.dtype).max)
    adds = True if alone else fine
    h, d_before = (only(units & adds, x) for x in (h, d_before))
    pulled, gain = only(columns & adds, pulled), jnp.where(adds, gain, 0.0)
    d_low, f_pulled = d_before.astype(y.dtype), f32(pulled)
    _write_input(p, tile, (given, g, d_low), (columns if alone else None, adds))
    added = _Sums(
        w1=sums.w1 + dot(y, d_low, (0, 0)),
        b1=sums.b1 + every_eighth(d_before),
        w2=sums.w2 + dot(h.astype(y.dtype), pulled, (0, 0)),
        b2=sums.b2 + f_pulled,
        scale=sums.scale + f_pulled * f32(y) if s.uses("scale") else sums.scale,
        alpha=sums.alpha + gain if p.reconstructs else sums.alpha,
    )
    return added, fine


def _write_input(
    p: _Backward,
    tile: Tile,
    values: tuple[Array, Array, Array],
    which: tuple[Array | None, Any],
) -> None:
    """Writes the gradient of a tile of y.

    Args:
      p: what the program holds.
      tile: the tile.
      values: the cotangent, the same of the members that are added, and the gradient of
        what enters the hidden units.
      which: the only columns to write, or None; and whether to write.
    """
    (given, g, d_low), (columns, adds), group = values, which, p.group
    alpha, mask = group.columns.alpha, tile.mask
    if columns is not None:
        mask = both_masks(mask, columns, given.shape)

    @pl.when(adds & (jnp.max(jnp.where(alpha != 0.0, 1, 0)) > 0))
    def _input() -> None:
        dy = dot(d_low, group.weights.w1, (1, 1))
        if p.s.uses("scale"):
            dy = dy + group.scale[None, :] * f32(g)
        counts = jnp.broadcast_to((alpha != 0.0)[None, :], given.shape)
        out = (f32(given) + alpha[None, :] * dy).astype(given.dtype)
        write(p.dy, tile.place, jnp.where(counts, out, given), mask)


def _factor(p: _Backward, lanes: Lanes) -> Array:
    """What the parameters' gradients are multiplied by."""
    if not p.reconstructs:
        return lanes.beta
    elements = f32(jnp.asarray(lanes.size)) * float(p.total)
    return lanes.beta * jnp.where(lanes.alpha != 0.0, 1.0, 2.0 / elements)


def _write_matrices(p: _Backward, sums: _Sums, count: int, outs: Any) -> None:
    """Leaves the gradients of the hidden layers: the blocks of the sums."""
    columns, units, part = p.group.columns, p.group.units, p.group.part
    factor = _factor(p, columns)
    for ref, sides, value in (
        (outs[0], (columns, units), factor[:, None] * sums.w1),
        (outs[2], (units, columns), factor[None, :] * sums.w2),
    ):
        index, mask = entries(*sides, count)
        write(ref, (jnp.full(mask.shape, part), *index), value, mask)
    b1 = biased(p.s.of_kind(units.kind, "bias"), _factor(p, units) * sums.b1)
    slot = jnp.where(units.living, units.slot, count)
    write(outs[1], (jnp.full(slot.shape, part), slot, units.at), b1, units.living)


def _write_vectors(p: _Backward, sums: _Sums, ref: Any) -> None:
    """Leaves the gradients that have an entry for each column, as `VECTORS`."""
    s, group, w = p.s, p.group, p.group.weights
    kind, factor = group.columns.kind, _factor(p, group.columns)
    gain = sums.alpha
    if not p.reconstructs:
        # sum(g * (h @ w2)) is sum(w2 * (h.T @ g)), whose second factor is at hand.
        blocks = same(group.units, group.columns)
        gain = jnp.sum(jnp.where(blocks, f32(w.w2) * sums.w2, 0.0), axis=0)
        gain = gain + group.b2 * sums.b2
        if s.uses("scale"):
            gain = gain + group.scale * sums.scale
    vectors = [
        biased(s.of_kind(kind, "bias"), factor * sums.b2),
        biased(s.of_kind(kind, "scale"), factor * sums.scale),
        gain,
    ]
    if s.biased:
        # As in `matrix.backward`: weights times sums over rows, in place of the rows.
        blocks = same(group.columns, group.units)
        through = jnp.where(blocks, f32(w.w1) * sums.b1[None, :], 0.0)
        pulled = jnp.sum(through, axis=1) + group.scale * sums.b2
        vectors.append(group.columns.alpha * pulled)
    across = Span(group.start, s.group_columns)
    for j, x in enumerate(vectors):
        write(ref, (group.part, j, across), x, group.exists)
