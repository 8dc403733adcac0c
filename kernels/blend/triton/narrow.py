"""Narrow chunks: a program is a tile of slots, one a lane, and a span of rows."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from esper_jax.kernels.blend.triton.refs import (
    Refs,
    Slot,
    biased,
    f32,
    index_range,
    loop,
    read,
    slot_at,
    write,
)
from esper_jax.kernels.blend.triton.static import Static

__all__ = ["backward_kernel", "forward_kernel"]


def _lanes(s: Static, refs: Refs, count: int, lanes: int) -> tuple[Array, Slot]:
    me = pl.program_id(0)
    index = me * lanes + index_range(lanes)
    return index, slot_at(s, refs, index, me * 0, index < count)


class _LaneWeights(NamedTuple):
    """Each parameter of the blueprint, a vector with one entry per lane."""

    w1: list[list[Array]]
    b1: list[Array]
    w2: list[list[Array]]
    b2: list[Array]
    scale: list[Array]


def _lane_weights(s: Static, refs: Refs, index: Array, slot: Slot) -> _LaneWeights:
    hidden = s.of_kind(slot.kind, "hidden")
    units = [slot.living & (h < hidden) for h in range(s.hidden)]
    bias = slot.living & s.of_kind(slot.kind, "bias")
    scale = slot.living & s.of_kind(slot.kind, "scale")

    def get(ref: Any, at: tuple[int, ...], mask: Array) -> Array:
        return f32(read(ref, (index, *(jnp.full_like(index, i) for i in at)), mask))

    wide, tall = range(s.width), range(s.hidden)
    return _LaneWeights(
        w1=[[get(refs.w1, (i, h), units[h]) for h in tall] for i in wide],
        b1=[get(refs.b1, (h,), units[h] & bias) for h in tall],
        w2=[[get(refs.w2, (h, i), units[h]) for i in wide] for h in tall],
        b2=[get(refs.b2, (i,), bias) for i in wide],
        scale=[get(refs.scale, (i,), scale) for i in wide],
    )


def _rounded(w: _LaneWeights, dtype: Any) -> _LaneWeights:
    """Matrices rounded to the dtype that a matrix product would take them in."""

    def low(rows: list[list[Array]]) -> list[list[Array]]:
        return [[f32(x.astype(dtype)) for x in row] for row in rows]

    return w._replace(w1=low(w.w1), w2=low(w.w2))


def _lane_hidden(
    s: Static, slot: Slot, w: _LaneWeights, y: list[Array]
) -> tuple[list[Array], list[Array]]:
    """Hidden activations and the activation's derivative, tiles (rows, lanes)."""
    values, slopes = [], []
    for h in range(s.hidden):
        before = jnp.broadcast_to(w.b1[h][None, :], y[0].shape)
        for i in range(s.width):
            before = before + y[i] * w.w1[i][h][None, :]
        value, slope = s.activate(slot.kind, before)
        values.append(value)
        slopes.append(slope)
    return values, slopes


def _lane_correction(
    s: Static, w: _LaneWeights, y: list[Array], h: list[Array], valid: list[Array]
) -> list[Array]:
    out = []
    for i in range(s.width):
        r = w.b2[i][None, :] + w.scale[i][None, :] * y[i]
        for unit in range(s.hidden):
            r = r + h[unit] * w.w2[unit][i][None, :]
        out.append(jnp.where(valid[i], r, 0.0))
    return out


class _LaneTile(NamedTuple):
    """Where a tile of rows by slots is: for each feature of a chunk, index and mask."""

    rows: Array
    place: list[tuple[Array, Array]]
    valid: list[Array]
    inside: Array


