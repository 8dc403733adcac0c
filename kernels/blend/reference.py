"""Blend in plain JAX: runs anywhere, and is what faster versions are tested against.

The chunks of the ``K`` slots are gathered, computed as one batch and scattered back, so
that the cost follows the number of slots and not of seeds. If no slot lives, nothing is
computed at all.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from esper_jax.blueprints import (
    ACTIVATIONS,
    Bank,
    Blueprint,
    Custom,
    Dense,
    dense_masks,
)
from esper_jax.chunks import ChunkLayout
from esper_jax.lifecycle.signals import Statistics
from esper_jax.lifecycle.stages import Incubation

__all__ = ["blend", "corrections", "statistics"]

_NEAR_ZERO = 1e-6


def statistics(
    y: Float[Array, "N F"], layout: ChunkLayout, rows: int | None = None
) -> Statistics:
    """Count, sum, sum of squares and near-zero count of each chunk, in float32.

    Over every row, or over at most ``rows``: every ``ceil(N / rows)``-th.
    """
    if rows is not None:
        y = y[:: max(1, -(-y.shape[0] // rows))] if rows else y[:0]
    x = y.astype(jnp.float32)
    columns = (
        jnp.sum(x, axis=0),
        jnp.sum(x * x, axis=0),
        jnp.sum((jnp.abs(x) < _NEAR_ZERO).astype(jnp.float32), axis=0),
    )
    total, squares, near_zero = (jnp.sum(layout.split(c), axis=-1) for c in columns)
    count = jnp.asarray(layout.sizes * float(y.shape[0]), jnp.float32)
    return Statistics(count=count, total=total, squares=squares, near_zero=near_zero)


def corrections(
    bank: Bank,
    blueprint: Int[Array, " K"],
    chunks: Float[Array, "K N C"],
    blueprints: tuple[Blueprint, ...],
    layer: Float[Array, "N F"] | None = None,
) -> Float[Array, "K N C"]:
    """``r(y)`` of each slot on its chunk, float32; differentiable.

    ``layer`` is what the blueprints that read the whole layer see.
    """
    blueprint = jnp.clip(blueprint, 0, len(blueprints) - 1)
    out = jnp.zeros_like(chunks, jnp.float32)
    if any(isinstance(b, Dense) for b in blueprints):
        out = _dense(bank, blueprint, chunks, blueprints)
    for i, b in enumerate(blueprints):
        if isinstance(b, Custom):
            # Computed for every slot, but only those that chose it get its gradients.
            params, x = _gradients_only_where(
                blueprint == i, (bank.custom[b.name], chunks.astype(jnp.float32))
            )
            if b.reads == "layer":
                if layer is None:
                    raise ValueError(
                        f"layer must be given: blueprint {b.name!r} reads all of it"
                    )
                x = layer.astype(jnp.float32)
            axis = None if b.reads == "layer" else 0
            own = jax.vmap(b.apply, in_axes=(0, axis))(params, x)
            if own.shape != chunks.shape:
                raise ValueError(
                    f"blueprint {b.name!r}: apply must return the shape of its chunk, "
                    f"{chunks.shape[1:]}; got {own.shape[1:]}"
                )
            chosen = (blueprint == i)[:, None, None]
            out = jnp.where(chosen, own.astype(jnp.float32), out)
    return out


def _reads_layer(blueprints: tuple[Blueprint, ...]) -> bool:
    return any(isinstance(b, Custom) and b.reads == "layer" for b in blueprints)


def _from_layer(
    y: Array,
    bank: Bank,
    alpha: Array,
    blueprint: Array,
    seed_of_slot: Array,
    g: Array,
    layout: ChunkLayout,
    blueprints: tuple[Blueprint, ...],
) -> tuple[Array, Array]:
    """What comes back to ``y`` through the slots that read the whole layer, float32:
    the sum over them of ``alpha * J(r)^T g``; and whether any of them counts.

    The sum over slots is contracted into one (N, F) array, so alpha has to weight what
    goes in. A slot that does not count goes in as parameters of 0, or an infinite one
    would bring NaN to the host.
    """
    a = _per_slot(alpha.astype(jnp.float32), _chunks(g, seed_of_slot, layout))
    chunks = _chunks(y, seed_of_slot, layout)
    valid = _valid(seed_of_slot, layout)
    reads = [isinstance(b, Custom) and b.reads == "layer" for b in blueprints]
    reader = jnp.asarray(np.array(reads))[jnp.clip(blueprint, 0, len(reads) - 1)]
    counts = reader & (alpha != 0) & (seed_of_slot >= 0)
    bank = _cut(counts, bank)

    def masked(layer: Array) -> Array:
        r = corrections(bank, blueprint, chunks, blueprints, layer)
        return jnp.where(valid & counts[:, None, None], r, 0.0)

    _, pull = jax.vjp(masked, y.astype(jnp.float32))
    g_chunks = _chunks(g, seed_of_slot, layout).astype(jnp.float32)
    return pull(a * g_chunks)[0], jnp.any(counts)


@jax.custom_vjp
def _gradients_only_where(keep: Array, tree: Any) -> Any:
    """``tree`` itself, with gradients of 0 in the slots that are not kept.

    A cotangent of 0 is not enough: 0 times an infinite slope is NaN.
    """
    return tree


def _cut(keep: Array, tree: Any) -> Any:
    return jax.tree.map(lambda g: jnp.where(_per_slot(keep, g), g, 0), tree)


_gradients_only_where.defvjp(
    lambda keep, tree: (tree, keep), lambda keep, g: (None, _cut(keep, g))
)


def _dense(
    bank: Bank,
    blueprint: Int[Array, " K"],
    chunks: Float[Array, "K N C"],
    blueprints: tuple[Blueprint, ...],
) -> Float[Array, "K N C"]:
    """The built-in form, ``W2 act(W1 y + b1) + b2 + scale * y``, for all slots."""
    width = chunks.shape[-1]
    hidden, bias, scale = (
        jnp.asarray(mask)[blueprint] for mask in dense_masks(blueprints, width)
    )

    def used(mask: Array, leaf: Array) -> Array:
        # Parts that a blueprint does not use are 0 and get no gradient.
        return jnp.where(mask, leaf.astype(jnp.float32), 0.0)

    w1 = used(hidden[:, None, :], bank.w1)
    b1 = used(bias[:, None] & hidden, bank.b1)
    w2 = used(hidden[:, :, None], bank.w2)
    b2 = used(bias[:, None], bank.b2)
    slope = used(scale[:, None], bank.scale)

    def matmul(x: Array, w: Array) -> Array:
        return jnp.einsum(
            "kni,kij->knj",
            x,
            w.astype(x.dtype),
            preferred_element_type=jnp.float32,
        )

    before = matmul(chunks, w1) + b1[:, None]
    after = _activate(before, blueprint, blueprints)
    out = matmul(after.astype(chunks.dtype), w2)
    return out + b2[:, None] + slope[:, None] * chunks.astype(jnp.float32)


def _activate(
    x: Float[Array, "K N H"],
    blueprint: Int[Array, " K"],
    blueprints: tuple[Blueprint, ...],
) -> Float[Array, "K N H"]:
    names = [b.activation if isinstance(b, Dense) else "" for b in blueprints]
    # A blueprint without a hidden layer may take any activation: its units are 0.
    wanted = [
        b.activation for b in blueprints if isinstance(b, Dense) and b.expansion > 0
    ]
    distinct = list(dict.fromkeys(wanted)) or ["identity"]
    out = ACTIVATIONS[distinct[0]](x)
    for name in distinct[1:]:
        chosen = jnp.asarray(np.array([n == name for n in names]))[blueprint]
        out = jnp.where(chosen[:, None, None], ACTIVATIONS[name](x), out)
    return out


def _valid(seed_of_slot: Int[Array, " K"], layout: ChunkLayout) -> Array:
    """Which columns of each slot's chunk are features of it: bool (K, 1, C)."""
    return (layout.columns(seed_of_slot) < layout.features)[:, None, :]


