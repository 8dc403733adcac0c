"""How the kernels are launched, and what all launches share."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from esper_jax.blueprints import Bank
from esper_jax.kernels.blend.static import Slots
from esper_jax.kernels.blend.triton.blocks import Blocks
from esper_jax.kernels.blend.triton.refs import Refs
from esper_jax.kernels.blend.triton.static import TritonStatic

__all__ = ["FIRST", "Launch", "launch", "programs_over", "shared", "struct"]

FIRST = len(Refs._fields)
"""Index of the first input after those that `shared` gives."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of a kernel.

    Args:
      name: what profilers show.
      grid: number of programs along each axis.
      blocks: warps and stages of a program.
      outputs: shapes and dtypes of the outputs.
      aliases: index of an input to the index of the output that overwrites it.
    """

    name: str
    grid: tuple[int, ...]
    blocks: Blocks
    outputs: Sequence[jax.ShapeDtypeStruct]
    aliases: dict[int, int] = dataclasses.field(default_factory=dict)


def launch(
    s: TritonStatic, kernel: Callable[..., None], how: Launch, inputs: Sequence[Array]
) -> Any:
    """Runs ``kernel(*input_refs, *output_refs)`` in every program of the grid."""

    def named(*refs: Any) -> None:
        kernel(*refs)

    named.__name__ = how.name
    # Under `shard_map` the outputs differ from device to device as the inputs do.
    axes = max(
        (jax.typeof(x).manual_axis_type for x in inputs), key=lambda t: len(t.varying)
    )
    return pl.pallas_call(
        named,
        out_shape=[
            jax.ShapeDtypeStruct(o.shape, o.dtype, manual_axis_type=axes)
            for o in how.outputs
        ],
        grid=how.grid,
        input_output_aliases=how.aliases,
        compiler_params=plgpu.CompilerParams(
            num_warps=how.blocks.warps, num_stages=how.blocks.stages
        ),
        interpret=s.interpret,
        name=how.name,
    )(*inputs)


def struct(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """An output, float32 unless said otherwise."""
    return jax.ShapeDtypeStruct(shape, dtype)


def programs_over(blocks: Blocks, units: int, rows: int) -> int:
    """Number of programs that share the work.

    Args:
      blocks: how the kernel cuts its work.
      units: number of slots, or of tiles of their hidden units.
      rows: rows of the batch.
    """
    return max(units, min(blocks.programs, units * pl.cdiv(rows, blocks.rows)))


def shared(s: TritonStatic, blocks: Blocks, bank: Bank, slots: Slots) -> Refs:
    """The inputs that all kernels of blueprints begin with."""
    w1, w2 = bank.w1, bank.w2
    if not s.config.narrow and s.hidden > blocks.across:
        # The kernel reads these again for each tile of rows.
        w1, w2 = w1.astype(s.dtype), w2.astype(s.dtype)
    return Refs(
        w1=w1,
        b1=bank.b1,
        w2=w2,
        b2=bank.b2,
        scale=bank.scale,
        alpha=slots.alpha,
        beta=slots.beta,
        kind=slots.blueprint,
        owner=slots.seed_of_slot,
    )
