"""How the kernels read and write memory, and find their slots."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from esper_jax.chunks import ChunkLayout
from esper_jax.kernels.blend.static import NEAR_ZERO
from esper_jax.kernels.blend.triton.blocks import power_of_two
from esper_jax.kernels.blend.triton.static import TritonStatic

__all__ = [
    "Found",
    "Order",
    "Refs",
    "Share",
    "Slot",
    "Span",
    "biased",
    "both",
    "chunk",
    "f32",
    "find",
    "index_range",
    "loop",
    "near_zero",
    "order_of",
    "parts_of",
    "plus_bias",
    "read",
    "share_of",
    "slot_at",
    "write",
]


class Slot(NamedTuple):
    """One slot."""

    alpha: Array
    beta: Array
    kind: Array
    """Index of its blueprint."""
    start: Array
    """First feature of its chunk."""
    size: Any
    """Width of its chunk; a Python constant if all chunks have the same."""
    living: Array
    """Whether it has an owner, and alpha or beta is not 0."""
    zero: Array
    """0 as a traced value. A span that may reach over the end of an array starts here:
    Pallas refuses such a span if its start is a Python number."""


class Refs(NamedTuple):
    """The first inputs of every kernel that computes blueprints."""

    w1: Any
    b1: Any
    w2: Any
    b2: Any
    scale: Any
    alpha: Any
    beta: Any
    kind: Any
    owner: Any

    @classmethod
    def split(cls, refs: tuple[Any, ...]) -> "tuple[Refs, tuple[Any, ...]]":
        """These inputs, and the refs of a kernel that follow them."""
        count = len(cls._fields)
        return cls(*refs[:count]), refs[count:]


class Span(NamedTuple):
    """Indices from ``start`` to ``start + size``."""

    start: Any
    size: int


def _index(index: tuple[Any, ...]) -> tuple[Any, ...]:
    """A Pallas index made of numbers, spans and arrays."""

    def convert(i: Any) -> Any:
        if isinstance(i, Span):
            return pl.ds(i.start, i.size)
        return jnp.int32(i) if isinstance(i, int) else i

    return tuple(convert(i) for i in index)


def read(ref: Any, index: tuple[Any, ...], mask: Array | None = None) -> Array:
    """``ref[index]``; 0 where the mask is false."""
    index = _index(index)
    if mask is None:
        return ref[index]
    return plgpu.load(ref.at[index], mask=mask, other=0)


def write(
    ref: Any, index: tuple[Any, ...], value: Array, mask: Array | None = None
) -> None:
    """``ref[index] = value`` where the mask is true."""
    index = _index(index)
    value = value.astype(ref.dtype)
    if mask is None:
        ref[index] = value
    else:
        plgpu.store(ref.at[index], value, mask=mask)


def index_range(size: int) -> Array:
    """``[0, 1, ... size - 1]``."""
    return lax.iota(jnp.int32, size)


def both(rows: Any, columns: Any, shape: tuple[int, ...]) -> Array | None:
    """The mask of a tile, from masks of its rows and columns; None masks nothing."""
    if rows is None and columns is None:
        return None
    if rows is None:
        return jnp.broadcast_to(columns[None, :], shape)
    tall = jnp.broadcast_to(rows[:, None], shape)
    if columns is None:
        return tall
    return tall & jnp.broadcast_to(columns[None, :], shape)


def f32(x: Array) -> Array:
    """``x`` in float32."""
    return x.astype(jnp.float32)


def near_zero(s: TritonStatic, x: Array, squares: Array) -> Array:
    """Which of ``x``, float32, count as near zero; ``squares`` is ``x * x``."""
    if s.dtype == "float32":
        return jnp.abs(x) < NEAR_ZERO
    # One instruction less. The half-precision numbers next to the bound are at least
    # 0.1% away from it, so rounding their squares changes no comparison.
    return squares < NEAR_ZERO**2


def biased(used: Any, x: Array) -> Array:
    """``x`` where the blueprint uses that part, else 0."""
    if isinstance(used, bool):
        return x if used else jnp.zeros_like(x)
    return jnp.where(used, x, 0.0)


def plus_bias(y: Array, bias: Array | None, mask: Array | None) -> Array:
    """A tile of ``y`` plus the bias of its columns, rounded as the sum is elsewhere.

    0 where the mask is false, as what `read` returns.
    """
    if bias is None:
        return y
    z = (f32(y) + f32(bias)[None, :]).astype(y.dtype)
    return z if mask is None else jnp.where(mask, z, jnp.zeros_like(z))


def loop(start: Any, end: Any, body: Callable[[Any, Any], Any], init: Any) -> Any:
    """``body(i, carry)`` for each i; without a loop if tracing knows of one turn."""
    if isinstance(start, int) and isinstance(end, int):
        if end == start + 1:
            return body(start, init)
        start, end = np.int32(start), np.int32(end)
    return lax.fori_loop(start, end, body, init)


def chunk(layout: ChunkLayout, seed: Array) -> tuple[Array, Any]:
    """First feature and width of a seed's chunk.

    The width is a Python constant if all chunks have the same.
    """
    base, wider = divmod(layout.features, layout.num_seeds)
    if layout.even:
        return seed * base, base
    # min and max, because the lowering cannot select between two constants.
    size = base + jnp.minimum(jnp.maximum(wider - seed, 0), 1)
    return seed * base + jnp.minimum(seed, wider), size


def slot_at(s: TritonStatic, refs: Refs, index: Any, zero: Array) -> Slot:
    """The slot at ``index``."""
    owner = read(refs.owner, (index,)).astype(jnp.int32)
    alpha, beta = f32(read(refs.alpha, (index,))), f32(read(refs.beta, (index,)))
    kind = read(refs.kind, (index,)).astype(jnp.int32)
    kind = jnp.minimum(jnp.maximum(kind, 0), len(s.blueprints) - 1)
    living = (owner >= 0) & ((alpha != 0.0) | (beta != 0.0))
    start, size = chunk(s.layout, jnp.maximum(owner, 0))
    return Slot(alpha, beta, kind, start, size, living, zero)


class Order(NamedTuple):
    """All slots, with the living ones numbered."""

    slots: Array
    owner: Array
    living: Array
    learning: Array
    rank: Array
    """Number of living slots up to and including this one."""
    total: Array
    """Number of living slots."""


class Found(NamedTuple):
    """What is read of all slots, before anything is computed from it."""

    slots: Array
    owner: Array
    alpha: Array
    beta: Array
    exists: Array | None
    """Which entries are slots: the others pad the count to a power of two."""


def find(alpha_ref: Any, beta_ref: Any, owner_ref: Any) -> Found:
    """Reads what decides which slots live."""
    count = alpha_ref.shape[0]
    size = power_of_two(count)
    slots = index_range(size)
    exists = None if size == count else slots < count
    where = (Span(pl.program_id(0) * 0, size),)
    owner = read(owner_ref, where, exists).astype(jnp.int32)
    alpha, beta = read(alpha_ref, where, exists), read(beta_ref, where, exists)
    return Found(slots, owner, alpha, beta, exists)


def order_of(found: Found) -> Order:
    """Numbers the living slots."""
    alpha, beta = found.alpha, found.beta
    living = (found.owner >= 0) & ((alpha != 0) | (beta != 0))
    if found.exists is not None:
        living = living & found.exists
    ones = jnp.where(living, 1, 0)
    return Order(
        found.slots,
        found.owner,
        living,
        living & (beta != 0),
        jnp.cumsum(ones),
        jnp.sum(ones),
    )


class Share(NamedTuple):
    """The work of one program: some tiles of the rows of one slot."""

    slot: Array
    works: Array
    """Whether there is any work for it."""
    block: Any
    """Index of its tile of hidden units."""
    last: Array
    """Its last tile, which it does first: what was written last may be in a cache."""
    step: Array
    """Number of tiles from one of its tiles back to the next."""
    turns: Array
    """Number of its tiles."""
    part: Array
    """Its index among the programs that share the slot's rows."""
    program: Array
    """Its index among all programs."""
    zero: Array
    """As in `Slot`."""


