"""When, where, what and how to grow: a heuristic over measured signals.

`decide` is a pure, jittable function that sees the seeds of all layers at once. It
asks; `lifecycle.transition` decides. A learned policy has the same signature.
"""

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from esper_jax import placement
from esper_jax.grafting import Strategy
from esper_jax.lifecycle import Commands, LifecycleConfig, gates_pass
from esper_jax.placement import What, Where
from esper_jax.signals import Signals
from esper_jax.stages import NO_REQUEST, Stage
from esper_jax.state import SeedState

__all__ = [
    "ControllerConfig",
    "ControllerMemory",
    "Decide",
    "Reason",
    "decide",
    "init_memory",
]

When = Literal["plateau", "period", "random"]
How = Literal["fixed", "conditions"]


class Reason(enum.IntEnum):
    """Why something germinated at a tick, or nothing did: the first that holds."""

    GERMINATED = 0
    DISABLED = 1
    TARGET_MET = 2
    NOT_YET = 3
    """No plateau, or the period is not over."""
    BUSY = 4
    """As many seeds are in TRAINING, or wait for it, as may be."""
    EMBARGOED = 5
    """No chunk is dormant, and some are under an embargo."""
    FULL = 6
    """No chunk is dormant: a seed lives in each."""
    NO_SLOT = 7
    """No layer with a dormant chunk has a free slot."""
    UNMEASURED = 8
    """What the place is chosen by was not measured."""
    BUDGET_SPENT = 9
    """The budget of parameters does not cover another seed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """Numbers of the heuristic; hashable.

    Args:
      when: what makes it time to germinate: ``"plateau"`` (the held-out loss has not
        improved for ``patience`` ticks), ``"period"`` (``period`` ticks since the last
        time) or ``"random"`` (each tick with a probability of ``1 / period``).
      patience: ticks without improvement of the held-out loss that make a plateau.
      threshold: relative improvement of the held-out loss that counts as one.
      period: ticks.
      where: which dormant chunk is taken first: ``"health"`` (dead or of low variance),
        ``"gradient"`` (its host weights have the largest gradient), ``"round_robin"``
        or ``"random"``.
      what: which blueprint: see `placement.What`.
      blueprint: index of the blueprint that germinates where ``what`` is ``"fixed"``.
      how: the grafting strategy that a seed is grafted with: its own (``"fixed"``), or
        by ``"conditions"``: DRIFT_CONTROLLED where the host's weights drift, else
        GRAD_NORM_GATED where gradients are wild, else MOMENTUM where the loss has just
        improved, else LINEAR.
      births: seeds that germinate at once, at most.
      max_training: seeds that may be in TRAINING (or waiting for it) at once.
      budget: parameters that all living seeds may have together; -1 for no limit.
      target_accuracy: held-out accuracy at which nothing more germinates; -1 for none.
      rent_per_parameter: worth, in units of the held-out loss, that a seed must bring
        for each of its parameters,
      rent_per_operation: and for each floating-point operation that it adds to a row's
        forward pass. A seed whose mean worth does not cover its rent is not kept.
      keep_tolerance: a seed is not kept, whatever its worth, while the mean held-out
        loss is above the one when its grafting began by more than this share of it: a
        host that has come to lean on a seed makes it costly to remove, and may still be
        worse than it was.
      shift_tolerance: seeds that have learned anything, and are not kept for good, are
        rolled back at a tick at which the held-out loss is above its running mean by
        more than this share of it; -1 for never. The data have changed then, and a
        network that has learned the old ones learns the new ones worse than a fresh one
        (E. Nikishin et al., The primacy bias in deep reinforcement learning, ICML 2022;
        S. Dohare et al., Loss of plasticity in deep continual learning, Nature 632,
        2024). Chunks are free for fresh seeds when their embargo is over. A `Governor`
        takes such a rise for breakage where its own limit is lower.
      require_gain: whether a seed is grafted only while its first-order gain is above
        0.
      waiting_limit: ticks in GERMINATED after which a seed whose turn has not come is
        cancelled.
      training_limit: ticks in TRAINING after which a seed that may not be grafted is
        culled.
      grafting_limit: ticks in GRAFTING after which a seed whose ramp has not ended is
        rolled back.
      evaluation_limit: ticks in EVALUATING after which a seed that is neither worth
        tuning nor bad enough to be culled is rolled back.
      tuning_limit: ticks in FINE_TUNING after which a seed that may not be kept is
        culled.
      enabled: if False, nothing germinates; what lives goes on.

    Raises:
      ValueError: naming the field that is out of its range.
    """

    when: str = "plateau"
    patience: int = 10
    threshold: float = 0.01
    period: int = 50
    where: str = "health"
    what: str = "fixed"
    blueprint: int = 0
    how: str = "fixed"
    births: int = 1
    max_training: int = 1
    budget: int = -1
    target_accuracy: float = -1.0
    rent_per_parameter: float = 0.0
    rent_per_operation: float = 0.0
    keep_tolerance: float = 0.02
    shift_tolerance: float = -1.0
    require_gain: bool = False
    waiting_limit: int = 200
    training_limit: int = 200
    grafting_limit: int = 400
    evaluation_limit: int = 200
    tuning_limit: int = 200
    enabled: bool = True

    def __post_init__(self) -> None:
        for name, choices in (
            ("when", When),
            ("where", Where),
            ("what", What),
            ("how", How),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(choices))}; "
                    f"got {getattr(self, name)!r}"
                )
        # A limit that epochs_in_stage (uint16) cannot hold would wrap when compared.
        for name, least, most in (
            ("patience", 1, 2**31 - 1),
            ("period", 1, 2**31 - 1),
            ("births", 1, 2**31 - 1),
            ("max_training", 1, 2**31 - 1),
            ("budget", -1, 2**31 - 1),
            ("blueprint", 0, 126),
            ("training_limit", 1, 65535),
            ("grafting_limit", 1, 65535),
            ("evaluation_limit", 1, 65535),
            ("tuning_limit", 1, 65535),
        ):
            if not least <= getattr(self, name) <= most:
                raise ValueError(
                    f"{name} must be at least {least} and at most {most}, "
                    f"got {getattr(self, name)}"
                )
        if not 0 <= self.threshold < 1:
            raise ValueError(
                f"threshold must be at least 0 and below 1, got {self.threshold}"
            )
        for name in ("rent_per_parameter", "rent_per_operation", "keep_tolerance"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name} must be at least 0 and finite, got {getattr(self, name)}"
                )
        for name in ("target_accuracy", "shift_tolerance"):
            value = getattr(self, name)
            if not (value >= 0 or value == -1):
                raise ValueError(
                    f"{name} must be at least 0, or -1 for none; got {value}"
                )


@struct.dataclass
class ControllerMemory:
    """What the controller remembers between ticks."""

    best_loss: Float[Array, ""]
    """Lowest held-out loss since the last germination."""
    stale: Int[Array, ""]
    """Ticks since it last improved, int32."""
    loss_mean: Float[Array, ""]
    """Running mean of the held-out loss; NaN before the first."""
    since: Int[Array, ""]
    """Ticks since the last germination, int32."""
    turn: Int[Array, ""]
    """Where the round robin goes on, counted over the chunks of all layers, int32."""
    key: Key[Array, ""]
    """Of random choices."""
    reason: Int[Array, ""]
    """`Reason` of the last tick, int8."""
    tried: Int[Array, " N"]
    """Seeds that germinated with each blueprint, int32."""
    kept: Int[Array, " N"]
    """Those of them that became fossils, int32."""
    earned: Float[Array, " N"]
    """Sum of the mean worth of those."""
    before: dict[str, Float[Array, " S"]]
    """``loss_mean`` when each seed's grafting began; NaN where there was none yet."""


