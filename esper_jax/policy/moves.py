"""When a living seed moves on, and when it is turned away."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from esper_jax.groups import Groups
from esper_jax.lifecycle.grafting import Strategy
from esper_jax.lifecycle.rules import LifecycleConfig, gates_pass
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import NO_REQUEST, Stage
from esper_jax.lifecycle.state import SeedState
from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.memory import ControllerMemory

__all__ = ["advance", "may_be_kept", "strategy_for", "take_turns"]


def may_be_kept(
    signals: Signals, before: Array, loss_mean: Array, config: ControllerConfig
) -> Bool[Array, " S"]:
    """Whether each seed covers its rent and the model is no worse than before it.

    The rent is compared with a paired counterfactual. Once the host has adapted to a
    seed, that difference is positive even if the model was better before; so the mean
    held-out loss is compared with its value when grafting began, too.
    """
    worse = loss_mean > before + config.keep_tolerance * jnp.abs(before)
    kept = ~jnp.broadcast_to(worse, before.shape)
    if config.rent_per_parameter or config.rent_per_operation:
        rent = config.rent_per_parameter * signals.parameters
        rent = rent + config.rent_per_operation * signals.operations
        kept &= signals.mean_worth >= rent  # False where not measured
    return kept


def strategy_for(
    grafted: Bool[Array, " S"],
    signals: Signals,
    memory: ControllerMemory,
    config: ControllerConfig,
    lifecycle: LifecycleConfig,
) -> Int[Array, " S"]:
    """The strategy that each seed is grafted with; -1 for its own."""
    nothing = jnp.full(grafted.shape, NO_REQUEST, jnp.int8)
    if config.how == "fixed":
        return nothing
    ramp = lifecycle.grafting
    wild = (signals.grad_norm < ramp.grad_norm_lower) | (
        signals.grad_norm > ramp.grad_norm_upper
    )
    by_conditions = jnp.select(
        [signals.drift > ramp.drift_threshold, wild, memory.stale == 0],
        [
            jnp.int8(Strategy.DRIFT_CONTROLLED),
            jnp.int8(Strategy.GRAD_NORM_GATED),
            jnp.int8(Strategy.MOMENTUM),
        ],
        jnp.int8(Strategy.LINEAR),
    )
    return jnp.where(grafted, by_conditions, nothing)


def advance(
    state: SeedState,
    signals: Signals,
    may_be_kept: Bool[Array, " S"],
    config: ControllerConfig,
    lifecycle: LifecycleConfig,
) -> Int[Array, " S"]:
    """The next stage of each living seed whose time has come, else -1.

    Germination is not decided here.
    """
    stage, epochs = state.stage, state.epochs_in_stage

    def ready(target: Stage) -> Array:
        return gates_pass(state, jnp.full(stage.shape, target), signals, lifecycle)

    def after(limit: int, late: Stage, otherwise: Any) -> Array:
        return jnp.where(epochs >= limit, late, otherwise)

    trained = ready(Stage.GRAFTING)
    if config.require_gain:
        trained &= signals.gain > 0
    # Asks in vain where the gate refuses, so that the refusal is on record.
    ask_in_vain = jnp.where(ready(Stage.GRAFTING), NO_REQUEST, Stage.GRAFTING)
    ramp_done = state.graft.alpha >= lifecycle.grafting.max_alpha
    tune = jnp.where(may_be_kept, Stage.FINE_TUNING, NO_REQUEST)
    keep = jnp.where(may_be_kept, Stage.FOSSILIZED, NO_REQUEST)
    undecided = after(config.evaluation_limit, Stage.ROLLED_BACK, tune)
    nowhere = jnp.full(stage.shape, NO_REQUEST)
    moves = {
        Stage.GERMINATED: jnp.full(stage.shape, Stage.TRAINING),
        Stage.TRAINING: jnp.where(
            trained,
            Stage.GRAFTING,
            after(config.training_limit, Stage.CULLED, ask_in_vain),
        ),
        Stage.GRAFTING: jnp.where(
            ramp_done,
            Stage.STABILIZATION,
            after(config.grafting_limit, Stage.ROLLED_BACK, NO_REQUEST),
        ),
        Stage.STABILIZATION: jnp.full(stage.shape, Stage.EVALUATING),
        Stage.EVALUATING: jnp.where(
            ready(Stage.FINE_TUNING) & may_be_kept,
            Stage.FINE_TUNING,
            jnp.where(ready(Stage.CULLED), Stage.CULLED, undecided),
        ),
        Stage.FINE_TUNING: jnp.where(
            ready(Stage.FOSSILIZED) & may_be_kept,
            Stage.FOSSILIZED,
            after(config.tuning_limit, Stage.CULLED, keep),
        ),
        **dict.fromkeys(
            (Stage.CULLED, Stage.CANCELLED, Stage.ROLLED_BACK),
            jnp.full(stage.shape, Stage.DORMANT),
        ),
    }
    target = jnp.select([stage == s for s in moves], list(moves.values()), nowhere)
    exempt = (target == Stage.CANCELLED) | (target == Stage.ROLLED_BACK)
    minimum = jnp.asarray(lifecycle.min_epochs, jnp.int32)[stage.astype(jnp.int32)]
    waited = epochs.astype(jnp.int32) >= minimum
    return jnp.where(exempt | waited, target, NO_REQUEST)


def take_turns(
    groups: Groups,
    seeds: Mapping[str, SeedState],
    targets: Mapping[str, Int[Array, "L S"]],
    config: ControllerConfig,
) -> dict[str, Int[Array, "L S"]]:
    """Lets at most ``max_training`` seeds into TRAINING, in order.

    Cancels the seeds that have waited too long. Seeds and targets come by group,
    stacked.
    """
    room = config.max_training - sum(
        jnp.sum(s.stage == Stage.TRAINING) for s in seeds.values()
    )
    waiting = groups.flat({n: t == Stage.TRAINING for n, t in targets.items()})
    widths = {name: s.num_seeds for name, s in seeds.items()}
    early = groups.unflat(jnp.cumsum(waiting) <= room, widths)
    allowed = {}
    for name, target in targets.items():
        late = seeds[name].epochs_in_stage >= config.waiting_limit
        instead = jnp.where(late, Stage.CANCELLED, NO_REQUEST)
        allowed[name] = jnp.where(
            (target == Stage.TRAINING) & ~early[name], instead, target
        )
    return allowed
