"""A policy that was learned: a small network reads all seeds and asks for what follows.

`network` is the network and `sight` what it reads. Here its outputs become requests:
what the lifecycle would refuse is masked by the lifecycle's own table, minimum ages and
gates; births are taken in the order of their logits, as far as slots and budget go. If
the network ever says something that is not finite, the heuristic decides from then on.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from esper_jax.groups import Groups
from esper_jax.lifecycle.commands import Commands
from esper_jax.lifecycle.grafting import READS, GraftConfig, Strategy
from esper_jax.lifecycle.rules import LifecycleConfig, gates_pass, minimum_epochs
from esper_jax.lifecycle.signals import Signals, running_mean
from esper_jax.lifecycle.stages import LEGAL, NO_REQUEST, NUM_STAGES, Stage
from esper_jax.lifecycle.state import SeedState
from esper_jax.policy import network
from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.germination import Seen
from esper_jax.policy.heuristic import heuristic
from esper_jax.policy.interface import LayerShape, Policy, PolicyFactory, Setting
from esper_jax.policy.learned_file import read_policy
from esper_jax.policy.memory import Reason
from esper_jax.policy.network import Outputs, Weights
from esper_jax.policy.places import by_seed
from esper_jax.policy.sight import Course, Places, features, of_blueprints

__all__ = ["LearnedConfig", "LearnedMemory", "learned", "learned_lives", "load"]

_STYLES = np.array([not READS[s] for s in Strategy])
"""Strategies that it may choose: those that need no measurement of their own."""

_MAY_FOLLOW = np.array([[t in LEGAL[s] for t in Stage] for s in Stage])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedConfig:
    """What a learned policy is told of a run; hashable unless the budget is an array.

    Args:
      path: file of the policy; empty for the one that the package ships.
      budget: most parameters that all living seeds may have together; -1 for no limit.
        An integer scalar array may be traced.
      ticks: length of the run, by which it reads how much of the run is done; 0 if that
        is not known.
      gradients: whether it reads gradients of the host's weights. False where the host
        is frozen.

    Raises:
      ValueError: naming the field that is out of its range.
    """

    path: str = ""
    budget: int | Int[Array, ""] = -1
    ticks: int = 0
    gradients: bool = True

    def __post_init__(self) -> None:
        for name, least in (("budget", -1), ("ticks", 0)):
            value = getattr(self, name)
            if name == "budget" and isinstance(value, jax.Array) and not value.shape:
                continue
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not least <= value < 2**31:
                raise ValueError(
                    f"{name} must be an int from {least} to {2**31 - 1}, got {value!r}"
                )


@struct.dataclass
class LearnedMemory:
    """What a learned policy remembers between ticks.

    It holds the weights. So a checkpoint holds what decides, and a resumed run decides
    as before, whatever the file says then.
    """

    OF_BIRTHS: ClassVar = ()  # It asks again without remembering that it has.

    weights: dict[str, Float[Array, "..."]]
    """Of the network."""
    remembered: Float[Array, "P R"]
    """By each place, over all layers."""
    tick: Int[Array, ""]
    """Ticks so far, int32."""
    first_loss: Float[Array, ""]
    """First finite held-out loss; NaN before it."""
    best_loss: Float[Array, ""]
    """Lowest held-out loss; infinity before the first."""
    loss_mean: Float[Array, ""]
    """Running mean of the held-out loss; NaN before the first."""
    stale: Int[Array, ""]
    """Ticks since ``best_loss`` last improved, int32."""
    broken: Bool[Array, ""]
    """Whether the network has said something that is not finite."""
    instead: Any
    """Memory of the heuristic, which decides then; None for none."""
    reason: Int[Array, ""]
    """`Reason` of the last tick, int8."""


def learned_lives(**fields: Any) -> LifecycleConfig:
    """Ages and gates that leave nearly every decision to a learned policy.

    Those that the shipped policy was trained with. A part that is grafted counts in
    full after four ticks; no gate asks for more than a worth that is not below 0.

    Args:
      **fields: of `LifecycleConfig`, to be other than that.
    """
    ages = dict.fromkeys(Stage, 0) | {
        Stage.TRAINING: 1,
        Stage.GRAFTING: 1,
        Stage.EVALUATING: 1,
        Stage.FINE_TUNING: 2,
        Stage.CULLED: 1,
        Stage.ROLLED_BACK: 1,
    }
    lenient = {
        "min_epochs": tuple(ages[s] for s in Stage),
        "reconstruction_threshold": float("inf"),
        "min_stability": -float("inf"),
        "min_final_stability": -float("inf"),
        "cull_delta": float("inf"),
        "min_improvement": 0.0,
        "grafting": GraftConfig(ramp_duration=4, min_alpha=0.2),
    }
    return LifecycleConfig(**{**lenient, **fields})


def load(
    path: str | Path = "",
    *,
    budget: int = -1,
    ticks: int = 0,
    controller: ControllerConfig | None = None,
) -> PolicyFactory:
    """A learned policy from its file, for ``policy=`` of `build` and `Growth`.

    Args:
      path: of the file; empty for the one that the package ships.
      budget: most parameters that all living seeds may have together; -1 for no limit.
      ticks: length of the run; 0 if that is not known.
      controller: numbers of the heuristic that decides if the network says something
        that is not finite.

    Raises:
      PolicyFileError: if the file is none of this version's policies.
    """
    told = LearnedConfig(path=str(path), budget=budget, ticks=ticks)
    weights = read_policy(path).weights
    return learned(weights, told, controller or ControllerConfig())


def learned(
    weights: Weights,
    config: LearnedConfig | None = None,
    controller: ControllerConfig | None = None,
) -> PolicyFactory:
    """A network as a policy for any model.

    Args:
      weights: of the network, as `network.init_weights` makes them.
      config: what it is told of the run; ``path`` is not read.
      controller: numbers of the heuristic that decides from the tick on at which the
        network says something that is not finite; None for nobody, in which case
        nothing is asked for then.
    """
    told = config or LearnedConfig()

    def make(setting: Setting) -> Policy:
        groups = setting.groups or Groups.alone(tuple(setting.layers))
        costs = {k: setting.layers[g.layers[0]].costs for k, g in groups.of.items()}
        places = sum(layer.num_seeds for layer in setting.layers.values())
        other = None
        if controller is not None:
            other = heuristic(_within(controller, told.budget))(setting)
        reads = {"chunk_gradient", "gradient_ratio"} if told.gradients else set()

        def init(
            shapes: Mapping[str, LayerShape], key: Key[Array, ""]
        ) -> LearnedMemory:
            instead = None if other is None else other.init(shapes, key)
            return _begin(weights, places, instead)

        def decide(
            seeds: Mapping[str, SeedState],
            signals: Mapping[str, Signals],
            memory: LearnedMemory,
        ) -> tuple[dict[str, Commands], LearnedMemory]:
            seen = Seen(groups, seeds, signals, costs)
            commands, new = _decide(seen, memory, told, setting.gates)
            if other is None:
                return commands, new
            asked, instead, reason = jax.lax.cond(
                new.broken,
                lambda: _of_other(other, seeds, signals, memory),
                lambda: (commands, memory.instead, new.reason),
            )
            return asked, dataclasses.replace(new, instead=instead, reason=reason)

        read_by = reads | ((other.reads or set()) if other is not None else set())
        return Policy(init, decide, reads=frozenset(read_by), stacked=True)

    return make


def _within(
    controller: ControllerConfig, budget: int | Int[Array, ""]
) -> ControllerConfig:
    """The heuristic's numbers, with the smaller of its budget and another."""
    own = controller.budget
    if isinstance(own, int) and isinstance(budget, int):
        limits = [limit for limit in (own, budget) if limit >= 0]
        return dataclasses.replace(controller, budget=min(limits, default=-1))
    both = (jnp.where(jnp.asarray(b) < 0, 2**31 - 1, b) for b in (own, budget))
    traced: Any = jnp.minimum(*both)
    return dataclasses.replace(controller, budget=traced)


