"""Chunks as matrices: a program multiplies tiles of one slot's chunk by its weights."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from esper_jax.kernels.blend.config import power_of_two
from esper_jax.kernels.blend.triton.refs import (
    Refs,
    Share,
    Slot,
    Span,
    biased,
    both,
    f32,
    find,
    index_range,
    loop,
    order_of,
    parts_of,
    read,
    share_of,
    slot_at,
    write,
)
from esper_jax.kernels.blend.triton.static import Static
from esper_jax.kernels.blend.triton.statistics import dormant_sums, statistics_of

__all__ = ["backward_kernel", "finish_kernel", "forward_kernel", "input_kernel"]


class _Weights(NamedTuple):
    """A slot's blueprint, or as many hidden units of it as fit a tile."""

    w1: Array
    b1: Array
    w2: Array


class _Tile(NamedTuple):
    """A tile of a slot's chunk."""

    place: tuple[Any, ...]
    """Where it is in the activation."""
    saved: tuple[Any, ...]
    """Where it is among the chunks saved for the backward pass."""
    mask: Array | None
    saved_mask: Array | None


def _masked(mask: Array | None, x: Array) -> Array:
    return x if mask is None else jnp.where(mask, x, 0.0)


def _dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """A product with float32 sums, over the given axis of each."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _tile(s: Static, slot: Slot, k: Any, i: Any, rows: int, total: int) -> _Tile:
    first = i * rows
    inside = None if total % rows == 0 else first + index_range(rows) < total
    across, shape = index_range(s.columns), (rows, s.columns)
    fits = None if s.width == s.columns else across < s.width
    mine = fits if s.layout.even else across < slot.size
    here = Span(first, rows)
    return _Tile(
        (here, Span(slot.start, s.columns)),
        (k, here, Span(slot.zero, s.columns)),
        both(inside, mine, shape),
        both(inside, fits, shape),
    )


def _weights(
    s: Static, refs: Refs, slot: Slot, k: Any, first: Any, units: int, dtype: Any
) -> _Weights:
    """Hidden units ``[first, first + units)`` of the slot; 0 where it has none."""
    first = slot.zero + first
    hidden = s.of_kind(slot.kind, "hidden")
    exact = isinstance(hidden, int) and hidden > 0 and hidden % units == 0
    unit_mask = None if exact else first + index_range(units) < hidden
    column_mask = None if s.width == s.columns else index_range(s.columns) < s.width
    across, along = Span(slot.zero, s.columns), Span(first, units)
    w1 = read(
        refs.w1, (k, across, along), both(column_mask, unit_mask, (s.columns, units))
    )
    w2 = read(
        refs.w2, (k, along, across), both(unit_mask, column_mask, (units, s.columns))
    )
    bias = s.of_kind(slot.kind, "bias")
    b1 = biased(bias, f32(read(refs.b1, (k, along), unit_mask)))
    return _Weights(w1.astype(dtype), b1, w2.astype(dtype))


def _offsets(s: Static, refs: Refs, slot: Slot, k: Any) -> tuple[Array, Array]:
    """``b2`` and ``scale`` of the slot, 0 where unused."""
    mask = None if s.width == s.columns else index_range(s.columns) < s.width
    index = (k, Span(slot.zero, s.columns))
    b2 = f32(read(refs.b2, index, mask))
    scale = f32(read(refs.scale, index, mask))
    return (
        biased(s.of_kind(slot.kind, "bias"), b2),
        biased(s.of_kind(slot.kind, "scale"), scale),
    )


def _correct(
    s: Static,
    refs: Refs,
    slot: Slot,
    k: Any,
    y: Array,
    mask: Array | None,
    units: int,
    held: _Weights | None,
    offsets: tuple[Array, Array],
    halved: bool = False,
) -> Array:
    """``r(y)`` of a tile; from weights already held, or walking over hidden units.

    With ``halved``, ``w2`` is half of what it should be, for an activation of twice.
    """

    def part(j: Any, out: Array) -> Array:
        w = held or _weights(s, refs, slot, k, j * units, units, y.dtype)
        before = _dot(y, w.w1) + w.b1[None, :]
        if halved and s.double:
            h = s.double(before)
        else:
            h = s.activate(slot.kind, before)[0]
        return out + _dot(h.astype(y.dtype), w.w2)

    zero = jnp.zeros(y.shape, jnp.float32)
    out = loop(0, pl.cdiv(s.hidden, units), part, zero)
    b2, scale = offsets
    out = out + b2[None, :]
    if s.uses("scale"):
        out = out + scale[None, :] * f32(y)
    return _masked(mask, out)


# Of the sums of a tile, a thread adds what it holds; the rest waits for the end of the
# loop, because what threads exchange in each turn costs more than the sums.


def _down(s: Static, x: Array) -> Array:
    """Partial sums of a tile laid out as it was read, 16 bytes a thread."""
    rows, columns = x.shape
    each = 16 // jnp.dtype(s.dtype).itemsize
    apart = min(rows, max(1, 32 * s.config.forward.warps * each // columns))
    x = jnp.sum(x.reshape(-1, apart, columns), axis=0)
    return jnp.sum(x.reshape(apart, -1, each), axis=2)


def _across(x: Array) -> Array:
    """Partial sums of a tile laid out as products are: columns eight apart."""
    return jnp.sum(x.reshape(x.shape[0], -1, 8), axis=1)


def _keep_sample(
    s: Static, kept_ref: Any, k: Any, tile: _Tile, y: Array, total: int
) -> None:
    """Sets aside those rows of a tile that statistics are taken over."""
    sampled, stride = s.sampled(total)
    rows = y.shape[0]
    index = tile.place[0].start + index_range(rows)
    turn = lax.div(index, jnp.int32(stride))
    here = (turn * stride == index) & (turn < sampled)
    # Rows masked off must not point where another one is put: interpret mode would
    # put both there.
    turn = jnp.where(here, turn, sampled)
    across = index_range(s.columns)
    fits = None if s.width == s.columns else across < s.width
    place = (
        jnp.full(y.shape, k),
        jnp.broadcast_to(turn[:, None], y.shape),
        jnp.broadcast_to(across[None, :], y.shape),
    )
    write(kept_ref, place, y, both(here, fits, y.shape))


def forward_kernel(
    s: Static, total: int, columns: int, span: int, save: bool, *all_refs: Any
) -> None:
    """Blends in place; leaves sums of each program: of ``r**2``, and statistics.

    Args:
      s: what is known.
      total: rows of the batch.
      columns: how many programs, the first, take sums of dormant columns, where
        statistics are over all rows; the others blend. They read living chunks too,
        which others overwrite meanwhile, but nobody uses what they found there: the
        living chunks' statistics are in the other programs' sums.
      span: rows that each of these goes over.
      save: whether the living chunks are saved.
      all_refs: inputs and outputs.
    """
    refs = Refs(*all_refs[:9])
    y_ref, out_ref, sums_ref, *rest = all_refs[9:]
    found = find(refs.alpha, refs.beta, refs.owner)
    me, programs = pl.program_id(0), pl.num_programs(0)

    def blend() -> None:
        tiles = pl.cdiv(total, s.config.forward.rows)
        share = share_of(order_of(found), me - columns, programs - columns, tiles)

        @pl.when(share.works)
        def _living() -> None:
            kept_ref = rest[-1] if save or s.samples else None
            _blend_share(
                s, refs, share, total, save, y_ref, out_ref, sums_ref, kept_ref
            )

    if not columns:
        blend()
        return

    @pl.when(me < columns)
    def _columns() -> None:
        dormant_sums(s, total, span, found, y_ref, rest[0], me)

    @pl.when(me >= columns)
    def _blend() -> None:
        blend()


def _blend_share(
    s: Static,
    refs: Refs,
    share: Share,
    total: int,
    save: bool,
    y_ref: Any,
    out_ref: Any,
    sums_ref: Any,
    kept_ref: Any,
) -> None:
    """Blends a program's share of a slot's rows."""
    rows, units = s.config.forward.rows, s.config.forward.across
    k = share.slot
    slot = slot_at(s, refs, k, share.zero)
    held = None
    if s.hidden <= units:
        held = _weights(s, refs, slot, k, 0, units, y_ref.dtype)
    halved = held is not None and s.double is not None
    if held is not None and halved:
        held = held._replace(w2=held.w2 * 0.5)
    offsets = _offsets(s, refs, slot, k)

    def body(i: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        tile = _tile(s, slot, k, share.last - i * share.step, rows, total)
        y = read(y_ref, tile.place, tile.mask)
        r = _correct(s, refs, slot, k, y, tile.mask, units, held, offsets, halved)
        y32 = f32(y)

        @pl.when(slot.alpha != 0.0)
        def _blended() -> None:
            write(out_ref, tile.place, y32 + slot.alpha * r, tile.mask)

        if save:
            write(kept_ref, tile.saved, y, tile.saved_mask)
        elif s.samples:
            _keep_sample(s, kept_ref, k, tile, y, total)
        new = [_across(r * r)]
        if s.own_statistics:
            new += [_down(s, x) for x in statistics_of(s, y, tile.mask)]
        return tuple(a + b for a, b in zip(sums, new, strict=True))

    tile = jnp.zeros((rows, s.columns), jnp.float32)
    zeros = (_across(tile), *(_down(s, tile),) * (3 if s.own_statistics else 0))
    sums = loop(share.zero, share.turns, body, zeros)
    for j, x in enumerate(sums):
        sums_ref[k, j, share.part] = jnp.sum(x)


class _Gradients(NamedTuple):
    """Sums of the gradients over the rows of a program; of vectors, in parts."""

    w1: Array
    b1: Array
    w2: Array
    b2: Array
    scale: Array
    alpha: Array


class _Backward(NamedTuple):
    """What a program of the backward kernel has at hand."""

    s: Static
    refs: Refs
    saved: Any
    g: Any
    dy: Any
    """None where another kernel has it."""
    total: int
    share: Share
    slot: Slot
    weights: _Weights
    offsets: tuple[Array, Array]
    learns: bool
    """Whether the parameters' gradients are wanted."""

    @property
    def reconstructs(self) -> bool:
        return self.s.incubation == "reconstruction"

    @property
    def gain_by_weights(self) -> bool:
        """Whether alpha's gradient comes from that of ``w2``: ``sum(g * (h @ w2))`` is
        ``sum(w2 * (h.T @ g))``, whose second factor is that."""
        return self.learns and not self.reconstructs


