"""The launches of a forward and of a backward pass over chunks as matrices."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from esper_jax.blueprints import Bank
from esper_jax.kernels.blend.static import Slots
from esper_jax.kernels.blend.triton.blocks import Blocks
from esper_jax.kernels.blend.triton.finish import Left, finish_kernel
from esper_jax.kernels.blend.triton.launch import (
    FIRST,
    Launch,
    launch,
    programs_over,
    shared,
    struct,
)
from esper_jax.kernels.blend.triton.matrix.backward import backward_kernel
from esper_jax.kernels.blend.triton.matrix.forward import forward_kernel
from esper_jax.kernels.blend.triton.matrix.gradients import SEGMENT, gradients_kernel
from esper_jax.kernels.blend.triton.matrix.input import input_kernel
from esper_jax.kernels.blend.triton.static import TritonStatic
from esper_jax.kernels.blend.triton.statistics import column_tiles
from esper_jax.lifecycle.signals import Statistics

__all__ = ["backward_pass", "forward_pass"]

_GRADIENTS = Blocks(rows=1, across=16, programs=1, warps=4, stages=1)
_FINISH = Blocks(rows=1, across=16, programs=1, warps=8, stages=1)


def forward_pass(
    s: TritonStatic, save: bool, y: Array, bank: Bank, slots: Slots
) -> tuple[Array, Statistics, Array, Any]:
    """Output, statistics, reconstruction, and the living chunks if ``save``."""
    rows, count = y.shape[0], slots.alpha.shape[0]
    blocks = s.config.forward
    programs = programs_over(blocks, count, rows)
    most = min(programs, pl.cdiv(rows, blocks.rows))
    cut = column_tiles(s, rows) if s.statistics_rows is None else None
    columns, seen, kept = 0, [], []
    if cut is not None:
        columns = cut.tiles * cut.parts
        seen = [struct((cut.parts, 3, s.layout.features))]
    if save:
        kept = [struct((count, rows, s.width), y.dtype)]
    elif s.samples:
        # The output no longer holds living chunks as they were.
        kept = [struct((count, s.sampled(rows)[0], s.width), y.dtype)]
    how = Launch(
        name="blend_forward",
        grid=(columns + programs,),
        blocks=blocks,
        outputs=[
            struct(y.shape, y.dtype),
            struct((count, 4 if s.own_statistics else 1, most)),
            *seen,
            *kept,
        ],
        aliases={FIRST: 0},
    )
    kernel = functools.partial(forward_kernel, s, rows, cut, save)
    inputs = [*shared(s, blocks, bank, slots), y]
    out, partial, *rest = launch(s, kernel, how, inputs)
    left = Left(
        rows=rows,
        programs=programs,
        parts=0 if cut is None else cut.parts,
        kept_step=s.sampled(rows)[1] if save else 1,
    )
    look_at = [out, *rest] if s.samples else rest[: len(seen)]
    statistics, means = _finish(s, left, slots, partial, look_at)
    return out, statistics, means, rest[-1] if save else None


def _finish(
    s: TritonStatic, left: Left, slots: Slots, partial: Array, seen: Sequence[Array]
) -> tuple[Statistics, Array]:
    """Statistics and reconstruction from what the forward kernel left."""
    seeds, count = s.layout.num_seeds, slots.alpha.shape[0]
    how = Launch(
        name="blend_finish",
        grid=(count + seeds,),
        blocks=_FINISH,
        outputs=[*[struct((seeds,))] * 4, struct((count,))],
    )
    kernel = functools.partial(finish_kernel, s, left)
    inputs = [slots.alpha, slots.beta, slots.seed_of_slot, partial, *seen]
    counts, *sums, means = launch(s, kernel, how, inputs)
    return Statistics(counts, *sums), means


def backward_pass(
    s: TritonStatic, g: Array, saved: Array, bank: Bank, slots: Slots
) -> tuple[Array, dict[str, Array], Array]:
    """Gradients of y, of each parameter and of alpha."""
    blocks = s.config.backward
    many = pl.cdiv(s.hidden, blocks.across)
    rows = g.shape[0]
    programs = programs_over(blocks, slots.alpha.shape[0] * many, rows)
    inputs = [*shared(s, blocks, bank, slots), saved, g]
    *partial, gain, dy = _programs_sums(s, programs, many == 1, inputs)
    if many > 1:
        dy, gain = _input(s, slots, [*inputs, gain])
    leaves, d_alpha = _gradients(s, rows, programs, slots, [*partial, gain])
    return dy, leaves, d_alpha


def _programs_sums(
    s: TritonStatic, programs: int, fused: bool, inputs: list[Array]
) -> list[Any]:
    """Each program's sums of w1, b1, w2, b2, scale and alpha; and dy, or None."""
    c, units, g = s.columns, s.config.backward.across, inputs[-1]
    outputs = [
        struct((programs, c, units)),
        struct((programs, units)),
        struct((programs, units, c)),
        struct((programs, c)),
        struct((programs, c)),
        struct((programs,)),
    ]
    how = Launch(
        name="blend_backward",
        grid=(programs,),
        blocks=s.config.backward,
        outputs=[*outputs, *([struct(g.shape, g.dtype)] if fused else ())],
        aliases={FIRST + 1: 6} if fused else {},
    )
    kernel = functools.partial(backward_kernel, s, g.shape[0], fused)
    sums = list(launch(s, kernel, how, inputs))
    return sums if fused else [*sums, None]


