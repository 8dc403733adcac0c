"""How seeds age and change their stage, and who owns which slot.

`transition` is the only function that changes a stage. It is pure, branches on no value
and loops over no seeds, so it can be jitted, donated and vmapped.
"""

import dataclasses
import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt

from esper_jax.lifecycle import grafting
from esper_jax.lifecycle.commands import Commands
from esper_jax.lifecycle.grafting import Strategy
from esper_jax.lifecycle.history import push_history
from esper_jax.lifecycle.rules import (
    LEGAL_PAIRS,
    LifecycleConfig,
    gates_pass,
    minimum_epochs,
)
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.slots import first_set
from esper_jax.lifecycle.stages import NO_REQUEST, NUM_STAGES, Outcome, Stage
from esper_jax.lifecycle.state import SeedState, saturating_add

__all__ = ["age", "released", "step", "transition"]


class _Verdict(NamedTuple):
    """What the rules say of each seed's request, before slots are considered."""

    outcome: Int[Array, " S"]
    """`Outcome`, int8."""
    target: UInt[Array, " S"]
    """The stage that was requested, uint8; 0 where none was."""
    entry: UInt[Array, " S"]
    """Source and target as one byte of the history, uint8."""


def _judge(
    state: SeedState, commands: Commands, signals: Signals, config: LifecycleConfig
) -> _Verdict:
    """Applies the rules in their order; the first that refuses names the refusal."""
    requested = commands.target != NO_REQUEST
    known = (commands.target >= 0) & (commands.target < NUM_STAGES)
    target = jnp.where(known, commands.target, 0).astype(jnp.uint8)
    pair = state.stage.astype(jnp.uint8) << 4 | target

    legal = known & functools.reduce(
        operator.or_, [pair == legal for legal in LEGAL_PAIRS]
    )
    exempt = (target == Stage.CANCELLED) | (target == Stage.ROLLED_BACK)
    late_enough = exempt | (
        state.epochs_in_stage >= minimum_epochs(state.stage, config)
    )
    passed = gates_pass(state, target, signals, config)
    outcome = jnp.select(
        [~requested, ~legal, ~late_enough, ~passed],
        [
            jnp.int8(Outcome.NONE),
            jnp.int8(Outcome.ILLEGAL),
            jnp.int8(Outcome.TOO_EARLY),
            jnp.int8(Outcome.GATE),
        ],
        jnp.int8(Outcome.OK),
    )
    return _Verdict(outcome, target, pair)


class _Handover(NamedTuple):
    """Which slots change hands: ``slots[i]`` goes to ``seeds[i]`` where ``served``."""

    owner: Int[Array, " K"]
    """``seed_of_slot`` without the seeds that leave."""
    slots: Int[Array, " K"]
    seeds: Int[Array, " K"]
    served: Bool[Array, " K"]
    born: Bool[Array, " S"]
    """Seeds that get a slot."""


def _hand_over(
    state: SeedState, freed: Bool[Array, " S"], germinates: Bool[Array, " S"]
) -> _Handover:
    """Gives the free slots to the seeds that want one, both in order."""
    owner = state.seed_of_slot
    owner = jnp.where((owner >= 0) & freed[jnp.maximum(owner, 0)], -1, owner)
    slots, free = first_set(owner < 0, state.capacity)
    seeds, wanting = first_set(germinates, state.capacity)
    rank = jnp.arange(state.capacity)
    served = rank < jnp.minimum(free, wanting)
    last = jnp.max(jnp.where(served, seeds, -1))
    born = germinates & (jnp.arange(state.num_seeds) <= last)
    return _Handover(owner, slots, seeds, served, born)


