"""The launches of a forward and of a backward pass over narrow chunks."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array

from esper_jax.blueprints import Bank
from esper_jax.chunks import ChunkLayout
from esper_jax.kernels.blend.static import Slots
from esper_jax.kernels.blend.triton.launch import FIRST, Launch, launch, shared, struct
from esper_jax.kernels.blend.triton.narrow.backward import backward_kernel
from esper_jax.kernels.blend.triton.narrow.forward import forward_kernel
from esper_jax.kernels.blend.triton.static import TritonStatic
from esper_jax.kernels.blend.triton.statistics import (
    column_sums_kernel,
    column_tiles,
    span_of,
)
from esper_jax.lifecycle.signals import Statistics

__all__ = ["backward_pass", "forward_pass"]

_LEAVES = ("w1", "b1", "w2", "b2", "scale")


def forward_pass(
    s: TritonStatic,
    save: bool,
    y: Array,
    bias: Array | None,
    bank: Bank,
    slots: Slots,
) -> tuple[Array, Statistics, Array, Any]:
    """Output, statistics, reconstruction, and the living chunks if ``save``.

    With a bias, the output lacks it, as ``y`` does.
    """
    both = [y] if bias is None else [y, bias]
    rows, count = y.shape[0], slots.alpha.shape[0]
    blocks = s.config.forward
    # These pass through the forward kernel, which does not touch them: so XLA knows
    # that y is read before it is overwritten, and need not copy it.
    column_sums = [_column_sums(s, both)] if s.statistics_rows != 0 else []
    side = pl.cdiv(count, blocks.across)
    span = span_of(rows, blocks, side)
    parts = pl.cdiv(rows, span)
    how = Launch(
        name="blend_forward",
        grid=(side, parts),
        blocks=blocks,
        outputs=[
            struct(y.shape, y.dtype),
            struct((parts, count)),
            *(struct(x.shape) for x in column_sums),
            *([struct((rows, count, s.width), y.dtype)] if save else ()),
        ],
        aliases={FIRST: 0} | ({FIRST + len(both): 2} if column_sums else {}),
    )
    kernel = functools.partial(forward_kernel, s, rows, span, save)
    inputs = [*shared(s, blocks, bank, slots), *both, *column_sums]
    out, partial, *rest = launch(s, kernel, how, inputs)
    statistics = _statistics(s, rows, rest[0] if column_sums else None)
    return out, statistics, jnp.sum(partial, axis=0), rest[-1] if save else None


def _column_sums(s: TritonStatic, y: list[Array]) -> Array:
    """Each program's sums of columns, (parts, 3, F); ``y`` may have its bias apart."""
    cut = column_tiles(s, y[0].shape[0])
    how = Launch(
        name="blend_statistics",
        grid=(cut.tiles, cut.parts),
        blocks=s.config.statistics,
        outputs=[struct((cut.parts, 3, s.layout.features))],
    )
    (sums,) = launch(s, functools.partial(column_sums_kernel, s, cut), how, y)
    return sums


def _statistics(s: TritonStatic, rows: int, column_sums: Array | None) -> Statistics:
    """Statistics of the chunks; 0 without sums of columns."""
    count = np.asarray(s.layout.sizes, np.float32) * s.sampled(rows)[0]
    total = squares = near = jnp.zeros(s.layout.num_seeds, jnp.float32)
    if column_sums is not None:
        total, squares, near = _by_chunk(jnp.sum(column_sums, axis=0), s.layout)
    return Statistics(
        count=jnp.asarray(count), total=total, squares=squares, near_zero=near
    )


def _by_chunk(sums: Array, layout: ChunkLayout) -> Array:
    """Sums of the columns of each chunk: (3, F) to (3, S)."""
    base, wider = divmod(layout.features, layout.num_seeds)
    if wider == 0:
        return jnp.sum(sums.reshape(3, -1, base), axis=-1)
    cut = wider * (base + 1)
    parts = (
        jnp.sum(sums[:, :cut].reshape(3, wider, base + 1), axis=-1),
        jnp.sum(sums[:, cut:].reshape(3, -1, base), axis=-1),
    )
    return jnp.concatenate(parts, axis=-1)


def backward_pass(
    s: TritonStatic,
    g: Array,
    total: Array | None,
    saved: Array,
    bank: Bank,
    slots: Slots,
) -> tuple[Array, Array | None, dict[str, Array], Array]:
    """Gradients of y, of its bias, of each parameter and of alpha."""
    rows, count = g.shape[0], slots.alpha.shape[0]
    blocks = s.config.backward
    tiles = pl.cdiv(count, blocks.across)
    span = span_of(rows, blocks, tiles)
    parts = pl.cdiv(rows, span)
    totals = [] if total is None else [total]
    outputs = [
        *(struct((parts, *getattr(bank, name).shape)) for name in _LEAVES),
        struct((parts, 1, count)),
        *(struct((parts, count, s.width)) for _ in totals),
        # Passes through: so XLA knows that it is taken before g is overwritten.
        *(struct(x.shape, x.dtype) for x in totals),
        struct(g.shape, g.dtype),
    ]
    how = Launch(
        name="blend_backward",
        grid=(tiles, parts),
        blocks=blocks,
        outputs=outputs,
        aliases={FIRST + 1: len(outputs) - 1} | ({FIRST + 2: 7} if totals else {}),
    )
    kernel = functools.partial(backward_kernel, s, rows, span)
    inputs = [*shared(s, blocks, bank, slots), saved, g, *totals]
    *sums, dy = launch(s, kernel, how, inputs)
    living = (slots.seed_of_slot >= 0) & ((slots.alpha != 0) | (slots.beta != 0))
    learning = living & (slots.beta != 0)

    def finish(x: Array) -> Array:
        # What the programs of other slots left here is undefined.
        keep = learning.reshape(count, *(1,) * (x.ndim - 2))
        return jnp.where(keep, jnp.sum(x, axis=0), 0.0)

    leaves = {name: finish(x) for name, x in zip(_LEAVES, sums[:5], strict=True)}
    d_alpha = jnp.where(living, jnp.sum(sums[5], axis=(0, 1)), 0.0)
    d_bias = _add_to_bias(s, slots, sums[7], sums[6]) if totals else None
    return dy, d_bias, leaves, d_alpha


def _add_to_bias(s: TritonStatic, slots: Slots, total: Array, sums: Array) -> Array:
    """Adds the slots' sums, (parts, K, C), to their chunks of the bias's gradient."""
    owner = jnp.where(slots.alpha != 0, slots.seed_of_slot, -1)
    more = s.layout.gather(total, owner).astype(jnp.float32) + jnp.sum(sums, axis=0)
    return s.layout.scatter(total, owner, more.astype(total.dtype))
