"""The lifecycle of seeds: ageing, gates, transitions and the ownership of slots.

`step` is the one function that changes a stage. It is pure, has no branch on values and
no loop over seeds, so it can be jitted, donated and vmapped.
"""

import dataclasses
import functools
import math
import numbers
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from esper_jax import grafting
from esper_jax.grafting import GraftConfig, Strategy
from esper_jax.signals import Signals
from esper_jax.stages import LEGAL, NO_REQUEST, NUM_STAGES, Outcome, Stage
from esper_jax.state import SeedState, push_history, saturating_add

__all__ = [
    "Commands",
    "Gate",
    "LifecycleConfig",
    "age",
    "commands_for",
    "gates",
    "gates_pass",
    "no_commands",
    "step",
    "transition",
]

_MIN_EPOCHS = {
    Stage.TRAINING: 100,
    Stage.GRAFTING: 50,
    Stage.STABILIZATION: 20,
    Stage.EVALUATING: 30,
    Stage.FINE_TUNING: 50,
    Stage.CULLED: 10,
    Stage.ROLLED_BACK: 10,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LifecycleConfig:
    """Minima and thresholds of the gates; hashable. The defaults are the original's.

    Args:
      min_epochs: epochs a seed spends in each stage at least, by stage code.
      max_epochs: a seed this long in EVALUATING may be culled; 0 turns it off.
      reconstruction_threshold: largest reconstruction loss that may be grafted.
      min_stability: stability score needed to leave EVALUATING for FINE_TUNING.
      cull_delta: a worth below this culls,
      cull_error_rate: an error rate above this,
      cull_error_count: or an error count above this; from 0 to 255, where 255 turns
        it off.
      min_improvement: total improvement needed for FOSSILIZED,
      min_final_stability: and the stability.
      worth_window: at how many ticks the worth of a seed in FINE_TUNING is measured up
        to the first at which it may be kept; it is at all later ones. Each measurement
        costs an evaluation of the held-out data. The default measures it throughout.
      grafting: numbers of the grafting strategies.

    Raises:
      TypeError, ValueError: naming the field that is out of its range.
    """

    min_epochs: tuple[int, ...] = tuple(_MIN_EPOCHS.get(s, 0) for s in Stage)
    max_epochs: int = 0
    reconstruction_threshold: float = 0.01
    min_stability: float = 0.8
    cull_delta: float = -0.05
    cull_error_rate: float = 0.1
    cull_error_count: int = 5
    min_improvement: float = 0.01
    min_final_stability: float = 0.95
    worth_window: int = 65535
    grafting: GraftConfig = dataclasses.field(default_factory=GraftConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "min_epochs", tuple(self.min_epochs))
        if len(self.min_epochs) != NUM_STAGES:
            raise ValueError(
                f"min_epochs must have one number for each of the {NUM_STAGES} stages, "
                f"got {self.min_epochs!r}"
            )
        # A number that the counter's type cannot hold would wrap in the comparison.
        for name, value, least, most in [
            *((f"min_epochs[{s.name}]", self.min_epochs[s], 0, 65535) for s in Stage),
            ("max_epochs", self.max_epochs, 0, 65535),
            ("cull_error_count", self.cull_error_count, 0, 255),
            ("worth_window", self.worth_window, 1, 65535),
        ]:
            if not (isinstance(value, numbers.Integral) and least <= value <= most):
                raise ValueError(
                    f"{name} must be an integer from {least} to {most}, got {value!r}"
                )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "grafting":
                if not isinstance(value, GraftConfig):
                    raise TypeError(f"grafting must be a GraftConfig, got {value!r}")
            elif field.name != "min_epochs" and (
                not isinstance(value, numbers.Real) or math.isnan(value)
            ):
                raise ValueError(f"{field.name} must be a number, got {value!r}")


@struct.dataclass
class Commands:
    """What is asked of each seed; -1 asks for nothing.

    ``blueprint`` is read at germination. ``strategy`` may change at any time; it comes
    with the transition where one is requested, and is dropped if that is refused.
    """

    target: Int[Array, "*S"]
    """`Stage` to go to."""
    blueprint: Int[Array, "*S"]
    strategy: Int[Array, "*S"]


def no_commands(num_seeds: int) -> Commands:
    """Commands that ask for nothing."""
    nothing = jnp.full((num_seeds,), NO_REQUEST, jnp.int8)
    return Commands(target=nothing, blueprint=nothing, strategy=nothing)


def commands_for(
    num_seeds: int,
    targets: Mapping[int, Stage] | None = None,
    *,
    blueprints: Mapping[int, int] | None = None,
    strategies: Mapping[int, Strategy] | None = None,
) -> Commands:
    """Commands from dictionaries, checked on the host.

    Args:
      num_seeds: number of seeds of the layer.
      targets: seed to requested stage.
      blueprints: seed to index into the layer's blueprints.
      strategies: seed to grafting strategy.

    Raises:
      IndexError: if a seed does not exist.
      ValueError: if a stage, blueprint index or strategy does not exist.
    """

    def column(name: str, requests: Mapping[int, Any] | None, limit: int) -> np.ndarray:
        values = np.full(num_seeds, NO_REQUEST, np.int8)
        for seed, value in (requests or {}).items():
            if not 0 <= operator.index(seed) < num_seeds:
                raise IndexError(
                    f"{name}: there is no seed {seed}; the layer has seeds 0 to "
                    f"{num_seeds - 1}"
                )
            if not 0 <= operator.index(value) < limit:
                raise ValueError(
                    f"{name}: value for seed {seed} must be from 0 to {limit - 1}, "
                    f"got {value!r}"
                )
            values[seed] = value
        return values

    return Commands(
        target=jnp.asarray(column("targets", targets, NUM_STAGES)),
        blueprint=jnp.asarray(column("blueprints", blueprints, 128)),
        strategy=jnp.asarray(column("strategies", strategies, len(Strategy))),
    )


@dataclasses.dataclass(frozen=True)
class Gate:
    """One comparison that a transition must pass: ``metric compare threshold``."""

    metric: str
    compare: Callable[[Any, Any], Any]
    threshold: float

    def measured(self, state: SeedState, signals: Signals) -> Array:
        """The value that the gate reads, for every seed."""
        source = signals if hasattr(signals, self.metric) else state
        return getattr(source, self.metric)

    def passes(self, state: SeedState, signals: Signals) -> Array:
        """Whether each seed meets it. False where the value is NaN."""
        return self.compare(self.measured(state, signals), self.threshold)


def gates(config: LifecycleConfig) -> dict[tuple[Stage, Stage], tuple[str, list[Gate]]]:
    """The gates of each guarded transition, and whether ``"all"`` or ``"any"`` of them
    must pass."""
    timed_out = Gate("epochs_in_stage", operator.ge, config.max_epochs)
    return {
        (Stage.TRAINING, Stage.GRAFTING): (
            "all",
            [Gate("reconstruction_loss", operator.le, config.reconstruction_threshold)],
        ),
        (Stage.EVALUATING, Stage.FINE_TUNING): (
            "all",
            [
                Gate("performance_delta", operator.gt, 0.0),
                Gate("stability_score", operator.ge, config.min_stability),
            ],
        ),
        (Stage.EVALUATING, Stage.CULLED): (
            "any",
            [
                Gate("performance_delta", operator.lt, config.cull_delta),
                Gate("error_rate", operator.gt, config.cull_error_rate),
                Gate("error_count", operator.gt, config.cull_error_count),
                *([timed_out] if config.max_epochs > 0 else []),
            ],
        ),
        (Stage.FINE_TUNING, Stage.FOSSILIZED): (
            "all",
            [
                Gate("total_improvement", operator.ge, config.min_improvement),
                Gate("final_stability", operator.ge, config.min_final_stability),
            ],
        ),
    }


_LEGAL_PAIRS = [
    np.uint8(source << 4 | target)
    for source, targets in LEGAL.items()
    for target in targets
]
"""The legal transitions, one byte each as in the history."""


def _minimum(stage: Int[Array, "*S"], config: LifecycleConfig) -> Int[Array, "*S"]:
    """``config.min_epochs[stage]``: selects vectorise where a gather does not."""
    minimum = jnp.zeros(stage.shape, jnp.uint16)
    for code, epochs in enumerate(config.min_epochs):
        if epochs:
            minimum = jnp.where(stage == code, jnp.uint16(epochs), minimum)
    return minimum


def gates_pass(
    state: SeedState,
    target: Int[Array, "*S"],
    signals: Signals,
    config: LifecycleConfig,
) -> Bool[Array, "*S"]:
    """Whether each seed meets the gates between its stage and ``target``; true where
    that transition has none."""
    passed = jnp.ones(target.shape, bool)
    for (source, goal), (rule, tests) in gates(config).items():
        results = [test.passes(state, signals) for test in tests]
        combine = operator.and_ if rule == "all" else operator.or_
        met = functools.reduce(combine, results)
        passed &= ~((state.stage == source) & (target == goal)) | met
    return passed


def _first_set(
    flags: Bool[Array, " N"], count: int
) -> tuple[Int[Array, " count"], Int[Array, ""]]:
    """Indices of the first ``count`` set flags, and how many are set in all.

    The flags are packed into words of 32 and blocks of 32 words. A set flag is found by
    descending: its block, its word, its bit. That reads the flags once, where a prefix
    sum over them makes several passes.

    Returns:
      The indices, ``N`` where there are fewer set flags, and their number.
    """
    n = flags.shape[0]
    blocks = -(-n // 1024)
    bit = jnp.arange(32, dtype=jnp.uint32)
    padded = jnp.pad(flags, (0, blocks * 1024 - n)).reshape(blocks, 32, 32)
    words = jnp.sum(padded.astype(jnp.uint32) << bit, axis=-1, dtype=jnp.uint32)
    words = jax.lax.optimization_barrier(words)

    def ones(words: Array) -> Array:
        return jax.lax.population_count(words).astype(jnp.int32)

    def descend(ends: Array, rank: Array) -> tuple[Array, Array]:
        """The child that holds the rank-th flag, given where each child's end."""
        passed = ends <= rank[:, None]
        skipped = jnp.max(jnp.where(passed, ends, 0), axis=-1)
        return jnp.sum(passed, axis=-1, dtype=jnp.int32), rank - skipped

    ends = jnp.cumsum(jnp.sum(ones(words), axis=1))
    rank = jnp.arange(count, dtype=jnp.int32)
    block, left = descend(ends, rank)
    row = words[jnp.minimum(block, blocks - 1)]
    upto = bit[:, None] >= bit
    word, left = descend(jnp.sum(jnp.where(upto, ones(row)[:, None], 0), axis=-1), left)
    chosen = jnp.take_along_axis(row, jnp.minimum(word, 31)[:, None], axis=1)
    place, _ = descend(ones(chosen & (jnp.uint32(0xFFFFFFFF) >> (31 - bit))), left)
    return jnp.where(rank < ends[-1], block * 1024 + word * 32 + place, n), ends[-1]


def _judge(
    state: SeedState, commands: Commands, signals: Signals, config: LifecycleConfig
) -> tuple[Int[Array, " S"], Int[Array, " S"], Int[Array, " S"]]:
    """The `Outcome` of each seed's request as far as it hangs on the seed alone, the
    stage that it asks for, and both stages as the history has them."""
    requested = commands.target != NO_REQUEST
    known = (commands.target >= 0) & (commands.target < NUM_STAGES)
    target = jnp.where(known, commands.target, 0).astype(jnp.uint8)
    pair = state.stage.astype(jnp.uint8) << 4 | target

    legal = known & functools.reduce(
        operator.or_, [pair == legal for legal in _LEGAL_PAIRS]
    )
    exempt = (target == Stage.CANCELLED) | (target == Stage.ROLLED_BACK)
    late_enough = exempt | (state.epochs_in_stage >= _minimum(state.stage, config))
    passed = gates_pass(state, target, signals, config)
    verdict = jnp.select(
        [~requested, ~legal, ~late_enough, ~passed],
        [
            jnp.int8(Outcome.NONE),
            jnp.int8(Outcome.ILLEGAL),
            jnp.int8(Outcome.TOO_EARLY),
            jnp.int8(Outcome.GATE),
        ],
        jnp.int8(Outcome.OK),
    )
    return verdict, target, pair


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
      config: minima and thresholds.

    Returns:
      The new state, and an `Outcome` per seed (int8[S]). A refused seed is left exactly
      as it was.

    Raises:
      ValueError: if the commands are not for ``S`` seeds.
    """
    for field in dataclasses.fields(commands):
        shape = getattr(commands, field.name).shape
        if shape != state.stage.shape:
            raise ValueError(
                f"commands.{field.name} must have one entry for each of the "
                f"{state.num_seeds} seeds, shape {state.stage.shape}; got {shape}. "
                "commands_for(num_seeds, ...) builds and checks them"
            )
    verdict, target, pair = _judge(state, commands, signals, config)
    # Computed once, and not again for each field that depends on it.
    verdict = jax.lax.optimization_barrier(verdict)
    allowed, idle = verdict == Outcome.OK, verdict == Outcome.NONE

    freed = allowed & (target >= Stage.CULLED)
    owner = state.seed_of_slot
    owner = jnp.where((owner >= 0) & freed[jnp.maximum(owner, 0)], -1, owner)
    # The first seed that wants a slot gets the first free one, and so on.
    germinates = allowed & (target == Stage.GERMINATED)
    slots, free = _first_set(owner < 0, state.capacity)
    seeds, wanting = _first_set(germinates, state.capacity)
    rank = jnp.arange(state.capacity)
    served = rank < jnp.minimum(free, wanting)
    last = jnp.max(jnp.where(served, seeds, -1))
    born = germinates & (jnp.arange(state.num_seeds) <= last)
    accepted = allowed & (born | ~germinates)
    outcome = jnp.where(germinates & ~born, jnp.int8(Outcome.NO_CAPACITY), verdict)

    def put(where: Array, new: Any, old: Array) -> Array:
        return jnp.where(where, jnp.asarray(new, old.dtype), old)

    pushed = push_history(state.history, pair)
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
        .at[jnp.where(served, seeds, state.num_seeds)]
        .set(slots, mode="drop"),
        graft=grafting.begin(
            state.graft, accepted & (target == Stage.GRAFTING), config.grafting
        ),
        worth=put(accepted, jnp.nan, state.worth),
        worth_ticks=put(accepted, 0, state.worth_ticks),
        seed_of_slot=owner.at[jnp.where(served, slots, state.capacity)].set(
            seeds, mode="drop"
        ),
    )
    return new, outcome


def age(state: SeedState, signals: Signals, config: LifecycleConfig) -> SeedState:
    """One more epoch in its stage for every seed; those in GRAFTING climb the ramp."""
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
    """One tick: every seed gets an epoch older (`age`), then the requests are decided
    (`transition`), which raises what that raises.

    A seed that entered a stage in one tick can leave it ``min_epochs`` ticks later.

    Returns:
      The new state, and an `Outcome` per seed (int8[S]).
    """
    return transition(age(state, signals, config), commands, signals, config)
