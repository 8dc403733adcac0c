"""Chunks as matrices: a program multiplies tiles of one slot's chunk by its weights."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from esper_jax.kernels.blend.config import power_of_two
from esper_jax.kernels.blend.triton.refs import (
    NEAR_ZERO,
    Refs,
    Slot,
    Span,
    biased,
    both,
    f32,
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
from esper_jax.kernels.blend.triton.statistics import column_sums, dormant

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
        h = (
            s.double(before)
            if halved and s.double
            else s.activate(slot.kind, before)[0]
        )
        return out + _dot(h.astype(y.dtype), w.w2)

    zero = jnp.zeros(y.shape, jnp.float32)
    out = loop(0, pl.cdiv(s.hidden, units), part, zero)
    b2, scale = offsets
    out = out + b2[None, :]
    if s.uses("scale"):
        out = out + scale[None, :] * f32(y)
    return _masked(mask, out)


def forward_kernel(
    s: Static, total: int, programs: int, span: int, save: bool, *all_refs: Any
) -> None:
    """Blends in place; leaves sums of each program: of ``r**2``, and statistics.

    Args:
      s: what is known.
      total: rows of the batch.
      programs: how many blend.
      span: rows that each of the programs after those takes column sums over, where
        statistics are over all rows. They
        read living chunks too, which others overwrite meanwhile, but nobody uses what
        they found there: the living chunks' statistics are in the programs' sums.
      save: whether the living chunks are saved.
      all_refs: inputs and outputs.
    """
    refs = Refs(*all_refs[:9])
    y_ref, rest = all_refs[9], list(all_refs[10:])
    out_ref, sums_ref = rest.pop(0), rest.pop(0)
    saved_ref = rest[-1] if save else None
    blocks = s.config.forward
    rows, units = blocks.rows, blocks.across
    order = order_of(refs.alpha, refs.beta, refs.owner)
    share = share_of(order, programs, pl.cdiv(total, rows))
    k = share.slot
    sampled, stride = s.sampled(total)
    if s.statistics_rows is None:
        tiles = pl.cdiv(s.layout.features, s.config.statistics.across)
        after = jnp.maximum(share.program - programs, 0)
        turn, part = lax.rem(after, tiles), lax.div(after, tiles)

        @pl.when((share.program >= programs) & dormant(s, order, turn))
        def _dormant() -> None:
            column_sums(s, total, span, y_ref, rest[0], turn, part)

    @pl.when(share.works)
    def _living() -> None:
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
                write(saved_ref, tile.saved, y, tile.saved_mask)
            added = [sums[0] + jnp.sum(r * r, axis=1)]
            if s.own_statistics:
                near = jnp.abs(y32) < NEAR_ZERO
                if tile.mask is not None:
                    near = near & tile.mask
                index = tile.place[0].start + index_range(rows)
                here = (lax.rem(index, stride) == 0) & (index < sampled * stride)
                for x, old in zip(
                    (y32, y32 * y32, jnp.where(near, 1.0, 0.0)), sums[1:], strict=True
                ):
                    new = jnp.sum(x, axis=1)
                    if s.statistics_rows is not None:
                        new = jnp.where(here, new, 0.0)
                    added.append(old + new)
            return tuple(added)

        zero = jnp.zeros((rows,), jnp.float32)
        zeros = (zero,) * (4 if s.own_statistics else 1)
        sums = loop(share.zero, share.turns, body, zeros)
        for j, x in enumerate(sums):
            sums_ref[j, share.program] = jnp.sum(x)


class _Gradients(NamedTuple):
    """Sums of the parameters' gradients over the rows of a program."""

    w1: Array
    b1: Array
    w2: Array
    b2: Array
    scale: Array
    alpha: Array


