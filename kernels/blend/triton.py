"""Blend as fused GPU kernels: Pallas on its Triton backend.

Programs of dead slots end at once, so the work follows the living ones. The forward
kernel overwrites the living chunks in place, with hidden activations that never leave
the chip, and keeps only those chunks for the backward pass. That one computes the
hidden activations again, and overwrites the cotangent in place with the gradient of
``y``. Sums over rows leave each program as partial sums, added up in a fixed order, so
that results are reproducible bit for bit.

Chunks of a few features (`Config.narrow`) share tiles, a slot a lane, and loop over
their features; wider ones are multiplied as matrices, a slot a program.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from esper_jax.blueprints import Bank, Blueprint, Custom, Dense, hidden_width
from esper_jax.chunks import ChunkLayout
from esper_jax.kernels.blend.config import Blocks, Config, choose, power_of_two
from esper_jax.signals import Statistics
from esper_jax.stages import Incubation

__all__ = ["MAX_WIDTH", "blend", "refusal"]

MAX_WIDTH = 512
"""Widest chunk that the kernels take."""

_NEAR_ZERO = 1e-6
_DTYPES = ("float32", "bfloat16", "float16")


def refusal(
    y: Array, alpha: Array, layout: ChunkLayout, blueprints: tuple[Blueprint, ...]
) -> str | None:
    """Why the kernels do not take these arguments; None if they do."""
    custom = [b.name for b in blueprints if isinstance(b, Custom)]
    if custom:
        return f"blueprint {custom[0]!r} is Custom, and only Dense ones are supported"
    for b in blueprints:
        if isinstance(b, Dense) and b.activation not in _ACTIVATIONS:
            return f"activation {b.activation!r} has no kernel"
    if jnp.dtype(y.dtype).name not in _DTYPES:
        return f"dtype {y.dtype} is none of {', '.join(_DTYPES)}"
    if layout.width > MAX_WIDTH:
        return f"chunks of {layout.width} features are wider than {MAX_WIDTH}"
    if y.size == 0 or alpha.size == 0:
        return "there are no rows or no slots"
    return None


def _gelu(x: Array) -> tuple[Array, Array]:
    # The tanh form of jax.nn.gelu, by tanh(u) = 2 * sigmoid(2 u) - 1.
    c = 2.0 * np.sqrt(2.0 / np.pi).astype(np.float32)
    square = x * x
    gate = jax.nn.sigmoid(c * x * (1.0 + 0.044715 * square))
    slope = gate + x * gate * (1.0 - gate) * c * (1.0 + 0.134145 * square)
    return x * gate, slope


def _silu(x: Array) -> tuple[Array, Array]:
    gate = jax.nn.sigmoid(x)
    return x * gate, gate * (1.0 + x * (1.0 - gate))


def _tanh(x: Array) -> tuple[Array, Array]:
    out = jnp.tanh(x)
    return out, 1.0 - out * out


def _relu(x: Array) -> tuple[Array, Array]:
    return jnp.maximum(x, 0.0), jnp.where(x > 0.0, 1.0, 0.0)


def _identity(x: Array) -> tuple[Array, Array]:
    return x, jnp.ones_like(x)


_ACTIVATIONS: dict[str, Callable[[Array], tuple[Array, Array]]] = {
    "gelu": _gelu,
    "relu": _relu,
    "silu": _silu,
    "tanh": _tanh,
    "identity": _identity,
}
"""Value and derivative of each activation that kernels know."""


@dataclasses.dataclass(frozen=True)
class _Static:
    """All that is known when a kernel is traced."""

    layout: ChunkLayout
    blueprints: tuple[Blueprint, ...]
    incubation: Incubation
    statistics_rows: int | None
    config: Config
    interpret: bool

    @property
    def width(self) -> int:
        return self.layout.width

    @property
    def columns(self) -> int:
        """Columns of a tile that holds one chunk; a dot takes no fewer than 16."""
        return max(16, power_of_two(self.layout.width))

    @property
    def hidden(self) -> int:
        return hidden_width(self.blueprints, self.layout.width)

    def of_kind(self, kind: Array, field: str) -> Any:
        """A property of a blueprint by its run-time index; a constant if all agree."""
        values = [getattr(b, field) for b in self.blueprints]
        if field == "hidden":
            values = [hidden(self.width) for hidden in values]
        if len(set(values)) == 1:
            return values[0]
        out = jnp.full_like(kind, int(values[0]))
        for i, value in enumerate(values):
            out = jnp.where(kind == i, int(value), out)
        return out != 0 if isinstance(values[0], bool) else out

    def activate(self, kind: Array, x: Array) -> tuple[Array, Array]:
        """Value and derivative of the activation that ``kind`` has; one per lane where
        ``kind`` is no scalar."""
        names = [b.activation for b in self.blueprints if isinstance(b, Dense)]
        used = [
            b.activation
            for b in self.blueprints
            if isinstance(b, Dense) and b.expansion > 0
        ]
        # A blueprint without a hidden layer may take any: its units are 0.
        distinct = list(dict.fromkeys(used)) or ["identity"]
        if len(distinct) == 1:
            return _ACTIVATIONS[distinct[0]](x)
        index = jnp.full_like(kind, 0)
        for i, name in enumerate(names):
            if name in distinct:
                index = jnp.where(kind == i, distinct.index(name), index)
        if kind.ndim == 0:
            return lax.switch(index, [_ACTIVATIONS[name] for name in distinct], x)
        out = _ACTIVATIONS[distinct[0]](x)
        for i, name in enumerate(distinct[1:], start=1):
            other = _ACTIVATIONS[name](x)
            chosen = jnp.broadcast_to((index == i)[None, :], x.shape)
            out = (
                jnp.where(chosen, other[0], out[0]),
                jnp.where(chosen, other[1], out[1]),
            )
        return out


class _Slot(NamedTuple):
    """What a program knows about its slot, or its lanes about theirs."""

    alpha: Array
    beta: Array
    kind: Array
    start: Array
    size: Any
    living: Array
    zero: Array
    """0, but not known to be while tracing: where a span starts that may reach over the
    end of an array, which Pallas refuses of one that starts at a number."""


class _Refs(NamedTuple):
    """The inputs that all kernels share."""

    w1: Any
    b1: Any
    w2: Any
    b2: Any
    scale: Any
    alpha: Any
    beta: Any
    kind: Any
    owner: Any


class _Span(NamedTuple):
    """``size`` indices from ``start`` on."""

    start: Any
    size: int


def _index(index: tuple[Any, ...]) -> tuple[Any, ...]:
    """An index of Pallas from numbers, spans and arrays."""

    def convert(i: Any) -> Any:
        if isinstance(i, _Span):
            return pl.ds(i.start, i.size)
        return jnp.int32(i) if isinstance(i, int) else i

    return tuple(convert(i) for i in index)


def _read(ref: Any, index: tuple[Any, ...], mask: Array | None = None) -> Array:
    """``ref[index]``, 0 where the mask is false."""
    index = _index(index)
    if mask is None:
        return ref[index]
    return plgpu.load(ref.at[index], mask=mask, other=0)


def _write(
    ref: Any, index: tuple[Any, ...], value: Array, mask: Array | None = None
) -> None:
    """``ref[index] = value`` where the mask is true."""
    index = _index(index)
    value = value.astype(ref.dtype)
    if mask is None:
        ref[index] = value
    else:
        plgpu.store(ref.at[index], value, mask=mask)


def _range(size: int) -> Array:
    return lax.iota(jnp.int32, size)


def _both(rows: Any, columns: Any, shape: tuple[int, ...]) -> Array | None:
    """The mask of a tile from those of its rows and columns; None is all."""
    if rows is None and columns is None:
        return None
    if rows is None:
        return jnp.broadcast_to(columns[None, :], shape)
    tall = jnp.broadcast_to(rows[:, None], shape)
    if columns is None:
        return tall
    return tall & jnp.broadcast_to(columns[None, :], shape)


def _masked(mask: Array | None, x: Array) -> Array:
    return x if mask is None else jnp.where(mask, x, 0.0)


def _dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """A product with float32 sums, over the given axis of each."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _f32(x: Array) -> Array:
    return x.astype(jnp.float32)


