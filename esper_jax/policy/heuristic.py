"""When, where, what and how to grow: a heuristic over measured signals.

`decide` is a pure, jittable function that sees the seeds of all layers at once. It only
asks; `lifecycle.transition` decides. Any other policy has the same signature.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Key

from esper_jax.groups import Groups
from esper_jax.lifecycle.commands import Commands
from esper_jax.lifecycle.rules import LifecycleConfig, gates_pass
from esper_jax.lifecycle.signals import Signals, running_mean
from esper_jax.lifecycle.stages import NO_REQUEST, Stage, is_active
from esper_jax.lifecycle.state import SeedState
from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.germination import Costs, Seen, germinate
from esper_jax.policy.interface import LayerShape, Policy, PolicyFactory, Setting
from esper_jax.policy.memory import ControllerMemory, init_memory
from esper_jax.policy.moves import advance, may_be_kept, strategy_for, take_turns
from esper_jax.policy.places import by_seed

__all__ = ["Costs", "Decide", "decide", "heuristic", "policy_of"]

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

        def by_layer(
            seeds: Mapping[str, SeedState], signals: Mapping[str, Signals], memory: Any
        ) -> tuple[dict[str, Commands], Any]:
            assert decide is not None
            return decide(seeds, signals, memory, numbers, setting.gates, costs)

        if decide is not None:
            return Policy(init, by_layer)
        groups = setting.groups or Groups.alone(tuple(setting.layers))
        of_group = {key: costs[group.layers[0]] for key, group in groups.of.items()}

        def by_group(
            seeds: Mapping[str, SeedState], signals: Mapping[str, Signals], memory: Any
        ) -> tuple[dict[str, Commands], Any]:
            given = Seen(groups, seeds, signals, of_group)
            return _decide(given, memory, numbers, setting.gates)

        return Policy(init, by_group, reads=_reads(numbers), stacked=True)

    return make


def _reads(config: ControllerConfig) -> frozenset[str]:
    """The costly signals that the heuristic reads."""
    where = {"chunk_gradient"} if config.where == "gradient" else set()
    how = {"drift", "grad_norm"} if config.how == "conditions" else set()
    return frozenset(where | how)


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
    groups = Groups.alone(tuple(seeds))
    seen = Seen(groups, groups.stack(seeds), groups.stack(signals), costs)
    commands, memory = _decide(seen, memory, config, lifecycle)
    return groups.split(commands), memory


def _decide(
    seen: Seen,
    memory: ControllerMemory,
    config: ControllerConfig,
    lifecycle: LifecycleConfig,
) -> tuple[dict[str, Commands], ControllerMemory]:
    """`decide` for layers by group; the memory is by layer."""
    groups, seeds, signals, _ = seen
    memory, shifted = _watch(memory, seen.common("held_out_loss"), config)
    before = groups.stack(_before(memory, seen))

    def asked(state: SeedState, signals: Signals, before: Array) -> Array:
        kept = may_be_kept(signals, before, memory.loss_mean, config)
        target = advance(state, signals, kept, config, lifecycle)
        fresh_start = shifted & is_active(state.stage)
        return jnp.where(fresh_start, Stage.ROLLED_BACK, target)

    targets = {
        name: jax.vmap(asked)(state, signals[name], before[name])
        for name, state in seeds.items()
    }
    targets = take_turns(groups, seeds, targets, config)
    passed = {
        name: jax.vmap(functools.partial(gates_pass, config=lifecycle))(
            seeds[name], target, signals[name]
        )
        for name, target in targets.items()
    }
    grafted = {n: (t == Stage.GRAFTING) & passed[n] for n, t in targets.items()}
    before = {
        name: jnp.where(
            seeds[name].stage == Stage.DORMANT,
            jnp.nan,
            jnp.where(grafted[name], memory.loss_mean, old),
        )
        for name, old in before.items()
    }
    kept = {n: (t == Stage.FOSSILIZED) & passed[n] for n, t in targets.items()}
    memory = _credit(seen, kept, memory)
    kind, born, memory = germinate(seen, memory, config)
    style = functools.partial(
        strategy_for, memory=memory, config=config, lifecycle=lifecycle
    )
    styles = {
        name: jax.vmap(style)(flags, signals[name]) for name, flags in grafted.items()
    }
    commands = {
        name: Commands(
            target=jnp.where(born[name], Stage.GERMINATED, target).astype(jnp.int8),
            blueprint=jnp.where(born[name], kind, NO_REQUEST).astype(jnp.int8),
            strategy=styles[name],
        )
        for name, target in targets.items()
    }
    return commands, dataclasses.replace(memory, before=groups.split(before))


def _before(memory: ControllerMemory, seen: Seen) -> dict[str, Array]:
    """``memory.before`` of every layer; NaN for one that it does not know."""
    return {
        name: memory.before.get(
            name, jnp.full(seen.seeds[group].num_seeds, jnp.nan, jnp.float32)
        )
        for name, group in seen.groups.names().items()
    }


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
    tolerance = config.shift_tolerance
    if not isinstance(tolerance, int | float) or tolerance >= 0:  # or is traced
        usual = memory.loss_mean + tolerance * jnp.abs(memory.loss_mean)
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
    seen: Seen, kept: Mapping[str, Bool[Array, "L S"]], memory: ControllerMemory
) -> ControllerMemory:
    """Credits blueprints with the mean worth of the seeds that are kept now."""
    flat = seen.groups.flat
    stays = flat(kept)
    kind = flat({n: s.blueprint for n, s in seen.seeds.items()}).astype(jnp.int32)
    worth = flat(
        {n: by_seed(seen.signals[n].mean_worth, s) for n, s in seen.seeds.items()}
    )
    # One infinite worth would make the sum infinite for good.
    counts = stays & jnp.isfinite(worth)
    return dataclasses.replace(
        memory,
        kept=memory.kept.at[kind].add(stays.astype(jnp.int32), mode="drop"),
        earned=memory.earned.at[kind].add(jnp.where(counts, worth, 0.0), mode="drop"),
    )