def backward_kernel(s: Static, total: int, fused: bool, *all_refs: Any) -> None:
    """Each program's sums of the gradients of parameters and alpha; the gradient of y
    too, if ``fused``."""
    refs = Refs(*all_refs[:9])
    saved_ref, g_ref = all_refs[9:11]
    dw1_ref, db1_ref, dw2_ref, db2_ref, dscale_ref, gain_ref, *rest = all_refs[11:]
    blocks = s.config.backward
    rows, units = blocks.rows, blocks.across
    order = order_of(refs.alpha, refs.beta, refs.owner)
    share = share_of(
        order, pl.num_programs(0), pl.cdiv(total, rows), pl.cdiv(s.hidden, units)
    )
    k, block, me = share.slot, share.block, share.program
    reconstructs = s.incubation == "reconstruction"
    biases, scales = s.uses("bias"), s.uses("scale")

    def run(slot: Slot, gradients: bool) -> None:
        grafted = slot.alpha != 0.0
        first = block * units
        w = _weights(s, refs, slot, k, first, units, saved_ref.dtype)
        offsets = _offsets(s, refs, slot, k)
        b2, scale = offsets
        # sum(g * (h @ w2)) is sum(w2 * (h.T @ g)), whose second factor is dw2.
        by_weights = gradients and not reconstructs

        def body(i: Any, sums: _Gradients) -> _Gradients:
            tile = _tile(s, slot, k, share.last - i * share.step, rows, total)
            y = read(saved_ref, tile.saved, tile.mask)
            g = read(g_ref, tile.place, tile.mask)
            before = _dot(y, w.w1) + w.b1[None, :]
            pulled = g
            if reconstructs:
                held = w if s.hidden <= units else None
                r = _correct(s, refs, slot, k, y, tile.mask, units, held, offsets)
                pulled = jnp.where(grafted, f32(g), r).astype(g.dtype)
                gain = jnp.sum(f32(g) * r, axis=1)
            dh = _dot(pulled, w.w2, (1, 1))
            # Both products first: else value and slope would wait in registers.
            h, slope = s.activate(slot.kind, before)
            if not reconstructs and not gradients:
                gain = jnp.sum(dh * h, axis=1)
            d_before = dh * slope
            d_low = d_before.astype(y.dtype)
            g32 = f32(g)
            out = sums
            if not by_weights:
                out = out._replace(alpha=sums.alpha + gain)
            if biases:
                out = out._replace(b2=sums.b2 + jnp.sum(f32(pulled), axis=0))
            if scales:
                product = f32(pulled) * f32(y)
                out = out._replace(scale=sums.scale + jnp.sum(product, axis=0))
            if gradients:
                out = out._replace(
                    w1=sums.w1 + _dot(y, d_low, (0, 0)),
                    w2=sums.w2 + _dot(h.astype(y.dtype), pulled, (0, 0)),
                )
                if biases:
                    out = out._replace(b1=sums.b1 + jnp.sum(d_before, axis=0))
            if fused:

                @pl.when(grafted)
                def _input() -> None:
                    dy = _dot(d_low, w.w1, (1, 1))
                    if scales:
                        dy = dy + scale[None, :] * g32
                    write(rest[0], tile.place, g32 + slot.alpha * dy, tile.mask)

            return out

        def zeros(*shape: int) -> Array:
            return jnp.zeros(shape, jnp.float32)

        c = s.columns
        sums = loop(
            share.zero,
            share.turns,
            body,
            _Gradients(
                w1=zeros(c, units) if gradients else zeros(1),
                b1=zeros(units) if gradients and biases else zeros(1),
                w2=zeros(units, c) if gradients else zeros(1),
                b2=zeros(c) if biases else zeros(1),
                scale=zeros(c) if scales else zeros(1),
                alpha=zeros(1 if by_weights else rows),
            ),
        )
        if by_weights:
            gain = jnp.sum(jnp.sum(f32(w.w2) * sums.w2, axis=1))
        else:
            gain = jnp.sum(sums.alpha)
        if not reconstructs:
            own = jnp.float32(0.0)
            if biases:
                own = own + jnp.sum(b2 * sums.b2)
            if scales:
                own = own + jnp.sum(scale * sums.scale)
            gain = gain + jnp.where(block == 0, own, 0.0)
        elif s.hidden > units:
            gain = jnp.where(block == 0, gain, 0.0)
        gain_ref[me] = gain
        if not gradients:
            return
        factor = slot.beta
        if reconstructs:
            elements = f32(jnp.asarray(slot.size)) * float(total)
            factor = factor * jnp.where(grafted, 1.0, 2.0 / elements)
        across, along = Span(slot.zero, c), Span(slot.zero, units)
        write(dw1_ref, (me, across, along), factor * sums.w1)
        write(dw2_ref, (me, along, across), factor * sums.w2)
        bias, used = s.of_kind(slot.kind, "bias"), s.of_kind(slot.kind, "scale")
        if biases:
            write(db1_ref, (me, along), biased(bias, factor * sums.b1))
            write(db2_ref, (me, across), biased(bias, factor * sums.b2))
        if scales:
            write(dscale_ref, (me, across), biased(used, factor * sums.scale))

    @pl.when(share.works)
    def _living() -> None:
        slot = slot_at(s, refs, k, share.zero)

        @pl.when(slot.beta != 0.0)
        def _learning() -> None:
            run(slot, True)

        @pl.when(slot.beta == 0.0)
        def _frozen() -> None:
            run(slot, False)


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
    order = order_of(alpha_ref, beta_ref, owner_ref)
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
    order = order_of(refs.alpha, refs.beta, refs.owner)
    share = share_of(order, pl.num_programs(0), pl.cdiv(total, rows))
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