def _chunk(layout: ChunkLayout, seed: Array) -> tuple[Array, Any]:
    """First feature and width of a seed's chunk; the width a constant if all agree."""
    base, wider = divmod(layout.features, layout.num_seeds)
    if layout.even:
        return seed * base, base
    # min and max, because the lowering selects no two constants.
    size = base + jnp.minimum(jnp.maximum(wider - seed, 0), 1)
    return seed * base + jnp.minimum(seed, wider), size


def _slot(s: _Static, refs: _Refs, index: Any, mask: Array | None = None) -> _Slot:
    owner = _read(refs.owner, (index,), mask).astype(jnp.int32)
    alpha = _f32(_read(refs.alpha, (index,), mask))
    beta = _f32(_read(refs.beta, (index,), mask))
    kind = _read(refs.kind, (index,), mask).astype(jnp.int32)
    kind = jnp.minimum(jnp.maximum(kind, 0), len(s.blueprints) - 1)
    living = (owner >= 0) & ((alpha != 0.0) | (beta != 0.0))
    if mask is not None:
        living = living & mask
    start, size = _chunk(s.layout, jnp.maximum(owner, 0))
    zero = pl.program_id(0) * 0
    return _Slot(alpha, beta, kind, start, size, living, zero)


def _walk(count: int, body: Callable[[Any, Any], Any], init: Any) -> Any:
    """``body(i, carry)`` for each i; no loop where there is one."""
    if count == 1:
        return body(0, init)
    return lax.fori_loop(np.int32(0), np.int32(count), body, init)


# Chunks as matrices: a program is a slot and a span of rows.


class _Weights(NamedTuple):
    """A slot's blueprint, or as many hidden units of it as fit a tile."""

    w1: Array
    b1: Array
    w2: Array


class _Tile(NamedTuple):
    """Where a tile of a chunk is."""

    rows: Any
    mask: Array | None


def _column_mask(s: _Static, slot: _Slot) -> Array | None:
    if s.layout.even and s.width == s.columns:
        return None
    return _range(s.columns) < slot.size


def _tile(
    s: _Static, slot: _Slot, first: Any, rows: int, total: int, span: int
) -> _Tile:
    inside = None if total % span == 0 else first + _range(rows) < total
    return _Tile(
        _Span(first, rows), _both(inside, _column_mask(s, slot), (rows, s.columns))
    )


