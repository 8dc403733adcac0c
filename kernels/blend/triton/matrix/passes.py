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
    biases = [] if bias is None else [bias]
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
    inputs = [*shared(s, blocks, bank, slots), y, *biases]
    out, partial, *rest = launch(s, kernel, how, inputs)
    left = Left(
        rows=rows,
        programs=programs,
        parts=0 if cut is None else cut.parts,
        kept_step=s.sampled(rows)[1] if save else 1,
    )
    look_at = [out, *rest, *biases] if s.samples else rest[: len(seen)]
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
    s: TritonStatic,
    g: Array,
    total: Array | None,
    saved: Array,
    bank: Bank,
    slots: Slots,
) -> tuple[Array, Array | None, dict[str, Array], Array]:
    """Gradients of y, of its bias, of each parameter and of alpha."""
    blocks = s.config.backward
    many = pl.cdiv(s.hidden, blocks.across)
    rows = g.shape[0]
    programs = programs_over(blocks, slots.alpha.shape[0] * many, rows)
    inputs = [*shared(s, blocks, bank, slots), saved, g]
    totals = [] if total is None else [total]
    sums, dy = _programs_sums(s, programs, many == 1, [*inputs, *totals])
    if many > 1:
        dy, *passed = _input(s, slots, [*inputs, sums[5], *sums[7:]])
        sums = [*sums[:5], passed[0], *sums[6:7], *passed[1:]]
    d_bias, leaves, d_alpha = _gradients(s, rows, programs, slots, sums)
    return dy, d_bias, leaves, d_alpha


def _programs_sums(
    s: TritonStatic, programs: int, fused: bool, inputs: list[Array]
) -> tuple[list[Any], Any]:
    """Each program's sums, and dy, or None.

    The sums are of w1, b1, w2, b2, scale and alpha; with a bias, also of what the
    correction adds to its gradient, and the sum of the cotangent. That one passes
    through, so that XLA knows that it is taken before the cotangent is overwritten.
    """
    c, units, g = s.columns, s.config.backward.across, inputs[FIRST + 1]
    totals = inputs[FIRST + 2 :]
    outputs = [
        struct((programs, c, units)),
        struct((programs, units)),
        struct((programs, units, c)),
        struct((programs, c)),
        struct((programs, c)),
        struct((programs,)),
        *(struct((programs, c)) for _ in totals),
        *(struct(x.shape, x.dtype) for x in totals),
    ]
    aliases = {FIRST + 2: 7} if totals else {}
    if fused:
        aliases[FIRST + 1] = len(outputs)
        outputs.append(struct(g.shape, g.dtype))
    how = Launch(
        name="blend_backward",
        grid=(programs,),
        blocks=s.config.backward,
        outputs=outputs,
        aliases=aliases,
    )
    kernel = functools.partial(backward_kernel, s, g.shape[0], fused)
    sums = list(launch(s, kernel, how, inputs))
    return (sums[:-1], sums[-1]) if fused else (sums, None)


def _input(s: TritonStatic, slots: Slots, inputs: list[Array]) -> list[Array]:
    """Gradient of y, and what passes through.

    The inputs after g pass through: sums from the backward kernel, so that XLA knows
    that it reads g before this one overwrites it.
    """
    g, *passed = inputs[FIRST + 1 :]
    blocks, rows = s.config.input, g.shape[0]
    how = Launch(
        name="blend_input",
        grid=(programs_over(blocks, slots.alpha.shape[0], rows),),
        blocks=blocks,
        outputs=[struct(x.shape, x.dtype) for x in (g, *passed)],
        aliases={FIRST + 1 + i: i for i in range(1 + len(passed))},
    )
    return list(launch(s, functools.partial(input_kernel, s, rows), how, inputs))


def _gradients(
    s: TritonStatic, rows: int, programs: int, slots: Slots, sums: list[Array]
) -> tuple[Array | None, dict[str, Array], Array]:
    """Gradients of y's bias, each parameter and alpha, from all programs' sums."""
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
            *(struct(x.shape, x.dtype) for x in sums[7:]),
        ],
        aliases={10: 6} if s.biased else {},
    )
    inputs = [
        slots.alpha,
        slots.beta,
        slots.seed_of_slot,
        *(x.reshape(programs, -1) for x in sums[:5]),
        *sums[5:],
    ]
    kernel = functools.partial(gradients_kernel, s, rows, programs)
    w1, b1, w2, b2, scale, d_alpha, *d_bias = launch(s, kernel, how, inputs)
    w1 = jnp.swapaxes(w1.reshape(count, many, c, units), 1, 2)
    leaves = {
        "w1": w1.reshape(count, c, -1)[:, : s.width, : s.hidden],
        "b1": b1.reshape(count, -1)[:, : s.hidden],
        "w2": w2.reshape(count, -1, c)[:, : s.hidden, : s.width],
        "b2": b2[:, : s.width],
        "scale": scale[:, : s.width],
    }
    return d_bias[0] if d_bias else None, leaves, d_alpha