def transition(
    state: SeedState, commands: Commands, signals: Signals, config: LifecycleConfig
) -> tuple[SeedState, Int[Array, " S"]]:
    """Carries out or refuses the requested transitions of all seeds at once.

    Slots that this call frees can be taken in the same call. Where more seeds want to
    germinate than slots are free, the lower seed numbers get them.

    Args:
      state: the seeds, ``S`` of them with ``K`` slots.
      commands: what is requested, each field of shape (S,).
      signals: measurements that the gates read, of shape (S,) or ().
      config: minimum ages and thresholds.

    Returns:
      The new state, and an `Outcome` per seed (int8[S]). A refused seed is left exactly
      as it was.

    Raises:
      ValueError: if the commands are not for ``S`` seeds.
    """
    _check_commands(state, commands)
    verdict = _judge(state, commands, signals, config)
    # Computed once, and not again for each field that depends on it.
    outcome = jax.lax.optimization_barrier(verdict.outcome)
    target = verdict.target
    allowed, idle = outcome == Outcome.OK, outcome == Outcome.NONE

    freed = allowed & (target >= Stage.CULLED)
    germinates = allowed & (target == Stage.GERMINATED)
    given = _hand_over(state, freed, germinates)
    born = given.born
    accepted = allowed & (born | ~germinates)

    def put(where: Array, new: Any, old: Array) -> Array:
        return jnp.where(where, jnp.asarray(new, old.dtype), old)

    pushed = push_history(state.history, verdict.entry)
    restyled = (commands.strategy >= 0) & (commands.strategy < len(Strategy))
    new = dataclasses.replace(
        state,
        stage=put(accepted, target, state.stage),
        parent_stage=put(accepted, state.stage, state.parent_stage),
        blueprint=put(
            born & (commands.blueprint >= 0), commands.blueprint, state.blueprint
        ),
        strategy=put(restyled & (accepted | idle), commands.strategy, state.strategy),
        epochs_in_stage=put(accepted, 0, state.epochs_in_stage),
        error_count=put(born, 0, state.error_count),
        history=jax.tree.map(
            functools.partial(jnp.where, accepted), pushed, state.history
        ),
        slot_of_seed=put(freed, -1, state.slot_of_seed)
        .at[jnp.where(given.served, given.seeds, state.num_seeds)]
        .set(given.slots, mode="drop"),
        graft=grafting.begin(
            state.graft, accepted & (target == Stage.GRAFTING), config.grafting
        ),
        worth=put(accepted, jnp.nan, state.worth),
        worth_ticks=put(accepted, 0, state.worth_ticks),
        seed_of_slot=given.owner.at[
            jnp.where(given.served, given.slots, state.capacity)
        ].set(given.seeds, mode="drop"),
    )
    unserved = germinates & ~born
    return new, jnp.where(unserved, jnp.int8(Outcome.NO_CAPACITY), outcome)


def released(state: SeedState, which: Bool[Array, " S"]) -> SeedState:
    """The seeds after some fossils became part of their layer's weights.

    These leave their slots and are DORMANT, as their chunks may grow again.

    Args:
      state: of one layer.
      which: seeds that are FOSSILIZED.
    """

    def put(new: Any, old: Array) -> Array:
        return jnp.where(which, jnp.asarray(new, old.dtype), old)

    owner = state.seed_of_slot
    gone = (owner >= 0) & which[jnp.maximum(owner, 0)]
    entry = jnp.uint8(Stage.FOSSILIZED << 4 | Stage.DORMANT)
    pushed = push_history(state.history, jnp.full(which.shape, entry))
    return dataclasses.replace(
        state,
        stage=put(Stage.DORMANT, state.stage),
        parent_stage=put(state.stage, state.parent_stage),
        epochs_in_stage=put(0, state.epochs_in_stage),
        history=jax.tree.map(
            functools.partial(jnp.where, which), pushed, state.history
        ),
        slot_of_seed=put(-1, state.slot_of_seed),
        worth=put(jnp.nan, state.worth),
        worth_ticks=put(0, state.worth_ticks),
        seed_of_slot=jnp.where(gone, -1, owner),
    )


def _check_commands(state: SeedState, commands: Commands) -> None:
    for field in dataclasses.fields(commands):
        shape = getattr(commands, field.name).shape
        if shape != state.stage.shape:
            raise ValueError(
                f"commands.{field.name} must have one entry for each of the "
                f"{state.num_seeds} seeds, shape {state.stage.shape}; got {shape}. "
                "commands_for(num_seeds, ...) builds and checks them"
            )


def age(state: SeedState, signals: Signals, config: LifecycleConfig) -> SeedState:
    """Ages every seed by one epoch. Seeds in GRAFTING climb their ramp."""
    epochs = saturating_add(state.epochs_in_stage, 1)
    climbed = grafting.update(
        state.graft, state.strategy, signals, epochs, config.grafting
    )
    climbing = state.stage == Stage.GRAFTING
    graft = jax.tree.map(
        lambda new, old: jnp.where(climbing, new, old), climbed, state.graft
    )
    return dataclasses.replace(state, epochs_in_stage=epochs, graft=graft)


def step(
    state: SeedState, commands: Commands, signals: Signals, config: LifecycleConfig
) -> tuple[SeedState, Int[Array, " S"]]:
    """One tick: ages every seed (`age`), then decides the requests (`transition`).

    A seed that enters a stage in one tick can leave it ``min_epochs`` ticks later.

    Returns:
      The new state, and an `Outcome` per seed (int8[S]).
    """
    return transition(age(state, signals, config), commands, signals, config)