def _begin(weights: Weights, places: int, instead: Any) -> LearnedMemory:
    def scalar(value: float, dtype: Any = jnp.float32) -> Array:
        return jnp.asarray(value, dtype)

    return LearnedMemory(
        weights={name: jnp.array(x, jnp.float32) for name, x in weights.items()},
        remembered=jnp.zeros((places, network.REMEMBERED), jnp.float32),
        tick=scalar(0, jnp.int32),
        first_loss=scalar(np.nan),
        best_loss=scalar(np.inf),
        loss_mean=scalar(np.nan),
        stale=scalar(0, jnp.int32),
        broken=jnp.asarray(False),
        instead=instead,
        reason=scalar(Reason.NOT_YET, jnp.int8),
    )


def _of_other(
    other: Policy,
    seeds: Mapping[str, SeedState],
    signals: Mapping[str, Signals],
    memory: LearnedMemory,
) -> tuple[dict[str, Commands], Any, Int[Array, ""]]:
    """What the heuristic asks for, its memory, and the reason of the tick."""
    commands, instead = other.decide(seeds, signals, memory.instead)
    told = jnp.where(memory.broken, instead.reason, jnp.int8(Reason.FELL_BACK))
    return commands, instead, told


def _decide(
    seen: Seen,
    memory: LearnedMemory,
    config: LearnedConfig,
    gates: LifecycleConfig,
) -> tuple[dict[str, Commands], LearnedMemory]:
    groups, seeds, signals, costs = seen
    places = Places.of(groups, seeds, costs)
    memory, course = _follow(seen, memory, config)
    worth = groups.flat(
        {n: by_seed(signals[n].mean_worth, s) for n, s in seeds.items()}
    )
    said = network.apply(
        memory.weights,
        features(groups, seeds, signals, places, course),
        of_blueprints(places, worth, course.loss),
        memory.remembered,
    )
    sound = said.finite()
    left = course.budget - jnp.sum(places.cost)
    target = _allowed_target(seen, said, gates)
    kind, born = _births(seen, said, places, target, left)
    target = jnp.where((target == Stage.GERMINATED) & ~born, NO_REQUEST, target)
    target = jnp.where(sound, target, NO_REQUEST)
    style = jnp.argmax(jnp.where(_STYLES, said.strategy, -jnp.inf), axis=1)
    asked = Commands(
        target=target.astype(jnp.int8),
        blueprint=_where(target == Stage.GERMINATED, kind),
        strategy=_where(target == Stage.GRAFTING, style),
    )
    widths = {name: s.num_seeds for name, s in seeds.items()}
    columns = {
        field.name: groups.unflat(getattr(asked, field.name), widths)
        for field in dataclasses.fields(Commands)
    }
    commands = {
        name: Commands(**{field: of[name] for field, of in columns.items()})
        for name in seeds
    }
    grows = jnp.any(target == Stage.GERMINATED)
    reason = jnp.where(grows, Reason.GERMINATED, Reason.NOT_YET)
    reason = jnp.where(sound, reason, Reason.FELL_BACK)
    return commands, dataclasses.replace(
        memory,
        remembered=jnp.where(sound, said.remembered, memory.remembered),
        broken=memory.broken | ~sound,
        reason=reason.astype(jnp.int8),
    )