def backward_kernel(s: Static, total: int, fused: bool, *all_refs: Any) -> None:
    """Each program's sums of the gradients of parameters and alpha; the gradient of y
    too, if ``fused``."""
    refs = Refs(*all_refs[:9])
    saved_ref, g_ref = all_refs[9:11]
    *outs, gain_ref = all_refs[11:17]
    dy_ref = all_refs[17] if fused else None
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
        k, units = share.slot, blocks.across
        w = _weights(s, refs, slot, k, share.block * units, units, saved_ref.dtype)
        offsets = _offsets(s, refs, slot, k)
        p = _Backward(
            s, refs, saved_ref, g_ref, dy_ref, total, share, slot, w, offsets, learns
        )
        body = functools.partial(_add_tile, p)
        sums = _added_up(loop(share.zero, share.turns, body, _no_gradients(p)))
        gain_ref[share.program] = _gain(p, sums)
        if learns:
            _write_gradients(p, sums, outs)

    @pl.when(share.works)
    def _living() -> None:
        slot = slot_at(s, refs, share.slot, share.zero)

        @pl.when(slot.beta != 0.0)
        def _learning() -> None:
            run(slot, True)

        @pl.when(slot.beta == 0.0)
        def _frozen() -> None:
            run(slot, False)


def _every_eighth(x: Array) -> Array:
    """Partial sums of a tile laid out as products are: rows eight apart."""
    return jnp.sum(x.reshape(-1, 8, x.shape[1]), axis=0)


