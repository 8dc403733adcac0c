"""Slots: which are free, and how they move when the capacity changes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from esper_jax.lifecycle.state import SeedState, check_capacity, init_seeds

__all__ = ["first_set", "move_slots", "resize", "slot_sources"]


def slot_sources(state: SeedState, capacity: int) -> Int[np.ndarray, " capacity"]:
    """For each slot of another capacity, the old slot that it takes over; -1 for none.

    In a larger capacity every slot keeps its place and new ones follow. In a smaller
    one the slots of living seeds move together in their order, and free ones fill the
    rest. Runs on the host: it reads the state.

    Args:
      state: the seeds of one layer.
      capacity: the new number of slots.

    Raises:
      ValueError: if the capacity is no int or out of its range, or if a living seed
        would be lost.
    """
    if state.seed_of_slot.ndim != 1:
        raise ValueError(
            "state must be of one layer, with slots of shape (K,); got "
            f"{state.seed_of_slot.shape}. Index the leading axes first"
        )
    check_capacity(capacity, state.num_seeds)
    owned = np.asarray(state.seed_of_slot) >= 0
    living = int(owned.sum())
    if capacity < living:
        raise ValueError(
            f"capacity must be at least {living}, the number of living seeds in its "
            f"{state.capacity} slots: a smaller one would lose a living seed; got "
            f"{capacity}"
        )
    if capacity >= state.capacity:
        new = np.full(capacity - state.capacity, -1)
        return np.concatenate([np.arange(state.capacity), new])
    return np.concatenate([np.flatnonzero(owned), np.flatnonzero(~owned)])[:capacity]


def move_slots(old: Any, fresh: Any, source: Int[np.ndarray, " N"]) -> Any:
    """Arrays with ``N`` slots on their leading axis, made from arrays with ``K``.

    Where ``fresh`` holds numpy arrays so does the result, and no device takes part.

    Args:
      old: a pytree whose leaves have ``K`` slots.
      fresh: the same pytree with ``N`` slots, for slots that take over none.
      source: as `slot_sources` returns it.
    """
    taken = np.flatnonzero(source >= 0)

    def move(old: Any, fresh: Any) -> Any:
        if isinstance(fresh, np.ndarray):
            new = fresh.copy()
            new[taken] = old[source[taken]]
            return new
        return fresh.at[taken].set(old[source[taken]].astype(fresh.dtype))

    return jax.tree.map(move, old, fresh)


def resize(
    state: SeedState, capacity: int, source: Int[np.ndarray, " capacity"] | None = None
) -> SeedState:
    """The same seeds with another number of slots.

    Bank, optimizer state and probe must follow: see `move_slots`.

    Args:
      state: the seeds of one layer.
      capacity: the new number of slots.
      source: what `slot_sources` returned, if it was called already. With it this
        function can be jitted.

    Raises:
      ValueError: as `slot_sources`.
    """
    if source is None:
        source = slot_sources(state, capacity)
    fresh = init_seeds(state.num_seeds, capacity)
    names = ("seed_of_slot", "reconstruction", "gain", "errors")
    moved = move_slots(
        {name: getattr(state, name) for name in names},
        {name: getattr(fresh, name) for name in names},
        source,
    )
    owner = moved["seed_of_slot"]
    slot = fresh.slot_of_seed.at[jnp.where(owner >= 0, owner, state.num_seeds)].set(
        jnp.arange(capacity, dtype=jnp.int32), mode="drop"
    )
    return dataclasses.replace(state, **moved, slot_of_seed=slot)


def first_set(
    flags: Bool[Array, " N"], count: int
) -> tuple[Int[Array, " count"], Int[Array, ""]]:
    """Indices of the first ``count`` set flags, and how many are set in all.

    The flags are packed into words of 32 and blocks of 32 words. A set flag is found by
    descending to its block, its word and its bit. That reads the flags once; a prefix
    sum over them makes several passes.

    Returns:
      The indices, ``N`` where fewer flags are set, and the number of set flags.
    """
    n = flags.shape[0]
    blocks = -(-n // 1024)
    bit = jnp.arange(32, dtype=jnp.uint32)
    padded = jnp.pad(flags, (0, blocks * 1024 - n)).reshape(blocks, 32, 32)
    words = jnp.sum(
        padded.astype(jnp.uint32) << bit[None, None], axis=-1, dtype=jnp.uint32
    )
    words = jax.lax.optimization_barrier(words)

    def ones(words: Array) -> Array:
        return jax.lax.population_count(words).astype(jnp.int32)

    def descend(ends: Array, rank: Array) -> tuple[Array, Array]:
        """The child that holds the rank-th set flag, given where each child ends."""
        passed = ends <= rank[:, None]
        skipped = jnp.max(jnp.where(passed, ends, 0), axis=-1)
        return jnp.sum(passed, axis=-1, dtype=jnp.int32), rank - skipped

    ends = jnp.cumsum(jnp.sum(ones(words), axis=1))
    rank = jnp.arange(count, dtype=jnp.int32)
    block, left = descend(ends[None], rank)
    row = words[jnp.minimum(block, blocks - 1)]
    upto = bit[:, None] >= bit[None]
    word, left = descend(
        jnp.sum(jnp.where(upto[None], ones(row)[:, None], 0), axis=-1), left
    )
    chosen = jnp.take_along_axis(row, jnp.minimum(word, 31)[:, None], axis=1)
    place, _ = descend(
        ones(chosen & (jnp.uint32(0xFFFFFFFF) >> (31 - bit)[None])), left
    )
    return jnp.where(rank < ends[-1], block * 1024 + word * 32 + place, n), ends[-1]
