"""Backward kernel of chunks as matrices: each program's sums of the gradients."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from esper_jax.kernels.blend.triton.matrix.tiles import (
    Blueprint,
    Tile,
    View,
    Weights,
    dot,
    every_eighth,
)
from esper_jax.kernels.blend.triton.refs import (
    Refs,
    Share,
    Slot,
    Span,
    biased,
    f32,
    find,
    loop,
    order_of,
    read,
    share_of,
    slot_at,
    write,
)
from esper_jax.kernels.blend.triton.static import TritonStatic

__all__ = ["backward_kernel"]


class _Gradients(NamedTuple):
    """Sums of the gradients over the rows of a program; of vectors, in parts."""

    w1: Array
    b1: Array
    w2: Array
    b2: Array
    scale: Array
    alpha: Array


@dataclasses.dataclass(frozen=True)
class _Arrays:
    """Where a program of the backward kernel reads and writes."""

    saved: Any
    g: Any
    gradients: tuple[Any, ...]
    """Of w1, b1, w2, b2 and scale."""
    gain: Any
    """Gradient of alpha."""
    bias: Any
    """What the correction adds to the gradient of y's bias; None without a bias."""
    dy: Any
    """Gradient of y; None where `input_kernel` computes it."""


@dataclasses.dataclass(frozen=True)
class _Backward:
    """What a program of the backward kernel holds."""

    view: View
    share: Share
    arrays: _Arrays
    weights: Weights
    offsets: tuple[Array, Array]
    learns: bool
    """Whether to compute the parameters' gradients."""

    @property
    def s(self) -> TritonStatic:
        return self.view.s

    @property
    def slot(self) -> Slot:
        return self.view.slot

    @property
    def reconstructs(self) -> bool:
        return self.s.incubation == "reconstruction"

    @property
    def gain_by_weights(self) -> bool:
        """Whether alpha's gradient comes from the gradient of ``w2``.

        ``sum(g * (h @ w2))`` is ``sum(w2 * (h.T @ g))``, whose second factor is the
        gradient of ``w2``.
        """
        return self.learns and not self.reconstructs

    @property
    def sums_hidden(self) -> bool:
        """Whether to sum the gradient of what enters the hidden units."""
        return self.s.biased or (self.learns and self.s.uses("bias"))

    @property
    def sums_cotangent(self) -> bool:
        """Whether to sum the cotangent of the correction."""
        return self.s.uses("bias") or (self.s.biased and self.s.uses("scale"))


def backward_kernel(s: TritonStatic, total: int, fused: bool, *all_refs: Any) -> None:
    """Each program's sums of the gradients of parameters and alpha.

    Args:
      s: what is fixed while tracing.
      total: rows of the batch.
      fused: whether to compute the gradient of y too.
      all_refs: inputs and outputs.
    """
    refs, (saved_ref, g_ref, *rest) = Refs.split(all_refs)
    # The sum of the cotangent passes through.
    outs = rest[1:] if s.biased else rest
    arrays = _Arrays(
        saved_ref,
        g_ref,
        tuple(outs[:5]),
        outs[5],
        outs[6] if s.biased else None,
        outs[-1] if fused else None,
    )
    blocks = s.config.backward
    order = order_of(find(refs.alpha, refs.beta, refs.owner))
    share = share_of(
        order,
        pl.program_id(0),
        pl.num_programs(0),
        pl.cdiv(total, blocks.rows),
        pl.cdiv(s.hidden, blocks.across),
    )

    def run(slot: Slot, learns: bool) -> None:
        view = View(s, refs, slot, share.slot, total)
        units = blocks.across
        w = view.weights(share.block * units, units, saved_ref.dtype)
        p = _Backward(view, share, arrays, w, view.offsets(), learns)
        body = functools.partial(_add_tile, p)
        sums = _added_up(loop(share.zero, share.turns, body, _no_gradients(p)))
        arrays.gain[share.program] = _gain(p, sums)
        if arrays.bias is not None:
            across = Span(share.zero, s.columns)
            write(arrays.bias, (share.program, across), _pulled_back(p, sums))
        if learns:
            _write_gradients(p, sums)

    @pl.when(share.works)
    def _living() -> None:
        slot = slot_at(s, refs, share.slot, share.zero)

        @pl.when(slot.beta != 0.0)
        def _learning() -> None:
            run(slot, True)

        @pl.when(slot.beta == 0.0)
        def _frozen() -> None:
            run(slot, False)


def _no_gradients(p: _Backward) -> _Gradients:
    """Sums of nothing; a single 0 for a gradient that is not wanted."""
    c, rows, units = p.s.columns, p.s.config.backward.rows, p.s.config.backward.across

    def zeros(wanted: bool, *shape: int) -> Array:
        return jnp.zeros(shape if wanted else (1,), jnp.float32)

    return _Gradients(
        w1=zeros(p.learns, c, units),
        b1=zeros(p.sums_hidden, 8, units),
        w2=zeros(p.learns, units, c),
        b2=zeros(p.sums_cotangent, rows, c),
        scale=zeros(p.s.uses("scale"), rows, c),
        alpha=zeros(not p.gain_by_weights, rows),
    )


def _added_up(sums: _Gradients) -> _Gradients:
    """Adds up the vectors' sums, which threads have kept in parts until now."""

    def total(x: Array) -> Array:
        return x if x.ndim < 2 else jnp.sum(x, axis=0)

    return sums._replace(b1=total(sums.b1), b2=total(sums.b2), scale=total(sums.scale))