def _added_up(sums: _Gradients) -> _Gradients:
    """The vectors' sums, which threads have kept in parts until now."""

    def total(x: Array) -> Array:
        return x if x.ndim < 2 else jnp.sum(x, axis=0)

    return sums._replace(b1=total(sums.b1), b2=total(sums.b2), scale=total(sums.scale))


def _no_gradients(p: _Backward) -> _Gradients:
    """Sums of nothing; a single 0 for what is not wanted."""
    c, rows, units = p.s.columns, p.s.config.backward.rows, p.s.config.backward.across
    biases = p.s.uses("bias")

    def zeros(wanted: bool, *shape: int) -> Array:
        return jnp.zeros(shape if wanted else (1,), jnp.float32)

    return _Gradients(
        w1=zeros(p.learns, c, units),
        b1=zeros(p.learns and biases, 8, units),
        w2=zeros(p.learns, units, c),
        b2=zeros(biases, rows, c),
        scale=zeros(p.s.uses("scale"), rows, c),
        alpha=zeros(not p.gain_by_weights, rows),
    )


def _add_tile(p: _Backward, i: Any, sums: _Gradients) -> _Gradients:
    """Adds a tile of rows to the sums, and writes its gradient of y."""
    s, slot, w, share = p.s, p.slot, p.weights, p.share
    rows = s.config.backward.rows
    tile = _tile(s, slot, share.slot, share.last - i * share.step, rows, p.total)
    y = read(p.saved, tile.saved, tile.mask)
    g = read(p.g, tile.place, tile.mask)
    before = _dot(y, w.w1) + w.b1[None, :]
    pulled, gain = g, None
    if p.reconstructs:
        pulled, gain = _of_reconstruction(p, tile, y, g)
    dh = _dot(pulled, w.w2, (1, 1))
    # Both products first: else value and slope would wait in registers.
    h, slope = s.activate(slot.kind, before)
    if not p.reconstructs and not p.learns:
        gain = jnp.sum(dh * h, axis=1)
    d_before = dh * slope
    d_low = d_before.astype(y.dtype)
    g32 = f32(g)
    if gain is not None:
        sums = sums._replace(alpha=sums.alpha + gain)
    if s.uses("bias"):
        sums = sums._replace(b2=sums.b2 + f32(pulled))
    if s.uses("scale"):
        product = f32(pulled) * f32(y)
        sums = sums._replace(scale=sums.scale + product)
    if p.learns:
        sums = sums._replace(
            w1=sums.w1 + _dot(y, d_low, (0, 0)),
            w2=sums.w2 + _dot(h.astype(y.dtype), pulled, (0, 0)),
        )
        if s.uses("bias"):
            sums = sums._replace(b1=sums.b1 + _every_eighth(d_before))
    if p.dy is not None:

        @pl.when(slot.alpha != 0.0)
        def _input() -> None:
            dy = _dot(d_low, w.w1, (1, 1))
            if s.uses("scale"):
                dy = dy + p.offsets[1][None, :] * g32
            write(p.dy, tile.place, g32 + slot.alpha * dy, tile.mask)

    return sums