def _weights(
    s: _Static, refs: _Refs, slot: _Slot, k: Any, first: Any, units: int, dtype: Any
) -> _Weights:
    """Hidden units ``[first, first + units)`` of the slot; 0 where it has none."""
    first = slot.zero + first
    hidden = s.of_kind(slot.kind, "hidden")
    exact = isinstance(hidden, int) and hidden > 0 and hidden % units == 0
    unit_mask = None if exact else first + _range(units) < hidden
    column_mask = None if s.width == s.columns else _range(s.columns) < s.width
    across, along = _Span(slot.zero, s.columns), _Span(first, units)
    w1 = _read(
        refs.w1, (k, across, along), _both(column_mask, unit_mask, (s.columns, units))
    )
    w2 = _read(
        refs.w2, (k, along, across), _both(unit_mask, column_mask, (units, s.columns))
    )
    bias = s.of_kind(slot.kind, "bias")
    b1 = _biased(bias, _f32(_read(refs.b1, (k, along), unit_mask)))
    return _Weights(w1.astype(dtype), b1, w2.astype(dtype))


def _biased(used: Any, x: Array) -> Array:
    """``x`` where that part of the blueprint is used, else 0."""
    if isinstance(used, bool):
        return x if used else jnp.zeros_like(x)
    return jnp.where(used, x, 0.0)


def _offsets(s: _Static, refs: _Refs, slot: _Slot, k: Any) -> tuple[Array, Array]:
    """``b2`` and ``scale`` of the slot, 0 where unused."""
    mask = None if s.width == s.columns else _range(s.columns) < s.width
    index = (k, _Span(slot.zero, s.columns))
    b2 = _f32(_read(refs.b2, index, mask))
    scale = _f32(_read(refs.scale, index, mask))
    return (
        _biased(s.of_kind(slot.kind, "bias"), b2),
        _biased(s.of_kind(slot.kind, "scale"), scale),
    )


def _correct(
    s: _Static,
    refs: _Refs,
    slot: _Slot,
    k: Any,
    y: Array,
    mask: Array | None,
    units: int,
    held: _Weights | None,
    offsets: tuple[Array, Array],
) -> Array:
    """``r(y)`` of a tile; from weights already held, or walking over hidden units."""

    def part(j: Any, out: Array) -> Array:
        w = held or _weights(s, refs, slot, k, j * units, units, y.dtype)
        h, _ = s.activate(slot.kind, _dot(y, w.w1) + w.b1[None, :])
        return out + _dot(h.astype(y.dtype), w.w2)

    zero = jnp.zeros(y.shape, jnp.float32)
    out = _walk(pl.cdiv(s.hidden, units), part, zero)
    b2, scale = offsets
    return _masked(mask, out + b2[None, :] + scale[None, :] * _f32(y))