def parts_of(order: Order, programs: Any, tiles: Any, blocks: Any) -> Array:
    """Number of programs that share the rows of one slot's tile of hidden units."""
    parts = lax.div(jnp.int32(programs), jnp.maximum(order.total * blocks, 1))
    return jnp.minimum(jnp.maximum(parts, 1), tiles)


def share_of(
    order: Order, me: Any, programs: Any, tiles: Any, blocks: Any = 1
) -> Share:
    """Divides living slots, tiles of hidden units and tiles of rows among programs.

    Each program gets rows of one tile of hidden units of one slot, or nothing. All
    living slots get the same number of programs.

    Args:
      order: the slots.
      me: index of the program.
      programs: number of programs, at least slots times ``blocks``.
      tiles: number of tiles of rows.
      blocks: number of tiles of hidden units.
    """
    parts = parts_of(order, programs, tiles, blocks)
    unit, part = lax.div(me, parts), lax.rem(me, parts)
    rank: Any = unit
    block: Any = 0
    if blocks > 1:
        rank, block = lax.div(unit, blocks), lax.rem(unit, blocks)
    mine = order.living & (order.rank == rank + 1)
    slot = jnp.sum(jnp.where(mine, order.slots, 0))
    return Share(
        slot,
        rank < order.total,
        block,
        tiles - 1 - part,
        parts,
        lax.div(tiles - part + parts - 1, parts),
        part,
        me,
        me * 0,
    )
