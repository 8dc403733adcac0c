"""Forward kernel of narrow chunks."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from esper_jax.kernels.blend.triton.narrow.lanes import (
    LaneTile,
    correction,
    hidden_layer,
    lane_bias,
    lane_tile,
    lane_weights,
    lanes_of,
    rounded,
)
from esper_jax.kernels.blend.triton.refs import (
    Refs,
    Slot,
    f32,
    loop,
    read,
    write,
)
from esper_jax.kernels.blend.triton.static import TritonStatic

__all__ = ["forward_kernel"]


@dataclasses.dataclass(frozen=True)
class _Forward:
    """What a program of the forward kernel holds."""

    s: TritonStatic
    total: int
    span: int
    index: Array
    """Index of each lane's slot."""
    slot: Slot
    y: tuple[Any, ...]
    """The activation; and its bias, if that comes apart."""
    out: Any
    saved: Any
    """Where the living chunks go; None if they are not saved."""


def forward_kernel(
    s: TritonStatic, total: int, span: int, save: bool, *all_refs: Any
) -> None:
    """Output, reconstruction and, with ``save``, the living chunks of narrow slots.

    Args:
      s: what is fixed while tracing.
      total: rows of the batch.
      span: rows that a program goes over.
      save: whether to save the living chunks.
      all_refs: inputs and outputs. The sums of columns are among both if statistics are
        taken; the kernel does not touch them.
    """
    refs, own = Refs.split(all_refs)
    first = 2 if s.biased else 1
    y, rest = own[:first], own[first:]
    takes_statistics = s.statistics_rows != 0
    out_ref, means_ref = rest[1:3] if takes_statistics else rest[:2]
    saved_ref = rest[-1] if save else None
    lanes = s.config.forward.across
    count = refs.alpha.shape[0]
    part = pl.program_id(1)
    index, slot = lanes_of(s, refs, count, lanes)
    exists = index < count
    any_living = jnp.max(jnp.where(slot.living, 1, 0)) > 0
    p = _Forward(s, total, span, index, slot, y, out_ref, saved_ref)

    @pl.when(jnp.logical_not(any_living))
    def _dead() -> None:
        zero = jnp.zeros((lanes,), jnp.float32)
        write(means_ref, (jnp.full_like(index, part), index), zero, exists)

    @pl.when(any_living)
    def _living() -> None:
        squares = _blend(p, refs, part)
        elements = f32(jnp.asarray(slot.size)) * float(total)
        means = jnp.sum(squares, axis=0) / elements
        write(means_ref, (jnp.full_like(index, part), index), means, exists)


def _blend(p: _Forward, refs: Refs, part: Any) -> Array:
    """Blends a part of the rows; sums of ``r**2``, (rows of a tile, lanes)."""
    s, slot = p.s, p.slot
    rows = s.config.forward.rows
    shape = (rows, s.config.forward.across)
    y_ref, *bias_refs = p.y
    w = rounded(lane_weights(s, refs, p.index, slot), y_ref.dtype)
    bias = lane_bias(s, slot, bias_refs[0]) if bias_refs else None
    alpha = jnp.broadcast_to(slot.alpha[None, :], shape)

    def body(i: Any, squares: Array) -> Array:
        tile = lane_tile(s, slot, part * p.span + i * rows, rows, p.total)
        given = [f32(read(y_ref, tile.place[i], tile.valid[i])) for i in range(s.width)]
        y = given
        if bias:
            sums = [a + b[None, :] for a, b in zip(given, bias, strict=True)]
            y = [f32(x.astype(y_ref.dtype)) for x in sums]
        h, _ = hidden_layer(s, slot, w, y)
        h = [f32(x.astype(y_ref.dtype)) for x in h]
        r = correction(s, w, y, h, tile.valid)
        for i in range(s.width):
            changed = tile.valid[i] & (alpha != 0.0)
            write(p.out, tile.place[i], given[i] + alpha * r[i], changed)
            squares = squares + r[i] * r[i]
            if p.saved is not None:
                _save(p, tile, i, y[i])
        return squares

    return loop(0, p.span // rows, body, jnp.zeros(shape, jnp.float32))


def _save(p: _Forward, tile: LaneTile, feature: int, y: Array) -> None:
    """Saves one feature of the living chunks."""
    shape = tile.rows.shape
    lane = jnp.broadcast_to(p.index[None, :], shape)
    kept = tile.inside & jnp.broadcast_to(p.slot.living[None, :], shape)
    write(p.saved, (tile.rows, lane, jnp.full_like(tile.rows, feature)), y, kept)
