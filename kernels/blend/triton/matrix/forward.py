"""Forward kernel of chunks as matrices."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from esper_jax.kernels.blend.triton.matrix.tiles import (
    Blueprint,
    Tile,
    View,
    sum_across,
)
from esper_jax.kernels.blend.triton.refs import (
    Refs,
    Share,
    both,
    f32,
    find,
    index_range,
    loop,
    order_of,
    plus_bias,
    read,
    share_of,
    slot_at,
    write,
)
from esper_jax.kernels.blend.triton.static import TritonStatic
from esper_jax.kernels.blend.triton.statistics import (
    ColumnTiles,
    dormant_sums,
    statistics_of,
)

__all__ = ["forward_kernel"]


@dataclasses.dataclass(frozen=True)
class _Outputs:
    """Where a program of the forward kernel reads and writes."""

    y: tuple[Any, ...]
    """The activation; and its bias, if that comes apart."""
    out: Any
    sums: Any
    kept: Any
    """The living chunks, or a sample of their rows; None if neither is kept."""
    save: bool
    """Whether all rows are kept, for the backward pass."""


def forward_kernel(
    s: TritonStatic, total: int, cut: ColumnTiles | None, save: bool, *all_refs: Any
) -> None:
    """Blends in place; leaves each program's sums of ``r**2`` and of its statistics.

    If ``cut`` is given, the first programs take sums of dormant columns. They may read
    living chunks while other programs overwrite these, but nobody uses those sums: the
    programs that blend leave the living chunks' statistics.

    Args:
      s: what is fixed while tracing.
      total: rows of the batch.
      cut: how sums of columns are divided; None unless statistics are over all rows.
      save: whether to save the living chunks for the backward pass.
      all_refs: inputs and outputs.
    """
    refs, own = Refs.split(all_refs)
    count = 2 if s.biased else 1
    y, (out_ref, sums_ref, *rest) = own[:count], own[count:]
    columns = 0 if cut is None else cut.tiles * cut.parts
    found = find(refs.alpha, refs.beta, refs.owner)
    me, programs = pl.program_id(0), pl.num_programs(0)

    def blend() -> None:
        tiles = pl.cdiv(total, s.config.forward.rows)
        share = share_of(order_of(found), me - columns, programs - columns, tiles)

        @pl.when(share.works)
        def _living() -> None:
            kept_ref = rest[-1] if save or s.samples else None
            outputs = _Outputs(y, out_ref, sums_ref, kept_ref, save)
            _blend_share(s, refs, share, total, outputs)

    if cut is None:
        blend()
        return

    @pl.when(me < columns)
    def _columns() -> None:
        dormant_sums(s, cut, found, y, rest[0], me)

    @pl.when(me >= columns)
    def _blend() -> None:
        blend()


def _blend_share(
    s: TritonStatic, refs: Refs, share: Share, total: int, to: _Outputs
) -> None:
    """Blends a program's share of a slot's rows."""
    rows, k = s.config.forward.rows, share.slot
    view = View(s, refs, slot_at(s, refs, k, share.zero), k, total)
    alpha = view.slot.alpha
    y_ref, *bias_refs = to.y
    blueprint = _blueprint(view, y_ref.dtype)
    bias = view.bias(bias_refs[0]) if bias_refs else None

    def body(i: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        tile = view.tile(share.last - i * share.step, rows)
        given = read(y_ref, tile.place, tile.mask)
        y = plus_bias(given, bias, tile.mask)
        r = blueprint.correct(y, tile.mask)
        y32 = f32(given)

        @pl.when(alpha != 0.0)
        def _blended() -> None:
            write(to.out, tile.place, y32 + alpha * r, tile.mask)

        if to.save:
            write(to.kept, tile.saved, y, tile.saved_mask)
        elif s.samples:
            _keep_sample(view, to.kept, tile, y)
        new = [sum_across(r * r)]
        if s.own_statistics:
            new += [_sum_down(s, x) for x in statistics_of(s, y, tile.mask)]
        return tuple(a + b for a, b in zip(sums, new, strict=True))

    tile = jnp.zeros((rows, s.columns), jnp.float32)
    zeros = (sum_across(tile), *(_sum_down(s, tile),) * (3 if s.own_statistics else 0))
    sums = loop(share.zero, share.turns, body, zeros)
    for j, x in enumerate(sums):
        to.sums[k, j, share.part] = jnp.sum(x)


def _blueprint(view: View, dtype: Any) -> Blueprint:
    """The slot's parameters, with all hidden units held if they fit a tile."""
    s, units = view.s, view.s.config.forward.across
    held = None
    if s.hidden <= units:
        held = view.weights(0, units, dtype)
    halved = held is not None and s.double is not None
    if held is not None and halved:
        held = held._replace(w2=held.w2 * 0.5)
    return Blueprint(view, units, held, view.offsets(), halved)


def _sum_down(s: TritonStatic, x: Array) -> Array:
    """Partial sums of a tile laid out as it was read, 16 bytes a thread."""
    rows, columns = x.shape
    each = 16 // jnp.dtype(s.dtype).itemsize
    apart = min(rows, max(1, 32 * s.config.forward.warps * each // columns))
    x = jnp.sum(x.reshape(-1, apart, columns), axis=0)
    return jnp.sum(x.reshape(apart, -1, each), axis=2)


def _keep_sample(view: View, kept_ref: Any, tile: Tile, y: Array) -> None:
    """Sets aside those rows of a tile that statistics are taken over."""
    s = view.s
    sampled, stride = s.sampled(view.total)
    rows = y.shape[0]
    index = tile.place[0].start + index_range(rows)
    turn = lax.div(index, jnp.int32(stride))
    here = (turn * stride == index) & (turn < sampled)
    # A row masked off must not point where another one is put: interpret mode would
    # write both there.
    turn = jnp.where(here, turn, sampled)
    across = index_range(s.columns)
    fits = None if s.width == s.columns else across < s.width
    place = (
        jnp.full(y.shape, view.k),
        jnp.broadcast_to(turn[:, None], y.shape),
        jnp.broadcast_to(across[None, :], y.shape),
    )
    write(kept_ref, place, y, both(here, fits, y.shape))
