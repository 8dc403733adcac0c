"""Everywhere at once, then keep the best: births early and wide, few kept.

At the first tick a part is born in every place, or in a sample of them. They are judged
for each of their parameters: by how much worse the held-out loss is without the part,
after all have counted and learned together for a number of ticks; or, before any of
them learns, by the gradient of the kernel that it stands beside. The best within the
budget stay.
"""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from esper_jax.blueprints import living_parameters
from esper_jax.groups import Groups
from esper_jax.lifecycle.commands import Commands
from esper_jax.lifecycle.rules import LifecycleConfig, gates_pass, minimum_epochs
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import NO_REQUEST, Stage
from esper_jax.lifecycle.state import SeedState
from esper_jax.policy.germination import Seen
from esper_jax.policy.interface import LayerShape, Policy, PolicyFactory, Setting
from esper_jax.policy.memory import Reason
from esper_jax.policy.places import by_seed
from esper_jax.policy.trial_config import TrialConfig, check_gates

__all__ = ["TrialMemory", "trial"]


@struct.dataclass
class TrialMemory:
    """What a trial remembers between ticks."""

    OF_BIRTHS: ClassVar = ("begun",)
    """See `policy.memory.not_heard`."""

    begun: Bool[Array, ""]
    """Whether the parts were born."""
    judged: Bool[Array, ""]
    """Whether they were judged."""
    key: Key[Array, ""]
    """Random key of the places."""
    reason: Int[Array, ""]
    """`Reason` of the last tick, int8."""


def trial(config: TrialConfig | None = None) -> PolicyFactory:
    """A trial as a policy for any model.

    The parts are born at the first tick, begin to learn at the second and to count at
    the third: call ``tick`` three times before the first step to begin at once. Those
    with ``start="gradient"`` wait for steps after the first. They count and learn in
    GRAFTING for ``ticks``, at each of which the held-out data are evaluated once for
    each part: one long tick is cheapest. Then those that are not kept are rolled back,
    or cancelled at the second tick if they are judged newborn. The others pass
    STABILIZATION and EVALUATING as the gates allow, and learn on in FINE_TUNING.
    Nothing is born any more, which is the reason SETTLED in reports from the tick after
    those that stay begin to tune: `fit` gives back the slots that are free then, and
    `Growth.shrink` does when it is called. Use it with gates that let parts through
    (`trial_lives`).

    Args:
      config: its numbers.

    Returns:
      A function that makes the policy for a model. It raises ValueError if a layer has
      no such blueprint, and its ``init`` if one has fewer slots than seeds.
    """
    if not isinstance(config, TrialConfig | None):
        raise TypeError(f"config must be a TrialConfig, got {config!r}")
    own = config or TrialConfig()

    def make(setting: Setting) -> Policy:
        _check(setting, own)
        groups = setting.groups or Groups.alone(tuple(setting.layers))
        shapes_of = {k: setting.layers[g.layers[0]] for k, g in groups.of.items()}
        costs = {key: shape.costs for key, shape in shapes_of.items()}
        aims = {key: shape.aims or (False,) for key, shape in shapes_of.items()}

        def init(shapes: Mapping[str, LayerShape], key: Key[Array, ""]) -> TrialMemory:
            _check_room(shapes, own)  # afterwards slots may be given back
            check_gates(setting.gates)
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
            return _decide(seen, memory, own, (setting.gates, aims))

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
        if config.judge == "gradient" and config.blueprint not in _aiming(layer):
            raise ValueError(
                "judge='gradient' reads what parts with start='gradient' collect; in "
                f"layer {name!r}, blueprint {config.blueprint} is none. Try "
                "lora(start='gradient')"
            )


def _aiming(layer: LayerShape) -> list[int]:
    """Indices of the blueprints that wait for a gradient."""
    return [i for i, aims in enumerate(layer.aims) if aims]


def _decide(
    seen: Seen,
    memory: TrialMemory,
    config: TrialConfig,
    fixed: tuple[LifecycleConfig, Mapping[str, tuple[bool, ...]]],
) -> tuple[dict[str, Commands], TrialMemory]:
    gates, aims = fixed
    groups, seeds, signals, _ = seen
    widths = {name: s.num_seeds for name, s in seeds.items()}
    key, places, lots = jax.random.split(memory.key, 3)
    stage = groups.flat({name: s.stage for name, s in seeds.items()})
    drawn = jax.random.uniform(places, stage.shape) < config.share
    birth = drawn & (stage == Stage.DORMANT) & ~memory.begun
    ready = {name: _ready(seeds[name], signals[name], aims[name]) for name in seeds}
    judges, which = _judged(seen, memory, config, (gates, groups.flat(ready)))
    # One place after the other, which is not for every tick.
    kept = jax.lax.cond(
        judges,
        lambda: _kept(seen, config, which, _rate(seen, config, which, lots)),
        lambda: jnp.zeros_like(which),
    )
    young = Stage.STABILIZATION if config.judge == "worth" else Stage.TRAINING
    old = Stage.ROLLED_BACK if config.judge == "worth" else Stage.CANCELLED
    verdict = jnp.where(kept, young, old)
    verdict = jnp.where(which & judges, verdict, NO_REQUEST)
    verdict = jnp.where(birth, Stage.GERMINATED, verdict)
    asked = groups.unflat(verdict, widths)
    judged = memory.judged | judges

    def target(
        state: SeedState, signals: Signals, asked: Array, ready: Array
    ) -> Int[Array, " S"]:
        on = _advance(state, signals, gates)
        waits = (state.stage == Stage.GERMINATED) & ~ready
        if config.judge != "worth":
            waits |= (state.stage == Stage.GERMINATED) & ~judged
            settled = state.epochs_in_stage.astype(jnp.int32) >= config.ticks
            settled &= (state.stage == Stage.GRAFTING) & judged
            on = jnp.where(settled, Stage.STABILIZATION, on)
        on = jnp.where(waits, NO_REQUEST, on)
        return jnp.where(asked == NO_REQUEST, on, asked).astype(jnp.int8)

    commands = {}
    begun = memory.begun | jnp.any(birth)
    # Those on probation may still leave; a governor may have taken all out before.
    tried = (stage >= Stage.GERMINATED) & (stage <= Stage.EVALUATING)
    lives = tried | (stage == Stage.FINE_TUNING) | (stage == Stage.FOSSILIZED)
    over = memory.begun & jnp.where(judged, ~jnp.any(tried), ~jnp.any(lives))
    over |= memory.reason == Reason.SETTLED  # whatever comes by a command
    for name, state in seeds.items():
        goal = jax.vmap(target)(state, signals[name], asked[name], ready[name])
        nothing = jnp.full(goal.shape, NO_REQUEST, jnp.int8)
        born = goal == Stage.GERMINATED
        kind = jnp.where(born, config.blueprint, NO_REQUEST).astype(jnp.int8)
        commands[name] = Commands(target=goal, blueprint=kind, strategy=nothing)
    return commands, TrialMemory(
        begun=begun,
        judged=judged,
        key=key,
        reason=jnp.select(
            [jnp.any(birth), over],
            [jnp.int8(Reason.GERMINATED), jnp.int8(Reason.SETTLED)],
            jnp.int8(Reason.NOT_YET),
        ),
    )