def init_memory(
    num_seeds: Mapping[str, int] | None = None,
    *,
    key: Key[Array, ""] | None = None,
    blueprints: int = 1,
) -> ControllerMemory:
    """Memory before the first tick.

    Args:
      num_seeds: seeds of each layer, by name.
      key: of random choices; ``jax.random.key(0)`` if None.
      blueprints: how many the layers have, the fewest of any of them.
    """

    def count() -> Array:
        return jnp.zeros((), jnp.int32)

    return ControllerMemory(
        best_loss=jnp.asarray(jnp.inf, jnp.float32),
        stale=count(),
        loss_mean=jnp.asarray(jnp.nan, jnp.float32),
        since=count(),
        turn=count(),
        key=jax.random.key(0) if key is None else key,
        reason=jnp.asarray(Reason.NOT_YET, jnp.int8),
        tried=jnp.zeros(blueprints, jnp.int32),
        kept=jnp.zeros(blueprints, jnp.int32),
        earned=jnp.zeros(blueprints, jnp.float32),
        before={
            name: jnp.full(s, jnp.nan, jnp.float32)
            for name, s in (num_seeds or {}).items()
        },
    )


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
        name: _advance(
            state,
            signals[name],
            _may_be_kept(signals[name], before[name], memory.loss_mean, config),
            config,
            lifecycle,
        )
        for name, state in seeds.items()
    }
    targets = {
        name: jnp.where(shifted & _has_learned(seeds[name]), Stage.ROLLED_BACK, target)
        for name, target in targets.items()
    }
    targets = _take_turns(seeds, targets, config)
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
            strategy=_strategy(grafted[name], signals[name], memory, config, lifecycle),
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


def _has_learned(state: SeedState) -> Bool[Array, " S"]:
    """Seeds that have learned something, and are not kept for good."""
    return (state.stage >= Stage.TRAINING) & (state.stage <= Stage.FINE_TUNING)


