"""`SeedState`: everything that is remembered about the seeds of one layer.

Letters: ``S`` seeds (chunks of the layer), ``K`` slots of its bank.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Shaped, UInt

from esper_jax.lifecycle.grafting import GraftMemory
from esper_jax.lifecycle.history import History, unpack_history
from esper_jax.lifecycle.signals import Statistics
from esper_jax.lifecycle.stages import Stage

__all__ = [
    "MAX_BLUEPRINTS",
    "SeedState",
    "check_capacity",
    "coefficients",
    "init_seeds",
    "record",
    "saturating_add",
    "slot_coefficients",
    "start_tick",
    "transitions",
]

MAX_BLUEPRINTS = 127
"""Most blueprints that a layer can have. Their ids are 0 to 126."""


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
    """Index into the layer's blueprints, int8. Only meaningful while the seed lives."""
    strategy: Int[Array, "*S"]
    """`Strategy` code, int8."""
    epochs_in_stage: UInt[Array, "*S"]
    """Ticks since the last transition, uint16, saturating at 65535."""
    error_count: UInt[Array, "*S"]
    """Steps with gradients that were not finite since germination, uint8, saturating
    at 255."""
    history: History
    """The last ten transitions."""
    slot_of_seed: Int[Array, "*S"]
    """The bank slot that the seed owns, or -1."""
    graft: GraftMemory
    health: Float[Array, "*S"]
    """Score of the chunk at the last tick, in [0, 1]; NaN before the first."""
    worth: Float[Array, "*S"]
    """Mean worth over the ticks in this stage that measured it, in units of the
    held-out loss; NaN before the first."""
    worth_ticks: UInt[Array, "*S"]
    """How many ticks ``worth`` is the mean of, uint8, saturating at 255. Beyond that it
    is a running mean."""
    statistics: Statistics
    seed_of_slot: Int[Array, "*K"]
    """The seed that owns each slot, or -1."""
    reconstruction: Float[Array, "*K"]
    """``mean((f(y) - y)**2)`` of each slot, summed over the tick's steps."""
    gain: Float[Array, "*K"]
    """Gradient of the loss with respect to alpha, summed over the tick's steps. Its
    negative is the first-order gain of grafting the slot."""
    errors: UInt[Array, "*K"]
    """Steps of this tick in which the slot's gradients were not finite, uint16."""
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


@jax.debug_nans(False)  # NaN is what was not measured
def init_seeds(num_seeds: int, capacity: int, strategy: int = 0) -> SeedState:
    """All seeds dormant, all slots free.

    Args:
      num_seeds: number of seeds, ``S``.
      capacity: number of slots, ``K``, from 1 to ``num_seeds``.
      strategy: `Strategy` code that each seed starts with.

    Raises:
      ValueError: if the capacity is no int or out of its range.
    """
    check_capacity(capacity, num_seeds)

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


def check_capacity(capacity: int, num_seeds: int) -> None:
    """Refuses a capacity that is no int or not from 1 to ``num_seeds``.

    Raises:
      ValueError: naming what was expected and what came.
    """
    whole = isinstance(capacity, int | np.integer) and not isinstance(capacity, bool)
    if not whole or not 1 <= capacity <= num_seeds:
        raise ValueError(
            f"capacity must be an int, from 1 to num_seeds ({num_seeds}): it is the "
            f"number of seeds that can live at once; got {capacity!r}"
        )


def coefficients(
    state: SeedState,
) -> tuple[Float[Array, "*S"], Float[Array, "*S"]]:
    """What the stages mean to the forward and backward pass.

    Returns:
      ``(alpha, beta)``, float32: how much each seed's blueprint counts in the output
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
    """``total + more``, capped at the largest value of the dtype of ``total``.

    Args:
      total: an array of an unsigned dtype.
      more: what to add, at least 0, of any dtype. A fraction is dropped.
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


def transitions(state: SeedState, seed: int) -> list[tuple[Stage, Stage]]:
    """The last transitions of one seed as ``(source, target)``, newest first."""
    entries = unpack_history(jax.tree.map(lambda word: word[seed], state.history))
    return [(Stage(int(e) >> 4), Stage(int(e) & 15)) for e in entries if e]
