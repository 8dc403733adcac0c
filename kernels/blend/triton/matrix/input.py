"""Kernel of the gradient of y, where one tile does not hold all hidden units."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from esper_jax.kernels.blend.triton.matrix.tiles import View, dot
from esper_jax.kernels.blend.triton.refs import (
    Refs,
    f32,
    find,
    loop,
    order_of,
    read,
    share_of,
    slot_at,
    write,
)
from esper_jax.kernels.blend.triton.static import TritonStatic

__all__ = ["input_kernel"]


def input_kernel(s: TritonStatic, total: int, *all_refs: Any) -> None:
    """Overwrites the cotangent with the gradient of y, a slot's rows at a time.

    Args:
      s: what is fixed while tracing.
      total: rows of the batch.
      all_refs: inputs and outputs.
    """
    refs, (saved_ref, g_ref, *rest) = Refs.split(all_refs)
    dy_ref = rest[len(rest) // 2]  # In between are what passes through, and its copy.
    rows = s.config.input.rows
    order = order_of(find(refs.alpha, refs.beta, refs.owner))
    share = share_of(order, pl.program_id(0), pl.num_programs(0), pl.cdiv(total, rows))

    @pl.when(share.works)
    def _living() -> None:
        slot = slot_at(s, refs, share.slot, share.zero)

        @pl.when(slot.alpha != 0.0)
        def _grafted() -> None:
            view = View(s, refs, slot, share.slot, total)
            _, scale = view.offsets()

            def body(i: Any, carry: Any) -> Any:
                tile = view.tile(share.last - i * share.step, rows)
                y = read(saved_ref, tile.saved, tile.mask)
                g = read(g_ref, tile.place, tile.mask)
                g32 = f32(g)
                dy = _through_hidden(view, y, g)
                dy = g32 + slot.alpha * (dy + scale[None, :] * g32)
                write(dy_ref, tile.place, dy, tile.mask)
                return carry

            loop(share.zero, share.turns, body, share.zero)


def _through_hidden(view: View, y: Array, g: Array) -> Array:
    """What the hidden layer gives back to a tile of y, float32."""
    s, units = view.s, view.s.config.input.across

    def some(j: Any, out: Array) -> Array:
        w = view.weights(j * units, units, y.dtype)
        before = dot(y, w.w1) + w.b1[None, :]
        _, slope = s.activate(view.slot.kind, before)
        d_before = dot(g, w.w2, (1, 1)) * slope
        return out + dot(d_before.astype(y.dtype), w.w1, (1, 1))

    zero = jnp.zeros(y.shape, jnp.float32)
    return loop(0, pl.cdiv(s.hidden, units), some, zero)
