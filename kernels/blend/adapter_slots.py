"""The slots that one adapter has in a layer, and what they compute.

Letters: ``N`` rows, ``F`` features, ``D`` width of what is read, ``K`` slots, ``H``
hidden units of a slot, ``M`` of all slots.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from esper_jax.blueprints import ACTIVATIONS, Adapter, Bank
from esper_jax.kernels.blend.backend import Product, Products
from esper_jax.kernels.blend.static import Read, Slots, Static, bound, wide

__all__ = ["AdapterSlots", "Part", "beside", "of_kind"]


class Part(NamedTuple):
    """What one adapter has of a `Product`; its factors keep an axis of slots."""

    left: Float[Array, "N K H"]
    right: Float[Array, "K H F"]
    row: Float[Array, " F"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdapterSlots:
    """The slots of one adapter; those that hold something else are 0.

    Args:
      kind: the adapter.
      params: by name, in the dtype of the sums, times the scaling; 0 where dead.
      alpha: how much each slot counts.
      beta: how much each slot learns.
      kernels: `Products` and what they take first; None for plain JAX. Where no slot
        lives, what comes of them may be anything, and is not used.
    """

    kind: Adapter = dataclasses.field(metadata={"static": True})
    params: dict[str, Array]
    alpha: Float[Array, " K"]
    beta: Float[Array, " K"]
    kernels: tuple[Products, Any] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )

    @classmethod
    def all(
        cls, s: Static, bank: Bank, slots: Any, kernels: Any = None
    ) -> "list[AdapterSlots]":
        """The slots of each adapter."""
        each = [cls.of(s, index, kind, bank, slots) for index, kind in s.adapters]
        return [dataclasses.replace(own, kernels=kernels) for own in each]

    @classmethod
    def of(
        cls, s: Static, index: int, kind: Adapter, bank: Bank, slots: Any
    ) -> "AdapterSlots":
        """The slots of the blueprint of that index."""
        mine = of_kind(s, index, slots) & (slots.seed_of_slot >= 0)
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

    def lacks(self, read: Read) -> Any:
        """A bias that what it reads lacks, (D,); None for none."""
        return read.bias if self.kind.reads == "layer" else None

    def before(self, x: Any, dtype: Any, bias: Any = None) -> Float[Array, "N K H"]:
        """The hidden units before their activation; products of ``dtype``.

        Args:
          x: what is read.
          dtype: of the layer.
          bias: that ``x`` lacks, (D,), or None.
        """
        w1 = self.params["w1"]
        if jnp.issubdtype(x.dtype, jnp.integer):
            rows = jnp.take(w1, x, axis=1, mode="fill", fill_value=0)
            z = jnp.swapaxes(rows, 0, 1)
        else:
            z = self._into(x.astype(dtype), w1.astype(dtype))
        if bias is not None:
            z += jnp.einsum("d,kdh->kh", bias.astype(w1.dtype), w1)
        return z + self.params["b1"][None] if "b1" in self.params else z

    def hidden(self, x: Any, dtype: Any, bias: Any = None) -> Float[Array, "N K H"]:
        """The hidden units of each slot, in ``dtype``."""
        before = self.before(x, dtype, bias)
        return ACTIVATIONS[self.kind.activation](before).astype(dtype)

    def write(self, hidden: Array, weight: Array, where: Array) -> Part:
        """The slots' corrections, each times its weight, without the others."""
        hidden = jnp.where(where[:, None], hidden, 0)
        w2 = jnp.where(where[:, None, None], self.params["w2"], 0)
        weight = weight.astype(w2.dtype)
        right = (weight[:, None, None] * w2).astype(hidden.dtype)
        row = jnp.zeros_like(w2[0, 0])
        if "b2" in self.params:
            row = weight @ jnp.where(where[:, None], self.params["b2"], 0)
        return Part(hidden, right, row)

    def total(self, x: Any, dtype: Any, where: Array) -> Float[Array, "N F"]:
        """Sum of ``alpha r(x)`` over the slots chosen."""
        return beside([self.write(self.hidden(x, dtype), self.alpha, where)]).value()

    def first(self, dtype: Any) -> Float[Array, "K H D"]:
        """``alpha W1`` of each hidden unit; 0 where a slot does not count."""
        w1 = jnp.where(self.counts[:, None, None], self.params["w1"], 0)
        w1 = self.alpha.astype(w1.dtype)[:, None, None] * w1
        return jnp.swapaxes(w1, 1, 2).astype(dtype)

    def back(self, d_before: Float[Array, "N K H"], dtype: Any) -> Part:
        """Gradient of what is read, from that of what enters the activation."""
        left = jnp.where(self.counts[:, None], d_before, 0).astype(dtype)
        right = self.first(dtype)
        return Part(left, right, jnp.zeros_like(right[0, 0], wide(right)))

    def moments(self, hidden: Array) -> tuple[Array, Array, Array, Array]:
        """``h^T h``, sum of ``h``, ``W2 W2^T`` and ``W2 b2`` of each slot."""
        w2 = self.params["w2"].astype(hidden.dtype)
        b2 = self.params.get("b2", jnp.zeros_like(self.params["w2"][:, 0]))
        return (
            *self._of_hidden(hidden),
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
    ) -> tuple[Float[Array, "N K H"], dict[str, Array], Float[Array, " K"]]:
        """Gradient of what enters the activation, of the parameters, and of alpha."""
        x, dtype, p = self.reads(read), g.dtype, self.params
        bias = self.lacks(read)
        before = self.before(x, dtype, bias)
        h, slope = jax.vjp(ACTIVATIONS[self.kind.activation], before)
        low = h.astype(dtype)
        back = self._into(g, jnp.swapaxes(p["w2"], 1, 2).astype(dtype))
        product, sums = self._over_rows(low, g)
        d = {"w2": product}
        d_alpha = jnp.sum(h * back, axis=(0, 2))
        if "b2" in p:
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
        total = jnp.sum(d_before, axis=0)
        if bias is not None:
            d["w1"] += bias.astype(total.dtype)[:, None] * total[:, None, :]
        if "b1" in p:
            d["b1"] = total

        learned = {}
        for name, leaf in params.items():
            scale = self.kind.scaling if name in ("w2", "b2") else 1.0
            beta = _per_slot(self.beta.astype(d[name].dtype), d[name])
            grad = jnp.where(beta != 0, d[name] * beta * scale, 0)
            learned[name] = grad.astype(leaf.dtype)
        return d_before, learned, jnp.where(self.lives, d_alpha, 0)

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
        own = jnp.einsum("nkh,khg->nkg", hidden.astype(outer.dtype), outer)
        own += with_bias[None]
        return {name: scale * leaf for name, leaf in d.items()}, scale * own

    def _to_first(self, x: Any, d: Float[Array, "N K H"], w1: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.integer):
            product, _ = self._over_rows(d, x.astype(d.dtype))
            return jnp.swapaxes(product, 1, 2)
        rows = jnp.swapaxes(d, 0, 1).astype(w1.dtype)
        return jnp.zeros_like(w1).at[:, x].add(rows, mode="drop")

    def _into(
        self, x: Float[Array, "N D"], w: Float[Array, "K D H"]
    ) -> Float[Array, "N K H"]:
        """The product with each slot's weights."""
        if self.kernels is None:
            return _product("nd,kdh->nkh", x, w)
        products, s = self.kernels
        flat = jnp.moveaxis(w, 0, 1).reshape(w.shape[1], -1)
        out = products.rows(s, x, flat, jnp.any(self.lives))
        return out.reshape(len(x), w.shape[0], w.shape[2])

    def _over_rows(
        self, hidden: Float[Array, "N K H"], x: Float[Array, "N D"]
    ) -> tuple[Float[Array, "K H D"], Float[Array, " D"]]:
        """The product of each slot's hidden units with ``x``; and the sum of ``x``."""
        if self.kernels is None:
            total = jnp.sum(x.astype(wide(x)), axis=0)
            return _product("nkh,nd->khd", hidden, x), total
        products, s = self.kernels
        flat = hidden.reshape(len(x), -1)
        product, total = products.sums(s, flat, x, jnp.any(self.lives))
        return product.reshape(*hidden.shape[1:], x.shape[1]), total

    def _of_hidden(
        self, hidden: Float[Array, "N K H"]
    ) -> tuple[Float[Array, "K H H"], Float[Array, "K H"]]:
        """``h^T h`` of each slot, and the sum of ``h``."""
        if self.kernels is None:
            total = jnp.sum(hidden.astype(wide(hidden)), axis=0)
            return _product("nkh,nkg->khg", hidden, hidden), total
        product, total = self._over_rows(hidden, hidden.reshape(len(hidden), -1))
        slots, units = hidden.shape[1:]
        each = jnp.arange(slots)
        product = product.reshape(slots, units, slots, units)[each, :, each]
        return product, total.reshape(slots, units)


def of_kind(s: Static, index: int, slots: Slots) -> Bool[Array, " K"]:
    """Which slots hold the blueprint of that index."""
    return jnp.clip(slots.blueprint, 0, len(s.blueprints) - 1) == index


def beside(parts: list[Part]) -> Product:
    """The sum of the parts as one product, all hidden units side by side.

    Slot by slot, so that further slots come last and change no bits.
    """
    left = jnp.concatenate([part.left for part in parts], axis=2)
    right = jnp.concatenate([part.right for part in parts], axis=1)
    row = functools.reduce(jnp.add, (part.row for part in parts))
    rows, width = left.shape[0], right.shape[2]
    return Product(left.reshape(rows, -1), right.reshape(-1, width), row)


def _product(equation: str, a: Array, b: Array) -> Array:
    """An einsum in the dtype of its factors, summed in at least float32."""
    return jnp.einsum(equation, a, b, preferred_element_type=wide(a))


def _per_slot(x: Array, like: Array) -> Array:
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))
