"""Backward kernel of narrow chunks."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from esper_jax.kernels.blend.triton.narrow.lanes import (
    LaneTile,
    LaneWeights,
    correction,
    hidden_layer,
    lane_tile,
    lane_weights,
    lanes_of,
    rounded,
)
from esper_jax.kernels.blend.triton.refs import (
    Refs,
    Slot,
    biased,
    f32,
    loop,
    read,
    write,
)
from esper_jax.kernels.blend.triton.static import TritonStatic

__all__ = ["backward_kernel"]


class _Sums(NamedTuple):
    """Sums of the gradients over rows: for each entry of a parameter, a lane a slot.

    Tiles (rows, lanes) while looping over rows; vectors (lanes,) after it.
    """

    w1: list[list[Array]]
    b1: list[Array]
    w2: list[list[Array]]
    b2: list[Array]
    scale: list[Array]
    alpha: Array


@dataclasses.dataclass(frozen=True)
class _Backward:
    """What a program of the backward kernel holds."""

    s: TritonStatic
    total: int
    span: int
    part: Any
    index: Array
    """Index of each lane's slot."""
    slot: Slot
    saved: Any
    g: Any
    dy: Any

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and lanes of a tile."""
        return self.s.config.backward.rows, self.s.config.backward.across


def backward_kernel(s: TritonStatic, total: int, span: int, *all_refs: Any) -> None:
    """Partial gradients of the bank and alpha, and ``dy``, of narrow slots.

    Args:
      s: what is fixed while tracing.
      total: rows of the batch.
      span: rows that a program goes over.
      all_refs: inputs and outputs.
    """
    refs, (saved_ref, g_ref, *rest, dy_ref) = Refs.split(all_refs)
    # The sum of the cotangent passes through.
    outs = rest[1:] if s.biased else rest
    part = pl.program_id(1)
    count = refs.alpha.shape[0]
    index, slot = lanes_of(s, refs, count, s.config.backward.across)
    p = _Backward(s, total, span, part, index, slot, saved_ref, g_ref, dy_ref)

    @pl.when(jnp.max(jnp.where(slot.living, 1, 0)) > 0)
    def _living() -> None:
        w = rounded(lane_weights(s, refs, index, slot), saved_ref.dtype)
        alpha = jnp.broadcast_to(slot.alpha[None, :], p.shape)

        def body(i: Any, sums: _Sums) -> _Sums:
            return _add_tile(p, w, alpha, i, sums)

        sums = loop(0, span // p.shape[0], body, _no_sums(p))
        sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
        _write_sums(p, sums, outs)
        if s.biased:
            _write_pulled_back(p, w, sums, outs[6])


def _no_sums(p: _Backward) -> _Sums:
    wide, tall = range(p.s.width), range(p.s.hidden)
    zero = jnp.zeros(p.shape, jnp.float32)
    return _Sums(
        w1=[[zero for _ in tall] for _ in wide],
        b1=[zero for _ in tall],
        w2=[[zero for _ in wide] for _ in tall],
        b2=[zero for _ in wide],
        scale=[zero for _ in wide],
        alpha=zero,
    )


def _add_tile(p: _Backward, w: LaneWeights, alpha: Array, i: Any, sums: _Sums) -> _Sums:
    """Adds the ``i``-th tile of rows to the sums, and writes its gradient of y."""
    s, rows = p.s, p.shape[0]
    wide, tall = range(s.width), range(s.hidden)
    tile = lane_tile(s, p.slot, p.part * p.span + i * rows, rows, p.total)
    y = _saved(p, tile)
    g = [f32(read(p.g, tile.place[i], tile.valid[i])) for i in wide]
    h, slopes = hidden_layer(s, p.slot, w, y)
    r = correction(s, w, y, h, tile.valid)
    pulled = g
    if s.incubation == "reconstruction":
        pulled = [
            jnp.where(alpha != 0.0, g[i], jnp.where(tile.valid[i], r[i], 0.0))
            for i in wide
        ]
    d_before = []
    for unit in tall:
        dh = jnp.zeros(p.shape, jnp.float32)
        for i in wide:
            dh = dh + pulled[i] * w.w2[unit][i][None, :]
        d_before.append(dh * slopes[unit])
    gain = sums.alpha
    for i in wide:
        dy = w.scale[i][None, :] * g[i]
        for unit in tall:
            dy = dy + d_before[unit] * w.w1[i][unit][None, :]
        changed = tile.valid[i] & (alpha != 0.0)
        write(p.dy, tile.place[i], g[i] + alpha * dy, changed)
        gain = gain + g[i] * r[i]
    return _Sums(
        w1=[[sums.w1[i][u] + y[i] * d_before[u] for u in tall] for i in wide],
        b1=[sums.b1[u] + d_before[u] for u in tall],
        w2=[[sums.w2[u][i] + h[u] * pulled[i] for i in wide] for u in tall],
        b2=[sums.b2[i] + pulled[i] for i in wide],
        scale=[sums.scale[i] + pulled[i] * y[i] for i in wide],
        alpha=gain,
    )


def _saved(p: _Backward, tile: LaneTile) -> list[Array]:
    """The chunks as the forward pass saved them, float32, feature by feature."""
    lane = jnp.broadcast_to(p.index[None, :], p.shape)
    return [
        f32(read(p.saved, (tile.rows, lane, jnp.full_like(tile.rows, i)), valid))
        for i, valid in enumerate(tile.valid)
    ]


def _write_pulled_back(p: _Backward, w: LaneWeights, sums: _Sums, ref: Any) -> None:
    """Leaves the program's part of ``alpha * J_y(r)^T g``, summed over its rows.

    ``J_y(r)^T`` multiplies by weights which are the same for all rows once the slopes
    of the hidden units are in. So it takes sums over the rows instead of the rows.
    """
    part = jnp.full_like(p.index, p.part)
    for i in range(p.s.width):
        out = w.scale[i] * sums.b2[i]
        for unit in range(p.s.hidden):
            out = out + w.w1[i][unit] * sums.b1[unit]
        place = (part, p.index, jnp.full_like(p.index, i))
        write(ref, place, p.slot.alpha * out, p.slot.living)


def _write_sums(p: _Backward, sums: _Sums, outs: list[Any]) -> None:
    """Leaves the program's gradients of the parameters and of alpha."""
    s, slot, index = p.s, p.slot, p.index
    dw1_ref, db1_ref, dw2_ref, db2_ref, dscale_ref, dalpha_ref = outs[:6]
    factor = slot.beta
    if s.incubation == "reconstruction":
        elements = f32(jnp.asarray(slot.size)) * float(p.total)
        factor = factor * jnp.where(slot.alpha != 0.0, 1.0, 2.0 / elements)
    learns = slot.living & (slot.beta != 0.0)
    bias = s.of_kind(slot.kind, "bias")
    scale = s.of_kind(slot.kind, "scale")

    def put(ref: Any, at: tuple[int, ...], value: Array) -> None:
        where = tuple(jnp.full_like(index, i) for i in at)
        write(ref, (jnp.full_like(index, p.part), index, *where), value, learns)

    for i in range(s.width):
        for u in range(s.hidden):
            put(dw1_ref, (i, u), factor * sums.w1[i][u])
            put(dw2_ref, (u, i), factor * sums.w2[u][i])
        put(db2_ref, (i,), biased(bias, factor * sums.b2[i]))
        put(dscale_ref, (i,), biased(scale, factor * sums.scale[i]))
    for u in range(s.hidden):
        put(db1_ref, (u,), biased(bias, factor * sums.b1[u]))
    block = jnp.full_like(index, 0)
    place = (jnp.full_like(index, p.part), block, index)
    write(dalpha_ref, place, sums.alpha, slot.living)