def _where(which: Bool[Array, " P"], value: Array) -> Int[Array, " P"]:
    return jnp.where(which, value, NO_REQUEST).astype(jnp.int8)


def _follow(
    seen: Seen, memory: LearnedMemory, config: LearnedConfig
) -> tuple[LearnedMemory, Course]:
    """Follows the losses of the run. One that is not finite counts for nothing."""
    loss = seen.common("held_out_loss")
    known = jnp.isfinite(loss)
    first = jnp.where(jnp.isfinite(memory.first_loss), memory.first_loss, loss)
    # By 1% of it, also where losses are negative.
    enough = jnp.where(memory.best_loss > 0, 0.99, 1.01) * memory.best_loss
    better = known & ~(loss >= enough)
    stale = jnp.where(better, 0, memory.stale + 1)
    tick = memory.tick + 1
    budget = jnp.asarray(config.budget, jnp.float32)
    done = jnp.minimum(tick.astype(jnp.float32) / max(config.ticks, 1), 1.0)
    course = Course(
        loss=loss,
        accuracy=seen.common("held_out_accuracy"),
        first_loss=first,
        loss_mean=memory.loss_mean,
        stale=stale,
        done=done if config.ticks else jnp.asarray(jnp.nan, jnp.float32),
        budget=jnp.where(budget < 0, jnp.inf, budget),
    )
    new = dataclasses.replace(
        memory,
        tick=tick,
        first_loss=jnp.where(known, first, memory.first_loss),
        best_loss=jnp.where(better, loss, memory.best_loss),
        loss_mean=running_mean(memory.loss_mean, loss),
        stale=stale,
    )
    return new, course


