"""Parts that write the whole layer, in plain JAX, beside any backend.

The hidden units of all slots stand side by side: one matrix product makes them, and one
writes them, whatever the number of slots. Computes nothing if no such slot lives. To a
backend those slots are dead.

Letters: ``N`` rows, ``F`` features, ``D`` width of what is read, ``K`` slots, ``H``
hidden units of a slot.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from esper_jax.blueprints import ACTIVATIONS, Adapter, Bank, Custom, Dense
from esper_jax.kernels.blend.static import Slots, Static, bound, wide

__all__ = ["Read", "backward", "forward", "of_chunks", "read_of", "split", "tangent"]


class Read(NamedTuple):
    """What the adapters of a layer read."""

    y: Any
    """The layer's output before anything is added to it, (N, F); None if not read."""
    x: Any
    """The layer's input: (N, D), or integer ids (N,); None if not read."""


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
        theirs |= _of_kind(s, index, slots)
    alpha, beta = (jnp.where(theirs, 0.0, c) for c in (slots.alpha, slots.beta))
    slots = dataclasses.replace(slots, alpha=alpha, beta=beta)
    return dataclasses.replace(bank, custom=custom), slots


def read_of(s: Static, y: Array, x: Any) -> Read:
    """What must be kept for the backward pass."""
    reads = {b.reads for _, b in s.adapters}
    whole = "layer" in reads or s.incubation == "bounded"
    return Read(y if whole else None, x if "input" in reads else None)


def forward(
    s: Static, out: Float[Array, "N F"], read: Read, bank: Bank, slots: Slots
) -> tuple[Float[Array, "N F"], Float[Array, " K"]]:
    """The output with the adapters added, and ``mean(r**2)`` of their slots.

    Args:
      s: as `split` returns it.
      out: output of the backend.
      read: what the adapters read.
      bank: parameters of all blueprints.
      slots: all slots.
    """
    each = [_Own.of(s, i, b, bank, slots) for i, b in s.adapters]

    def living() -> tuple[Array, Array]:
        total = jnp.zeros_like(out, wide(out))
        mean = jnp.zeros_like(slots.alpha)
        for own in each:
            hidden = own.hidden(own.reads(read), out.dtype)
            total += own.write(hidden, own.alpha, own.alpha != 0)
            mean += own.squares(hidden).astype(mean.dtype) / _count(out)
        added = (out.astype(total.dtype) + total).astype(out.dtype)
        return jnp.where(_any(each, "counts"), added, out), mean

    def dormant() -> tuple[Array, Array]:
        return out, jnp.zeros_like(slots.alpha)

    return jax.lax.cond(_any(each, "lives"), living, dormant)


