"""When, where, what and how to grow: a heuristic over measured signals.

`decide` is a pure, jittable function that sees the seeds of all layers at once. It only
asks; `lifecycle.transition` decides. Any other policy has the same signature.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from esper_jax.blueprints import living_parameters
from esper_jax.lifecycle.commands import Commands
from esper_jax.lifecycle.rules import LifecycleConfig, gates_pass
from esper_jax.lifecycle.signals import Signals, running_mean
from esper_jax.lifecycle.stages import NO_REQUEST, Stage, is_active
from esper_jax.lifecycle.state import SeedState
from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.interface import LayerShape, Policy, PolicyFactory, Setting
from esper_jax.policy.memory import ControllerMemory, Reason, init_memory
from esper_jax.policy.moves import advance, may_be_kept, strategy_for, take_turns
from esper_jax.policy.places import Limits, choose, choose_blueprint, cost_of, scores

__all__ = ["Costs", "Decide", "decide", "heuristic", "policy_of"]

Costs = Mapping[str, Int[np.ndarray, "N S"]]
"""Parameters of each blueprint on each chunk, by layer."""

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
"""The type of `decide`. The memory may be of another type if it has a ``reason``."""


def heuristic(
    config: ControllerConfig | None = None, *, decide: Decide | None = None
) -> PolicyFactory:
    """The heuristic as a policy for any model.

    Args:
      config: its numbers.
      decide: what decides with them instead, with the signature of `decide`.

    Returns:
      A function that makes the policy for a model. It raises ValueError if the config
      asks for a blueprint that a layer does not have.
    """
    numbers = config or ControllerConfig()
    chosen = decide or _decide

    def make(setting: Setting) -> Policy:
        costs = {name: layer.costs for name, layer in setting.layers.items()}
        for name, cost in costs.items():
            if numbers.blueprint >= len(cost):
                raise ValueError(
                    f"controller blueprint must be an index into the {len(cost)} "
                    f"blueprints of layer {name!r}, got {numbers.blueprint}"
                )

        def init(shapes: Mapping[str, LayerShape], key: Key[Array, ""]) -> Any:
            return init_memory(
                {name: layer.num_seeds for name, layer in shapes.items()},
                key=key,
                blueprints=min(len(layer.costs) for layer in shapes.values()),
            )

        def decide(
            seeds: Mapping[str, SeedState], signals: Mapping[str, Signals], memory: Any
        ) -> tuple[dict[str, Commands], Any]:
            return chosen(seeds, signals, memory, numbers, setting.gates, costs)

        return Policy(init, decide)

    return make


def policy_of(
    policy: Policy | PolicyFactory | None,
    config: ControllerConfig | None,
    decide: Decide | None,
) -> Policy | PolicyFactory:
    """The policy that was asked for: one given, or the heuristic.

    Raises:
      ValueError: if a policy is given together with what the heuristic takes.
    """
    if policy is None:
        return heuristic(config, decide=decide)
    if config is not None or decide is not None:
        raise ValueError(
            "policy must be given alone, or controller_config and decide without it: "
            "they are the heuristic's. Write policy=policy.heuristic(config)"
        )
    return policy


def decide(
    seeds: Mapping[str, SeedState],
    signals: Mapping[str, Signals],
    memory: ControllerMemory,
    config: ControllerConfig,
    lifecycle: LifecycleConfig,
    costs: Costs | None = None,
) -> tuple[dict[str, Commands], ControllerMemory]:
    """Requests for the seeds of all layers.

    When it is time, dormant chunks germinate. A seed moves on as soon as its age and
    its gate allow it. It is culled or rolled back if they do not within its limit.

    Args:
      seeds: the seeds of each layer, by name, already aged by this tick.
      signals: this tick's measurements of each layer.
      memory: what was remembered.
      config: numbers of the heuristic.
      lifecycle: the gates that seeds have to pass.
      costs: parameters of each blueprint on each chunk of each layer, as
        `blueprints.param_counts` counts them. May be None if the config neither has a
        budget nor chooses blueprints by cost.

    Returns:
      Commands for each layer, and the new memory. Its ``reason`` says why something
      germinated, or why not.

    Raises:
      ValueError: if the config has a budget, or chooses blueprints by cost, and costs
        are missing.
    """
    costs = _known_costs(costs, seeds, memory, config)
    measured = next(iter(signals.values()))
    memory, shifted = _watch(memory, measured.held_out_loss, config)
    before = {
        name: memory.before.get(name, jnp.full(s.num_seeds, jnp.nan, jnp.float32))
        for name, s in seeds.items()
    }
    targets = {}
    for name, state in seeds.items():
        kept = may_be_kept(signals[name], before[name], memory.loss_mean, config)
        target = advance(state, signals[name], kept, config, lifecycle)
        fresh_start = shifted & is_active(state.stage)
        targets[name] = jnp.where(fresh_start, Stage.ROLLED_BACK, target)
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
    kind, born, memory = _germinate(seeds, signals, memory, config, costs)
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


def _known_costs(
    costs: Costs | None,
    seeds: Mapping[str, SeedState],
    memory: ControllerMemory,
    config: ControllerConfig,
) -> Costs:
    """The costs, or zeros where nothing that is asked for needs them."""
    if costs is not None:
        return costs
    if config.budget >= 0 or config.what in ("risk_averse", "hybrid"):
        raise ValueError(
            "costs must be given where the config has a budget or chooses the "
            f"blueprint by cost (budget {config.budget}, what {config.what!r})"
        )
    size = memory.tried.shape[0]
    return {name: np.zeros((size, s.num_seeds), int) for name, s in seeds.items()}


def _watch(
    memory: ControllerMemory, loss: Array, config: ControllerConfig
) -> tuple[ControllerMemory, Bool[Array, ""]]:
    """Looks for a plateau, and for data that have changed.

    A loss that is not finite counts as no improvement and as no change. When the data
    have changed, both the best loss and the mean start afresh.
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
    memory = dataclasses.replace(
        memory,
        best_loss=jnp.where(better, loss, memory.best_loss),
        stale=jnp.where(better, 0, memory.stale + 1),
        loss_mean=running_mean(memory.loss_mean, loss),
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
    """Credits blueprints with the mean worth of the seeds that are kept now."""
    kept, earned = memory.kept, memory.earned
    for name, state in seeds.items():
        target = targets[name]
        stays = (target == Stage.FOSSILIZED) & gates_pass(
            state, target, signals[name], lifecycle
        )
        kind = state.blueprint.astype(jnp.int32)
        worth = jnp.broadcast_to(signals[name].mean_worth, kind.shape)
        kept = kept.at[kind].add(stays.astype(jnp.int32), mode="drop")
        # One infinite worth would make the sum infinite for good.
        counts = stays & jnp.isfinite(worth)
        earned = earned.at[kind].add(jnp.where(counts, worth, 0.0), mode="drop")
    return dataclasses.replace(memory, kept=kept, earned=earned)


def _germinate(
    seeds: Mapping[str, SeedState],
    signals: Mapping[str, Signals],
    memory: ControllerMemory,
    config: ControllerConfig,
    costs: Costs,
) -> tuple[Int[Array, ""], dict[str, Bool[Array, " S"]], ControllerMemory]:
    """Which blueprint germinates and where, if anything does; and the new memory."""
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
    spent = sum(
        jnp.sum(living_parameters(costs[name], s.blueprint, s.slot_of_seed >= 0))
        for name, s in seeds.items()
    )
    kind = choose_blueprint(config, memory, costs)
    score, next_turn = scores(config.where, seeds, signals, memory.turn, places)
    chosen = choose(
        seeds,
        score,
        {name: cost_of(kind, cost) for name, cost in costs.items()},
        Limits(
            births=config.births,
            at_once=config.max_training - waiting,
            room=jnp.inf if config.budget < 0 else config.budget - spent,
        ),
    )
    measured = next(iter(signals.values()))
    reason = _first_reason(
        [
            (jnp.asarray(not config.enabled), Reason.DISABLED),
            (_target_met(measured.held_out_accuracy, config), Reason.TARGET_MET),
            (jnp.asarray(config.budget == 0), Reason.BUDGET_SPENT),
            (~time, Reason.NOT_YET),
            (jnp.asarray(waiting >= config.max_training), Reason.BUSY),
            *_no_place(seeds, score, chosen),
        ]
    )
    grows = reason == Reason.GERMINATED
    born = {name: flags & grows for name, flags in chosen.items()}
    loss = measured.held_out_loss
    # Infinity, so that the next finite loss becomes the best one.
    best = jnp.where(jnp.isfinite(loss), loss, jnp.inf)
    memory = dataclasses.replace(
        memory,
        best_loss=jnp.where(grows, best, memory.best_loss),
        stale=jnp.where(grows, 0, memory.stale),
        since=jnp.where(grows, 0, memory.since),
        turn=jnp.where(grows, next_turn(born), memory.turn),
        key=key,
        reason=reason,
        tried=memory.tried.at[kind].add(sum(jnp.sum(b) for b in born.values())),
    )
    return kind, born, memory


def _target_met(accuracy: Array, config: ControllerConfig) -> Bool[Array, ""]:
    if config.target_accuracy < 0:
        return jnp.asarray(False)
    return accuracy >= config.target_accuracy


def _no_place(
    seeds: Mapping[str, SeedState],
    score: Mapping[str, Array],
    chosen: Mapping[str, Array],
) -> list[tuple[Bool[Array, ""], Reason]]:
    """What may be wrong with all places."""
    dormant = {n: s.stage == Stage.DORMANT for n, s in seeds.items()}
    usable = {n: d & jnp.any(seeds[n].seed_of_slot < 0) for n, d in dormant.items()}
    resting = {n: s.stage >= Stage.CULLED for n, s in seeds.items()}
    known = {n: u & jnp.isfinite(score[n]) for n, u in usable.items()}

    def some(flags: Mapping[str, Array]) -> Array:
        return jnp.any(jnp.stack([jnp.any(f) for f in flags.values()]))

    return [
        (~some(dormant) & some(resting), Reason.EMBARGOED),
        (~some(dormant), Reason.FULL),
        (~some(usable), Reason.NO_SLOT),
        (~some(known), Reason.UNMEASURED),
        (~some(chosen), Reason.BUDGET_SPENT),
    ]


def _first_reason(cases: list[tuple[Bool[Array, ""], Reason]]) -> Int[Array, ""]:
    """The reason of the first case that holds, else GERMINATED; int8."""
    holds, reasons = zip(*cases, strict=True)
    return jnp.select(
        list(holds), [jnp.int8(r) for r in reasons], jnp.int8(Reason.GERMINATED)
    )


_decide: Decide = decide
"""`decide`, where an argument has its name."""
