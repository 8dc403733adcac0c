"""Tiles of a group's chunks, and the group's weights as block-diagonal matrices."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from esper_jax.chunks import ChunkLayout
from esper_jax.kernels.blend.triton.blocks import power_of_two
from esper_jax.kernels.blend.triton.matrix.tiles import Tile, Weights, dot
from esper_jax.kernels.blend.triton.refs import (
    Refs,
    Span,
    biased,
    both,
    chunk,
    f32,
    index_range,
    loop,
    read,
)
from esper_jax.kernels.blend.triton.static import TritonStatic

__all__ = [
    "Group",
    "Lanes",
    "Members",
    "both_masks",
    "entries",
    "group_of",
    "only",
    "over_tiles",
    "same",
]

Members = tuple[Any, Any]
"""The first of some members of a group, and the one after the last."""


class Lanes(NamedTuple):
    """The slots of a group, with an entry for each column or each hidden unit."""

    member: Array
    """Index of the seed within the group."""
    slot: Array
    """Index of the slot; the number of slots where no slot lives."""
    at: Array
    """Which feature of the chunk, or hidden unit of the slot."""
    size: Any
    """Width of the chunk; a Python constant if all chunks have the same."""
    alpha: Array
    beta: Array
    kind: Array
    living: Array


def _lanes(
    refs: Refs, of_seed: Any, kinds: int, seed: Array, given: tuple[Any, ...]
) -> Lanes:
    """Looks up the slots of the seeds.

    Args:
      refs: the slots.
      of_seed: the slot of each seed.
      kinds: number of blueprints.
      seed: index of each lane's seed.
      given: its member, at, size, and whether it exists.
    """
    member, at, size, exists = given
    count = refs.alpha.shape[0]
    slot = jnp.where(exists, read(of_seed, (seed,), exists), count)
    living = slot < count
    index = jnp.where(living, slot, 0)
    kind = read(refs.kind, (index,), living).astype(jnp.int32)
    return Lanes(
        member,
        slot,
        at,
        size,
        f32(read(refs.alpha, (index,), living)),
        f32(read(refs.beta, (index,), living)),
        jnp.minimum(jnp.maximum(kind, 0), kinds - 1),
        living,
    )


def _seed_of(layout: ChunkLayout, column: Array) -> Array:
    """The seed that watches each feature."""
    base, wider = divmod(layout.features, layout.num_seeds)
    if layout.even:
        return lax.div(column, base)
    cut = wider * (base + 1)
    first = lax.div(column, base + 1)
    return jnp.where(column < cut, first, lax.div(column - cut, base) + wider)


def same(a: Lanes, b: Lanes) -> Array:
    """Whether the lanes of ``a`` and of ``b`` belong to one living slot, as a tile."""
    shape = (len(a.member), len(b.member))
    one = jnp.broadcast_to(jnp.where(a.living, a.member, -1)[:, None], shape)
    other = jnp.broadcast_to(jnp.where(b.living, b.member, -2)[None, :], shape)
    return one == other


def only(lanes: Array, x: Array) -> Array:
    """A tile with 0 outside the lanes."""
    return jnp.where(jnp.broadcast_to(lanes[None, :], x.shape), x, jnp.zeros_like(x))


def both_masks(mask: Array | None, columns: Array, shape: tuple[int, ...]) -> Array:
    """The mask of a tile, less other columns than these."""
    own = jnp.broadcast_to(columns[None, :], shape)
    return own if mask is None else mask & own


@dataclasses.dataclass(frozen=True)
class Group:
    """Neighbouring seeds, and the blueprints of their slots."""

    s: TritonStatic
    columns: Lanes
    units: Lanes
    start: Array
    """First feature."""
    exists: Array | None
    """Which columns of a tile are the group's; None if all are."""
    weights: Weights
    """Block-diagonal."""
    b2: Array
    scale: Array
    rank: Array
    """Index of the group among the living ones."""
    part: Array
    """Index of the program among those that share the group's rows."""
    every: Members
    """All members, as traced values: a loop over all, and one over a member alone, are
    then the same program, and round in the same way."""
    halved: bool = False
    """Whether ``w2`` is half of what it should be, for an activation of twice."""

    def tile(self, first: Any, rows: int, total: int) -> Tile:
        """The tile of ``rows`` rows from ``first``, of a batch of ``total``."""
        inside = None if total % rows == 0 else first + index_range(rows) < total
        width = len(self.columns.at)
        mask = both(inside, self.exists, (rows, width))
        here = Span(first, rows)
        saved = (self.rank, here, Span(self.start * 0, width))
        return Tile((here, Span(self.start, width)), saved, mask, mask)

    def lanes_of(self, members: Members) -> tuple[Array, Array]:
        """The columns and the hidden units of some members."""
        first, end = members
        columns, units = self.columns.member, self.units.member
        return (
            (columns >= first) & (columns < end),
            (units >= first) & (units < end),
        )

    def with_half(self) -> "Group":
        """The same for an activation of twice, if tracing knows of one."""
        if not self.s.double:
            return self
        w = self.weights._replace(w2=self.weights.w2 * 0.5)
        return dataclasses.replace(self, weights=w, halved=True)

    def correct(self, y: Array, tile: Tile, members: Members) -> Array:
        """``r(y)`` of a tile, float32, where the members' columns are; elsewhere 0."""
        s, w = self.s, self.weights
        columns, units = self.lanes_of(members)
        before = dot(y, w.w1) + w.b1[None, :]
        if self.halved and s.double:
            h = s.double(before)
        else:
            h = s.activate(self.units.kind, before)[0]
        r = dot(only(units, h.astype(y.dtype)), w.w2) + self.b2[None, :]
        if s.uses("scale"):
            r = r + self.scale[None, :] * f32(y)
        r = only(columns, r)
        return r if tile.mask is None else jnp.where(tile.mask, r, 0.0)


