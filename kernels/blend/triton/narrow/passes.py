"""The launches of a forward and of a backward pass over groups of narrow chunks."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array

from esper_jax.blueprints import Bank
from esper_jax.chunks import ChunkLayout
from esper_jax.kernels.blend.static import Slots
from esper_jax.kernels.blend.triton.blocks import Blocks
from esper_jax.kernels.blend.triton.launch import FIRST, Launch, launch, shared, struct
from esper_jax.kernels.blend.triton.narrow.backward import VECTORS, backward_kernel
from esper_jax.kernels.blend.triton.narrow.forward import forward_kernel
from esper_jax.kernels.blend.triton.static import TritonStatic
from esper_jax.kernels.blend.triton.statistics import (
    column_sums_kernel,
    column_tiles,
    span_of,
)
from esper_jax.lifecycle.signals import Statistics

__all__ = ["backward_pass", "forward_pass"]

_TURNS = 256
"""Tiles of a program, at most: it remembers which of them are to be done again."""


def _living(slots: Slots) -> Array:
    return (slots.seed_of_slot >= 0) & ((slots.alpha != 0) | (slots.beta != 0))


def _find(s: TritonStatic, slots: Slots) -> list[Array]:
    """The slot of each seed, and the groups in which a slot lives; as kernels take it.

    The number of slots stands where none lives, and -1 after the last living group.
    """
    seeds, count = s.layout.num_seeds, slots.alpha.shape[0]
    owner = jnp.where(_living(slots), slots.seed_of_slot, seeds)
    of_seed = jnp.full(seeds, count, jnp.int32)
    of_seed = of_seed.at[owner].set(jnp.arange(count, dtype=jnp.int32), mode="drop")
    groups = pl.cdiv(seeds, s.config.group)
    padded = jnp.full(groups * s.config.group, count, jnp.int32).at[:seeds].set(of_seed)
    lives = jnp.any((padded < count).reshape(groups, -1), axis=1)
    if groups <= count:
        index = jnp.where(lives, jnp.arange(groups), -1)
    else:
        (index,) = jnp.nonzero(lives, size=count, fill_value=-1)
    return [of_seed, index.astype(jnp.int32)]


def _cut(blocks: Blocks, rows: int, side: int) -> tuple[int, int]:
    """Rows that a program goes over, and the number of programs over all of them."""
    span = min(span_of(rows, blocks, side), _TURNS * blocks.rows)
    return span, int(pl.cdiv(rows, span))


def forward_pass(
    s: TritonStatic,
    save: bool,
    y: Array,
    bias: Array | None,
    bank: Bank,
    slots: Slots,
) -> tuple[Array, Statistics, Array, Any]:
    """Output, statistics, reconstruction; with ``save``, living groups' chunks too.

    With a bias, the output lacks it, as ``y`` does.
    """
    both = [y] if bias is None else [y, bias]
    rows, blocks, found = y.shape[0], s.config.forward, _find(s, slots)
    # These pass through the forward kernel, which does not touch them: so XLA knows
    # that y is read before it is overwritten, and need not copy it.
    sums = [_column_sums(s, both)] if s.statistics_rows != 0 else []
    side = len(found[1])
    span, parts = _cut(blocks, rows, side)
    kept = struct((side, rows, s.group_columns), y.dtype)
    how = Launch(
        name="blend_forward",
        grid=(side, parts),
        blocks=blocks,
        outputs=[
            struct(y.shape, y.dtype),
            struct((parts, s.layout.features)),
            *(struct(x.shape) for x in sums),
            *([kept] if save else ()),
        ],
        aliases={FIRST + 2: 0} | ({FIRST + 2 + len(both): 2} if sums else {}),
    )
    kernel = functools.partial(forward_kernel, s, rows, span, save)
    inputs = [*shared(s, blocks, bank, slots), *found, *both, *sums]
    out, squares, *rest = launch(s, kernel, how, inputs)
    # What the programs of other slots left here is undefined.
    owner = jnp.where(_living(slots), slots.seed_of_slot, -1)
    means = jnp.sum(s.layout.gather(jnp.sum(squares, axis=0), owner), axis=-1)
    sizes = jnp.asarray(s.layout.sizes.astype(np.float32))[jnp.maximum(owner, 0)]
    measured = _statistics(s, rows, rest[0] if sums else None)
    saved = (rest[-1], *found) if save else None
    return out, measured, means / (sizes * rows), saved


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


def _statistics(s: TritonStatic, rows: int, sums: Array | None) -> Statistics:
    """Statistics of the chunks; 0 without sums of columns."""
    count = np.asarray(s.layout.sizes, np.float32) * s.sampled(rows)[0]
    total = squares = near = jnp.zeros(s.layout.num_seeds, jnp.float32)
    if sums is not None:
        total, squares, near = _by_chunk(jnp.sum(sums, axis=0), s.layout)
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
    saved: tuple[Array, Array, Array],
    bank: Bank,
    slots: Slots,
) -> tuple[Array, Array | None, dict[str, Array], Array]:
    """Gradients of y, of its bias, of each parameter and of alpha."""
    rows, count, blocks = g.shape[0], slots.alpha.shape[0], s.config.backward
    kept, *found = saved
    span, parts = _cut(blocks, rows, kept.shape[0])
    totals = [] if total is None else [total]
    vectors = len(VECTORS) if totals else len(VECTORS) - 1
    outputs = [
        *(struct((parts, *getattr(bank, name).shape)) for name in ("w1", "b1", "w2")),
        struct((parts, vectors, s.layout.features)),
        # Passes through: so XLA knows that it is taken before g is overwritten.
        *(struct(x.shape, x.dtype) for x in totals),
        struct(g.shape, g.dtype),
    ]
    how = Launch(
        name="blend_backward",
        grid=(kept.shape[0], parts),
        blocks=blocks,
        outputs=outputs,
        aliases={FIRST + 3: len(outputs) - 1} | ({FIRST + 4: 4} if totals else {}),
    )
    kernel = functools.partial(backward_kernel, s, rows, span)
    inputs = [*shared(s, blocks, bank, slots), *found, kept, g, *totals]
    *sums, dy = launch(s, kernel, how, inputs)
    living = _living(slots)
    learns = living & (slots.beta != 0)

    def of_slots(x: Array, which: Array) -> Array:
        # What the programs of other slots left here is undefined.
        keep = which.reshape(count, *(1,) * (x.ndim - 1))
        return jnp.where(keep, x, 0.0)

    w1, b1, w2 = (of_slots(jnp.sum(x, axis=0), learns) for x in sums[:3])
    if not s.layout.even:
        size = jnp.asarray(s.layout.sizes)[jnp.maximum(slots.seed_of_slot, 0)]
        has = jnp.arange(s.width) < size[:, None]
        w1, w2 = jnp.where(has[:, :, None], w1, 0), jnp.where(has[:, None], w2, 0)
    owner = jnp.where(living, slots.seed_of_slot, -1)
    columns = jnp.moveaxis(s.layout.gather(jnp.sum(sums[3], axis=0), owner), 1, 0)
    b2, scale = (of_slots(x, learns) for x in (columns[:, 0], columns[:, 1]))
    d_bias = None
    if totals:
        d_bias = _add_to_bias(s, slots, sums[4], columns[None, :, 3])
    leaves = {"w1": w1, "b1": b1, "w2": w2, "b2": b2, "scale": scale}
    return dy, d_bias, leaves, jnp.sum(columns[:, 2], axis=-1)


def _add_to_bias(s: TritonStatic, slots: Slots, total: Array, sums: Array) -> Array:
    """Adds the slots' sums, (parts, K, C), to their chunks of the bias's gradient."""
    owner = jnp.where(slots.alpha != 0, slots.seed_of_slot, -1)
    more = s.layout.gather(total, owner).astype(jnp.float32) + jnp.sum(sums, axis=0)
    return s.layout.scatter(total, owner, more.astype(total.dtype))
