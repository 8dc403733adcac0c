"""Blend, slow and obviously right: a loop over slots, differentiated by JAX alone.

What every implementation is tested against. Nothing else uses it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from esper_jax.blueprints import ACTIVATIONS, Bank, Blueprint, Custom
from esper_jax.chunks import ChunkLayout
from esper_jax.signals import Statistics
from esper_jax.stages import Incubation

__all__ = ["blend", "correction"]


def correction(params: Bank, y: jax.Array, blueprint: Blueprint) -> jax.Array:
    """``r(y) = f(y) - y`` of one slot on one chunk (N, width), of its true width."""
    width = y.shape[-1]
    if isinstance(blueprint, Custom):
        return blueprint.apply(params.custom[blueprint.name], y)
    out = jnp.zeros_like(y)
    hidden = blueprint.hidden(params.w1.shape[0])
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


def blend(
    y: jax.Array,
    bank: Bank,
    alpha: jax.Array,
    beta: jax.Array,
    blueprint: jax.Array,
    seed_of_slot: jax.Array,
    layout: ChunkLayout,
    blueprints: tuple[Blueprint, ...],
    incubation: Incubation = "task",
    statistics_rows: int | None = None,
) -> tuple[jax.Array, Statistics, jax.Array]:
    """`esper_jax.kernels.blend.blend` by definition, for concrete stages and slots.

    Runs in the dtype of its arguments: give it float64 for a sharper truth. The
    parameters' gradient comes from a term of value 0, ``beta * (f - stop_gradient(f))``
    at ``stop_gradient(y)``; all else is autodiff.
    """
    stop = jax.lax.stop_gradient
    flat = y.reshape(-1, layout.features)
    out = flat
    reconstruction = []
    for k, seed in enumerate(np.asarray(seed_of_slot)):
        living = seed >= 0 and bool((alpha[k] != 0) | (beta[k] != 0))
        if not living:
            reconstruction.append(jnp.zeros((), y.dtype))
            continue
        columns = slice(
            int(layout.starts[seed]), int(layout.starts[seed] + layout.sizes[seed])
        )
        params = jax.tree.map(lambda leaf, k=k: leaf[k], bank)
        kind = blueprints[int(blueprint[k])]
        chunk = flat[:, columns]
        r_frozen = correction(stop(params), chunk, kind)
        r_learning = correction(params, stop(chunk), kind)
        reconstruction.append(stop(jnp.mean(r_frozen**2)))
        new = chunk + alpha[k] * r_frozen
        if incubation == "reconstruction" and bool(alpha[k] == 0):
            # Enters the sum over outputs in such a way that its cotangent is 1.
            loss = jnp.mean(r_learning**2)
            new = new + _unit_cotangent(beta[k] * (loss - stop(loss)), chunk)
        else:
            new = new + beta[k] * (r_learning - stop(r_learning))
        out = out.at[:, columns].set(new)
    count, total, squares, near_zero = [], [], [], []
    seen = flat
    if statistics_rows is not None:
        rows = min(statistics_rows, len(flat))
        step = len(flat) // max(rows, 1)
        seen = flat[np.arange(rows) * step]
    for start, size in zip(layout.starts, layout.sizes, strict=True):
        chunk = stop(seen[:, start : start + size])
        count.append(chunk.size)
        total.append(jnp.sum(chunk))
        squares.append(jnp.sum(chunk**2))
        near_zero.append(jnp.sum(jnp.abs(chunk) < 1e-6))
    statistics = Statistics(
        count=jnp.asarray(count, y.dtype),
        total=jnp.stack(total),
        squares=jnp.stack(squares),
        near_zero=jnp.stack(near_zero).astype(y.dtype),
    )
    return out.reshape(y.shape), statistics, jnp.stack(reconstruction)


def _unit_cotangent(loss: jax.Array, like: jax.Array) -> jax.Array:
    """Zeros of the shape of ``like`` through which ``loss`` gets a cotangent of 1."""

    @jax.custom_vjp
    def spread(loss: jax.Array) -> jax.Array:
        return jnp.zeros_like(like) + 0.0 * loss

    spread.defvjp(lambda loss: (spread(loss), None), lambda _, g: (jnp.ones(()),))
    return spread(loss)
