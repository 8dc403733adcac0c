"""What is launched for a forward and for a backward pass."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from esper_jax.blueprints import Bank
from esper_jax.chunks import ChunkLayout
from esper_jax.kernels.blend.config import Blocks
from esper_jax.kernels.blend.triton import matrix, narrow
from esper_jax.kernels.blend.triton import statistics as sums_of
from esper_jax.kernels.blend.triton.refs import Refs
from esper_jax.kernels.blend.triton.static import Static
from esper_jax.lifecycle.signals import Statistics

__all__ = ["backward_pass", "forward_pass"]

_DEPRECATED = "The Pallas Triton backend is deprecated"


def _launch(
    s: Static,
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
    # Under `shard_map` the outputs differ from device to device as the inputs do.
    axes = max(
        (jax.typeof(x).manual_axis_type for x in inputs), key=lambda t: len(t.varying)
    )
    return pl.pallas_call(
        named,
        out_shape=[
            jax.ShapeDtypeStruct(o.shape, o.dtype, manual_axis_type=axes)
            for o in outputs
        ],
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


_FINISH = Blocks(rows=1, across=16, programs=1, warps=4, stages=1)
_FINISH_FORWARD = dataclasses.replace(_FINISH, warps=8)


def _programs(blocks: Blocks, units: int, rows: int) -> int:
    """Programs that share ``units`` slots or blocks of them, over a batch of rows."""
    return max(units, min(blocks.programs, units * pl.cdiv(rows, blocks.rows)))


def _column_parts(s: Static, rows: int) -> tuple[int, int, int]:
    """Tiles of columns, parts of the rows, and rows of a part, of statistics."""
    blocks = s.config.statistics
    tiles = int(pl.cdiv(s.layout.features, blocks.across))
    sampled, _ = s.sampled(rows)
    span = sums_of.span_of(sampled, blocks, tiles, sums_of.UNROLL)
    return tiles, int(pl.cdiv(sampled, span)), span


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


def forward_pass(s: Static, save: bool, *arrays: Any) -> tuple[Any, ...]:
    """Output, statistics, reconstruction, and the living chunks if ``save``."""
    forward = _narrow_forward if s.config.narrow else _matrix_forward
    return forward(s, save, *arrays)


def _narrow_forward(s: Static, save: bool, *arrays: Any) -> tuple[Any, ...]:
    y, bank, alpha, beta, kind, owner = arrays
    rows, slots = y.shape[0], alpha.shape[0]
    blocks = s.config.forward
    # These pass through the forward kernel, which does not touch them: so XLA knows
    # that y is read before it is overwritten, and need not copy it.
    column_sums = _narrow_column_sums(s, y) if s.statistics_rows != 0 else []
    side = pl.cdiv(slots, blocks.across)
    span = sums_of.span_of(rows, blocks, side)
    parts = pl.cdiv(rows, span)
    saved = _struct((rows, slots, s.width), y.dtype)
    out, partial, *rest = _launch(
        s,
        functools.partial(narrow.forward_kernel, s, rows, span, save),
        "blend_forward",
        (side, parts),
        blocks,
        [*_shared(s, bank, blocks, alpha, beta, kind, owner), y, *column_sums],
        [
            _struct(y.shape, y.dtype),
            _struct((parts, slots)),
            *(_struct(x.shape) for x in column_sums),
            *([saved] if save else ()),
        ],
        {9: 0, 10: 2} if column_sums else {9: 0},
    )
    count = np.asarray(s.layout.sizes, np.float32) * s.sampled(rows)[0]
    total = squares = near = jnp.zeros(s.layout.num_seeds, jnp.float32)
    if column_sums:
        total, squares, near = _by_chunk(jnp.sum(rest[0], axis=0), s.layout)
    statistics = Statistics(
        count=jnp.asarray(count), total=total, squares=squares, near_zero=near
    )
    return (out, statistics, jnp.sum(partial, axis=0), *(rest[-1:] if save else ()))


def _narrow_column_sums(s: Static, y: Array) -> Sequence[Array]:
    rows = y.shape[0]
    tiles, parts, span = _column_parts(s, rows)
    return _launch(
        s,
        functools.partial(sums_of.column_sums_kernel, s, rows, span),
        "blend_statistics",
        (tiles, parts),
        s.config.statistics,
        (y,),
        [_struct((parts, 3, s.layout.features))],
    )


def _matrix_forward(s: Static, save: bool, *arrays: Any) -> tuple[Any, ...]:
    y, bank, alpha, beta, kind, owner = arrays
    rows, slots = y.shape[0], alpha.shape[0]
    blocks = s.config.forward
    programs = _programs(blocks, slots, rows)
    most = min(programs, pl.cdiv(rows, blocks.rows))
    columns, span = 0, 0
    seen, kept = [], []
    if s.statistics_rows is None:
        tiles, parts, span = _column_parts(s, rows)
        columns = tiles * parts
        seen = [_struct((parts, 3, s.layout.features))]
    if save:
        kept = [_struct((slots, rows, s.width), y.dtype)]
    elif s.samples:
        # Of living chunks, the last launch does not find any more what they were.
        kept = [_struct((slots, s.sampled(rows)[0], s.width), y.dtype)]
    out, partial, *rest = _launch(
        s,
        functools.partial(matrix.forward_kernel, s, rows, columns, span, save),
        "blend_forward",
        (columns + programs,),
        blocks,
        [*_shared(s, bank, blocks, alpha, beta, kind, owner), y],
        [
            _struct(y.shape, y.dtype),
            _struct((slots, 4 if s.own_statistics else 1, most)),
            *seen,
            *kept,
        ],
        {9: 0},
    )
    kept_step = s.sampled(rows)[1] if save else 1
    look_at = [out, *rest] if s.samples else rest[: len(seen)]
    statistics, means = _finish(
        s, rows, programs, kept_step, alpha, beta, owner, partial, *look_at
    )
    return (out, statistics, means, *(rest[-1:] if save else ()))


def _finish(
    s: Static, rows: int, programs: int, kept_step: int, *arrays: Array
) -> tuple[Statistics, Array]:
    seeds, slots = s.layout.num_seeds, arrays[0].shape[0]
    parts = arrays[4].shape[0] if s.statistics_rows is None else 0
    count, *sums, means = _launch(
        s,
        functools.partial(sums_of.finish_kernel, s, rows, parts, programs, kept_step),
        "blend_finish",
        (slots + seeds,),
        _FINISH_FORWARD,
        arrays,
        [*[_struct((seeds,))] * 4, _struct((slots,))],
    )
    return Statistics(count, *sums), means


def _shared(s: Static, bank: Bank, blocks: Blocks, *arrays: Array) -> Refs:
    w1, w2 = bank.w1, bank.w2
    if not s.config.narrow and s.hidden > blocks.across:
        # Read again for each tile of rows.
        w1, w2 = w1.astype(s.dtype), w2.astype(s.dtype)
    return Refs(w1, bank.b1, w2, bank.b2, bank.scale, *arrays)


def backward_pass(s: Static, *arrays: Any) -> tuple[Array, Bank, Array]:
    """Gradients of y, the bank and alpha."""
    backward = _narrow_backward if s.config.narrow else _matrix_backward
    dy, leaves, d_alpha = backward(s, *arrays)
    bank, alpha = arrays[2], arrays[3]
    leaves = {
        name: leaf.astype(getattr(bank, name).dtype) for name, leaf in leaves.items()
    }
    d_bank = dataclasses.replace(jax.tree.map(jnp.zeros_like, bank), **leaves)
    return dy, d_bank, d_alpha.astype(alpha.dtype)


_LEAVES = ("w1", "b1", "w2", "b2", "scale")


def _narrow_backward(s: Static, *arrays: Any) -> tuple[Array, dict[str, Array], Array]:
    g, saved, bank, alpha, beta, kind, owner = arrays
    rows, slots = g.shape[0], alpha.shape[0]
    blocks = s.config.backward
    tiles = pl.cdiv(slots, blocks.across)
    span = sums_of.span_of(rows, blocks, tiles)
    parts = pl.cdiv(rows, span)
    *partial, gain, dy = _launch(
        s,
        functools.partial(narrow.backward_kernel, s, rows, span),
        "blend_backward",
        (tiles, parts),
        blocks,
        [*_shared(s, bank, blocks, alpha, beta, kind, owner), saved, g],
        [
            *(_struct((parts, *getattr(bank, name).shape)) for name in _LEAVES),
            _struct((parts, 1, slots)),
            _struct(g.shape, g.dtype),
        ],
        {10: 6},
    )
    living = (owner >= 0) & ((alpha != 0) | (beta != 0))
    learning = living & (beta != 0)

    def finish(x: Array) -> Array:
        # What the programs of other slots left there is undefined.
        keep = learning.reshape(slots, *(1,) * (x.ndim - 2))
        return jnp.where(keep, jnp.sum(x, axis=0), 0.0)

    leaves = {name: finish(x) for name, x in zip(_LEAVES, partial, strict=True)}
    return dy, leaves, jnp.where(living, jnp.sum(gain, axis=(0, 1)), 0.0)


def _matrix_backward(s: Static, *arrays: Any) -> tuple[Array, dict[str, Array], Array]:
    g, saved, bank, alpha, beta, kind, owner = arrays
    rows, slots = g.shape[0], alpha.shape[0]
    blocks = s.config.backward
    c, units = s.columns, blocks.across
    many = pl.cdiv(s.hidden, units)
    fused = many == 1
    programs = _programs(blocks, slots * many, rows)
    outputs = [
        _struct((programs, c, units)),
        _struct((programs, units)),
        _struct((programs, units, c)),
        _struct((programs, c)),
        _struct((programs, c)),
        _struct((programs,)),
    ]
    inputs = [*_shared(s, bank, blocks, alpha, beta, kind, owner), saved, g]
    *partial, gain = _launch(
        s,
        functools.partial(matrix.backward_kernel, s, rows, fused),
        "blend_backward",
        (programs,),
        blocks,
        inputs,
        [*outputs, *([_struct(g.shape, g.dtype)] if fused else ())],
        {10: 6} if fused else None,
    )
    if fused:
        partial, (gain, dy) = partial[:5], (partial[5], gain)
    else:
        # The gain passes through, so that g is read before it is overwritten.
        inner = s.config.input
        dy, gain = _launch(
            s,
            functools.partial(matrix.input_kernel, s, rows),
            "blend_input",
            (_programs(inner, slots, rows),),
            inner,
            [*inputs, gain],
            (_struct(g.shape, g.dtype), _struct(gain.shape)),
            {10: 0, 11: 1},
        )
    flat = c * units
    segment = min(matrix.SEGMENT, flat)
    w1, b1, w2, b2, scale, d_alpha = _launch(
        s,
        functools.partial(matrix.finish_kernel, s, rows, programs),
        "blend_gradients",
        (slots * many, flat // segment + 1),
        _FINISH,
        [alpha, beta, owner, *(x.reshape(programs, -1) for x in partial), gain],
        [
            _struct((slots * many, flat)),
            _struct((slots * many, units)),
            _struct((slots * many, flat)),
            _struct((slots, c)),
            _struct((slots, c)),
            _struct((slots,)),
        ],
    )
    w1 = jnp.swapaxes(w1.reshape(slots, many, c, units), 1, 2)
    leaves = {
        "w1": w1.reshape(slots, c, -1)[:, : s.width, : s.hidden],
        "b1": b1.reshape(slots, -1)[:, : s.hidden],
        "w2": w2.reshape(slots, -1, c)[:, : s.hidden, : s.width],
        "b2": b2[:, : s.width],
        "scale": scale[:, : s.width],
    }
    return dy, leaves, d_alpha