def _ready(
    state: SeedState, signals: Signals, aims: tuple[bool, ...]
) -> Bool[Array, "L S"]:
    """Whether a newborn has what it waits for, if its own blueprint waits."""
    waits = jnp.asarray(aims)[jnp.clip(state.blueprint, 0, len(aims) - 1)]
    return ~waits | jnp.isfinite(signals.weight_gradient)


def _judged(
    seen: Seen,
    memory: TrialMemory,
    config: TrialConfig,
    known: tuple[LifecycleConfig, Bool[Array, " P"]],
) -> tuple[Bool[Array, ""], Bool[Array, " P"]]:
    """Whether parts are judged now, all when all have had their time; and which.

    By worth, what could not be measured then, or came by a command, is judged later.
    """
    (gates, ready), groups = known, seen.groups
    stage = groups.flat({name: s.stage for name, s in seen.seeds.items()})
    if config.judge != "worth":
        newborn = stage == Stage.GERMINATED
        return ~memory.judged & jnp.any(newborn) & ~jnp.any(newborn & ~ready), newborn
    age = groups.flat({name: s.epochs_in_stage for name, s in seen.seeds.items()})
    grafted = stage == Stage.GRAFTING
    early = (stage == Stage.GERMINATED) | (stage == Stage.TRAINING)
    ticks = max(config.ticks, gates.min_epochs[Stage.GRAFTING])
    early |= grafted & (age.astype(jnp.int32) < ticks)
    measured = jnp.isfinite(_worth(seen)) & grafted  # else waits for the next tick
    return jnp.any(measured) & ~jnp.any(early), measured


def _rate(
    seen: Seen, config: TrialConfig, which: Bool[Array, " P"], lots: Key[Array, ""]
) -> Float[Array, " P"]:
    """What each part that is judged offers for each of its parameters; else NaN."""
    groups, seeds = seen.groups, seen.seeds
    if config.judge == "random":
        return jnp.where(which, jax.random.uniform(lots, which.shape), jnp.nan)
    if config.judge == "worth":
        offers = _worth(seen)
    else:
        # Each part of a layer finds less than those before it.
        newborn = {n: s.stage == Stage.GERMINATED for n, s in seeds.items()}
        parts = {n: jnp.cumsum(new, axis=-1) for n, new in newborn.items()}
        energy = groups.flat({n: s.weight_gradient for n, s in seen.signals.items()})
        offers = energy / jnp.maximum(groups.flat(parts), 1).astype(energy.dtype)
    costs = jnp.maximum(_costs(seen), 1).astype(offers.dtype)
    return jnp.where(which, offers / costs, jnp.nan)


def _costs(seen: Seen) -> Int[Array, " P"]:
    """Parameters of each living part, over all places."""
    each = {
        name: jax.vmap(functools.partial(living_parameters, seen.costs[name]))(
            s.blueprint, s.slot_of_seed >= 0
        )
        for name, s in seen.seeds.items()
    }
    return seen.groups.flat(each)


def _kept(
    seen: Seen,
    config: TrialConfig,
    which: Bool[Array, " P"],
    rate: Float[Array, " P"],
) -> Bool[Array, " P"]:
    """Which parts are kept if they are judged now, over all places.

    In the order of what they offer for each parameter. One that the budget does not
    cover is passed over for those after it that it does. What lives and is not judged
    now has its share of the budget.
    """
    cost = _costs(seen)
    able = jnp.isfinite(rate) & (rate >= config.rent)
    if config.rent >= 0:
        able &= rate > 0
    if isinstance(config.budget, int) and config.budget < 0:
        return able
    others = jnp.sum(jnp.where(which, 0, cost))
    order = jnp.argsort(jnp.where(able, -rate, jnp.inf), stable=True)

    def take(room: Array, at: Array) -> tuple[Array, Array]:
        fits = able[at] & (cost[at] <= room)
        return room - jnp.where(fits, cost[at], 0), fits

    _, fits = jax.lax.scan(take, config.budget - others, order)
    within = jnp.zeros(able.shape, bool).at[order].set(fits)
    return jnp.where(jnp.asarray(config.budget) < 0, able, within)


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
