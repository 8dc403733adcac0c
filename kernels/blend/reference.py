"""Blend in plain JAX: runs anywhere, and is what faster versions are tested against.

Gathers the chunks of the ``K`` slots, computes them as one batch and scatters them
back: the cost follows the number of slots, not of seeds. Computes nothing if no slot
lives.
"""

from collections.abc import Callable
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
from esper_jax.kernels.blend.backend import Backend
from esper_jax.kernels.blend.static import NEAR_ZERO, Slots, Static, bound, wide
from esper_jax.lifecycle.signals import Statistics

__all__ = ["BACKEND", "corrections", "statistics"]


def statistics(
    y: Float[Array, "N F"], layout: ChunkLayout, rows: int | None = None
) -> Statistics:
    """Count, sum, sum of squares and near-zero count of each chunk, float32.

    Over every row, or over at most ``rows``: every ``ceil(N / rows)``-th.
    """
    if rows is not None:
        y = y[:: max(1, -(-y.shape[0] // rows))] if rows else y[:0]
    x = y.astype(wide(y))
    columns = (
        jnp.sum(x, axis=0),
        jnp.sum(x * x, axis=0),
        jnp.sum((jnp.abs(x) < NEAR_ZERO).astype(x.dtype), axis=0),
    )
    total, squares, near_zero = (
        jnp.sum(layout.split(c), axis=-1).astype(jnp.float32) for c in columns
    )
    count = jnp.asarray(layout.sizes * float(y.shape[0]), jnp.float32)
    return Statistics(count=count, total=total, squares=squares, near_zero=near_zero)


def corrections(
    bank: Bank,
    blueprint: Int[Array, " K"],
    chunks: Float[Array, "K N C"],
    blueprints: tuple[Blueprint, ...],
    layer: Float[Array, "N F"] | None = None,
) -> Float[Array, "K N C"]:
    """``r(y)`` of each slot on its chunk; differentiable.

    Float64 if the chunks are, else float32.

    Args:
      bank: parameters of the blueprints.
      blueprint: index of each slot's blueprint; clipped to the blueprints there are.
      chunks: the chunk of each slot.
      blueprints: what may grow.
      layer: what blueprints that read the whole layer get.
    """
    blueprint = jnp.clip(blueprint, 0, len(blueprints) - 1)
    dtype = wide(chunks)
    out = jnp.zeros_like(chunks, dtype)
    if any(isinstance(b, Dense) for b in blueprints):
        out = _dense(bank, blueprint, chunks, blueprints)
    for i, b in enumerate(blueprints):
        if isinstance(b, Custom):
            # Computed for every slot, but only those that chose it get its gradients.
            params, x = _gradients_only_where(
                blueprint == i, _cast((bank.custom[b.name], chunks), dtype)
            )
            if b.reads == "layer":
                if layer is None:
                    raise ValueError(
                        f"layer must be given: blueprint {b.name!r} reads all of it"
                    )
                x = layer.astype(dtype)
            axis = None if b.reads == "layer" else 0
            own = jax.vmap(b.apply, in_axes=(0, axis))(params, x)
            if own.shape != chunks.shape:
                raise ValueError(
                    f"blueprint {b.name!r}: apply must return the shape of its chunk, "
                    f"{chunks.shape[1:]}; got {own.shape[1:]}"
                )
            chosen = (blueprint == i)[:, None, None]
            out = jnp.where(chosen, own.astype(dtype), out)
    return out


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def _reads_layer(blueprints: tuple[Blueprint, ...]) -> bool:
    return any(isinstance(b, Custom) and b.reads == "layer" for b in blueprints)


def _from_layer(
    s: Static, y: Array, bank: Bank, slots: Slots, g: Array
) -> tuple[Array, Array]:
    """Gradient of ``y`` through the slots that read the whole layer.

    Weights the cotangents with alpha before pulling them back, because one (N, F) array
    holds the sum over slots. Sets the parameters of slots that do not count to 0: an
    infinite one would bring NaN to the host.

    Returns:
      The sum over those slots of ``alpha * J_y(r)^T g``, (N, F), as `corrections` is;
      and whether any of them counts.
    """
    owner, layout = slots.seed_of_slot, s.layout
    masked, counts = _layer_corrections(s, y, bank, slots)
    g_chunks = _chunks(g, owner, layout).astype(wide(g))
    a = _per_slot(slots.alpha.astype(g_chunks.dtype), g_chunks)
    _, pull = jax.vjp(masked, y.astype(g_chunks.dtype))
    return pull(a * g_chunks)[0], jnp.any(counts)


def _layer_corrections(
    s: Static, y: Array, bank: Bank, slots: Slots
) -> tuple[Callable[[Array], Array], Array]:
    """``r`` as a function of the whole layer, and for which slots: bool (K,).

    They read the whole layer and count. ``r`` is 0 for all others.
    """
    owner, layout = slots.seed_of_slot, s.layout
    chunks = _chunks(y, owner, layout)
    valid = _valid(owner, layout)
    reads = [isinstance(b, Custom) and b.reads == "layer" for b in s.blueprints]
    kind = jnp.clip(slots.blueprint, 0, len(reads) - 1)
    counts = jnp.asarray(np.array(reads))[kind] & (slots.alpha != 0) & (owner >= 0)
    bank = _cut(counts, bank)

    def masked(layer: Array) -> Array:
        r = corrections(bank, slots.blueprint, chunks, s.blueprints, layer)
        return jnp.where(valid & counts[:, None, None], r, 0.0)

    return masked, counts


@jax.custom_jvp
def _gradients_only_where(keep: Array, tree: Any) -> Any:
    """``tree`` itself, with gradients of 0 in the slots that are not kept.

    A cotangent of 0 is not enough: 0 times an infinite slope is NaN.
    """
    return tree


def _cut(keep: Array, tree: Any) -> Any:
    return jax.tree.map(lambda g: jnp.where(_per_slot(keep, g), g, 0), tree)


@_gradients_only_where.defjvp
def _tangents_only_where(primals: Any, tangents: Any) -> Any:
    keep, tree = primals
    return tree, _cut(keep, tangents[1])


def _dense(
    bank: Bank,
    blueprint: Int[Array, " K"],
    chunks: Float[Array, "K N C"],
    blueprints: tuple[Blueprint, ...],
) -> Float[Array, "K N C"]:
    """The built-in form, ``W2 act(W1 y + b1) + b2 + scale * y``, for all slots."""
    width, dtype = chunks.shape[-1], wide(chunks)
    hidden, bias, scale = (
        jnp.asarray(mask)[blueprint] for mask in dense_masks(blueprints, width)
    )

    def used(mask: Array, leaf: Array) -> Array:
        # Parts that a blueprint does not use are 0 and get no gradient.
        return jnp.where(mask, leaf.astype(dtype), 0.0)

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
            preferred_element_type=dtype,
        )

    before = matmul(chunks, w1) + b1[:, None]
    after = _activate(before, blueprint, blueprints)
    out = matmul(after.astype(chunks.dtype), w2)
    return out + b2[:, None] + slope[:, None] * chunks.astype(dtype)


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


def _elements(seed_of_slot: Array, layout: ChunkLayout, rows: Any) -> Array:
    sizes = jnp.asarray(layout.sizes, jnp.float32)[jnp.maximum(seed_of_slot, 0)]
    if isinstance(rows, int):
        return sizes * max(rows, 1)
    # A symbolic size, for jax.export: known when the exported function is called.
    return sizes * jnp.maximum(jnp.asarray(rows).astype(jnp.float32), 1.0)


def _lives(slots: Slots) -> Array:
    return (slots.alpha != 0) | (slots.beta != 0)


def _forward(
    s: Static, save: bool, y: Array, bias: Array | None, bank: Bank, slots: Slots
) -> tuple[Array, Statistics, Array, None]:
    layout, owner = s.layout, slots.seed_of_slot
    lives = _lives(slots)

    def living() -> tuple[Array, Array]:
        chunks = _chunks(y, owner, layout)
        r = corrections(bank, slots.blueprint, chunks, s.blueprints, y)
        r = jnp.where(_valid(owner, layout), r, 0.0)
        a = _per_slot(slots.alpha.astype(r.dtype), r)
        mixed = (chunks.astype(r.dtype) + a * r).astype(y.dtype)
        out = _put(y, owner, jnp.where(a != 0, mixed, chunks), layout)
        squares = jnp.sum(r * r, axis=(1, 2)).astype(jnp.float32)
        mean = squares / _elements(owner, layout, y.shape[0])
        return out, jnp.where(lives, mean, 0.0)

    def dormant() -> tuple[Array, Array]:
        return y, jnp.zeros_like(slots.alpha, jnp.float32)

    out, reconstruction = jax.lax.cond(jnp.any(lives), living, dormant)
    return out, statistics(y, layout, s.statistics_rows), reconstruction, None


def _backward(
    s: Static, g: Array, total: Array | None, y: Array, bank: Bank, slots: Slots
) -> tuple[Array, None, Bank, Array]:
    lives = _lives(slots)

    def living() -> tuple[Array, Bank, Array]:
        return _gradients(s, g, y, bank, slots, lives)

    def dormant() -> tuple[Array, Bank, Array]:
        return g, jax.tree.map(jnp.zeros_like, bank), jnp.zeros_like(slots.alpha)

    dy, d_bank, d_alpha = jax.lax.cond(jnp.any(lives), living, dormant)
    return dy, None, d_bank, d_alpha


def _gradients(
    s: Static, g: Array, y: Array, bank: Bank, slots: Slots, lives: Array
) -> tuple[Array, Bank, Array]:
    """`_backward` where a slot lives."""
    layout, owner, alpha = s.layout, slots.seed_of_slot, slots.alpha
    chunks = _chunks(y, owner, layout)
    g_chunks = _chunks(g, owner, layout)
    valid = _valid(owner, layout)

    def masked(bank: Bank, chunks: Array) -> Array:
        r = corrections(bank, slots.blueprint, chunks, s.blueprints, y)
        return jnp.where(valid, r, 0.0)

    r, pull = jax.vjp(masked, bank, chunks)
    g_wide = g_chunks.astype(r.dtype)
    a = _per_slot(alpha.astype(r.dtype), g_chunks)
    pulled = g_wide
    if s.incubation == "reconstruction":
        size = _per_slot(_elements(owner, layout, y.shape[0]).astype(r.dtype), r)
        pulled = jnp.where(a == 0, 2.0 * r / size, g_wide)
    elif s.incubation == "bounded":
        pull_back = bound(g_chunks, chunks, axis=(1, 2)) * r
        pulled = jnp.where(a == 0, g_wide + pull_back, g_wide)
    # One pull gives both gradients: alpha and beta only scale them.
    d_bank, d_chunks = pull(pulled)
    mixed = (g_wide + a * d_chunks.astype(r.dtype)).astype(g.dtype)
    dy = _put(g, owner, jnp.where(a != 0, mixed, g_chunks), layout)
    if _reads_layer(s.blueprints):
        more, any_counts = _from_layer(s, y, bank, slots, g)
        # Where no slot counts, add nothing at all: -0.0 + 0.0 is another number.
        added = (dy.astype(more.dtype) + more).astype(g.dtype)
        dy = jnp.where(any_counts, added, dy)
    d_alpha = jnp.where(lives, jnp.sum(g_wide * r, axis=(1, 2)), 0.0)
    learns = jnp.where(owner >= 0, slots.beta, 0.0)
    return dy, _scaled(d_bank, learns), d_alpha.astype(alpha.dtype)


def _scaled(tree: Bank, factor: Array) -> Bank:
    """Each slot times its factor; 0 where that is 0, whatever the slot holds."""

    def scale(leaf: Array) -> Array:
        f = _per_slot(factor, leaf)
        return jnp.where(f != 0, leaf * f.astype(leaf.dtype), 0)

    return jax.tree.map(scale, tree)


def _tangent(
    s: Static,
    y: Array,
    bank: Bank,
    slots: Slots,
    dots: tuple[Array | None, Bank | None, Array | None],
) -> Array:
    y_dot = jnp.zeros_like(y) if dots[0] is None else dots[0]

    def living() -> Array:
        more = _corrections_dot(s, y, bank, slots, dots)
        # Adds each slot's tangent to its chunk. A scatter could not be transposed.
        place = jax.linear_transpose(
            lambda v: _chunks(v, slots.seed_of_slot, s.layout), y.astype(more.dtype)
        )
        return (y_dot.astype(more.dtype) + place(more)[0]).astype(y.dtype)

    return jax.lax.cond(jnp.any(_lives(slots)), living, lambda: y_dot)


def _corrections_dot(
    s: Static,
    y: Array,
    bank: Bank,
    slots: Slots,
    dots: tuple[Array | None, Bank | None, Array | None],
) -> Float[Array, "K N C"]:
    """Tangent of ``alpha r``, where a slot lives; linear in ``dots``."""
    y_dot, bank_dot, alpha_dot = dots
    owner, layout = slots.seed_of_slot, s.layout
    chunks, valid = _chunks(y, owner, layout), _valid(owner, layout)

    def masked(bank: Bank, chunks: Array) -> Array:
        r = corrections(bank, slots.blueprint, chunks, s.blueprints, y)
        return jnp.where(valid, r, 0.0)

    more = jnp.zeros_like(chunks, wide(chunks))
    a = _per_slot(slots.alpha.astype(more.dtype), more)
    # Each part is cut where it does not count: 0 times an infinite weight is NaN.
    if y_dot is not None:
        weighted = a * _chunks(y_dot, owner, layout).astype(more.dtype)
        weighted = jnp.where(a != 0, weighted, 0.0).astype(y.dtype)
        _, part = jax.jvp(lambda c: masked(bank, c), (chunks,), (weighted,))
        more += jnp.where(a != 0, part, 0.0)
        if _reads_layer(s.blueprints):
            from_layer, counts = _layer_corrections(s, y, bank, slots)
            layer = y.astype(more.dtype), y_dot.astype(more.dtype)
            _, part = jax.jvp(from_layer, layer[:1], layer[1:])
            more += jnp.where(counts[:, None, None], a * part, 0.0)
    if bank_dot is not None:
        learns = jnp.where(owner >= 0, slots.beta, 0.0)
        if s.incubation == "reconstruction":
            learns = jnp.where(slots.alpha != 0, learns, 0.0)
        scaled = _scaled(bank_dot, learns)
        _, part = jax.jvp(lambda b: masked(b, chunks), (bank,), (scaled,))
        more += jnp.where(_per_slot(learns, part) != 0, part, 0.0)
    if alpha_dot is not None:
        part = masked(bank, chunks) * _per_slot(alpha_dot.astype(more.dtype), more)
        more += jnp.where(_per_slot(_lives(slots), part), part, 0.0)
    return more


BACKEND = Backend(
    name="xla",
    preference=0,
    platforms=None,
    refusal=lambda *_: None,
    slow=lambda *_: False,
    forward=_forward,
    backward=_backward,
    differentiable=True,
    tangent=_tangent,
)
"""Plain JAX: takes every call, on every platform."""
