"""`SeedState`: everything that is remembered about the seeds of one layer.

Letters: ``S`` seeds (chunks of the layer), ``K`` slots of its bank.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Shaped, UInt

from esper_jax.grafting import GraftMemory
from esper_jax.signals import Statistics
from esper_jax.stages import Stage

__all__ = [
    "HISTORY",
    "History",
    "SeedState",
    "coefficients",
    "init_seeds",
    "move_slots",
    "pack_history",
    "push_history",
    "record",
    "resize",
    "saturating_add",
    "slot_coefficients",
    "slot_sources",
    "start_tick",
    "transitions",
    "unpack_history",
]

HISTORY = 10
"""Number of past transitions that a seed remembers."""


@struct.dataclass
class History:
    """The last ten transitions of each seed, one byte each, the newest in the lowest.

    An entry is ``source << 4 | target``; 0 is none (DORMANT to DORMANT is no
    transition). Shifting words is several times faster than shifting a (S, 10) array.
    """

    newest: UInt[Array, "*S"]
    """Entries 0 to 3, uint32."""
    middle: UInt[Array, "*S"]
    """Entries 4 to 7, uint32."""
    oldest: UInt[Array, "*S"]
    """Entries 8 and 9, uint16."""


@struct.dataclass
class SeedState:
    """The seeds of one layer, struct-of-arrays.

    All changes are pure functions ``state -> state``. Under `jax.vmap` every field
    gets a further leading axis.
    """

    stage: Int[Array, "*S"]
    """`Stage` code, int8."""
    parent_stage: Int[Array, "*S"]
    """The stage before this one, int8."""
    blueprint: Int[Array, "*S"]
    """Index into the layer's blueprints, int8. Has a meaning while the seed lives."""
    strategy: Int[Array, "*S"]
    """`Strategy` code, int8."""
    epochs_in_stage: UInt[Array, "*S"]
    """Ticks since the last transition, uint16, saturating at 65535."""
    error_count: UInt[Array, "*S"]
    """Steps with gradients that were not finite since germination, uint8, saturating
    at 255."""
    history: History
    """Last ten transitions, as `push_history` and `unpack_history` know them."""
    slot_of_seed: Int[Array, "*S"]
    """The bank slot that the seed owns, or -1."""
    graft: GraftMemory
    health: Float[Array, "*S"]
    """Score of the chunk at the last tick, in [0, 1]; NaN before the first."""
    worth: Float[Array, "*S"]
    """Mean worth over the ticks in this stage, in units of the held-out loss; NaN where
    none was measured."""
    worth_ticks: UInt[Array, "*S"]
    """How many ticks that is the mean of, uint8, saturating at 255: of more, the mean
    is a running one."""
    statistics: Statistics
    seed_of_slot: Int[Array, "*K"]
    """The seed that owns each slot, or -1."""
    reconstruction: Float[Array, "*K"]
    """Sum over the tick's steps of ``mean((f(y) - y)**2)`` of each slot."""
    gain: Float[Array, "*K"]
    """Sum over the tick's steps of the loss's gradient with respect to alpha; its
    negative is the first-order gain of grafting the slot."""
    errors: UInt[Array, "*K"]
    """Steps of this tick whose gradients in the slot were not finite, uint16."""
    steps: Int[Array, "*"]
    """Steps since the last tick."""

    @property
    def num_seeds(self) -> int:
        """``S``."""
        return self.stage.shape[-1]

    @property
    def capacity(self) -> int:
        """``K``."""
        return self.seed_of_slot.shape[-1]