def backward(
    s: Static,
    cotangents: tuple[Float[Array, "N F"], Float[Array, "N F"]],
    read: Read,
    bank: Bank,
    slots: Slots,
) -> tuple[Float[Array, "N F"], Any, dict[str, Any], Float[Array, " K"]]:
    """Gradients of ``y``, ``x``, the adapters' parameters by name, and alpha.

    Args:
      s: as `split` returns it.
      cotangents: of the output; and of ``y`` as the backend found it, which is returned
        with the adapters' own added to it, or as it is where none counts.
      read: what the adapters read.
      bank: parameters of all blueprints.
      slots: all slots.
    """
    g, dy = cotangents
    each = [_Own.of(s, i, b, bank, slots) for i, b in s.adapters]
    floating = read.x is not None and jnp.issubdtype(read.x.dtype, jnp.floating)
    none = jax.tree.map(
        jnp.zeros_like, {b.name: bank.custom[b.name] for _, b in s.adapters}
    )

    def living() -> tuple[Array, Any, dict[str, Any], Array]:
        to_y = jnp.zeros_like(dy, wide(g))
        to_x = jnp.zeros_like(read.x, wide(g)) if floating else None
        params, d_alpha = {}, jnp.zeros_like(slots.alpha)
        for own in each:
            back, params[own.kind.name], more = own.gradients(
                s, read, g, bank.custom[own.kind.name]
            )
            d_alpha += more.astype(d_alpha.dtype)
            if own.kind.reads == "layer":
                to_y += back()
            elif to_x is not None:
                to_x += back()
        # Where no slot counts, add nothing at all: -0.0 + 0.0 is another number.
        layer = [own for own in each if own.kind.reads == "layer"]
        added = (dy.astype(to_y.dtype) + to_y).astype(dy.dtype)
        new = jnp.where(_any(layer, "counts"), added, dy) if layer else dy
        return new, None if to_x is None else to_x.astype(read.x.dtype), params, d_alpha

    def dormant() -> tuple[Array, Any, dict[str, Any], Array]:
        to_x = jnp.zeros_like(read.x) if floating else None
        return dy, to_x, none, jnp.zeros_like(slots.alpha)

    return jax.lax.cond(_any(each, "lives"), living, dormant)


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
    each = [_Own.of(s, i, b, bank, slots) for i, b in s.adapters]
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Own:
    """The slots of one adapter; those that hold something else are 0.

    Args:
      kind: the adapter.
      params: by name, in the dtype of the sums, times the scaling; 0 where dead.
      alpha: how much each slot counts.
      beta: how much each slot learns.
    """

    kind: Adapter = dataclasses.field(metadata={"static": True})
    params: dict[str, Array]
    alpha: Float[Array, " K"]
    beta: Float[Array, " K"]

    @classmethod
    def of(cls, s: Static, index: int, kind: Adapter, bank: Bank, slots: Any) -> "_Own":
        """The slots of the blueprint of that index."""
        mine = _of_kind(s, index, slots) & (slots.seed_of_slot >= 0)
        alpha, beta = (jnp.where(mine, c, 0.0) for c in (slots.alpha, slots.beta))
        own = cls(kind, {}, alpha, beta)
        params = own.taken(bank.custom[kind.name], own.lives)
        return dataclasses.replace(own, params=params)

    @property
    def lives(self) -> Bool[Array, " K"]:
        """Which slots count or learn."""
        return (self.alpha != 0) | (self.beta != 0)

    @property
    def counts(self) -> Bool[Array, " K"]:
        """Which slots count in the output."""
        return self.alpha != 0

    def taken(self, params: dict[str, Array], where: Array) -> dict[str, Array]:
        """Parameters, or their tangents, with the scaling; 0 where they are not used.

        A product with 0 would not do: 0 times an infinite weight is NaN.
        """
        taken = {}
        for name, leaf in params.items():
            leaf = leaf.astype(wide(leaf))
            scale = self.kind.scaling if name in ("w2", "b2") else 1.0
            taken[name] = jnp.where(_per_slot(where, leaf), leaf * scale, 0)
        return taken

    def reads(self, read: Read) -> Any:
        """What this adapter reads."""
        return read.y if self.kind.reads == "layer" else read.x

    def before(self, x: Any, dtype: Any) -> Float[Array, "N K H"]:
        """The hidden units before their activation; products of ``dtype``."""
        w1 = self.params["w1"]
        if jnp.issubdtype(x.dtype, jnp.integer):
            rows = jnp.take(w1, x, axis=1, mode="fill", fill_value=0)
            z = jnp.swapaxes(rows, 0, 1)
        else:
            z = _product("nd,kdh->nkh", x.astype(dtype), w1.astype(dtype))
        return z + self.params["b1"] if "b1" in self.params else z

    def hidden(self, x: Any, dtype: Any) -> Float[Array, "N K H"]:
        """The hidden units of each slot, in ``dtype``."""
        return ACTIVATIONS[self.kind.activation](self.before(x, dtype)).astype(dtype)

    def write(self, hidden: Array, weight: Array, where: Array) -> Float[Array, "N F"]:
        """Sum of the slots' corrections, each times its weight, without the others."""
        hidden = jnp.where(where[:, None], hidden, 0)
        w2 = jnp.where(where[:, None, None], self.params["w2"], 0)
        weight = weight.astype(w2.dtype)
        out = _product(
            "nkh,khf->nf", hidden, (weight[:, None, None] * w2).astype(hidden.dtype)
        )
        if "b2" in self.params:
            b2 = jnp.where(where[:, None], self.params["b2"], 0)
            out += weight @ b2
        return out

    def total(self, x: Any, dtype: Any, where: Array) -> Float[Array, "N F"]:
        """Sum of ``alpha r(x)`` over the slots chosen."""
        return self.write(self.hidden(x, dtype), self.alpha, where)

    def moments(self, hidden: Array) -> tuple[Array, Array, Array, Array]:
        """``h^T h``, sum of ``h``, ``W2 W2^T`` and ``W2 b2`` of each slot."""
        w2 = self.params["w2"].astype(hidden.dtype)
        b2 = self.params.get("b2", jnp.zeros_like(self.params["w2"][:, 0]))
        return (
            _product("nkh,nkg->khg", hidden, hidden),
            jnp.sum(hidden.astype(b2.dtype), axis=0),
            _product("khf,kgf->khg", w2, w2),
            jnp.einsum("khf,kf->kh", self.params["w2"], b2),
        )

    def squares(self, hidden: Array) -> Float[Array, " K"]:
        """Sum of ``r(x)**2`` over rows and features; ``r`` itself is never formed."""
        inner, sums, outer, with_bias = self.moments(hidden)
        total = jnp.sum(inner * outer, axis=(1, 2)) + 2 * jnp.sum(
            sums * with_bias, axis=1
        )
        if "b2" in self.params:
            rows = jnp.asarray(hidden.shape[0]).astype(total.dtype)
            total += rows * jnp.sum(self.params["b2"] ** 2, axis=1)
        return jnp.where(self.lives, jnp.maximum(total, 0), 0)

    def gradients(
        self, s: Static, read: Read, g: Array, params: dict[str, Array]
    ) -> tuple[Callable[[], Array], dict[str, Array], Float[Array, " K"]]:
        """Gradient of what is read (when called), of the parameters, and of alpha."""
        x, dtype, p = self.reads(read), g.dtype, self.params
        before = self.before(x, dtype)
        h, slope = jax.vjp(ACTIVATIONS[self.kind.activation], before)
        low = h.astype(dtype)
        back = _product("nf,khf->nkh", g, p["w2"].astype(dtype))
        d = {"w2": _product("nkh,nf->khf", low, g)}
        d_alpha = jnp.sum(h * back, axis=(0, 2))
        if "b2" in p:
            sums = jnp.sum(g.astype(wide(g)), axis=0)
            d["b2"] = jnp.broadcast_to(sums, p["b2"].shape)
            d_alpha += p["b2"] @ sums
        if s.incubation != "task":
            apart = self.alpha == 0
            own, to_hidden = self._of_squares(low, self._pull(s, read, g))
            if s.incubation == "bounded":
                own = {name: leaf + own[name] for name, leaf in d.items()}
                to_hidden = back + to_hidden
            d = {n: jnp.where(_per_slot(apart, v), own[n], v) for n, v in d.items()}
            back = jnp.where(apart[:, None], to_hidden, back)
        (d_before,) = slope(back)
        d["w1"] = self._to_first(x, d_before.astype(dtype), p["w1"])
        if "b1" in p:
            d["b1"] = jnp.sum(d_before, axis=0)

        def to_read() -> Array:
            weighted = jnp.where(self.counts[:, None], d_before, 0).astype(dtype)
            w1 = jnp.where(self.counts[:, None, None], p["w1"], 0)
            w1 = self.alpha.astype(w1.dtype)[:, None, None] * w1
            return _product("nkh,kdh->nd", weighted, w1.astype(dtype))

        learned = {}
        for name, leaf in params.items():
            scale = self.kind.scaling if name in ("w2", "b2") else 1.0
            beta = _per_slot(self.beta.astype(d[name].dtype), d[name])
            grad = jnp.where(beta != 0, d[name] * beta * scale, 0)
            learned[name] = grad.astype(leaf.dtype)
        return to_read, learned, jnp.where(self.lives, d_alpha, 0)

    def _pull(self, s: Static, read: Read, g: Array) -> Any:
        """What the sum of ``r(x)**2`` counts, halved, where alpha is 0."""
        if s.incubation == "bounded":
            return bound(g, read.y, axis=(0, 1))[0, 0]
        return 2.0 / (jnp.asarray(g.shape[0]).astype(wide(g)) * g.shape[1])

    def _of_squares(self, hidden: Array, scale: Any) -> tuple[dict[str, Array], Array]:
        """``scale`` times the gradients of half the sum of ``r(x)**2``.

        Returns:
          Those of the parameters but ``W1`` and ``b1``, and of the hidden units.
        """
        inner, sums, outer, with_bias = self.moments(hidden)
        p, rows = self.params, jnp.asarray(hidden.shape[0]).astype(sums.dtype)
        d = {"w2": jnp.einsum("khg,kgf->khf", inner, p["w2"])}
        if "b2" in p:
            d["w2"] += sums[:, :, None] * p["b2"][:, None, :]
            d["b2"] = jnp.einsum("kh,khf->kf", sums, p["w2"]) + rows * p["b2"]
        own = jnp.einsum("nkh,khg->nkg", hidden.astype(outer.dtype), outer) + with_bias
        return {name: scale * leaf for name, leaf in d.items()}, scale * own

    def _to_first(self, x: Any, d: Float[Array, "N K H"], w1: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.integer):
            return _product("nd,nkh->kdh", x.astype(d.dtype), d)
        rows = jnp.swapaxes(d, 0, 1).astype(w1.dtype)
        return jnp.zeros_like(w1).at[:, x].add(rows, mode="drop")


def _of_kind(s: Static, index: int, slots: Slots) -> Bool[Array, " K"]:
    """Which slots hold the blueprint of that index."""
    return jnp.clip(slots.blueprint, 0, len(s.blueprints) - 1) == index


def _any(each: list[_Own], which: str) -> Bool[Array, ""]:
    return jnp.any(jnp.stack([jnp.any(getattr(own, which)) for own in each]))


def _product(equation: str, a: Array, b: Array) -> Array:
    """An einsum in the dtype of its factors, summed in at least float32."""
    return jnp.einsum(equation, a, b, preferred_element_type=wide(a))


def _count(out: Array) -> Any:
    return jnp.asarray(out.shape[0]).astype(jnp.float32) * out.shape[1]


def _per_slot(x: Array, like: Array) -> Array:
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))
