"""When, where, what and how to grow: a heuristic over measured signals.

`decide` is a pure, jittable function that sees the seeds of all layers at once. It
asks; `lifecycle.transition` decides. A learned policy has the same signature.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from esper_jax.lifecycle.commands import Commands
from esper_jax.lifecycle.rules import LifecycleConfig, gates_pass
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import NO_REQUEST, Stage
from esper_jax.lifecycle.state import SeedState
from esper_jax.policy import places as placement
from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.memory import ControllerMemory, Reason
from esper_jax.policy.moves import (
    advance,
    has_learned,
    may_be_kept,
    strategy_for,
    take_turns,
)

__all__ = ["Decide", "decide"]

Costs = Mapping[str, Int[np.ndarray, "N S"]]


Decide = Callable[
    [
        Mapping[str, SeedState],
        Mapping[str, Signals],
        Any,
        ControllerConfig,
        LifecycleConfig,
        Costs,
    ],
    tuple[dict[str, Commands], Any],
]
"""`decide`'s type. The memory may be of another kind, if it has a ``reason``."""


_DECAY = 0.9
"""Of the running mean of the held-out loss, per tick."""


def decide(
    seeds: Mapping[str, SeedState],
    signals: Mapping[str, Signals],
    memory: ControllerMemory,
    config: ControllerConfig,
    lifecycle: LifecycleConfig,
    costs: Costs | None = None,
) -> tuple[dict[str, Commands], ControllerMemory]:
    """Requests for the seeds of all layers.

    When it is time, dormant chunks germinate. A seed is moved on as soon as its time
    and its gate allow, and culled or rolled back when they do not within its limit.

    Args:
      seeds: the seeds of each layer, by name, already aged by this tick.
      signals: this tick's measurements of each layer.
      memory: what was remembered.
      config: numbers of the heuristic.
      lifecycle: the gates, which the seeds are moved by.
      costs: parameters of each blueprint on each chunk of each layer, as
        `blueprints.param_counts` counts them; None where nothing that is asked for
        needs them.

    Returns:
      Commands for each layer, and the new memory, whose ``reason`` tells why something
      germinated or nothing did.

    Raises:
      ValueError: if the config has a budget or a choice of blueprint by cost, and there
        are no costs.
    """
    if costs is None:
        if config.budget >= 0 or config.what in ("risk_averse", "hybrid"):
            raise ValueError(
                "costs must be given where the config has a budget or chooses the "
                f"blueprint by cost (budget {config.budget}, what {config.what!r})"
            )
        size = memory.tried.shape[0]
        costs = {name: np.zeros((size, s.num_seeds), int) for name, s in seeds.items()}
    measured = next(iter(signals.values()))
    memory, shifted = _watch(memory, measured.held_out_loss, config)
    before = {
        name: memory.before.get(name, jnp.full(s.num_seeds, jnp.nan, jnp.float32))
        for name, s in seeds.items()
    }
    targets = {
        name: advance(
            state,
            signals[name],
            may_be_kept(signals[name], before[name], memory.loss_mean, config),
            config,
            lifecycle,
        )
        for name, state in seeds.items()
    }
    targets = {
        name: jnp.where(shifted & has_learned(seeds[name]), Stage.ROLLED_BACK, target)
        for name, target in targets.items()
    }
    targets = take_turns(seeds, targets, config)
    grafted = {
        name: (t == Stage.GRAFTING)
        & gates_pass(seeds[name], t, signals[name], lifecycle)
        for name, t in targets.items()
    }
    before = {
        name: jnp.where(
            seeds[name].stage == Stage.DORMANT,
            jnp.nan,
            jnp.where(grafted[name], memory.loss_mean, old),
        )
        for name, old in before.items()
    }
    memory = _credit(seeds, signals, targets, memory, lifecycle)
    kind, born, memory = _germinate(
        seeds, signals, memory, config, costs, measured.held_out_accuracy
    )
    commands = {
        name: Commands(
            target=jnp.where(born[name], Stage.GERMINATED, target).astype(jnp.int8),
            blueprint=jnp.where(born[name], kind, NO_REQUEST).astype(jnp.int8),
            strategy=strategy_for(
                grafted[name], signals[name], memory, config, lifecycle
            ),
        )
        for name, target in targets.items()
    }
    return commands, dataclasses.replace(memory, before=before)