def _may_be_kept(
    signals: Signals, before: Array, loss_mean: Array, config: ControllerConfig
) -> Bool[Array, " S"]:
    """Whether each seed covers its rent and the model is no worse than without growth.

    The first is a paired counterfactual, but one in which the host has come to lean on
    the seed. The second keeps a seed out that the host was better without.
    """
    worse = loss_mean > before + config.keep_tolerance * jnp.abs(before)
    kept = ~jnp.broadcast_to(worse, before.shape)
    if config.rent_per_parameter or config.rent_per_operation:
        rent = config.rent_per_parameter * signals.parameters
        rent = rent + config.rent_per_operation * signals.operations
        kept &= signals.total_improvement >= rent  # False where not measured
    return kept


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


def _strategy(
    grafted: Bool[Array, " S"],
    signals: Signals,
    memory: ControllerMemory,
    config: ControllerConfig,
    lifecycle: LifecycleConfig,
) -> Int[Array, " S"]:
    """The strategy that each seed is grafted with, -1 for its own."""
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


def _advance(
    state: SeedState,
    signals: Signals,
    may_be_kept: Bool[Array, " S"],
    config: ControllerConfig,
    lifecycle: LifecycleConfig,
) -> Int[Array, " S"]:
    """The next stage of each seed for which it is time, else -1. Not germination."""
    stage, epochs = state.stage, state.epochs_in_stage

    def ready(target: Stage) -> Array:
        return gates_pass(state, jnp.full(stage.shape, target), signals, lifecycle)

    def after(limit: int, late: Stage, otherwise: Any) -> Array:
        return jnp.where(epochs >= limit, late, otherwise)

    ramp_done = state.graft.alpha >= lifecycle.grafting.max_alpha
    trained = ready(Stage.GRAFTING)
    if config.require_gain:
        trained &= signals.gain > 0
    keep = jnp.where(may_be_kept, Stage.FOSSILIZED, NO_REQUEST)
    judged = jnp.where(
        ready(Stage.FINE_TUNING) & may_be_kept,
        Stage.FINE_TUNING,
        jnp.where(
            ready(Stage.CULLED),
            Stage.CULLED,
            after(
                config.evaluation_limit,
                Stage.ROLLED_BACK,
                jnp.where(may_be_kept, Stage.FINE_TUNING, NO_REQUEST),
            ),
        ),
    )
    target = jnp.select(
        [stage == s for s in Stage],
        [
            jnp.full(stage.shape, NO_REQUEST),
            jnp.full(stage.shape, Stage.TRAINING),
            jnp.where(
                trained,
                Stage.GRAFTING,
                after(
                    config.training_limit,
                    Stage.CULLED,
                    # Asks in vain, so that the gate's refusal is on record.
                    jnp.where(ready(Stage.GRAFTING), NO_REQUEST, Stage.GRAFTING),
                ),
            ),
            jnp.where(
                ramp_done,
                Stage.STABILIZATION,
                after(config.grafting_limit, Stage.ROLLED_BACK, NO_REQUEST),
            ),
            jnp.full(stage.shape, Stage.EVALUATING),
            judged,
            jnp.where(
                ready(Stage.FOSSILIZED) & may_be_kept,
                Stage.FOSSILIZED,
                after(config.tuning_limit, Stage.CULLED, keep),
            ),
            jnp.full(stage.shape, NO_REQUEST),
            jnp.full(stage.shape, Stage.DORMANT),
            jnp.full(stage.shape, Stage.DORMANT),
            jnp.full(stage.shape, Stage.DORMANT),
        ],
    )
    exempt = (target == Stage.CANCELLED) | (target == Stage.ROLLED_BACK)
    minimum = jnp.asarray(lifecycle.min_epochs, jnp.int32)[stage.astype(jnp.int32)]
    return jnp.where(exempt | (epochs >= minimum), target, NO_REQUEST)


def _take_turns(
    seeds: Mapping[str, SeedState],
    targets: Mapping[str, Int[Array, " S"]],
    config: ControllerConfig,
) -> dict[str, Int[Array, " S"]]:
    """Lets no more than ``max_training`` seeds into TRAINING, in order; cancels those
    that have waited too long."""
    room = config.max_training - sum(
        jnp.sum(s.stage == Stage.TRAINING) for s in seeds.values()
    )
    allowed = {}
    for name, target in targets.items():
        waiting = target == Stage.TRAINING
        turn = jnp.cumsum(waiting)
        late = seeds[name].epochs_in_stage >= config.waiting_limit
        instead = jnp.where(late, Stage.CANCELLED, NO_REQUEST)
        allowed[name] = jnp.where(waiting & (turn > room), instead, target)
        room = room - jnp.sum(waiting & (turn <= room))
    return allowed
