"""Everywhere at once, then keep the best: births early and wide, few kept.

At the first tick a part is born in every place, or in a sample of them. For a number of
ticks all count and learn together. Then each is judged by how much worse the held-out
loss is without it, for each of its parameters. The best within the budget stay.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from esper_jax.blueprints import living_parameters
from esper_jax.groups import Groups
from esper_jax.lifecycle.commands import Commands
from esper_jax.lifecycle.grafting import GraftConfig
from esper_jax.lifecycle.rules import LifecycleConfig, gates_pass, minimum_epochs
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import NO_REQUEST, Stage
from esper_jax.lifecycle.state import SeedState
from esper_jax.policy.germination import Seen
from esper_jax.policy.interface import LayerShape, Policy, PolicyFactory, Setting
from esper_jax.policy.memory import Reason
from esper_jax.policy.places import by_seed

__all__ = ["TrialConfig", "TrialMemory", "trial", "trial_lives"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """Numbers of a trial; hashable.

    Args:
      ticks: how long all parts count and learn together before they are judged.
      budget: most parameters that are kept; -1 for no limit.
      rent: worth that a part must have for each of its parameters to be kept, in units
        of the held-out loss.
      blueprint: index of the blueprint that is tried.
      share: of the places that are tried, drawn at random; above 0, at most 1.

    Raises:
      ValueError: naming the field that is out of its range.
    """

    ticks: int = 8
    budget: int = -1
    rent: float = 0.0
    blueprint: int = 0
    share: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("ticks", 1), ("budget", -1), ("blueprint", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not least <= value < 2**31:
                raise ValueError(
                    f"{name} must be an int from {least} to {2**31 - 1}, got {value!r}"
                )
        if not (math.isfinite(self.rent) and self.rent >= 0):
            raise ValueError(f"rent must be finite, at least 0; got {self.rent!r}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share!r}")


@struct.dataclass
class TrialMemory:
    """What a trial remembers between ticks."""

    begun: Bool[Array, ""]
    """Whether the parts were born."""
    judged: Bool[Array, ""]
    """Whether they were judged."""
    key: Key[Array, ""]
    """Random key of the places."""
    reason: Int[Array, ""]
    """`Reason` of the last tick, int8."""


def trial_lives(*, tuning: int = 100, **fields: Any) -> LifecycleConfig:
    """Ages and gates that leave the judging to a trial.

    Parts count in full from the start, and no gate asks for more than a worth that is
    not below 0.

    Args:
      tuning: ticks for which what is kept learns on before it becomes a fossil.
      **fields: of `LifecycleConfig`, to be other than that.
    """
    ages = [0] * len(Stage)
    ages[Stage.FINE_TUNING] = tuning
    lenient = {
        "min_epochs": tuple(ages),
        "reconstruction_threshold": math.inf,
        "min_stability": -math.inf,
        "min_final_stability": -math.inf,
        "cull_delta": 0.0,
        "min_improvement": 0.0,
        "worth_window": 1,
        "grafting": GraftConfig(ramp_duration=1, min_alpha=1.0),
    }
    return LifecycleConfig(**{**lenient, **fields})


def trial(config: TrialConfig | None = None) -> PolicyFactory:
    """A trial as a policy for any model.

    The parts are born at the first tick, begin to learn at the second and to count at
    the third: call ``tick`` three times before the first step to begin at once. They
    count and learn in GRAFTING for ``ticks``, at each of which the held-out data are
    evaluated once for each part: one long tick is cheapest. Then those that are not
    kept are rolled back. The others pass STABILIZATION and EVALUATING as the gates
    allow, and learn on in FINE_TUNING. Nothing is born any more, and
    `Program.grow_capacity` gives back the slots of `build`. Use it with gates that let
    parts through (`trial_lives`).

    Args:
      config: its numbers.

    Returns:
      A function that makes the policy for a model. It raises ValueError if a layer has
      no such blueprint, and its ``init`` if one has fewer slots than seeds.
    """
    numbers = config or TrialConfig()

    def make(setting: Setting) -> Policy:
        _check(setting, numbers)
        groups = setting.groups or Groups.alone(tuple(setting.layers))
        costs = {
            key: setting.layers[group.layers[0]].costs
            for key, group in groups.of.items()
        }

        def init(shapes: Mapping[str, LayerShape], key: Key[Array, ""]) -> TrialMemory:
            _check_room(shapes, numbers)  # afterwards slots may be given back
            return TrialMemory(
                begun=jnp.asarray(False),
                judged=jnp.asarray(False),
                key=key,
                reason=jnp.asarray(Reason.NOT_YET, jnp.int8),
            )

        def decide(
            seeds: Mapping[str, SeedState],
            signals: Mapping[str, Signals],
            memory: TrialMemory,
        ) -> tuple[dict[str, Commands], TrialMemory]:
            seen = Seen(groups, seeds, signals, costs)
            return _decide(seen, memory, numbers, setting.gates)

        return Policy(init, decide, reads=frozenset(), stacked=True)

    return make


def _check_room(shapes: Mapping[str, LayerShape], config: TrialConfig) -> None:
    for name, layer in shapes.items():
        if config.share == 1 and layer.capacity < layer.num_seeds:
            raise ValueError(
                f"policy: a trial in every place needs a slot for each seed; layer "
                f"{name!r} has {layer.capacity} for {layer.num_seeds} seeds. Make it "
                "growable with capacity=num_seeds, or try a share of the places"
            )


def _check(setting: Setting, config: TrialConfig) -> None:
    for name, layer in setting.layers.items():
        if config.blueprint >= len(layer.costs):
            raise ValueError(
                f"blueprint must be an index into the {len(layer.costs)} blueprints of "
                f"layer {name!r}, got {config.blueprint}"
            )


def _decide(
    seen: Seen, memory: TrialMemory, config: TrialConfig, gates: LifecycleConfig
) -> tuple[dict[str, Commands], TrialMemory]:
    groups, seeds, signals, _ = seen
    widths = {name: s.num_seeds for name, s in seeds.items()}
    key, places = jax.random.split(memory.key)
    stage = groups.flat({name: s.stage for name, s in seeds.items()})
    age = groups.flat({name: s.epochs_in_stage for name, s in seeds.items()})
    drawn = jax.random.uniform(places, stage.shape) < config.share
    birth = drawn & (stage == Stage.DORMANT) & ~memory.begun
    # All are judged together, when all have had their time.
    grafted = stage == Stage.GRAFTING
    early = (stage == Stage.GERMINATED) | (stage == Stage.TRAINING)
    ticks = max(config.ticks, gates.min_epochs[Stage.GRAFTING])
    early |= grafted & (age.astype(jnp.int32) < ticks)
    measured = jnp.isfinite(_worth(seen)) & grafted  # else waits for the next tick
    judges = ~memory.judged & jnp.any(measured) & ~jnp.any(early)
    verdict = jnp.where(_kept(seen, config), Stage.STABILIZATION, Stage.ROLLED_BACK)
    verdict = jnp.where(grafted & judges, verdict, NO_REQUEST)
    verdict = jnp.where(birth, Stage.GERMINATED, verdict)
    asked = groups.unflat(verdict, widths)

    def target(state: SeedState, signals: Signals, asked: Array) -> Array:
        on = _advance(state, signals, gates)
        return jnp.where(asked == NO_REQUEST, on, asked).astype(jnp.int8)

    commands = {}
    for name, state in seeds.items():
        goal = jax.vmap(target)(state, signals[name], asked[name])
        nothing = jnp.full(goal.shape, NO_REQUEST, jnp.int8)
        born = goal == Stage.GERMINATED
        kind = jnp.where(born, config.blueprint, NO_REQUEST).astype(jnp.int8)
        commands[name] = Commands(target=goal, blueprint=kind, strategy=nothing)
    judged = memory.judged | judges
    return commands, TrialMemory(
        begun=memory.begun | jnp.any(birth),
        judged=judged,
        key=key,
        reason=jnp.where(jnp.any(birth), Reason.GERMINATED, Reason.NOT_YET).astype(
            jnp.int8
        ),
    )


def _kept(seen: Seen, config: TrialConfig) -> Bool[Array, " P"]:
    """Which parts are kept if they are judged now, over all places.

    In the order of worth for each parameter. One that the budget does not cover is
    passed over for those after it that it does.
    """
    groups, seeds, _, costs = seen
    each = {
        name: jax.vmap(functools.partial(living_parameters, costs[name]))(
            s.blueprint, s.slot_of_seed >= 0
        )
        for name, s in seeds.items()
    }
    cost = groups.flat(each)
    worth = _worth(seen)
    stage = groups.flat({name: s.stage for name, s in seeds.items()})
    rate = worth / jnp.maximum(cost, 1)
    able = (stage == Stage.GRAFTING) & jnp.isfinite(rate) & (worth > 0)
    able &= rate >= config.rent
    if config.budget < 0:
        return able
    others = jnp.sum(jnp.where(stage == Stage.FOSSILIZED, cost, 0))
    order = jnp.argsort(jnp.where(able, -rate, jnp.inf), stable=True)

    def take(room: Array, at: Array) -> tuple[Array, Array]:
        fits = able[at] & (cost[at] <= room)
        return room - jnp.where(fits, cost[at], 0), fits

    _, fits = jax.lax.scan(take, config.budget - others, order)
    return jnp.zeros(able.shape, bool).at[order].set(fits)


def _worth(seen: Seen) -> Float[Array, " P"]:
    """What each seed is worth now, over all places; NaN where it was not measured."""
    signals = seen.signals
    by_group = {n: by_seed(signals[n].worth, s) for n, s in seen.seeds.items()}
    return seen.groups.flat(by_group)


def _advance(
    state: SeedState, signals: Signals, gates: LifecycleConfig
) -> Int[Array, " S"]:
    """The next stage of a part as time goes by and the gates allow; -1 to stay."""
    stage = state.stage

    def passes(target: Stage) -> Array:
        return gates_pass(state, jnp.full(stage.shape, target), signals, gates)

    old = state.epochs_in_stage >= minimum_epochs(stage, gates)
    # What was not measured is no reason to remove anything.
    known = jnp.isfinite(signals.mean_worth) & jnp.isfinite(signals.stability)
    over: dict[Stage, Any] = {
        Stage.GERMINATED: Stage.TRAINING,
        Stage.TRAINING: Stage.GRAFTING,
        Stage.STABILIZATION: Stage.EVALUATING,
        Stage.EVALUATING: jnp.where(
            passes(Stage.CULLED), Stage.CULLED, Stage.FINE_TUNING
        ),
        Stage.FINE_TUNING: jnp.where(
            passes(Stage.FOSSILIZED),
            Stage.FOSSILIZED,
            jnp.where(known, Stage.CULLED, NO_REQUEST),
        ),
        Stage.CULLED: Stage.DORMANT,
        Stage.CANCELLED: Stage.DORMANT,
        Stage.ROLLED_BACK: Stage.DORMANT,
    }
    goal = jnp.full(stage.shape, NO_REQUEST, jnp.int32)
    for source, target in over.items():
        goal = jnp.where((stage == source) & old, target, goal)
    return goal