def init_seeds(num_seeds: int, capacity: int, strategy: int = 0) -> SeedState:
    """All seeds dormant, all slots free.

    Args:
      num_seeds: number of seeds, ``S``.
      capacity: number of slots, ``K``, from 1 to ``num_seeds``.
      strategy: `Strategy` code that each seed starts with.

    Raises:
      ValueError: if the capacity is not an int or out of its range.
    """
    _check_capacity(capacity, num_seeds)

    def full(n: int, value: float, dtype: jnp.dtype | type) -> Array:
        return jnp.asarray(np.full((n,), value, dtype))  # nothing to compile

    s, k = num_seeds, capacity
    return SeedState(
        stage=full(s, Stage.DORMANT, jnp.int8),
        parent_stage=full(s, Stage.DORMANT, jnp.int8),
        blueprint=full(s, 0, jnp.int8),
        strategy=full(s, strategy, jnp.int8),
        epochs_in_stage=full(s, 0, jnp.uint16),
        error_count=full(s, 0, jnp.uint8),
        history=History(
            newest=full(s, 0, jnp.uint32),
            middle=full(s, 0, jnp.uint32),
            oldest=full(s, 0, jnp.uint16),
        ),
        slot_of_seed=full(s, -1, jnp.int32),
        graft=GraftMemory(
            alpha=full(s, 0, jnp.float32),
            velocity=full(s, 0, jnp.float32),
            stable_alpha=full(s, 0, jnp.float32),
            previous_loss=full(s, jnp.nan, jnp.float32),
            pause=full(s, 0, jnp.uint16),
            unstable_checks=full(s, 0, jnp.uint8),
        ),
        health=full(s, jnp.nan, jnp.float32),
        worth=full(s, jnp.nan, jnp.float32),
        worth_ticks=full(s, 0, jnp.uint8),
        statistics=Statistics(
            **{f.name: full(s, 0, jnp.float32) for f in dataclasses.fields(Statistics)}
        ),
        seed_of_slot=full(k, -1, jnp.int32),
        reconstruction=full(k, 0, jnp.float32),
        gain=full(k, 0, jnp.float32),
        errors=full(k, 0, jnp.uint16),
        steps=jnp.asarray(np.int32(0)),
    )


def _check_capacity(capacity: int, num_seeds: int) -> None:
    whole = isinstance(capacity, int | np.integer) and not isinstance(capacity, bool)
    if not whole or not 1 <= capacity <= num_seeds:
        raise ValueError(
            f"capacity must be an int, from 1 to num_seeds ({num_seeds}): it is the "
            f"number of seeds that can live at once; got {capacity!r}"
        )