def _input(s: TritonStatic, slots: Slots, inputs: list[Array]) -> tuple[Array, Array]:
    """Gradient of y, and the gain.

    The gain passes through, so that XLA knows that the backward kernel reads g before
    this one overwrites it.
    """
    g, gain = inputs[-2:]
    blocks, rows = s.config.input, g.shape[0]
    how = Launch(
        name="blend_input",
        grid=(programs_over(blocks, slots.alpha.shape[0], rows),),
        blocks=blocks,
        outputs=[struct(g.shape, g.dtype), struct(gain.shape)],
        aliases={FIRST + 1: 0, FIRST + 2: 1},
    )
    dy, gain = launch(s, functools.partial(input_kernel, s, rows), how, inputs)
    return dy, gain


def _gradients(
    s: TritonStatic, rows: int, programs: int, slots: Slots, sums: list[Array]
) -> tuple[dict[str, Array], Array]:
    """Gradients of each parameter and of alpha, from all programs' sums."""
    c, units, count = s.columns, s.config.backward.across, slots.alpha.shape[0]
    many = pl.cdiv(s.hidden, units)
    flat = c * units
    how = Launch(
        name="blend_gradients",
        grid=(count * many, flat // min(SEGMENT, flat) + 1),
        blocks=_GRADIENTS,
        outputs=[
            struct((count * many, flat)),
            struct((count * many, units)),
            struct((count * many, flat)),
            struct((count, c)),
            struct((count, c)),
            struct((count,)),
        ],
    )
    *partial, gain = sums
    inputs = [
        slots.alpha,
        slots.beta,
        slots.seed_of_slot,
        *(x.reshape(programs, -1) for x in partial),
        gain,
    ]
    kernel = functools.partial(gradients_kernel, s, rows, programs)
    w1, b1, w2, b2, scale, d_alpha = launch(s, kernel, how, inputs)
    w1 = jnp.swapaxes(w1.reshape(count, many, c, units), 1, 2)
    leaves = {
        "w1": w1.reshape(count, c, -1)[:, : s.width, : s.hidden],
        "b1": b1.reshape(count, -1)[:, : s.hidden],
        "w2": w2.reshape(count, -1, c)[:, : s.hidden, : s.width],
        "b2": b2[:, : s.width],
        "scale": scale[:, : s.width],
    }
    return leaves, d_alpha
