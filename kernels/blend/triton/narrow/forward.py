"""Forward kernel of groups."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from esper_jax.kernels.blend.triton.matrix.tiles import every_eighth
from esper_jax.kernels.blend.triton.narrow.tiles import (
    Group,
    Members,
    both_masks,
    group_of,
    only,
    over_tiles,
)
from esper_jax.kernels.blend.triton.refs import Refs, Span, f32, plus_bias, read, write
from esper_jax.kernels.blend.triton.static import TritonStatic

__all__ = ["forward_kernel"]


def forward_kernel(
    s: TritonStatic, total: int, span: int, save: bool, *all_refs: Any
) -> None:
    """Output, sums of ``r**2`` by column and, with ``save``, the living groups' chunks.

    Args:
      s: what is fixed while tracing.
      total: rows of the batch.
      span: rows that a program goes over.
      save: whether to save the chunks.
      all_refs: inputs and outputs. The sums of columns are among both if statistics are
        taken; the kernel does not touch them.
    """
    refs, (of_seed, groups, *own) = Refs.split(all_refs)
    first = 2 if s.biased else 1
    y, rest = tuple(own[:first]), own[first:]
    outs = rest[1:] if s.statistics_rows != 0 else rest
    saved = outs[-1] if save else None
    program = pl.program_id(0), pl.program_id(1)
    index = groups[program[0]]

    @pl.when(index >= 0)
    def _living() -> None:
        group = group_of(s, refs, of_seed, index, program).with_half()
        squares = _blend(group, total, span, y, (outs[0], saved))
        place = (group.part, Span(group.start, s.group_columns))
        write(outs[1], place, squares, group.exists)


def _blend(
    group: Group, total: int, span: int, y: tuple[Any, ...], to: tuple[Any, Any]
) -> Array:
    """Blends a part of the rows; sums of ``r**2`` by column."""
    s, (y_ref, *biases), (out_ref, saved_ref) = group.s, y, to
    rows, width = s.config.forward.rows, s.group_columns
    bias = (
        read(biases[0], (Span(group.start, width),), group.exists) if biases else None
    )
    alpha = group.columns.alpha
    counts = jnp.broadcast_to((alpha != 0.0)[None, :], (rows, width))
    any_counts = jnp.max(jnp.where(alpha != 0.0, 1, 0)) > 0
    first = group.part * span

    def body(
        i: Any, members: Members, alone: bool, squares: Array
    ) -> tuple[Array, Array]:
        tile = group.tile(first + i * rows, rows, total)
        columns, _ = group.lanes_of(members)
        given = read(y_ref, tile.place, tile.mask)
        y = only(columns, plus_bias(given, bias, tile.mask))
        r = group.correct(y, tile, members)
        more, mask = every_eighth(r * r), tile.mask
        fine = jnp.sum(more) < jnp.inf
        if alone:
            # Other columns are other threads': a turn must not write what a later one
            # reads.
            mask = both_masks(mask, columns, given.shape)
            writes, adds = any_counts, jnp.bool_(True)
        else:
            writes, adds = any_counts & fine, fine
            if saved_ref is not None:
                write(saved_ref, tile.saved, y, mask)

        @pl.when(writes)
        def _write() -> None:
            out = (f32(given) + alpha[None, :] * r).astype(given.dtype)
            write(out_ref, tile.place, jnp.where(counts, out, given), mask)

        return squares + jnp.where(adds, more, 0.0), fine

    zero = jnp.zeros((8, width), jnp.float32)
    squares = over_tiles(group, span // rows, body, zero)
    return jnp.sum(squares, axis=0)
