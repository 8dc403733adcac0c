"""Blend, slow and obviously right: a loop over slots, differentiated by JAX alone.

Every backend is tested against it. Nothing else uses it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_jax.blueprints import ACTIVATIONS, Adapter, Bank, Blueprint, Custom
from esper_jax.chunks import ChunkLayout
from esper_jax.kernels.blend.static import Slots, Static
from esper_jax.lifecycle.signals import Statistics

__all__ = ["blend", "correction"]


@functools.partial(jax.jit, static_argnames="blueprint")
def correction(
    params: Bank, y: jax.Array, blueprint: Blueprint, layer: jax.Array | None = None
) -> jax.Array:
    """``r(y) = f(y) - y`` of one slot.

    Args:
      params: of the slot.
      y: its chunk, (N, width), of its true width.
      blueprint: what the slot holds.
      layer: the whole output, (N, F), for a blueprint that reads it; or the layer's
        input, (N, D) or ids (N,).
    """
    if isinstance(blueprint, Adapter):
        return _adapter(params.custom[blueprint.name], layer, blueprint)
    width, widest = y.shape[-1], params.w1.shape[0]
    if isinstance(blueprint, Custom) and blueprint.reads == "layer":
        return blueprint.apply(params.custom[blueprint.name], layer)[:, :width]
    if isinstance(blueprint, Custom):
        padded = jnp.pad(y, ((0, 0), (0, widest - width)))
        return blueprint.apply(params.custom[blueprint.name], padded)[:, :width]
    out = jnp.zeros_like(y)
    hidden = blueprint.hidden(widest)
    if hidden:
        before = y @ params.w1[:width, :hidden]
        if blueprint.bias:
            before = before + params.b1[:hidden]
        after = ACTIVATIONS[blueprint.activation](before)
        out = out + after @ params.w2[:hidden, :width]
    if blueprint.bias:
        out = out + params.b2[:width]
    if blueprint.scale:
        out = out + params.scale[:width] * y
    return out


def _adapter(params: Any, x: Any, blueprint: Adapter) -> jax.Array:
    """``r(x)`` of one slot that writes the whole layer, (N, F)."""
    w1 = params["w1"]
    if jnp.issubdtype(x.dtype, jnp.integer):
        x = jax.nn.one_hot(x, w1.shape[0], dtype=w1.dtype)
    before = x @ w1
    if blueprint.bias:
        before = before + params["b1"]
    out = ACTIVATIONS[blueprint.activation](before) @ params["w2"]
    if blueprint.bias:
        out = out + params["b2"]
    return blueprint.scaling * out


def blend(
    s: Static, y: jax.Array, bank: Bank, slots: Slots, x: Any = None
) -> tuple[jax.Array, Statistics, jax.Array]:
    """`esper_jax.kernels.blend.blend` by definition, for concrete stages and slots.

    Runs in the dtype of its arguments: pass float64 for a sharper truth. The gradient
    of the parameters comes from a term of value 0, ``beta * (f - stop_gradient(f))`` at
    ``stop_gradient(y)``. JAX differentiates all the rest.
    """
    layout, stop = s.layout, jax.lax.stop_gradient
    # Dynamic indices and slices: static ones would compile again for each place.
    of_slot = jax.lax.dynamic_index_in_dim
    flat = y.reshape(-1, layout.features)
    out = flat
    reconstruction = []
    for k, seed in enumerate(np.asarray(slots.seed_of_slot)):
        a, b = (of_slot(x, k, keepdims=False) for x in (slots.alpha, slots.beta))
        living = seed >= 0 and bool((a != 0) | (b != 0))
        if not living:
            reconstruction.append(jnp.zeros((), y.dtype))
            continue
        start, size = int(layout.starts[seed]), int(layout.sizes[seed])
        params = jax.tree.map(lambda x, k=k: of_slot(x, k, keepdims=False), bank)
        kind = s.blueprints[int(np.asarray(slots.blueprint)[k])]
        read = flat
        if isinstance(kind, Adapter):
            start, size = 0, layout.features
            if kind.reads == "input":
                read = x.reshape(len(flat), *x.shape[y.ndim - 1 :])
        chunk = jax.lax.dynamic_slice_in_dim(flat, start, size, axis=1)
        r_frozen = correction(stop(params), chunk, kind, read)
        r_learning = correction(params, stop(chunk), kind, stop(read))
        reconstruction.append(stop(jnp.mean(r_frozen**2)))
        new = jax.lax.dynamic_slice_in_dim(out, start, size, axis=1) + a * r_frozen
        if s.incubation == "reconstruction" and bool(a == 0):
            # Enters the sum over outputs with a cotangent of 1, whatever the loss.
            loss = jnp.mean(r_learning**2)
            new = new + _unit_cotangent(b * (loss - stop(loss)), chunk)
        elif s.incubation == "bounded" and bool(a == 0):
            new = new + b * _leaning(r_learning, stop(chunk))
        else:
            new = new + b * (r_learning - stop(r_learning))
        out = jax.lax.dynamic_update_slice_in_dim(out, new, start, axis=1)
    statistics = _statistics(stop(flat), layout, s.statistics_rows)
    return out.reshape(y.shape), statistics, jnp.stack(reconstruction)


def _statistics(flat: jax.Array, layout: ChunkLayout, rows: int | None) -> Statistics:
    """Statistics of each chunk, over at most ``rows`` rows, a chunk at a time."""
    seen = flat
    if rows is not None:
        step = int(np.ceil(len(flat) / rows)) if rows else 1
        wanted = [i for i in range(len(flat)) if rows and i % step == 0]
        seen = flat[np.asarray(wanted, int)]
    count, total, squares, near_zero = [], [], [], []
    for start, size in zip(layout.starts, layout.sizes, strict=True):
        chunk = jax.lax.dynamic_slice_in_dim(seen, start, int(size), axis=1)
        count.append(chunk.size)
        total.append(jnp.sum(chunk))
        squares.append(jnp.sum(chunk**2))
        near_zero.append(jnp.sum(jnp.abs(chunk) < 1e-6))
    return Statistics(
        count=jnp.asarray(count, flat.dtype),
        total=jnp.stack(total),
        squares=jnp.stack(squares),
        near_zero=jnp.stack(near_zero).astype(flat.dtype),
    )


@jax.custom_vjp
def _leaning(r: jax.Array, y: jax.Array) -> jax.Array:
    """Zeros through which ``g + rms(g) / rms(y) * r`` reaches ``r``."""
    return jnp.zeros_like(r)


def _lean(kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, Any]:
    r, y = kept
    ratio = jnp.sqrt(jnp.mean(g**2)) / jnp.sqrt(jnp.mean(y**2))
    return g + ratio * r, jnp.zeros_like(y)


_leaning.defvjp(lambda r, y: (jnp.zeros_like(r), (r, y)), _lean)


def _unit_cotangent(loss: jax.Array, like: jax.Array) -> jax.Array:
    """Zeros of the shape of ``like`` that give ``loss`` a cotangent of 1."""

    @jax.custom_vjp
    def spread(loss: jax.Array) -> jax.Array:
        return jnp.zeros_like(like) + 0.0 * loss

    spread.defvjp(lambda loss: (spread(loss), None), lambda _, g: (jnp.ones(()),))
    return spread(loss)