def _lane_tile(
    s: Static, slot: Slot, first: Any, rows: int, lanes: int, total: int
) -> _LaneTile:
    shape = (rows, lanes)
    index = first + index_range(rows)
    inside = jnp.broadcast_to((index < total)[:, None], shape)
    index = jnp.broadcast_to(index[:, None], shape)
    place, valid = [], []
    for i in range(s.width):
        lane = slot.living & (i < slot.size)
        # Lanes masked off must not point where another lane writes: interpret mode
        # would write both.
        column = jnp.where(lane, slot.start + i, s.layout.features)
        place.append((index, jnp.broadcast_to(column[None, :], shape)))
        valid.append(inside & jnp.broadcast_to(lane[None, :], shape))
    return _LaneTile(index, place, valid, inside)


def forward_kernel(
    s: Static, total: int, span: int, save: bool, *all_refs: Any
) -> None:
    """Output, reconstruction and, with ``save``, the living chunks of narrow slots."""
    refs = Refs(*all_refs[:9])
    y_ref, rest = all_refs[9], list(all_refs[10:])
    if s.statistics_rows != 0:
        rest.pop(0)
    out_ref, means_ref = rest.pop(0), rest.pop(0)
    if s.statistics_rows != 0:
        rest.pop(0)
    saved_ref = rest.pop(0) if save else None
    blocks = s.config.forward
    lanes = blocks.across
    count = refs.alpha.shape[0]
    part = pl.program_id(1)
    index, slot = _lanes(s, refs, count, lanes)
    exists = index < count
    any_living = jnp.max(jnp.where(slot.living, 1, 0)) > 0

    @pl.when(jnp.logical_not(any_living))
    def _dead() -> None:
        zero = jnp.zeros((lanes,), jnp.float32)
        write(means_ref, (jnp.full_like(index, part), index), zero, exists)

    @pl.when(any_living)
    def _living() -> None:
        w = _rounded(_lane_weights(s, refs, index, slot), y_ref.dtype)
        alpha = jnp.broadcast_to(slot.alpha[None, :], (blocks.rows, lanes))

        def body(i: Any, squares: Array) -> Array:
            tile = _lane_tile(
                s, slot, part * span + i * blocks.rows, blocks.rows, lanes, total
            )
            y = [f32(read(y_ref, tile.place[i], tile.valid[i])) for i in range(s.width)]
            h, _ = _lane_hidden(s, slot, w, y)
            h = [f32(x.astype(y_ref.dtype)) for x in h]
            r = _lane_correction(s, w, y, h, tile.valid)
            for i in range(s.width):
                changed = tile.valid[i] & (alpha != 0.0)
                write(out_ref, tile.place[i], y[i] + alpha * r[i], changed)
                squares = squares + r[i] * r[i]
                if save:
                    shape = tile.rows.shape
                    lane = jnp.broadcast_to(index[None, :], shape)
                    kept = tile.inside & jnp.broadcast_to(slot.living[None, :], shape)
                    feature = jnp.full_like(tile.rows, i)
                    write(saved_ref, (tile.rows, lane, feature), y[i], kept)
            return squares

        squares = loop(
            0,
            span // blocks.rows,
            body,
            jnp.zeros((blocks.rows, lanes), jnp.float32),
        )
        elements = f32(jnp.asarray(slot.size)) * float(total)
        means = jnp.sum(squares, axis=0) / elements
        write(means_ref, (jnp.full_like(index, part), index), means, exists)