def _watch(
    memory: ControllerMemory, loss: Array, config: ControllerConfig
) -> tuple[ControllerMemory, Bool[Array, ""]]:
    """Plateau detection, and whether the data have changed; a loss that was not
    measured counts as no improvement, and as no change. After one, both begin afresh.
    """
    if config.shift_tolerance >= 0:
        usual = memory.loss_mean + config.shift_tolerance * jnp.abs(memory.loss_mean)
        shifted = jnp.isfinite(loss) & (loss > usual)
        memory = dataclasses.replace(
            memory,
            best_loss=jnp.where(shifted, jnp.inf, memory.best_loss),
            loss_mean=jnp.where(shifted, jnp.nan, memory.loss_mean),
        )
    else:
        shifted = jnp.asarray(False)
    better = loss < memory.best_loss - config.threshold * jnp.abs(memory.best_loss)
    better |= jnp.isinf(memory.best_loss) & jnp.isfinite(loss)
    mean = jnp.where(
        jnp.isnan(memory.loss_mean),
        loss,
        _DECAY * memory.loss_mean + (1 - _DECAY) * loss,
    )
    memory = dataclasses.replace(
        memory,
        best_loss=jnp.where(better, loss, memory.best_loss),
        stale=jnp.where(better, 0, memory.stale + 1),
        loss_mean=jnp.where(jnp.isfinite(loss), mean, memory.loss_mean),
        since=memory.since + 1,
    )
    return memory, shifted


def _credit(
    seeds: Mapping[str, SeedState],
    signals: Mapping[str, Signals],
    targets: Mapping[str, Int[Array, " S"]],
    memory: ControllerMemory,
    lifecycle: LifecycleConfig,
) -> ControllerMemory:
    """Books the worth of the seeds that are kept now to their blueprints."""
    kept, earned = memory.kept, memory.earned
    for name, state in seeds.items():
        target = targets[name]
        stays = (target == Stage.FOSSILIZED) & gates_pass(
            state, target, signals[name], lifecycle
        )
        kind = state.blueprint.astype(jnp.int32)
        worth = jnp.broadcast_to(signals[name].total_improvement, kind.shape)
        kept = kept.at[kind].add(stays.astype(jnp.int32), mode="drop")
        earned = earned.at[kind].add(jnp.where(stays, worth, 0.0), mode="drop")
    return dataclasses.replace(memory, kept=kept, earned=earned)


def _germinate(
    seeds: Mapping[str, SeedState],
    signals: Mapping[str, Signals],
    memory: ControllerMemory,
    config: ControllerConfig,
    costs: Costs,
    accuracy: Array,
) -> tuple[Int[Array, ""], dict[str, Bool[Array, " S"]], ControllerMemory]:
    """Which blueprint germinates where, if anything does, and why not if not."""
    key, chance, places = jax.random.split(memory.key, 3)
    time = {
        "plateau": memory.stale >= config.patience,
        "period": memory.since >= config.period,
        "random": jax.random.uniform(chance) < 1 / config.period,
    }[config.when]
    waiting = sum(
        jnp.sum((s.stage == Stage.GERMINATED) | (s.stage == Stage.TRAINING))
        for s in seeds.values()
    )
    kind = placement.choose_blueprint(config, memory, costs)
    scores, turn = placement.scores(config.where, seeds, signals, memory.turn, places)
    spent = sum(placement.spent(s, costs[name]) for name, s in seeds.items())
    room = jnp.inf if config.budget < 0 else config.budget - spent
    chosen = placement.choose(
        seeds,
        scores,
        {name: placement.cost_of(kind, cost) for name, cost in costs.items()},
        most=config.births,
        room=room,
        at_once=config.max_training - waiting,
    )
    dormant = {n: s.stage == Stage.DORMANT for n, s in seeds.items()}
    usable = {n: d & jnp.any(seeds[n].seed_of_slot < 0) for n, d in dormant.items()}
    resting = {n: s.stage >= Stage.CULLED for n, s in seeds.items()}
    known = {n: u & jnp.isfinite(scores[n]) for n, u in usable.items()}

    def some(flags: Mapping[str, Array]) -> Array:
        return jnp.any(jnp.stack([jnp.any(f) for f in flags.values()]))

    target = config.target_accuracy
    reason = jnp.select(
        [
            jnp.asarray(not config.enabled),
            accuracy >= target if target >= 0 else jnp.asarray(False),
            jnp.asarray(config.budget == 0),
            ~time,
            jnp.asarray(waiting >= config.max_training),
            ~some(dormant) & some(resting),
            ~some(dormant),
            ~some(usable),
            ~some(known),
            ~some(chosen),
        ],
        [
            jnp.int8(r)
            for r in (
                Reason.DISABLED,
                Reason.TARGET_MET,
                Reason.BUDGET_SPENT,
                Reason.NOT_YET,
                Reason.BUSY,
                Reason.EMBARGOED,
                Reason.FULL,
                Reason.NO_SLOT,
                Reason.UNMEASURED,
                Reason.BUDGET_SPENT,
            )
        ],
        jnp.int8(Reason.GERMINATED),
    )
    grows = reason == Reason.GERMINATED
    born = {name: flags & grows for name, flags in chosen.items()}
    births = sum(jnp.sum(b) for b in born.values())
    measured = next(iter(signals.values())).held_out_loss
    memory = dataclasses.replace(
        memory,
        best_loss=jnp.where(grows, measured, memory.best_loss),
        stale=jnp.where(grows, 0, memory.stale),
        since=jnp.where(grows, 0, memory.since),
        turn=jnp.where(grows, turn(born), memory.turn),
        key=key,
        reason=reason,
        tried=memory.tried.at[kind].add(births),
    )
    return kind, born, memory
