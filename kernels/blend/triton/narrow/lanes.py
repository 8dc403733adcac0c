"""Slots as lanes: each lane loops over the features of its own chunk."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from esper_jax.kernels.blend.triton.refs import (
    Refs,
    Slot,
    f32,
    index_range,
    read,
    slot_at,
)
from esper_jax.kernels.blend.triton.static import TritonStatic

__all__ = [
    "LaneTile",
    "LaneWeights",
    "correction",
    "hidden_layer",
    "lane_bias",
    "lane_tile",
    "lane_weights",
    "lanes_of",
    "rounded",
]


def lanes_of(s: TritonStatic, refs: Refs, count: int, lanes: int) -> tuple[Array, Slot]:
    """Indices of the program's slots among all ``count``, and the slots."""
    me = pl.program_id(0)
    index = me * lanes + index_range(lanes)
    return index, slot_at(s, refs, index, me * 0, index < count)


class LaneWeights(NamedTuple):
    """Each parameter of the blueprint, a vector with one entry per lane."""

    w1: list[list[Array]]
    b1: list[Array]
    w2: list[list[Array]]
    b2: list[Array]
    scale: list[Array]


def lane_weights(s: TritonStatic, refs: Refs, index: Array, slot: Slot) -> LaneWeights:
    """The parameters of the slots; 0 where a blueprint has none."""
    hidden = s.of_kind(slot.kind, "hidden")
    units = [slot.living & (h < hidden) for h in range(s.hidden)]
    bias = slot.living & s.of_kind(slot.kind, "bias")
    scale = slot.living & s.of_kind(slot.kind, "scale")

    def get(ref: Any, at: tuple[int, ...], mask: Array) -> Array:
        return f32(read(ref, (index, *(jnp.full_like(index, i) for i in at)), mask))

    wide, tall = range(s.width), range(s.hidden)
    return LaneWeights(
        w1=[[get(refs.w1, (i, h), units[h]) for h in tall] for i in wide],
        b1=[get(refs.b1, (h,), units[h] & bias) for h in tall],
        w2=[[get(refs.w2, (h, i), units[h]) for i in wide] for h in tall],
        b2=[get(refs.b2, (i,), bias) for i in wide],
        scale=[get(refs.scale, (i,), scale) for i in wide],
    )


def rounded(w: LaneWeights, dtype: Any) -> LaneWeights:
    """Rounds the matrices to ``dtype``, as a matrix product takes them."""

    def low(rows: list[list[Array]]) -> list[list[Array]]:
        return [[f32(x.astype(dtype)) for x in row] for row in rows]

    return w._replace(w1=low(w.w1), w2=low(w.w2))


def hidden_layer(
    s: TritonStatic, slot: Slot, w: LaneWeights, y: list[Array]
) -> tuple[list[Array], list[Array]]:
    """Hidden activations and their derivatives, a tile (rows, lanes) for each unit."""
    values, slopes = [], []
    for h in range(s.hidden):
        before = jnp.broadcast_to(w.b1[h][None, :], y[0].shape)
        for i in range(s.width):
            before = before + y[i] * w.w1[i][h][None, :]
        value, slope = s.activate(slot.kind, before)
        values.append(value)
        slopes.append(slope)
    return values, slopes


def correction(
    s: TritonStatic, w: LaneWeights, y: list[Array], h: list[Array], valid: list[Array]
) -> list[Array]:
    """``r(y)``, a tile (rows, lanes) for each feature of a chunk."""
    out = []
    for i in range(s.width):
        r = w.b2[i][None, :] + w.scale[i][None, :] * y[i]
        for unit in range(s.hidden):
            r = r + h[unit] * w.w2[unit][i][None, :]
        out.append(jnp.where(valid[i], r, 0.0))
    return out


class LaneTile(NamedTuple):
    """Where a tile of rows by slots is; lists have an entry for each feature."""

    rows: Array
    """Index of each row, (rows, lanes)."""
    place: list[tuple[Array, Array]]
    """Index into the activation."""
    valid: list[Array]
    """Whether the row exists, and the slot lives and has the feature."""
    inside: Array
    """Whether the row exists."""


def lane_bias(s: TritonStatic, slot: Slot, bias_ref: Any) -> list[Array]:
    """The bias of each feature of the chunks, float32, with an entry for each lane."""
    bias = []
    for i in range(s.width):
        lane = slot.living & (i < slot.size)
        column = jnp.where(lane, slot.start + i, s.layout.features)
        bias.append(f32(read(bias_ref, (column,), lane)))
    return bias


def lane_tile(
    s: TritonStatic, slot: Slot, first: Any, rows: int, total: int
) -> LaneTile:
    """The tile of ``rows`` rows from ``first``, of a batch of ``total``."""
    shape = (rows, slot.alpha.shape[0])
    index = first + index_range(rows)
    inside = jnp.broadcast_to((index < total)[:, None], shape)
    index = jnp.broadcast_to(index[:, None], shape)
    place, valid = [], []
    for i in range(s.width):
        lane = slot.living & (i < slot.size)
        # A lane masked off must not point where another lane writes: interpret mode
        # would write both.
        column = jnp.where(lane, slot.start + i, s.layout.features)
        place.append((index, jnp.broadcast_to(column[None, :], shape)))
        valid.append(inside & jnp.broadcast_to(lane[None, :], shape))
    return LaneTile(index, place, valid, inside)