def _allowed_target(
    seen: Seen, said: Outputs, gates: LifecycleConfig
) -> Int[Array, " P"]:
    """The stage with the highest logit that would not be refused; -1 to stay."""

    def allowed(state: SeedState, signals: Signals) -> Bool[Array, "S 11"]:
        stage = state.stage.astype(jnp.int32)
        old = state.epochs_in_stage >= minimum_epochs(stage, gates)
        columns = []
        for goal in Stage:
            may = jnp.asarray(_MAY_FOLLOW[:, goal])[stage]
            if goal not in (Stage.CANCELLED, Stage.ROLLED_BACK):
                may &= old
            passed = gates_pass(state, jnp.full(stage.shape, goal), signals, gates)
            columns.append(may & passed)
        return jnp.stack(columns)

    by_group = {n: jax.vmap(allowed)(s, seen.signals[n]) for n, s in seen.seeds.items()}
    flat = seen.groups.flat
    may = [flat({n: a[:, goal] for n, a in by_group.items()}) for goal in Stage]
    logits = jnp.where(jnp.stack(may, axis=1), said.target[:, :NUM_STAGES], -jnp.inf)
    best = jnp.argmax(logits, axis=1)
    moves = jnp.max(logits, axis=1) > said.target[:, NUM_STAGES]
    return jnp.where(moves, best, NO_REQUEST)


def _births(
    seen: Seen,
    said: Outputs,
    places: Places,
    target: Int[Array, " P"],
    left: Float[Array, ""],
) -> tuple[Int[Array, " P"], Bool[Array, " P"]]:
    """The blueprint of each place, and where one is born.

    Of the places that want a birth, those with the highest logits come first, in each
    layer as many as slots are free, and over all layers as far as the budget goes.
    """
    groups, seeds = seen.groups, seen.seeds
    price = jnp.asarray(places.price, jnp.float32)
    fits = (price <= left) & np.isfinite(places.price)
    kind = jnp.argmax(jnp.where(fits, said.blueprint, -jnp.inf), axis=1)
    wants = (target == Stage.GERMINATED) & jnp.any(fits, axis=1)
    logit = said.target[:, Stage.GERMINATED] - said.target[:, NUM_STAGES]
    order = jnp.where(wants, -logit, jnp.inf)
    by_layer = groups.unflat(order, {n: s.num_seeds for n, s in seeds.items()})
    has_slot = {
        name: _ranks(by_layer[name])
        < jnp.sum(s.seed_of_slot < 0, axis=-1, keepdims=True)
        for name, s in seeds.items()
    }
    served = wants & groups.flat(has_slot)
    first = jnp.argsort(jnp.where(served, order, jnp.inf), stable=True)
    own = price[jnp.arange(kind.size), kind]
    spent = jnp.cumsum(jnp.where(served, own, 0.0)[first])
    paid = jnp.zeros_like(served).at[first].set(spent <= left)
    return kind, served & paid


def _ranks(order: Float[Array, "L S"]) -> Int[Array, "L S"]:
    """How many chunks of the layer come before each."""
    return jnp.argsort(jnp.argsort(order, axis=-1, stable=True), axis=-1)