def _chunks(y: Array, seed_of_slot: Array, layout: ChunkLayout) -> Array:
    return jnp.swapaxes(layout.gather(y, seed_of_slot), 0, 1)


def _put(y: Array, seed_of_slot: Array, chunks: Array, layout: ChunkLayout) -> Array:
    return layout.scatter(y, seed_of_slot, jnp.swapaxes(chunks, 0, 1))


def _per_slot(x: Array, like: Array) -> Array:
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))


def _elements(seed_of_slot: Array, layout: ChunkLayout, rows: int) -> Array:
    sizes = jnp.asarray(layout.sizes, jnp.float32)[jnp.maximum(seed_of_slot, 0)]
    return sizes * max(rows, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def _blend(
    y: Float[Array, "N F"],
    bank: Bank,
    alpha: Float[Array, " K"],
    beta: Float[Array, " K"],
    blueprint: Int[Array, " K"],
    seed_of_slot: Int[Array, " K"],
    layout: ChunkLayout,
    blueprints: tuple[Blueprint, ...],
    incubation: Incubation,
    statistics_rows: int | None = None,
) -> tuple[Float[Array, "N F"], Statistics, Float[Array, " K"]]:
    """The public `blend` on arguments already checked, with one batch axis."""

    lives = (alpha != 0) | (beta != 0)

    def living() -> tuple[Array, Array]:
        chunks = _chunks(y, seed_of_slot, layout)
        r = corrections(bank, blueprint, chunks, blueprints, y)
        r = jnp.where(_valid(seed_of_slot, layout), r, 0.0)
        a = _per_slot(alpha.astype(jnp.float32), r)
        mixed = (chunks.astype(jnp.float32) + a * r).astype(y.dtype)
        out = _put(y, seed_of_slot, jnp.where(a != 0, mixed, chunks), layout)
        mean = jnp.sum(r * r, axis=(1, 2)) / _elements(seed_of_slot, layout, len(y))
        return out, jnp.where(lives, mean, 0.0)

    def dormant() -> tuple[Array, Array]:
        return y, jnp.zeros_like(alpha, jnp.float32)

    out, reconstruction = jax.lax.cond(jnp.any(lives), living, dormant)
    return out, statistics(y, layout, statistics_rows), reconstruction


def _forward(
    y: Array,
    bank: Bank,
    alpha: Array,
    beta: Array,
    blueprint: Array,
    seed_of_slot: Array,
    layout: ChunkLayout,
    blueprints: tuple[Blueprint, ...],
    incubation: Incubation,
    statistics_rows: int | None,
) -> tuple[Any, Any]:
    arrays = (y, bank, alpha, beta, blueprint, seed_of_slot)
    return _blend(*arrays, layout, blueprints, incubation, statistics_rows), arrays


def _backward(
    layout: ChunkLayout,
    blueprints: tuple[Blueprint, ...],
    incubation: Incubation,
    statistics_rows: int | None,
    saved: Any,
    cotangents: Any,
) -> tuple[Any, ...]:
    y, bank, alpha, beta, blueprint, seed_of_slot = saved
    g = cotangents[0]

    lives = (alpha != 0) | (beta != 0)

    def living() -> tuple[Array, Bank, Array]:
        chunks = _chunks(y, seed_of_slot, layout)
        g_chunks = _chunks(g, seed_of_slot, layout)
        valid = _valid(seed_of_slot, layout)

        def masked(bank: Bank, chunks: Array) -> Array:
            r = corrections(bank, blueprint, chunks, blueprints, y)
            return jnp.where(valid, r, 0.0)

        r, pull = jax.vjp(masked, bank, chunks)
        g32 = g_chunks.astype(jnp.float32)
        a = _per_slot(alpha.astype(jnp.float32), g_chunks)
        pulled = g32
        if incubation == "reconstruction":
            size = _per_slot(_elements(seed_of_slot, layout, len(y)), r)
            pulled = jnp.where(a == 0, 2.0 * r / size, g32)
        # One pass serves both: alpha and beta only scale what it gives.
        d_bank, d_chunks = pull(pulled)
        mixed = (g32 + a * d_chunks.astype(jnp.float32)).astype(g.dtype)
        dy = _put(g, seed_of_slot, jnp.where(a != 0, mixed, g_chunks), layout)
        if _reads_layer(blueprints):
            more, any_counts = _from_layer(
                y, bank, alpha, blueprint, seed_of_slot, g, layout, blueprints
            )
            # Not even a zero is added where none counts: -0.0 + 0.0 is another number.
            added = (dy.astype(jnp.float32) + more).astype(g.dtype)
            dy = jnp.where(any_counts, added, dy)
        d_alpha = jnp.where(lives, jnp.sum(g32 * r, axis=(1, 2)), 0.0)
        learns = jnp.where(seed_of_slot >= 0, beta, 0.0)
        return dy, _scaled(d_bank, learns), d_alpha.astype(alpha.dtype)

    def dormant() -> tuple[Array, Bank, Array]:
        return g, jax.tree.map(jnp.zeros_like, bank), jnp.zeros_like(alpha)

    dy, d_bank, d_alpha = jax.lax.cond(jnp.any(lives), living, dormant)
    return dy, d_bank, d_alpha, jnp.zeros_like(beta), None, None


def _scaled(tree: Bank, factor: Array) -> Bank:
    """Each slot times its factor; 0 where that is 0, whatever the slot holds."""

    def scale(leaf: Array) -> Array:
        f = _per_slot(factor, leaf)
        return jnp.where(f != 0, leaf * f.astype(leaf.dtype), 0)

    return jax.tree.map(scale, tree)


_blend.defvjp(_forward, _backward)

# Without this, each call outside of a jitted function would compile its branches anew.
blend = jax.jit(_blend, static_argnums=(6, 7, 8, 9), inline=True)
