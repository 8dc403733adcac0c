"""Tiles of a slot's chunk and weights, and the correction of a tile."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from esper_jax.kernels.blend.triton.refs import (
    Refs,
    Slot,
    Span,
    biased,
    both,
    f32,
    index_range,
    loop,
    read,
)
from esper_jax.kernels.blend.triton.static import TritonStatic

__all__ = [
    "Blueprint",
    "Tile",
    "View",
    "Weights",
    "dot",
    "every_eighth",
    "sum_across",
]


class Weights(NamedTuple):
    """A slot's blueprint, or as many of its hidden units as fit a tile."""

    w1: Array
    b1: Array
    w2: Array


class Tile(NamedTuple):
    """Where a tile of rows of a slot's chunk is."""

    place: tuple[Any, ...]
    """Index into the activation."""
    saved: tuple[Any, ...]
    """Index into the chunks saved for the backward pass."""
    mask: Array | None
    saved_mask: Array | None


def dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """A product with float32 sums, over the given axis of each factor."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def sum_across(x: Array) -> Array:
    """Partial sums of a tile laid out as products are: columns eight apart.

    Each thread adds what it holds. What threads would exchange in each turn of a loop
    costs more than the sums, so the rest of the sum waits for the loop's end.
    """
    return jnp.sum(x.reshape(x.shape[0], -1, 8), axis=1)


def every_eighth(x: Array) -> Array:
    """Partial sums of a tile laid out as products are: rows eight apart."""
    return jnp.sum(x.reshape(-1, 8, x.shape[1]), axis=0)


@dataclasses.dataclass(frozen=True)
class View:
    """One slot, as a program sees it."""

    s: TritonStatic
    refs: Refs
    slot: Slot
    k: Any
    """Index of the slot."""
    total: int
    """Number of rows of the batch."""

    @property
    def column_mask(self) -> Array | None:
        """Which columns of a tile the widest chunk has."""
        s = self.s
        return None if s.width == s.columns else index_range(s.columns) < s.width

    def tile(self, i: Any, rows: int) -> Tile:
        """The ``i``-th tile of ``rows`` rows."""
        s, slot, total = self.s, self.slot, self.total
        first = i * rows
        inside = None if total % rows == 0 else first + index_range(rows) < total
        shape, fits = (rows, s.columns), self.column_mask
        here = Span(first, rows)
        return Tile(
            (here, Span(slot.start, s.columns)),
            (self.k, here, Span(slot.zero, s.columns)),
            both(inside, self.own_mask, shape),
            both(inside, fits, shape),
        )

    @property
    def own_mask(self) -> Array | None:
        """Which columns of a tile the slot's own chunk has."""
        if self.s.layout.even:
            return self.column_mask
        return index_range(self.s.columns) < self.slot.size

    def bias(self, bias_ref: Any) -> Array:
        """The bias of the slot's chunk."""
        here = Span(self.slot.start, self.s.columns)
        return read(bias_ref, (here,), self.own_mask)

    def weights(self, first: Any, units: int, dtype: Any) -> Weights:
        """Hidden units ``[first, first + units)``; 0 where the slot has none."""
        s, refs, slot, k = self.s, self.refs, self.slot, self.k
        first = slot.zero + first
        hidden = s.of_kind(slot.kind, "hidden")
        exact = isinstance(hidden, int) and hidden > 0 and hidden % units == 0
        unit_mask = None if exact else first + index_range(units) < hidden
        mask = self.column_mask
        across, along = Span(slot.zero, s.columns), Span(first, units)
        w1 = read(
            refs.w1, (k, across, along), both(mask, unit_mask, (s.columns, units))
        )
        w2 = read(
            refs.w2, (k, along, across), both(unit_mask, mask, (units, s.columns))
        )
        bias = s.of_kind(slot.kind, "bias")
        b1 = biased(bias, f32(read(refs.b1, (k, along), unit_mask)))
        return Weights(w1.astype(dtype), b1, w2.astype(dtype))

    def offsets(self) -> tuple[Array, Array]:
        """``b2`` and ``scale`` of the slot; 0 where its blueprint has none."""
        s, slot, mask = self.s, self.slot, self.column_mask
        index = (self.k, Span(slot.zero, s.columns))
        b2 = f32(read(self.refs.b2, index, mask))
        scale = f32(read(self.refs.scale, index, mask))
        return (
            biased(s.of_kind(slot.kind, "bias"), b2),
            biased(s.of_kind(slot.kind, "scale"), scale),
        )


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A slot's parameters, as far as a program holds them."""

    view: View
    units: int
    """Number of hidden units that are computed at once."""
    held: Weights | None
    """All hidden units; None if they are read again for each tile of rows."""
    offsets: tuple[Array, Array]
    halved: bool = False
    """Whether ``w2`` is half of what it should be, for an activation of twice."""

    def correct(self, y: Array, mask: Array | None) -> Array:
        """``r(y)`` of a tile, float32."""
        s, slot = self.view.s, self.view.slot

        def part(j: Any, out: Array) -> Array:
            w = self.held or self.view.weights(j * self.units, self.units, y.dtype)
            before = dot(y, w.w1) + w.b1[None, :]
            if self.halved and s.double:
                h = s.double(before)
            else:
                h = s.activate(slot.kind, before)[0]
            return out + dot(h.astype(y.dtype), w.w2)

        zero = jnp.zeros(y.shape, jnp.float32)
        out = loop(0, pl.cdiv(s.hidden, self.units), part, zero)
        b2, scale = self.offsets
        out = out + b2[None, :]
        if s.uses("scale"):
            out = out + scale[None, :] * f32(y)
        return out if mask is None else jnp.where(mask, out, 0.0)