def _of_reconstruction(
    p: _Backward, tile: _Tile, y: Array, g: Array
) -> tuple[Array, Array]:
    """The cotangent of the correction, while incubating the correction itself; and the
    rows' part of alpha's gradient."""
    units = p.s.config.backward.across
    held = p.weights if p.s.hidden <= units else None
    k = p.share.slot
    r = _correct(p.s, p.refs, p.slot, k, y, tile.mask, units, held, p.offsets)
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


def _write_gradients(p: _Backward, sums: _Gradients, outs: list[Any]) -> None:
    """Leaves the program's gradients of the parameters."""
    s, slot, me = p.s, p.slot, p.share.program
    dw1_ref, db1_ref, dw2_ref, db2_ref, dscale_ref = outs
    factor = slot.beta
    if p.reconstructs:
        elements = f32(jnp.asarray(slot.size)) * float(p.total)
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


SEGMENT = 256
"""Elements of both matrices of weights that a program of `finish_kernel` adds up."""
_TALL = 32


def finish_kernel(s: Static, total: int, programs: int, *refs: Any) -> None:
    """Adds up what the programs of each slot left: the gradients of its parameters.

    A program is a slot's block of hidden units, and a segment of its flat matrices; the
    last one of a block is for all else.
    """
    alpha_ref, beta_ref, owner_ref = refs[:3]
    w1_ref, b1_ref, w2_ref, b2_ref, scale_ref, gain_ref = refs[3:9]
    w1_out, b1_out, w2_out, b2_out, scale_out, gain_out = refs[9:]
    blocks = s.config.backward
    many = pl.cdiv(s.hidden, blocks.across)
    tiles = pl.cdiv(total, blocks.rows)
    unit, segment = pl.program_id(0), pl.program_id(1)
    zero, segments = unit * 0, pl.num_programs(1) - 1
    k, block = lax.div(unit, many), lax.rem(unit, many)
    order = order_of(find(alpha_ref, beta_ref, owner_ref))
    parts = parts_of(order, programs, tiles, many)
    mine = order.slots == k
    rank = jnp.sum(jnp.where(mine, order.rank, 0)) - 1
    lives = jnp.sum(jnp.where(mine & order.living, 1, 0)) > 0
    learns = jnp.sum(jnp.where(mine & order.learning, 1, 0)) > 0

    def put(pairs: list[tuple[Any, Any]], row: Any, start: Any, size: int) -> None:
        """Sums of the programs' shares, written; 0 where nothing is learnt."""
        shape = (_TALL, size)
        columns = jnp.broadcast_to((start + index_range(size))[None, :], shape)

        def body(i: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            part = i * _TALL + index_range(_TALL)
            program = (rank * many + block) * parts + part
            place = (jnp.broadcast_to(program[:, None], shape), columns)
            mask = jnp.broadcast_to((part < parts)[:, None], shape)
            return tuple(
                x + read(ref, place, mask)
                for x, (ref, _) in zip(sums, pairs, strict=True)
            )

        @pl.when(learns)
        def _learning() -> None:
            steps = lax.div(parts + (_TALL - 1), _TALL)
            zeros = (jnp.zeros(shape, jnp.float32),) * len(pairs)
            sums = loop(zero, steps, body, zeros)
            for x, (_, out) in zip(sums, pairs, strict=True):
                write(out, (row, Span(start, size)), jnp.sum(x, axis=0))

        @pl.when(jnp.logical_not(learns))
        def _frozen() -> None:
            none(pairs, row, start, size)

    def none(pairs: list[tuple[Any, Any]], row: Any, start: Any, size: int) -> None:
        for _, out in pairs:
            write(out, (row, Span(start, size)), jnp.zeros((size,), jnp.float32))

    @pl.when(segment < segments)
    def _matrices() -> None:
        size = min(SEGMENT, w1_ref.shape[1])
        put([(w1_ref, w1_out), (w2_ref, w2_out)], unit, segment * size, size)

    @pl.when(segment == segments)
    def _vectors() -> None:
        biases = put if s.uses("bias") else none
        biases([(b1_ref, b1_out)], unit, zero, blocks.across)

        @pl.when(block == 0)
        def _once() -> None:
            scales = put if s.uses("scale") else none
            biases([(b2_ref, b2_out)], k, zero, s.columns)
            scales([(scale_ref, scale_out)], k, zero, s.columns)
            index = index_range(power_of_two(min(programs, tiles * many)))
            mask = lives & (index < parts * many)
            gains = read(gain_ref, (rank * many * parts + index,), mask)
            gain_out[k] = jnp.sum(gains)


def input_kernel(s: Static, total: int, *all_refs: Any) -> None:
    """Gradient of y, where hidden units are too many for the other kernel's tile."""
    refs = Refs(*all_refs[:9])
    saved_ref, g_ref, _, dy_ref, _ = all_refs[9:]
    blocks = s.config.input
    rows, units = blocks.rows, blocks.across
    order = order_of(find(refs.alpha, refs.beta, refs.owner))
    share = share_of(order, pl.program_id(0), pl.num_programs(0), pl.cdiv(total, rows))
    k = share.slot

    @pl.when(share.works)
    def _living() -> None:
        slot = slot_at(s, refs, k, share.zero)

        @pl.when(slot.alpha != 0.0)
        def _grafted() -> None:
            _, scale = _offsets(s, refs, slot, k)

            def body(i: Any, carry: Any) -> Any:
                tile = _tile(s, slot, k, share.last - i * share.step, rows, total)
                y = read(saved_ref, tile.saved, tile.mask)
                g = read(g_ref, tile.place, tile.mask)

                def some(j: Any, out: Array) -> Array:
                    w = _weights(s, refs, slot, k, j * units, units, y.dtype)
                    before = _dot(y, w.w1) + w.b1[None, :]
                    _, slope = s.activate(slot.kind, before)
                    d_before = _dot(g, w.w2, (1, 1)) * slope
                    return out + _dot(d_before.astype(y.dtype), w.w1, (1, 1))

                g32 = f32(g)
                zero = jnp.zeros(y.shape, jnp.float32)
                dy = loop(0, pl.cdiv(s.hidden, units), some, zero)
                dy = g32 + slot.alpha * (dy + scale[None, :] * g32)
                write(dy_ref, tile.place, dy, tile.mask)
                return carry

            loop(share.zero, share.turns, body, share.zero)
