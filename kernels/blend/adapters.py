"""Parts that write the whole layer, beside any backend.

The hidden units of all slots stand side by side: one matrix product makes them, and one
writes them, whatever the number of slots. To a backend those slots are dead.

Where a backend has products for it (`Products`), they do nothing while no such slot
lives. Elsewhere a branch computes the hidden units, and another one adds what is as
large as the layer.

Letters: ``N`` rows, ``F`` features, ``D`` width of what is read, ``K`` slots, ``H``
hidden units of a slot, ``M`` of all slots.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from esper_jax.blueprints import Adapter, Bank, Custom, Dense
from esper_jax.kernels.blend.adapter_slots import AdapterSlots, beside, of_kind
from esper_jax.kernels.blend.backend import Backend, Product
from esper_jax.kernels.blend.static import Read, Slots, Static, wide

__all__ = [
    "backward",
    "forward",
    "of_chunks",
    "read_of",
    "split",
    "tangent",
    "tap",
]


def split(s: Static) -> Static:
    """The same call with the adapters apart; a `Dense` of nothing stands for each."""
    found = tuple((i, b) for i, b in enumerate(s.blueprints) if isinstance(b, Adapter))
    if not found:
        return s
    nothing = Dense(name="noop")
    left = (nothing if isinstance(b, Adapter) else b for b in s.blueprints)
    return dataclasses.replace(s, blueprints=tuple(left), adapters=found)


def of_chunks(s: Static, bank: Bank, slots: Slots) -> tuple[Bank, Slots]:
    """Bank and slots as a backend takes them."""
    if not s.adapters:
        return bank, slots
    names = {b.name for b in s.blueprints if isinstance(b, Custom)}
    custom = {name: tree for name, tree in bank.custom.items() if name in names}
    theirs = jnp.zeros_like(slots.blueprint, bool)
    for index, _ in s.adapters:
        theirs |= of_kind(s, index, slots)
    alpha, beta = (jnp.where(theirs, 0.0, c) for c in (slots.alpha, slots.beta))
    slots = dataclasses.replace(slots, alpha=alpha, beta=beta)
    return dataclasses.replace(bank, custom=custom), slots


def read_of(s: Static, read: Read) -> Read:
    """What must be kept for the backward pass."""
    reads = {b.reads for _, b in s.adapters}
    whole = "layer" in reads or s.incubation == "bounded"
    x = read.x if "input" in reads else None
    # Of the hook it is enough to know that there is one.
    hook = None if read.hook is None else read.hook[:0]
    return Read(read.y if whole else None, x, hook, read.bias if whole else None)


def forward(
    backend: Backend,
    s: Static,
    out: Float[Array, "N F"],
    read: Read,
    bank: Bank,
    slots: Slots,
) -> tuple[Float[Array, "N F"], Float[Array, " K"]]:
    """The output with the adapters added, and ``mean(r**2)`` of their slots.

    Args:
      backend: may add products in place.
      s: as `split` returns it.
      out: output of the backend.
      read: what the adapters read; ``out`` lacks the bias that ``y`` does.
      bank: parameters of all blueprints.
      slots: all slots.
    """
    kernels = _kernels(backend, s, read)
    each = AdapterSlots.all(s, bank, slots, kernels)
    rows, dtype = out.shape[0], out.dtype

    def living() -> tuple[Product, Array]:
        here = read if kernels else read.whole()
        parts, mean = [], jnp.zeros_like(slots.alpha)
        for own in each:
            hidden = own.hidden(own.reads(here), dtype, own.lacks(here))
            parts.append(own.write(hidden, own.alpha, own.counts))
            mean += own.squares(hidden).astype(mean.dtype) / _count(out)
        return beside(parts), mean

    def dormant() -> tuple[Product, Array]:
        return _nothing(each, rows, out.shape[1], dtype), jnp.zeros_like(slots.alpha)

    product, mean = _if_any(each, living, dormant)
    return _added(backend, s, out, product, _any(each, "counts")), mean


def backward(
    backend: Backend,
    s: Static,
    cotangents: tuple[Float[Array, "N F"], Float[Array, "N F"], Array | None],
    read: Read,
    bank: Bank,
    slots: Slots,
) -> tuple[Read, Array | None, dict[str, Any], Float[Array, " K"]]:
    """Gradients of what is read, the bias, the adapters' parameters by name, and alpha.

    Args:
      backend: may add products in place.
      s: as `split` returns it.
      cotangents: of the output; and of ``y`` and its bias as the backend found them,
        which are returned with the adapters' own added to them, or as they are where
        none counts.
      read: what the adapters read.
      bank: parameters of all blueprints.
      slots: all slots.
    """
    g, dy, d_bias = cotangents
    kernels, x = _kernels(backend, s, read), read.x
    each = AdapterSlots.all(s, bank, slots, kernels)
    of_y = [own for own in each if own.kind.reads == "layer"]
    floating = x is not None and jnp.issubdtype(x.dtype, jnp.floating)
    of_x = [own for own in each if floating and own.kind.reads == "input"]
    none = jax.tree.map(
        jnp.zeros_like, {own.kind.name: bank.custom[own.kind.name] for own in each}
    )

    def living() -> tuple[Any, Any, dict[str, Any], Array]:
        here = read if kernels else read.whole()
        backs, params, d_alpha = {}, {}, jnp.zeros_like(slots.alpha)
        for own in each:
            name = own.kind.name
            d_before, params[name], more = own.gradients(s, here, g, bank.custom[name])
            backs[name] = own.back(d_before, g.dtype)
            d_alpha += more.astype(d_alpha.dtype)
        to_y, to_x = (
            beside([backs[own.kind.name] for own in those]) if those else None
            for those in (of_y, of_x)
        )
        return to_y, to_x, params, d_alpha

    def dormant() -> tuple[Any, Any, dict[str, Any], Array]:
        to_y, to_x = (
            _nothing(those, g.shape[0], width, g.dtype) if those else None
            for those, width in ((of_y, g.shape[1]), (of_x, x.shape[1] if of_x else 0))
        )
        return to_y, to_x, none, jnp.zeros_like(slots.alpha)

    to_y, to_x, params, d_alpha = _if_any(each, living, dormant)
    if to_y is not None:
        counts = _any(of_y, "counts")
        dy = _added(backend, s, dy, to_y, counts)
        if d_bias is not None:
            # By the same rule: a sum that XLA fuses with more may be another number.
            row = jnp.sum(to_y.left.astype(to_y.row.dtype), axis=0, keepdims=True)
            more = to_y._replace(left=row, right=to_y.right.astype(row.dtype))
            d_bias = _added(backend, s, d_bias[None, :], more, counts)[0]
    to_read = _to_input(read, to_x, of_x)
    return to_read._replace(y=dy), d_bias, params, d_alpha


def _to_input(read: Read, product: Product | None, of_x: list[AdapterSlots]) -> Read:
    """Gradients of the input and its hook; None for those of ids, and of none."""
    if product is None:
        return Read(None, None)
    if read.hook is not None:
        return Read(None, None, product.left.astype(read.hook.dtype))
    x = read.x
    return Read(
        None,
        jax.lax.cond(
            _any(of_x, "counts"),
            lambda: product.value().astype(x.dtype),
            lambda: jnp.zeros_like(x),
        ),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def tap(
    backend: Backend, s: Static, x: Float[Array, "N D"], bank: Bank, slots: Slots
) -> tuple[Float[Array, "N D"], Float[Array, "N M"]]:
    """The input of a layer for its base layer and its adapters, and their hook.

    The adapters leave the gradient of their hidden units to the hook. Here it is
    multiplied by their weights and added in place to what the base layer left to
    ``x``. An array of the size of ``x`` for the adapters alone would have to be
    written, zeros where no slot counts, and read again.

    Args:
      backend: one that can add products in place.
      s: as `split` returns it and `Backend.prepare`, in the dtype of ``x``.
      x: the input.
      bank: parameters of all blueprints.
      slots: all slots.
    """
    units = sum(b.hidden for _, b in s.adapters if b.reads == "input")
    shape = x.shape[0], units * len(slots.alpha)
    return x, jnp.broadcast_to(jnp.zeros_like(slots.alpha)[0].astype(x.dtype), shape)


def _tap(backend: Backend, s: Static, x: Array, bank: Bank, slots: Slots) -> Any:
    return tap(backend, s, x, bank, slots), (bank, slots)


def _untap(backend: Backend, s: Static, kept: Any, cotangents: Any) -> Any:
    g, to_hook = cotangents
    each = [own for own in AdapterSlots.all(s, *kept) if own.kind.reads == "input"]
    right = jnp.concatenate([own.first(g.dtype) for own in each], axis=1)
    right = right.reshape(-1, g.shape[1])
    product = Product(to_hook, right, jnp.zeros_like(right[0], wide(g)))
    return _added(backend, s, g, product, _any(each, "counts")), None, None


tap.defvjp(_tap, _untap)


def tangent(
    s: Static,
    read: Read,
    bank: Bank,
    slots: Slots,
    dots: tuple[Read, Bank | None, Array | None],
) -> Float[Array, "N F"]:
    """What the adapters add to the tangent of the output; linear in ``dots``.

    Args:
      s: as `split` returns it.
      read: what the adapters read.
      bank: parameters of all blueprints.
      slots: all slots.
      dots: tangents of what is read, of the bank and of alpha; None for those of 0.
    """
    of_read, bank_dot, alpha_dot = dots
    each = [AdapterSlots.of(s, i, b, bank, slots) for i, b in s.adapters]
    dtype = read.y.dtype

    def living() -> Array:
        total = jnp.zeros_like(read.y, wide(read.y))
        for own in each:
            x, x_dot = own.reads(read), own.reads(of_read)
            counts = own.alpha != 0
            if x_dot is not None:
                total += jax.jvp(
                    lambda x, own=own, counts=counts: own.total(x, dtype, counts),
                    (x,),
                    (x_dot,),
                )[1]
            learns = own.beta != 0
            if s.incubation == "reconstruction":
                learns &= counts
            if bank_dot is not None:
                theirs = own.taken(bank_dot.custom[own.kind.name], learns)
                other = dataclasses.replace(own, alpha=own.beta)

                def of_params(
                    p: Any, x: Any = x, o: Any = other, m: Any = learns
                ) -> Array:
                    return dataclasses.replace(o, params=p).total(x, dtype, m)

                total += jax.jvp(of_params, (own.params,), (theirs,))[1]
            if alpha_dot is not None:
                other = dataclasses.replace(own, alpha=alpha_dot)
                total += other.total(x, dtype, own.lives)
        return total.astype(dtype)

    return jax.lax.cond(_any(each, "lives"), living, lambda: jnp.zeros_like(read.y))


def _nothing(each: list[AdapterSlots], rows: int, width: int, dtype: Any) -> Product:
    """A product of the same shapes that adds nothing."""
    zero = jnp.zeros_like(each[0].alpha)[0]  # it varies over devices as they do
    units = sum(own.params["w1"].shape[0] * own.params["w1"].shape[2] for own in each)
    row = jnp.broadcast_to(zero.astype(wide(each[0].params["w1"])), width)
    return Product(
        jnp.broadcast_to(zero.astype(dtype), (rows, units)),
        jnp.broadcast_to(zero.astype(dtype), (units, width)),
        row,
    )


def _added(
    backend: Backend, s: Static, to: Array, product: Product, where: Array
) -> Array:
    """``to`` with a product added, or as it is, bit for bit."""
    if backend.products is not None:
        return backend.products.add(s, to, product, where)

    def added() -> Array:
        return (to.astype(product.row.dtype) + product.value()).astype(to.dtype)

    return jax.lax.cond(where, added, lambda: to)


def _kernels(backend: Backend, s: Static, read: Read) -> Any:
    """Products that do nothing where no slot lives, if these are all there is to do."""
    ids = read.x is not None and jnp.issubdtype(read.x.dtype, jnp.integer)
    if backend.products is None or s.incubation != "task" or ids:
        return None
    return backend.products, s


def _if_any(
    each: list[AdapterSlots], living: Callable[[], Any], dormant: Callable[[], Any]
) -> Any:
    """``living()``, or ``dormant()`` where that would be for nothing."""
    if all(own.kernels is not None for own in each):
        return living()
    return jax.lax.cond(_any(each, "lives"), living, dormant)


def _any(each: list[AdapterSlots], which: str) -> Bool[Array, ""]:
    return jnp.any(jnp.stack([jnp.any(getattr(own, which)) for own in each]))


def _count(out: Array) -> Any:
    return jnp.asarray(out.shape[0]).astype(jnp.float32) * out.shape[1]