def group_of(
    s: TritonStatic, refs: Refs, of_seed: Any, index: Array, program: tuple[Any, Any]
) -> Group:
    """The group at ``index``.

    Args:
      s: what is fixed while tracing.
      refs: the slots and their parameters.
      of_seed: the slot of each seed, (S,); the number of slots where none lives.
      index: index of the group.
      program: `Group.rank` and `Group.part`.
    """
    layout, many = s.layout, s.config.group
    first = index * many
    start, _ = chunk(layout, first)
    end, _ = chunk(layout, jnp.minimum(first + many, layout.num_seeds))
    column = start + index_range(s.group_columns)
    inside = column < end
    seed = _seed_of(layout, jnp.where(inside, column, start))
    begin, size = chunk(layout, seed)
    look_up = functools.partial(_lanes, refs, of_seed, len(s.blueprints))
    columns = look_up(seed, (seed - first, column - begin, size, inside))

    unit = index_range(s.group_units)
    member = lax.div(unit, s.hidden)
    exists = (member < many) & (first + member < layout.num_seeds)
    seed = jnp.where(exists, first + member, 0)
    _, size = chunk(layout, seed)
    at = lax.rem(unit, s.hidden)
    units = look_up(seed, (member, at, size, exists))

    exact = layout.even and s.width * many == s.group_columns
    exact = exact and layout.num_seeds % many == 0
    own = (columns.slot, columns.at)
    here = columns.living
    b2 = biased(s.of_kind(columns.kind, "bias"), f32(read(refs.b2, own, here)))
    scale = f32(read(refs.scale, own, here))
    scale = biased(s.of_kind(columns.kind, "scale"), scale)
    weights = _weights(s, refs, columns, units)
    return Group(
        s,
        columns,
        units,
        start,
        None if exact else inside,
        weights,
        b2,
        scale,
        *program,
        (jnp.minimum(index, 0), many + jnp.minimum(index, 0)),
    )


def entries(a: Lanes, b: Lanes, count: int) -> tuple[tuple[Array, ...], Array]:
    """Index of each entry of a tile into the slots' matrices, and which entries exist.

    Those off the diagonal point beyond the ``count`` slots: a masked entry must not
    point where another one is written, since interpret mode would write both.
    """
    mask = same(a, b)
    slot = jnp.where(mask, jnp.broadcast_to(a.slot[:, None], mask.shape), count)
    across = jnp.broadcast_to(a.at[:, None], mask.shape)
    along = jnp.broadcast_to(b.at[None, :], mask.shape)
    return (slot, across, along), mask


def _weights(s: TritonStatic, refs: Refs, columns: Lanes, units: Lanes) -> Weights:
    """The slots' matrices along the diagonal, in the dtype of the products."""
    count = refs.alpha.shape[0]
    has = units.at < s.of_kind(units.kind, "hidden")
    units = units._replace(living=units.living & has)
    b1 = f32(read(refs.b1, (units.slot, units.at), units.living))
    return Weights(
        read(refs.w1, *entries(columns, units, count)).astype(s.dtype),
        biased(s.of_kind(units.kind, "bias"), b1),
        read(refs.w2, *entries(units, columns, count)).astype(s.dtype),
    )


def over_tiles(
    group: Group, turns: int, body: Callable[..., tuple[Any, Array]], sums: Any
) -> Any:
    """Adds up all tiles of a program; where ``body`` finds one bad, member by member.

    Args:
      group: the group of the program.
      turns: number of tiles.
      body: ``body(i, members, alone, sums)`` adds these members of the i-th tile to the
        sums, and says whether the tile was finite. If not, and unless it does one
        member ``alone``, it adds and writes nothing.
      sums: what to begin with.
    """
    numbers, many = index_range(power_of_two(turns)), group.s.config.group

    def once(i: Any, carry: Any) -> Any:
        sums, bad = carry
        sums, fine = body(i, group.every, False, sums)
        return sums, jnp.where((numbers == i) & jnp.logical_not(fine), 1, bad)

    sums, bad = loop(0, turns, once, (sums, jnp.zeros_like(numbers)))

    def again(i: Any, sums: Any) -> Any:
        turn, member = lax.div(i, many), lax.rem(i, many)
        # Nobody where the tile was finite.
        end = member + jnp.max(jnp.where(numbers == turn, bad, 0))
        return body(turn, (member, end), True, sums)[0]

    # A loop, not a branch: it has no turns where all was finite.
    return lax.fori_loop(np.int32(0), jnp.max(bad) * (turns * many), again, sums)