def backward_kernel(s: Static, total: int, span: int, *all_refs: Any) -> None:
    """Partial gradients of the bank and alpha, and ``dy``, of narrow slots."""
    refs = Refs(*all_refs[:9])
    saved_ref, g_ref = all_refs[9:11]
    dw1_ref, db1_ref, dw2_ref, db2_ref, dscale_ref, dalpha_ref, dy_ref = all_refs[11:]
    blocks = s.config.backward
    lanes = blocks.across
    shape = (blocks.rows, lanes)
    part = pl.program_id(1)
    index, slot = _lanes(s, refs, refs.alpha.shape[0], lanes)
    wide, tall = range(s.width), range(s.hidden)

    @pl.when(jnp.max(jnp.where(slot.living, 1, 0)) > 0)
    def _living() -> None:
        dtype = saved_ref.dtype
        w = _rounded(_lane_weights(s, refs, index, slot), dtype)
        alpha = jnp.broadcast_to(slot.alpha[None, :], shape)

        def body(i: Any, sums: Any) -> Any:
            dw1, db1, dw2, db2, dscale, dalpha = sums
            tile = _lane_tile(
                s, slot, part * span + i * blocks.rows, blocks.rows, lanes, total
            )
            lane = jnp.broadcast_to(index[None, :], shape)
            y = [
                f32(
                    read(
                        saved_ref,
                        (tile.rows, lane, jnp.full_like(tile.rows, i)),
                        tile.valid[i],
                    )
                )
                for i in wide
            ]
            g = [f32(read(g_ref, tile.place[i], tile.valid[i])) for i in wide]
            h, slopes = _lane_hidden(s, slot, w, y)
            r = _lane_correction(s, w, y, h, tile.valid)
            pulled = g
            if s.incubation == "reconstruction":
                pulled = [
                    jnp.where(alpha != 0.0, g[i], jnp.where(tile.valid[i], r[i], 0.0))
                    for i in wide
                ]
            d_before = []
            for unit in tall:
                dh = jnp.zeros(shape, jnp.float32)
                for i in wide:
                    dh = dh + pulled[i] * w.w2[unit][i][None, :]
                d_before.append(dh * slopes[unit])
            for i in wide:
                dy = w.scale[i][None, :] * g[i]
                for unit in tall:
                    dy = dy + d_before[unit] * w.w1[i][unit][None, :]
                changed = tile.valid[i] & (alpha != 0.0)
                write(dy_ref, tile.place[i], g[i] + alpha * dy, changed)
                dalpha = dalpha + g[i] * r[i]
            return (
                [[dw1[i][u] + y[i] * d_before[u] for u in tall] for i in wide],
                [db1[u] + d_before[u] for u in tall],
                [[dw2[u][i] + h[u] * pulled[i] for i in wide] for u in tall],
                [db2[i] + pulled[i] for i in wide],
                [dscale[i] + pulled[i] * y[i] for i in wide],
                dalpha,
            )

        zero = jnp.zeros(shape, jnp.float32)
        init = (
            [[zero for _ in tall] for _ in wide],
            [zero for _ in tall],
            [[zero for _ in wide] for _ in tall],
            [zero for _ in wide],
            [zero for _ in wide],
            zero,
        )
        sums = loop(0, span // blocks.rows, body, init)
        dw1, db1, dw2, db2, dscale, dalpha = jax.tree.map(
            lambda x: jnp.sum(x, axis=0), sums
        )
        factor = slot.beta
        if s.incubation == "reconstruction":
            elements = f32(jnp.asarray(slot.size)) * float(total)
            factor = factor * jnp.where(slot.alpha != 0.0, 1.0, 2.0 / elements)
        learns = slot.living & (slot.beta != 0.0)
        bias = s.of_kind(slot.kind, "bias")
        scale = s.of_kind(slot.kind, "scale")

        def put(ref: Any, at: tuple[int, ...], value: Array, mask: Array) -> None:
            where = tuple(jnp.full_like(index, i) for i in at)
            write(ref, (jnp.full_like(index, part), index, *where), value, mask)

        for i in wide:
            for u in tall:
                put(dw1_ref, (i, u), factor * dw1[i][u], learns)
                put(dw2_ref, (u, i), factor * dw2[u][i], learns)
            put(db2_ref, (i,), biased(bias, factor * db2[i]), learns)
            put(dscale_ref, (i,), biased(scale, factor * dscale[i]), learns)
        for u in tall:
            put(db1_ref, (u,), biased(bias, factor * db1[u]), learns)
        block = jnp.full_like(index, 0)
        write(
            dalpha_ref,
            (jnp.full_like(index, part), block, index),
            dalpha,
            slot.living,
        )