def _add_tile(p: _Backward, i: Any, sums: _Gradients) -> _Gradients:
    """Adds a tile of rows to the sums, and writes its gradient of y."""
    s, slot, w, share = p.s, p.slot, p.weights, p.share
    tile = p.view.tile(share.last - i * share.step, s.config.backward.rows)
    y = read(p.arrays.saved, tile.saved, tile.mask)
    g = read(p.arrays.g, tile.place, tile.mask)
    before = dot(y, w.w1) + w.b1[None, :]
    pulled, gain = g, None
    if p.reconstructs:
        pulled, gain = _of_reconstruction(p, tile, y, g)
    dh = dot(pulled, w.w2, (1, 1))
    # Both products first: otherwise value and slope would wait in registers.
    h, slope = s.activate(slot.kind, before)
    if not p.reconstructs and not p.learns:
        gain = jnp.sum(dh * h, axis=1)
    d_before = dh * slope
    d_low = d_before.astype(y.dtype)
    g32 = f32(g)
    if gain is not None:
        sums = sums._replace(alpha=sums.alpha + gain)
    if p.sums_cotangent:
        sums = sums._replace(b2=sums.b2 + f32(pulled))
    if s.uses("scale"):
        product = f32(pulled) * f32(y)
        sums = sums._replace(scale=sums.scale + product)
    if p.learns:
        sums = sums._replace(
            w1=sums.w1 + dot(y, d_low, (0, 0)),
            w2=sums.w2 + dot(h.astype(y.dtype), pulled, (0, 0)),
        )
    if p.sums_hidden:
        sums = sums._replace(b1=sums.b1 + every_eighth(d_before))
    if p.arrays.dy is not None:
        _write_input(p, tile, g32, d_low)
    return sums


def _write_input(p: _Backward, tile: Tile, g32: Array, d_low: Array) -> None:
    """Writes the gradient of a tile of y, where it differs from the cotangent."""

    @pl.when(p.slot.alpha != 0.0)
    def _input() -> None:
        dy = dot(d_low, p.weights.w1, (1, 1))
        if p.s.uses("scale"):
            dy = dy + p.offsets[1][None, :] * g32
        write(p.arrays.dy, tile.place, g32 + p.slot.alpha * dy, tile.mask)


def _of_reconstruction(
    p: _Backward, tile: Tile, y: Array, g: Array
) -> tuple[Array, Array]:
    """Cotangent of the correction, and each row's part of alpha's gradient.

    While alpha is 0, the cotangent is the correction itself.
    """
    units = p.s.config.backward.across
    held = p.weights if p.s.hidden <= units else None
    r = Blueprint(p.view, units, held, p.offsets).correct(y, tile.mask)
    pulled = jnp.where(p.slot.alpha != 0.0, f32(g), r).astype(g.dtype)
    return pulled, jnp.sum(f32(g) * r, axis=1)


def _gain(p: _Backward, sums: _Gradients) -> Array:
    """The program's part of alpha's gradient."""
    first = p.share.block == 0
    if p.reconstructs:
        gain = jnp.sum(sums.alpha)
        whole = p.s.hidden <= p.s.config.backward.across
        return gain if whole else jnp.where(first, gain, 0.0)
    if p.gain_by_weights:
        gain = jnp.sum(jnp.sum(f32(p.weights.w2) * sums.w2, axis=1))
    else:
        gain = jnp.sum(sums.alpha)
    b2, scale = p.offsets
    own = jnp.float32(0.0)
    if p.s.uses("bias"):
        own = own + jnp.sum(b2 * sums.b2)
    if p.s.uses("scale"):
        own = own + jnp.sum(scale * sums.scale)
    return gain + jnp.where(first, own, 0.0)


def _pulled_back(p: _Backward, sums: _Gradients) -> Array:
    """The program's part of ``alpha * J_y(r)^T g``, summed over its rows.

    ``J_y(r)^T`` multiplies by weights which are the same for all rows once the slopes
    of the hidden units are in. So it takes sums over the rows instead of the rows.
    """
    out = jnp.sum(f32(p.weights.w1) * sums.b1[None, :], axis=1)
    if p.s.uses("scale"):
        own = p.offsets[1] * sums.b2
        out = out + jnp.where(p.share.block == 0, own, jnp.zeros_like(own))
    return p.slot.alpha * out


def _write_gradients(p: _Backward, sums: _Gradients) -> None:
    """Leaves the program's gradients of the parameters."""
    s, slot, me = p.s, p.slot, p.share.program
    dw1_ref, db1_ref, dw2_ref, db2_ref, dscale_ref = p.arrays.gradients
    factor = slot.beta
    if p.reconstructs:
        elements = f32(jnp.asarray(slot.size)) * float(p.view.total)
        factor = factor * jnp.where(slot.alpha != 0.0, 1.0, 2.0 / elements)
    across, along = Span(slot.zero, s.columns), Span(slot.zero, len(sums.w2))
    write(dw1_ref, (me, across, along), factor * sums.w1)
    write(dw2_ref, (me, along, across), factor * sums.w2)
    if s.uses("bias"):
        bias = s.of_kind(slot.kind, "bias")
        write(db1_ref, (me, along), biased(bias, factor * sums.b1))
        write(db2_ref, (me, across), biased(bias, factor * sums.b2))
    if s.uses("scale"):
        used = s.of_kind(slot.kind, "scale")
        write(dscale_ref, (me, across), biased(used, factor * sums.scale))