def _forward_kernel(
    s: _Static, total: int, record: bool, save: bool, *all_refs: Any
) -> None:
    refs = _Refs(*all_refs[:9])
    y_ref, rest = all_refs[9], list(all_refs[10:])
    if s.statistics_rows != 0:
        rest.pop(0)  # The statistics' input, which is their output too.
    out_ref, means_ref = rest.pop(0), rest.pop(0)
    sums_ref = rest.pop(0) if s.statistics_rows != 0 else None
    saved_ref = rest.pop(0) if save else None
    blocks = s.config.forward
    k, part = pl.program_id(0), pl.program_id(1)
    slot = _slot(s, refs, k)

    @pl.when(jnp.logical_not(slot.living))
    def _dead() -> None:
        means_ref[part, k] = jnp.float32(0.0)

    @pl.when(slot.living)
    def _living() -> None:
        units = blocks.across
        held = None
        if s.hidden <= units:
            held = _weights(s, refs, slot, k, 0, units, y_ref.dtype)
        offsets = _offsets(s, refs, slot, k)

        def body(i: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            tile = _tile(
                s,
                slot,
                part * blocks.span + i * blocks.rows,
                blocks.rows,
                total,
                blocks.span,
            )
            place = (tile.rows, _Span(slot.start, s.columns))
            y = _read(y_ref, place, tile.mask)
            r = _correct(s, refs, slot, k, y, tile.mask, units, held, offsets)
            y32 = _f32(y)

            @pl.when(slot.alpha != 0.0)
            def _blended() -> None:
                _write(out_ref, place, y32 + slot.alpha * r, tile.mask)

            if save:
                kept = (tile.rows, k, _Span(slot.zero, s.columns))
                inside = None
                if total % blocks.span:
                    inside = (
                        part * blocks.span + i * blocks.rows + _range(blocks.rows)
                        < total
                    )
                fits = None if s.width == s.columns else _range(s.columns) < s.width
                _write(saved_ref, kept, y, _both(inside, fits, y.shape))
            added = [sums[0] + jnp.sum(r * r, axis=0)]
            if record:
                near = jnp.abs(y32) < _NEAR_ZERO
                if tile.mask is not None:
                    near = near & tile.mask
                added.append(sums[1] + jnp.sum(y32, axis=0))
                added.append(sums[2] + jnp.sum(y32 * y32, axis=0))
                added.append(sums[3] + jnp.sum(jnp.where(near, 1.0, 0.0), axis=0))
            return tuple(added)

        zero = jnp.zeros((s.columns,), jnp.float32)
        sums = _walk(blocks.span // blocks.rows, body, (zero,) * (4 if record else 1))
        elements = _f32(jnp.asarray(slot.size)) * float(total)
        means_ref[part, k] = jnp.sum(sums[0]) / elements
        if record and sums_ref is not None:
            for j in range(3):
                _write(
                    sums_ref,
                    (part, j, _Span(slot.start, s.columns)),
                    sums[1 + j],
                    _column_mask(s, slot),
                )


class _Gradients(NamedTuple):
    """Sums of the parameters' gradients over the rows of a program."""

    w1: Array
    b1: Array
    w2: Array
    b2: Array
    scale: Array
    alpha: Array


def _backward_kernel(s: _Static, total: int, fused: bool, *all_refs: Any) -> None:
    """Gradients of parameters and alpha; that of y too, if ``fused``."""
    refs = _Refs(*all_refs[:9])
    saved_ref, g_ref = all_refs[9:11]
    dw1_ref, db1_ref, dw2_ref, db2_ref, dscale_ref, dalpha_ref, *rest = all_refs[11:]
    blocks = s.config.backward
    units = blocks.across
    block, k, part = (pl.program_id(i) for i in range(3))
    slot = _slot(s, refs, k)
    grafted = slot.alpha != 0.0
    learns = slot.beta != 0.0
    reconstructs = s.incubation == "reconstruction"

    def run(gradients: bool) -> None:
        first = block * units
        w = _weights(s, refs, slot, k, first, units, saved_ref.dtype)
        offsets = _offsets(s, refs, slot, k)
        b2, scale = offsets

        # sum(g * (h @ w2)) is sum(w2 * (h.T @ g)), whose second factor is dw2.
        by_weights = gradients and not reconstructs

        def body(i: Any, sums: _Gradients) -> _Gradients:
            tile = _tile(
                s,
                slot,
                part * blocks.span + i * blocks.rows,
                blocks.rows,
                total,
                blocks.span,
            )
            place = (tile.rows, _Span(slot.start, s.columns))
            y = _read(saved_ref, (tile.rows, k, _Span(slot.zero, s.columns)), tile.mask)
            g = _read(g_ref, place, tile.mask)
            before = _dot(y, w.w1) + w.b1[None, :]
            h, slope = s.activate(slot.kind, before)
            pulled = g
            if reconstructs:
                held = w if s.hidden <= units else None
                r = _correct(s, refs, slot, k, y, tile.mask, units, held, offsets)
                pulled = jnp.where(grafted, _f32(g), r).astype(g.dtype)
                gain = jnp.sum(_f32(g) * r, axis=0)
            dh = _dot(pulled, w.w2, (1, 1))
            if not reconstructs and not gradients:
                gain = jnp.sum(dh * h, axis=0)
            d_before = dh * slope
            d_low = d_before.astype(y.dtype)
            g32, y32, p32 = _f32(g), _f32(y), _f32(pulled)
            out = sums._replace(
                alpha=sums.alpha if by_weights else sums.alpha + gain,
                b2=sums.b2 + jnp.sum(p32, axis=0),
                scale=sums.scale + jnp.sum(p32 * y32, axis=0),
            )
            if gradients:
                out = out._replace(
                    w1=sums.w1 + _dot(y, d_low, (0, 0)),
                    b1=sums.b1 + jnp.sum(d_before, axis=0),
                    w2=sums.w2 + _dot(h.astype(y.dtype), pulled, (0, 0)),
                )
            if fused:

                @pl.when(grafted)
                def _input() -> None:
                    dy = _dot(d_low, w.w1, (1, 1)) + scale[None, :] * g32
                    _write(rest[0], place, g32 + slot.alpha * dy, tile.mask)

            return out

        def zeros(*shape: int) -> Array:
            return jnp.zeros(shape, jnp.float32)

        c = s.columns
        matrices = gradients
        sums = _walk(
            blocks.span // blocks.rows,
            body,
            _Gradients(
                w1=zeros(c, units) if matrices else zeros(1),
                b1=zeros(units) if matrices else zeros(1),
                w2=zeros(units, c) if matrices else zeros(1),
                b2=zeros(c),
                scale=zeros(c),
                alpha=zeros(1 if by_weights else c if reconstructs else units),
            ),
        )
        if by_weights:
            gain = jnp.sum(jnp.sum(_f32(w.w2) * sums.w2, axis=1))
        else:
            gain = jnp.sum(sums.alpha)
        if not reconstructs:
            own = jnp.sum(b2 * sums.b2) + jnp.sum(scale * sums.scale)
            gain = gain + jnp.where(block == 0, own, 0.0)
        elif s.hidden > units:
            gain = jnp.where(block == 0, gain, 0.0)
        dalpha_ref[part, block, k] = gain
        if gradients:
            factor = slot.beta
            if reconstructs:
                elements = _f32(jnp.asarray(slot.size)) * float(total)
                factor = factor * jnp.where(grafted, 1.0, 2.0 / elements)
            _write_gradients(s, slot, sums, factor, first, units)

    def _write_gradients(
        s: _Static,
        slot: _Slot,
        sums: _Gradients,
        factor: Array,
        first: Any,
        units: int,
    ) -> None:
        fits = None if s.width == s.columns else _range(s.columns) < s.width
        inside = None if s.hidden % units == 0 else first + _range(units) < s.hidden
        across, along = _Span(slot.zero, s.columns), _Span(first, units)
        _write(
            dw1_ref,
            (part, k, across, along),
            factor * sums.w1,
            _both(fits, inside, sums.w1.shape),
        )
        _write(
            dw2_ref,
            (part, k, along, across),
            factor * sums.w2,
            _both(inside, fits, sums.w2.shape),
        )
        bias = s.of_kind(slot.kind, "bias")
        _write(db1_ref, (part, k, along), _biased(bias, factor * sums.b1), inside)

        @pl.when(block == 0)
        def _once() -> None:
            _write(db2_ref, (part, k, across), _biased(bias, factor * sums.b2), fits)
            used = s.of_kind(slot.kind, "scale")
            d_scale = _biased(used, factor * sums.scale)
            _write(dscale_ref, (part, k, across), d_scale, fits)

    @pl.when(slot.living & learns)
    def _learning() -> None:
        run(True)

    @pl.when(slot.living & jnp.logical_not(learns))
    def _frozen() -> None:
        run(False)


def _input_kernel(s: _Static, total: int, *all_refs: Any) -> None:
    """Gradient of y, where hidden units are too many for the other kernel's tile."""
    refs = _Refs(*all_refs[:9])
    saved_ref, g_ref, _, dy_ref, _ = all_refs[9:]
    blocks = s.config.input
    units = blocks.across
    k, part = pl.program_id(0), pl.program_id(1)
    slot = _slot(s, refs, k)

    @pl.when(slot.living & (slot.alpha != 0.0))
    def _grafted() -> None:
        _, scale = _offsets(s, refs, slot, k)

        def body(i: Any, carry: Any) -> Any:
            tile = _tile(
                s,
                slot,
                part * blocks.span + i * blocks.rows,
                blocks.rows,
                total,
                blocks.span,
            )
            place = (tile.rows, _Span(slot.start, s.columns))
            y = _read(saved_ref, (tile.rows, k, _Span(slot.zero, s.columns)), tile.mask)
            g = _read(g_ref, place, tile.mask)

            def some(j: Any, out: Array) -> Array:
                w = _weights(s, refs, slot, k, j * units, units, y.dtype)
                before = _dot(y, w.w1) + w.b1[None, :]
                _, slope = s.activate(slot.kind, before)
                d_before = _dot(g, w.w2, (1, 1)) * slope
                return out + _dot(d_before.astype(y.dtype), w.w1, (1, 1))

            g32 = _f32(g)
            dy = _walk(pl.cdiv(s.hidden, units), some, jnp.zeros(y.shape, jnp.float32))
            dy = g32 + slot.alpha * (dy + scale[None, :] * g32)
            _write(dy_ref, place, dy, tile.mask)
            return carry

        _walk(blocks.span // blocks.rows, body, np.int32(0))


# Narrow chunks: a program is a tile of slots, one a lane, and a span of rows.


def _lanes(s: _Static, refs: _Refs, count: int, lanes: int) -> tuple[Array, _Slot]:
    index = pl.program_id(0) * lanes + _range(lanes)
    return index, _slot(s, refs, index, index < count)


class _LaneWeights(NamedTuple):
    """Each parameter of the blueprint, a vector with one entry per lane."""

    w1: list[list[Array]]
    b1: list[Array]
    w2: list[list[Array]]
    b2: list[Array]
    scale: list[Array]


def _lane_weights(s: _Static, refs: _Refs, index: Array, slot: _Slot) -> _LaneWeights:
    hidden = s.of_kind(slot.kind, "hidden")
    units = [slot.living & (h < hidden) for h in range(s.hidden)]
    bias = slot.living & s.of_kind(slot.kind, "bias")
    scale = slot.living & s.of_kind(slot.kind, "scale")

    def read(ref: Any, at: tuple[int, ...], mask: Array) -> Array:
        return _f32(_read(ref, (index, *(jnp.full_like(index, i) for i in at)), mask))

    wide, tall = range(s.width), range(s.hidden)
    return _LaneWeights(
        w1=[[read(refs.w1, (i, h), units[h]) for h in tall] for i in wide],
        b1=[read(refs.b1, (h,), units[h] & bias) for h in tall],
        w2=[[read(refs.w2, (h, i), units[h]) for i in wide] for h in tall],
        b2=[read(refs.b2, (i,), bias) for i in wide],
        scale=[read(refs.scale, (i,), scale) for i in wide],
    )


def _rounded(w: _LaneWeights, dtype: Any) -> _LaneWeights:
    """Matrices rounded to the dtype that a matrix product would take them in."""

    def low(rows: list[list[Array]]) -> list[list[Array]]:
        return [[_f32(x.astype(dtype)) for x in row] for row in rows]

    return w._replace(w1=low(w.w1), w2=low(w.w2))


def _lane_hidden(
    s: _Static, slot: _Slot, w: _LaneWeights, y: list[Array]
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
    s: _Static, w: _LaneWeights, y: list[Array], h: list[Array], valid: list[Array]
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
    s: _Static, slot: _Slot, first: Any, rows: int, lanes: int, total: int
) -> _LaneTile:
    shape = (rows, lanes)
    index = first + _range(rows)
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


def _narrow_forward_kernel(
    s: _Static, total: int, record: bool, save: bool, *all_refs: Any
) -> None:
    del record  # The statistics' own kernel reads all chunks.
    refs = _Refs(*all_refs[:9])
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
        _write(means_ref, (jnp.full_like(index, part), index), zero, exists)

    @pl.when(any_living)
    def _living() -> None:
        w = _rounded(_lane_weights(s, refs, index, slot), y_ref.dtype)
        alpha = jnp.broadcast_to(slot.alpha[None, :], (blocks.rows, lanes))

        def body(i: Any, squares: Array) -> Array:
            tile = _lane_tile(
                s, slot, part * blocks.span + i * blocks.rows, blocks.rows, lanes, total
            )
            y = [
                _f32(_read(y_ref, tile.place[i], tile.valid[i])) for i in range(s.width)
            ]
            h, _ = _lane_hidden(s, slot, w, y)
            h = [_f32(x.astype(y_ref.dtype)) for x in h]
            r = _lane_correction(s, w, y, h, tile.valid)
            for i in range(s.width):
                changed = tile.valid[i] & (alpha != 0.0)
                _write(out_ref, tile.place[i], y[i] + alpha * r[i], changed)
                squares = squares + r[i] * r[i]
                if save:
                    shape = tile.rows.shape
                    lane = jnp.broadcast_to(index[None, :], shape)
                    kept = tile.inside & jnp.broadcast_to(slot.living[None, :], shape)
                    feature = jnp.full_like(tile.rows, i)
                    _write(saved_ref, (tile.rows, lane, feature), y[i], kept)
            return squares

        squares = _walk(
            blocks.span // blocks.rows,
            body,
            jnp.zeros((blocks.rows, lanes), jnp.float32),
        )
        elements = _f32(jnp.asarray(slot.size)) * float(total)
        means = jnp.sum(squares, axis=0) / elements
        _write(means_ref, (jnp.full_like(index, part), index), means, exists)


def _narrow_backward_kernel(s: _Static, total: int, *all_refs: Any) -> None:
    refs = _Refs(*all_refs[:9])
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
                s, slot, part * blocks.span + i * blocks.rows, blocks.rows, lanes, total
            )
            lane = jnp.broadcast_to(index[None, :], shape)
            y = [
                _f32(
                    _read(
                        saved_ref,
                        (tile.rows, lane, jnp.full_like(tile.rows, i)),
                        tile.valid[i],
                    )
                )
                for i in wide
            ]
            g = [_f32(_read(g_ref, tile.place[i], tile.valid[i])) for i in wide]
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
                _write(dy_ref, tile.place[i], g[i] + alpha * dy, changed)
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
        sums = _walk(blocks.span // blocks.rows, body, init)
        dw1, db1, dw2, db2, dscale, dalpha = jax.tree.map(
            lambda x: jnp.sum(x, axis=0), sums
        )
        factor = slot.beta
        if s.incubation == "reconstruction":
            elements = _f32(jnp.asarray(slot.size)) * float(total)
            factor = factor * jnp.where(slot.alpha != 0.0, 1.0, 2.0 / elements)
        learns = slot.living & (slot.beta != 0.0)
        bias = s.of_kind(slot.kind, "bias")
        scale = s.of_kind(slot.kind, "scale")

        def put(ref: Any, at: tuple[int, ...], value: Array, mask: Array) -> None:
            where = tuple(jnp.full_like(index, i) for i in at)
            _write(ref, (jnp.full_like(index, part), index, *where), value, mask)

        for i in wide:
            for u in tall:
                put(dw1_ref, (i, u), factor * dw1[i][u], learns)
                put(dw2_ref, (u, i), factor * dw2[u][i], learns)
            put(db2_ref, (i,), _biased(bias, factor * db2[i]), learns)
            put(dscale_ref, (i,), _biased(scale, factor * dscale[i]), learns)
        for u in tall:
            put(db1_ref, (u,), _biased(bias, factor * db1[u]), learns)
        block = jnp.full_like(index, 0)
        _write(
            dalpha_ref,
            (jnp.full_like(index, part), block, index),
            dalpha,
            slot.living,
        )


# Statistics of the chunks: a program is a span of rows of a few hundred columns.


def _statistics_kernel(
    s: _Static, sampled: int, stride: int, skip: bool, *refs: Any
) -> None:
    """Sums of each column. With ``skip``, tiles in which every chunk lives are left to
    the forward kernel, which has them at hand."""
    y_ref, alpha_ref, beta_ref, owner_ref, sums_ref = refs
    blocks = s.config.statistics
    across, part = blocks.across, pl.program_id(1)
    first = pl.program_id(0) * across
    features = s.layout.features
    columns = first + _range(across)
    shape = (blocks.rows, across)
    exact = features % across == 0

    def run() -> None:
        column_mask = None if exact else columns < features
        place = jnp.broadcast_to(columns[None, :], shape)

        def body(i: Any, sums: tuple[Array, Array, Array]) -> tuple[Array, ...]:
            rows = part * blocks.span + i * blocks.rows + _range(blocks.rows)
            row_mask = None if sampled % blocks.span == 0 else rows < sampled
            mask = _both(row_mask, column_mask, shape)
            where = (jnp.broadcast_to((rows * stride)[:, None], shape), place)
            x = _f32(_read(y_ref, where, mask))
            near = jnp.abs(x) < _NEAR_ZERO
            if mask is not None:
                near = near & mask
            return (
                sums[0] + x,
                sums[1] + x * x,
                sums[2] + jnp.where(near, 1.0, 0.0),
            )

        zero = jnp.zeros(shape, jnp.float32)
        sums = _walk(blocks.span // blocks.rows, body, (zero, zero, zero))
        for j in range(3):
            index = (part, j, _Span(first, across))
            _write(sums_ref, index, jnp.sum(sums[j], axis=0), column_mask)

    if not skip:
        run()
        return
    count = alpha_ref.shape[0]
    slots = _range(power_of_two(count))
    mask = None if power_of_two(count) == count else slots < count
    index = (_Span(pl.program_id(0) * 0, power_of_two(count)),)
    owner = _read(owner_ref, index, mask).astype(jnp.int32)
    alpha, beta = _read(alpha_ref, index, mask), _read(beta_ref, index, mask)
    living = (owner >= 0) & ((alpha != 0) | (beta != 0))
    if mask is not None:
        living = living & mask
    start, size = _chunk(s.layout, jnp.maximum(owner, 0))
    end = jnp.minimum(first + across, features)
    shared = jnp.minimum(start + size, end) - jnp.maximum(start, first)
    covered = jnp.sum(jnp.where(living, jnp.maximum(shared, 0), 0))

    @pl.when(covered < end - first)
    def _some_dormant() -> None:
        run()


# Launches.


_DEPRECATED = "The Pallas Triton backend is deprecated"


def _launch(
    s: _Static,
    kernel: Callable[..., None],
    name: str,
    grid: Sequence[int],
    blocks: Blocks,
    inputs: Sequence[Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    aliases: dict[int, int] | None = None,
) -> Any:
    # Raised while lowering, after this function returns; users are told in the README.
    warnings.filterwarnings("ignore", message=_DEPRECATED, category=DeprecationWarning)

    def named(*refs: Any) -> None:
        kernel(*refs)

    named.__name__ = name  # What profilers show.
    return pl.pallas_call(
        named,
        out_shape=list(outputs),
        grid=tuple(grid),
        input_output_aliases=aliases or {},
        compiler_params=plgpu.CompilerParams(
            num_warps=blocks.warps, num_stages=blocks.stages
        ),
        interpret=s.interpret,
        name=name,
    )(*inputs)


def _struct(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _sampled(s: _Static, rows: int) -> tuple[int, int]:
    """Rows that statistics are taken over, and the step from one to the next."""
    if s.statistics_rows is None:
        return rows, 1
    sampled = min(rows, s.statistics_rows)
    return sampled, rows // max(sampled, 1)


def _column_sums(
    s: _Static, y: Array, alpha: Array, beta: Array, owner: Array
) -> tuple[Array, bool]:
    """Partial sums of the columns, and whether the forward kernel completes them."""
    rows, features = y.shape
    sampled, stride = _sampled(s, rows)
    complete = s.statistics_rows is None and not s.config.narrow
    if complete:
        # One partition of the rows for both kernels, which fill one array.
        span = s.config.forward.span
        tile = min(s.config.statistics.rows, span)
        blocks = dataclasses.replace(
            s.config.statistics, rows=tile, span=tile * -(-span // tile)
        )
        if blocks.span != span:
            raise ValueError(
                f"the span of the forward kernel, {span}, must be a multiple of the "
                f"rows of a tile of statistics, {tile}"
            )
        s = dataclasses.replace(
            s, config=dataclasses.replace(s.config, statistics=blocks)
        )
    blocks = s.config.statistics
    parts = pl.cdiv(sampled, blocks.span)
    (sums,) = _launch(
        s,
        functools.partial(_statistics_kernel, s, sampled, stride, complete),
        "blend_statistics",
        (pl.cdiv(features, blocks.across), parts),
        blocks,
        (y, alpha, beta, owner),
        (_struct((parts, 3, features)),),
    )
    return sums, complete


def _by_chunk(sums: Array, layout: ChunkLayout) -> Array:
    """(3, F) to (3, S)."""
    base, wider = divmod(layout.features, layout.num_seeds)
    if wider == 0:
        return jnp.sum(sums.reshape(3, -1, base), axis=-1)
    cut = wider * (base + 1)
    parts = (
        jnp.sum(sums[:, :cut].reshape(3, wider, base + 1), axis=-1),
        jnp.sum(sums[:, cut:].reshape(3, -1, base), axis=-1),
    )
    return jnp.concatenate(parts, axis=-1)


def _forward_pass(s: _Static, save: bool, *arrays: Any) -> tuple[Any, ...]:
    """Output, statistics, reconstruction, and the living chunks if ``save``."""
    y, bank, alpha, beta, kind, owner = arrays
    rows = y.shape[0]
    slots = alpha.shape[0]
    blocks = s.config.forward
    parts = pl.cdiv(rows, blocks.span)
    outputs = [_struct(y.shape, y.dtype), _struct((parts, slots))]
    inputs = [*_shared(bank, alpha, beta, kind, owner), y]
    aliases = {9: 0}
    complete = False
    if s.statistics_rows != 0:
        # The sums pass through the forward kernel even where it adds nothing to them:
        # so XLA knows that y is read before it is overwritten, and need not copy it.
        sums, complete = _column_sums(s, y, alpha, beta, owner)
        inputs.append(sums)
        outputs.append(_struct(sums.shape))
        aliases[10] = 2
    if save:
        outputs.append(_struct((rows, slots, s.width), y.dtype))
    kernel = _narrow_forward_kernel if s.config.narrow else _forward_kernel
    tiles = pl.cdiv(slots, blocks.across) if s.config.narrow else slots
    out, means, *rest = _launch(
        s,
        functools.partial(kernel, s, rows, complete, save),
        "blend_forward",
        (tiles, parts),
        blocks,
        inputs,
        outputs,
        aliases,
    )
    count = np.asarray(s.layout.sizes, np.float32) * _sampled(s, rows)[0]
    if s.statistics_rows != 0:
        total, squares, near = _by_chunk(jnp.sum(rest[0], axis=0), s.layout)
    else:
        total = squares = near = jnp.zeros(s.layout.num_seeds, jnp.float32)
    statistics = Statistics(
        count=jnp.asarray(count), total=total, squares=squares, near_zero=near
    )
    return (out, statistics, jnp.sum(means, axis=0), *(rest[-1:] if save else ()))


def _shared(bank: Bank, *arrays: Array) -> _Refs:
    return _Refs(bank.w1, bank.b1, bank.w2, bank.b2, bank.scale, *arrays)


def _backward_pass(s: _Static, *arrays: Any) -> tuple[Array, Bank, Array]:
    """Gradients of y, the bank and alpha."""
    g, saved, bank, alpha, beta, kind, owner = arrays
    rows = g.shape[0]
    slots = alpha.shape[0]
    blocks = s.config.backward
    parts = pl.cdiv(rows, blocks.span)
    narrow = s.config.narrow
    tiles = 1 if narrow else pl.cdiv(s.hidden, blocks.across)
    fused = tiles == 1
    outputs = [
        _struct((parts, *leaf.shape))
        for leaf in (bank.w1, bank.b1, bank.w2, bank.b2, bank.scale)
    ]
    outputs.append(_struct((parts, tiles, slots)))
    inputs = [*_shared(bank, alpha, beta, kind, owner), saved, g]
    if fused:
        outputs.append(_struct(g.shape, g.dtype))
    if narrow:
        kernel = functools.partial(_narrow_backward_kernel, s, rows)
        grid: tuple[int, ...] = (pl.cdiv(slots, blocks.across), parts)
    else:
        kernel = functools.partial(_backward_kernel, s, rows, fused)
        grid = (tiles, slots, parts)
    w1, b1, w2, b2, scale, gain, *rest = _launch(
        s,
        kernel,
        "blend_backward",
        grid,
        blocks,
        inputs,
        outputs,
        {10: 6} if fused else None,
    )
    if fused:
        (dy,) = rest
    else:
        # The gain passes through, so that g is read before it is overwritten.
        blocks = s.config.input
        dy, gain = _launch(
            s,
            functools.partial(_input_kernel, s, rows),
            "blend_input",
            (slots, pl.cdiv(rows, blocks.span)),
            blocks,
            [*inputs, gain],
            (_struct(g.shape, g.dtype), _struct(gain.shape)),
            {10: 0, 11: 1},
        )
    living = (owner >= 0) & ((alpha != 0) | (beta != 0))
    learning = living & (beta != 0)

    def finish(partial: Array, like: Array) -> Array:
        # What the programs of other slots left there is undefined.
        keep = learning.reshape(slots, *(1,) * (like.ndim - 1))
        return jnp.where(keep, jnp.sum(partial, axis=0), 0.0).astype(like.dtype)

    d_bank = dataclasses.replace(
        jax.tree.map(jnp.zeros_like, bank),
        w1=finish(w1, bank.w1),
        b1=finish(b1, bank.b1),
        w2=finish(w2, bank.w2),
        b2=finish(b2, bank.b2),
        scale=finish(scale, bank.scale),
    )
    d_alpha = jnp.where(living, jnp.sum(gain, axis=(0, 1)), 0.0)
    return dy, d_bank, d_alpha.astype(alpha.dtype)


def _once(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f``, with an error that says so where it is differentiated again."""

    def refuse(*_: Any) -> Any:
        raise NotImplementedError(
            "blend with implementation='triton' has no second derivative; pass "
            "implementation='xla'"
        )

    once = jax.custom_vjp(f)
    once.defvjp(refuse, refuse)
    return once


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blend(s: _Static, *arrays: Any) -> Any:
    return _once(functools.partial(_forward_pass, s, False))(*arrays)


def _blend_forward(s: _Static, *arrays: Any) -> tuple[Any, Any]:
    *out, saved = _once(functools.partial(_forward_pass, s, True))(*arrays)
    return tuple(out), (saved, *arrays[1:])


def _blend_backward(s: _Static, kept: Any, cotangents: Any) -> tuple[Any, ...]:
    dy, d_bank, d_alpha = _once(functools.partial(_backward_pass, s))(
        cotangents[0], *kept
    )
    beta = kept[3]
    return dy, d_bank, d_alpha, jnp.zeros_like(beta), None, None


_blend.defvjp(_blend_forward, _blend_backward)


def blend(
    y: Float[Array, "N F"],
    bank: Bank,
    alpha: Float[Array, " K"],
    beta: Float[Array, " K"],
    blueprint: Int[Array, " K"],
    seed_of_slot: Int[Array, " K"],
    layout: ChunkLayout,
    blueprints: tuple[Blueprint, ...],
    incubation: Incubation,
    statistics_rows: int | None = None,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "N F"], Statistics, Float[Array, " K"]]:
    """The public `blend` on arguments that `refusal` takes, with one batch axis.

    Args:
      config: block sizes; by default `esper_jax.kernels.blend.config.choose`'s.
      interpret: runs the kernels as plain JAX, on any device, to test them.
    """
    if config is None:
        config = choose(
            y.shape[0],
            layout.features,
            layout.width,
            hidden_width(blueprints, layout.width),
            jnp.dtype(y.dtype).name,
            jax.devices()[0].device_kind,
            statistics_rows,
        )
    s = _Static(layout, blueprints, incubation, statistics_rows, config, interpret)
    return _blend(s, y, bank, alpha, beta, blueprint, seed_of_slot)