def slot_sources(state: SeedState, capacity: int) -> Int[np.ndarray, " capacity"]:
    """The old slot that each slot takes over when the capacity changes, -1 for none.

    In a larger capacity every slot keeps its place and the new ones follow. In a
    smaller one the slots of living seeds are moved together, in their order, and free
    ones fill up the rest. Runs on the host: it reads the state.

    Raises:
      ValueError: if the capacity is not an int or out of its range, or a living seed
        would be lost.
    """
    if state.seed_of_slot.ndim != 1:
        raise ValueError(
            "state must be of one layer, with slots of shape (K,); got "
            f"{state.seed_of_slot.shape}. Index the leading axes first"
        )
    _check_capacity(capacity, state.num_seeds)
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
    """Arrays with ``N`` slots on their leading axis, made from those with ``K``.

    Where ``fresh`` is of numpy the result is, too, and no device takes part.

    Args:
      old: a pytree, each leaf with ``K`` slots.
      fresh: the same with ``N`` slots, for those that take over none.
      source: as `slot_sources` gives it.
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

    Bank, optimizer state and probe have to follow: `move_slots`.

    Args:
      state: of one layer.
      capacity: the new number of slots.
      source: what `slot_sources` gives, where it was asked already; with it this can be
        jitted.

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


def coefficients(
    state: SeedState,
) -> tuple[Float[Array, "*S"], Float[Array, "*S"]]:
    """What the stages mean to the forward and the backward pass.

    Returns:
      ``(alpha, beta)``, float32: how much each seed's blueprint counts in the output,
      and how much it learns. TRAINING is ``0, 1``; GRAFTING the ramp's alpha and 1;
      STABILIZATION, EVALUATING and FOSSILIZED ``1, 0``; FINE_TUNING ``1, 1``; every
      other stage ``0, 0``.
    """
    stage = state.stage
    grafted = (stage >= Stage.STABILIZATION) & (stage <= Stage.FOSSILIZED)
    alpha = jnp.where(
        stage == Stage.GRAFTING, state.graft.alpha, grafted.astype(jnp.float32)
    )
    learns = (
        (stage == Stage.TRAINING)
        | (stage == Stage.GRAFTING)
        | (stage == Stage.FINE_TUNING)
    )
    return alpha, learns.astype(jnp.float32)


def slot_coefficients(
    state: SeedState,
) -> tuple[Float[Array, " K"], Float[Array, " K"], Int[Array, " K"]]:
    """`coefficients` by slot: ``(alpha, beta, blueprint)``, all 0 where free."""
    alpha, beta = coefficients(state)
    owner = jnp.maximum(state.seed_of_slot, 0)
    owned = state.seed_of_slot >= 0
    return (
        jnp.where(owned, alpha[owner], 0.0),
        jnp.where(owned, beta[owner], 0.0),
        jnp.where(owned, state.blueprint[owner].astype(jnp.int32), 0),
    )


def saturating_add(
    total: UInt[Array, "*N"], more: Shaped[Array, "*#N"] | int
) -> UInt[Array, "*N"]:
    """``total + more``, at most what the dtype of ``total`` can hold; never wraps.

    Args:
      total: of an unsigned dtype.
      more: what to add, at least 0, of any dtype; a fraction is dropped.
    """
    more = jnp.asarray(more)
    if more.dtype == bool:
        more = more.astype(total.dtype)
    room = (jnp.iinfo(total.dtype).max - total).astype(more.dtype)
    return total + jnp.minimum(more, room).astype(total.dtype)


def record(
    state: SeedState,
    statistics: Statistics,
    reconstruction: Float[Array, " K"],
) -> SeedState:
    """Adds one forward pass's statistics to the tick's sums."""
    return dataclasses.replace(
        state,
        statistics=jax.tree.map(jnp.add, state.statistics, statistics),
        reconstruction=state.reconstruction + reconstruction,
        steps=state.steps + 1,
    )


def start_tick(state: SeedState) -> SeedState:
    """Clears the tick's sums."""
    zero = jnp.zeros_like
    return dataclasses.replace(
        state,
        statistics=jax.tree.map(zero, state.statistics),
        reconstruction=zero(state.reconstruction),
        gain=zero(state.gain),
        errors=zero(state.errors),
        steps=zero(state.steps),
    )


def push_history(history: History, entry: UInt[Array, "*S"]) -> History:
    """``history`` with a new entry, uint8[S], and without its oldest."""
    return History(
        newest=history.newest << 8 | entry.astype(jnp.uint32),
        middle=history.middle << 8 | history.newest >> 24,
        oldest=history.oldest << 8 | (history.middle >> 24).astype(jnp.uint16),
    )


def pack_history(entries: UInt[np.ndarray, "*S 10"]) -> History:
    """Words from entries, newest first, on the host."""
    shifts = (8 * np.arange(HISTORY) % 32).astype(np.uint32)
    shifted = np.asarray(entries, np.uint32) << shifts
    newest, middle, oldest = (
        np.bitwise_or.reduce(shifted[..., i : i + 4], axis=-1) for i in (0, 4, 8)
    )
    return History(newest=newest, middle=middle, oldest=oldest.astype(np.uint16))


def unpack_history(history: History) -> UInt[np.ndarray, "*S 10"]:
    """Entries from words, newest first, uint8, on the host."""
    words = (history.newest, history.middle, history.oldest)
    entries = [np.asarray(words[i // 4]) >> 8 * (i % 4) & 0xFF for i in range(HISTORY)]
    return np.stack(entries, axis=-1).astype(np.uint8)


def transitions(state: SeedState, seed: int) -> list[tuple[Stage, Stage]]:
    """The last transitions of one seed as ``(source, target)``, newest first."""
    entries = unpack_history(jax.tree.map(lambda word: word[seed], state.history))
    return [(Stage(int(e) >> 4), Stage(int(e) & 15)) for e in entries if e]
