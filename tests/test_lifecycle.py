"""The lifecycle: transitions, gates, slots and memory over whole histories."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lifecycle_oracle as oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_jax import lifecycle
from esper_jax.chunks import ChunkLayout
from esper_jax.lifecycle.commands import Commands, commands_for, no_commands
from esper_jax.lifecycle.grafting import GraftConfig, Strategy
from esper_jax.lifecycle.history import unpack_history
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.slots import resize
from esper_jax.lifecycle.stages import LEGAL, LIVING, Outcome, Stage
from esper_jax.lifecycle.state import (
    SeedState,
    coefficients,
    init_seeds,
    saturating_add,
    slot_coefficients,
    transitions,
)

TICKS = 200
SEEDS = 12
FAST = LifecycleConfig(
    min_epochs=(0, 0, 2, 3, 1, 1, 2, 0, 2, 0, 1),
    max_epochs=4,
    grafting=GraftConfig(
        ramp_duration=8,
        min_alpha=0.125,
        max_alpha=0.75,
        pause_duration=3,
        stability_window=2,
    ),
)
"""A life that fits into a short history."""

PASSING = {
    "reconstruction_loss": 0.005,
    "worth": 0.02,
    "stability": 0.96,
    "error_rate": 0.0,
    "mean_worth": 0.02,
    "drift": 0.0,
    "loss_variance": 0.0,
    "accuracy_variance": 0.0,
    "grad_norm": 0.5,
}
ODD = [math.nan, math.inf, -math.inf, 0.0, 0.0625, 0.125, 0.01, 0.02, 0.1, 0.8, 0.95]
ODD += [1.0, 10.0, 30.0, -0.02, -0.05, -0.2]

step = jax.jit(lifecycle.step, static_argnums=3)
transition = jax.jit(lifecycle.transition, static_argnums=3)


def state_with(stages: list[Stage], **fields: Any) -> SeedState:
    """A state of seeds in the given stages, each living one in a slot of its own."""
    stage = np.array(stages, np.int8)
    n = len(stages)
    owned = np.where(LIVING[stage], np.arange(n), -1).astype(np.int32)
    state = init_seeds(n, n)
    return dataclasses.replace(
        state,
        stage=jnp.asarray(stage),
        slot_of_seed=jnp.asarray(owned),
        seed_of_slot=jnp.asarray(owned),
        **{
            name: jnp.asarray(value, getattr(state, name).dtype)
            for name, value in fields.items()
        },
    )


def outcomes(
    asked: list[tuple[Stage, Stage]],
    metrics: dict[str, float],
    config: LifecycleConfig | None = None,
    **fields: Any,
) -> list[Outcome]:
    """What becomes of each (source, target), at most 4 of them: one compiled shape."""
    n = 4
    stages = [source for source, _ in asked] + [Stage.DORMANT] * (n - len(asked))
    padded = {k: v + [0] * (n - len(asked)) for k, v in fields.items()}
    commands = commands_for(n, {i: target for i, (_, target) in enumerate(asked)})
    _, outcome = transition(
        state_with(stages, **padded),
        commands,
        Signals.unmeasured(**metrics),
        config or LifecycleConfig(),
    )
    return [Outcome(code) for code in outcome[: len(asked)].tolist()]


def seed_rows(state: SeedState) -> dict[str, np.ndarray]:
    """The fields that have one row a seed, by path."""
    per_slot = {"seed_of_slot", "reconstruction", "gain", "errors", "steps"}
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    rows = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return {path: leaf for path, leaf in rows.items() if path[1:] not in per_slot}


# Random histories.


class Inputs(NamedTuple):
    """What happens in each tick: [ticks, seeds]."""

    kind: Any  # 0: no request, 1: something legal, 2: any number
    pick: Any
    wild: Any
    blueprint: Any
    strategy: Any
    errors: Any
    signals: Signals


def random_inputs(number: int, seeds: int = SEEDS) -> Inputs:
    rng = np.random.default_rng(number)
    shape = (TICKS, seeds)

    calm, busy = [0.85, 0.1, 0.05], [0.3, 0.65, 0.05]

    def signal(name: str) -> jax.Array:
        odd = rng.choice(np.array(ODD, np.float32), shape)
        usual = np.float32(PASSING.get(name, math.nan))
        return jnp.asarray(np.where(rng.random(shape) < 0.7, usual, odd))

    def maybe(low: int, high: int, share: float) -> np.ndarray:
        values = rng.integers(low, high, shape)
        return np.where(rng.random(shape) < share, values, -1).astype(np.int8)

    return Inputs(
        kind=rng.choice(3, shape, p=calm if number % 3 == 0 else busy),
        pick=np.where(rng.random(shape) < 0.7, 0, rng.integers(0, 12, shape)),
        wild=rng.integers(-128, 128, shape).astype(np.int8),
        blueprint=maybe(-3, 5, 0.5),
        strategy=maybe(-128, 128, 0.2) if number % 2 else maybe(-1, 9, 0.3),
        errors=np.where(rng.random(shape) < 0.1, rng.integers(0, 200, shape), 0),
        signals=Signals(
            **{f.name: signal(f.name) for f in dataclasses.fields(Signals)}
        ),
    )


NEXT = np.array([(LEGAL[s] * 12 + (-1,) * 12)[:12] for s in Stage], np.int8)


@functools.partial(jax.jit, static_argnums=2)
def play(state: SeedState, inputs: Inputs, config: LifecycleConfig) -> Any:
    """Per tick: the request, the aged state, the new state and the outcome."""

    def tick(state: SeedState, x: Inputs) -> Any:
        legal = jnp.asarray(NEXT)[state.stage.astype(jnp.int32), x.pick]
        target = jnp.select([x.kind == 0, x.kind == 1], [jnp.int8(-1), legal], x.wild)
        commands = Commands(target=target, blueprint=x.blueprint, strategy=x.strategy)
        state = dataclasses.replace(
            state, error_count=saturating_add(state.error_count, x.errors)
        )
        aged = lifecycle.age(state, x.signals, config)
        new, outcome = lifecycle.step(state, commands, x.signals, config)
        return new, (target, aged, new, outcome)

    return jax.lax.scan(tick, state, inputs)[1]


class History(NamedTuple):
    """`play`'s result, on the host."""

    inputs: Inputs
    target: np.ndarray
    aged: SeedState
    new: SeedState
    outcome: np.ndarray


def history(number: int, capacity: int = 5) -> History:
    inputs = random_inputs(number)
    start = init_seeds(SEEDS, capacity, number % 7)
    return History(inputs, *jax.device_get(play(start, inputs, FAST)))


histories = st.integers(0, 2**31).map(history)
few = settings(max_examples=15, deadline=None)


def at(state: SeedState, tick: int) -> SeedState:
    return jax.tree.map(lambda x: x[tick], state)


@few
@given(st.integers(0, 2**31))
def test_histories_equal_the_scalar_model(number: int) -> None:
    h = history(number)
    layer = oracle.Layer(SEEDS, 5, number % 7)
    commands = {
        "target": h.target,
        "blueprint": h.inputs.blueprint,
        "strategy": h.inputs.strategy,
    }
    signals = {
        f.name: np.asarray(getattr(h.inputs.signals, f.name))
        for f in dataclasses.fields(Signals)
    }
    model = oracle.replay(layer, TICKS, commands, signals, h.inputs.errors, FAST)
    for t, outcomes in enumerate(model):
        now, graft = at(h.new, t), at(h.new, t).graft
        seeds = layer.seeds
        exact = {
            "stage": (now.stage, [s.stage for s in seeds]),
            "parent": (now.parent_stage, [s.parent for s in seeds]),
            "blueprint": (now.blueprint, [s.blueprint for s in seeds]),
            "strategy": (now.strategy, [s.strategy for s in seeds]),
            "epochs": (now.epochs_in_stage, [s.epochs for s in seeds]),
            "errors": (now.error_count, [s.errors for s in seeds]),
            "slot": (now.slot_of_seed, [s.slot for s in seeds]),
            "owner": (now.seed_of_slot, layer.slots),
            "pause": (graft.pause, [s.pause for s in seeds]),
            "unstable": (graft.unstable_checks, [s.unstable for s in seeds]),
            "outcome": (h.outcome[t], outcomes),
            "history": (
                unpack_history(now.history),
                [([a << 4 | b for a, b in s.history] + [0] * 10)[:10] for s in seeds],
            ),
        }
        for name, (ours, theirs) in exact.items():
            np.testing.assert_array_equal(ours, theirs, f"{name}, tick {t}")
        close = {
            "alpha": (graft.alpha, [s.alpha for s in seeds]),
            "velocity": (graft.velocity, [s.velocity for s in seeds]),
            "remembered": (graft.stable_alpha, [s.remembered for s in seeds]),
            "previous": (graft.previous_loss, [s.previous for s in seeds]),
        }
        for name, (ours, theirs) in close.items():
            np.testing.assert_allclose(
                ours, theirs, rtol=0, atol=1e-5, err_msg=f"{name}, tick {t}"
            )


def test_random_histories_reach_every_stage_and_outcome() -> None:
    seen: set[tuple[str, int]] = set()
    for number in range(6):
        h = history(number)
        seen |= {("stage", int(s)) for s in np.unique(h.new.stage)}
        seen |= {("outcome", int(o)) for o in np.unique(h.outcome)}
        seen |= {("strategy", int(s)) for s in np.unique(h.new.strategy)}
    outcomes = set(Outcome) - {Outcome.BATCH}  # of what is asked together
    expected = {("stage", s) for s in Stage} | {("outcome", o) for o in outcomes}
    assert seen == expected | {("strategy", s) for s in Strategy}


@few
@given(histories)
def test_a_refused_seed_is_left_exactly_as_it_was(h: History) -> None:
    refused = h.outcome > Outcome.OK
    before, after = seed_rows(h.aged), seed_rows(h.new)
    for path in before:
        np.testing.assert_array_equal(before[path][refused], after[path][refused], path)


@few
@given(histories)
def test_a_slot_is_never_owned_twice_nor_lost(h: History) -> None:
    for stage, slot_of_seed, seed_of_slot in zip(
        h.new.stage, h.new.slot_of_seed, h.new.seed_of_slot, strict=True
    ):
        np.testing.assert_array_equal(slot_of_seed >= 0, LIVING[stage])
        owners = np.flatnonzero(slot_of_seed >= 0)
        np.testing.assert_array_equal(seed_of_slot[slot_of_seed[owners]], owners)
        assert np.count_nonzero(seed_of_slot >= 0) == owners.size


@few
@given(histories)
def test_alpha_stays_in_bounds_and_rises_but_where_stability_reverts(
    h: History,
) -> None:
    c = FAST.grafting
    grafting = h.new.stage == Stage.GRAFTING
    alpha = h.new.graft.alpha
    assert np.all(alpha[grafting] >= c.min_alpha)
    assert np.all(alpha[grafting] <= c.max_alpha)
    stayed = grafting[1:] & grafting[:-1] & (h.outcome[1:] != Outcome.OK)
    monotone = stayed & (h.new.strategy[:-1] != Strategy.STABILITY)
    assert np.all(alpha[1:][monotone] >= alpha[:-1][monotone])
    total, _ = coefficients(h.new)
    assert np.all((total >= 0) & (total <= 1))


@few
@given(histories)
def test_history_holds_the_last_ten_transitions_newest_first(h: History) -> None:
    for seed in range(SEEDS):
        moved = np.flatnonzero(h.outcome[:, seed] == Outcome.OK)
        expected = [
            (Stage(h.aged.stage[t, seed]), Stage(h.new.stage[t, seed])) for t in moved
        ]
        assert transitions(at(h.new, TICKS - 1), seed) == expected[::-1][:10]


@few
@given(st.integers(0, 2**31))
def test_a_seed_depends_on_no_other(number: int) -> None:
    inputs = random_inputs(number)
    order = np.random.default_rng(number).permutation(SEEDS)
    shuffled = jax.tree.map(lambda x: x[:, order], inputs)
    start = init_seeds(SEEDS, SEEDS)
    ours, theirs = (jax.device_get(play(start, x, FAST)) for x in (inputs, shuffled))
    a, b = seed_rows(ours[2]), seed_rows(theirs[2])
    for path in a.keys() - {".slot_of_seed"}:
        np.testing.assert_array_equal(a[path][:, order], b[path], path)
    np.testing.assert_array_equal(ours[3][:, order], theirs[3])


def test_vmap_over_layers_equals_a_loop() -> None:
    runs = [history(number) for number in range(4)]
    states = [at(run.new, 150) for run in runs]
    signals = [at(run.inputs.signals, 151) for run in runs]
    commands = [
        Commands(
            target=run.target[151],
            blueprint=run.inputs.blueprint[151],
            strategy=run.inputs.strategy[151],
        )
        for run in runs
    ]

    def stack(trees: list[Any]) -> Any:
        return jax.tree.map(lambda *x: jnp.stack([jnp.asarray(a) for a in x]), *trees)

    over_layers = jax.jit(
        jax.vmap(lambda s, c, m: lifecycle.step(s, c, m, FAST)),
    )
    at_once = over_layers(stack(states), stack(commands), stack(signals))
    one_by_one = stack(
        [step(s, c, m, FAST) for s, c, m in zip(states, commands, signals, strict=True)]
    )
    jax.tree.map(np.testing.assert_array_equal, at_once, one_by_one)


# Slots.


def test_free_slots_go_to_the_lowest_seeds_in_order() -> None:
    state = init_seeds(6, 3)
    state, outcome = step(
        state,
        commands_for(6, {4: Stage.GERMINATED}),
        Signals.unmeasured(),
        FAST,
    )
    assert state.slot_of_seed.tolist() == [-1, -1, -1, -1, 0, -1]
    everyone = commands_for(
        6, {i: Stage.GERMINATED for i in (5, 3, 2, 1)} | {4: Stage.CANCELLED}
    )
    state, outcome = step(state, everyone, Signals.unmeasured(), FAST)
    ok, none, full = Outcome.OK, Outcome.NONE, Outcome.NO_CAPACITY
    assert outcome.tolist() == [none, ok, ok, ok, ok, full]
    assert state.slot_of_seed.tolist() == [-1, 0, 1, 2, -1, -1]
    assert state.seed_of_slot.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("seeds", "capacity"), [(1, 1), (33, 3), (1025, 40), (3000, 3000)]
)
def test_slots_are_given_out_as_a_plain_loop_would(seeds: int, capacity: int) -> None:
    rng = np.random.default_rng(seeds)
    state = init_seeds(seeds, capacity)
    stage, owners = np.zeros(seeds, int), [-1] * capacity
    nothing = no_commands(seeds)
    for share in (0.02, 0.5, 1.0, 0.0, 0.3):
        asks = rng.random(seeds) < share
        target = np.where(stage == 0, Stage.GERMINATED, Stage.CANCELLED)
        target = np.where(asks, np.where(stage == 9, Stage.DORMANT, target), -1)
        commands = dataclasses.replace(nothing, target=jnp.asarray(target, jnp.int8))
        state, outcome = transition(state, commands, Signals.unmeasured(), FAST)
        for seed in np.flatnonzero(target == Stage.CANCELLED):
            owners[owners.index(seed)], stage[seed] = -1, Stage.CANCELLED
        for seed in np.flatnonzero(target == Stage.DORMANT):
            stage[seed] = Stage.DORMANT
        for seed in np.flatnonzero(target == Stage.GERMINATED):
            if -1 in owners:
                owners[owners.index(-1)], stage[seed] = seed, Stage.GERMINATED
            else:
                assert outcome[seed] == Outcome.NO_CAPACITY
        np.testing.assert_array_equal(state.stage, stage)
        np.testing.assert_array_equal(state.seed_of_slot, owners)


def test_coefficients_by_stage() -> None:
    state = state_with(list(Stage))
    graft = dataclasses.replace(state.graft, alpha=jnp.full(11, 0.25))
    alpha, beta = coefficients(dataclasses.replace(state, graft=graft))
    assert alpha.tolist() == [0, 0, 0, 0.25, 1, 1, 1, 1, 0, 0, 0]
    assert beta.tolist() == [0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    by_slot = slot_coefficients(dataclasses.replace(state, graft=graft))
    assert by_slot[0].tolist() == alpha.tolist()
    assert by_slot[1].tolist() == beta.tolist()


# Gates.


@pytest.mark.parametrize(
    ("source", "target", "metrics", "expected"),
    [
        (Stage.TRAINING, Stage.GRAFTING, {"reconstruction_loss": 0.01}, "OK"),
        (Stage.TRAINING, Stage.GRAFTING, {"reconstruction_loss": 0.0101}, "GATE"),
        (Stage.EVALUATING, Stage.FINE_TUNING, {"worth": 0.0}, "GATE"),
        (Stage.EVALUATING, Stage.FINE_TUNING, {"stability": 0.79}, "GATE"),
        (Stage.EVALUATING, Stage.FINE_TUNING, {"stability": 0.8}, "OK"),
        (Stage.EVALUATING, Stage.CULLED, {"worth": -0.05}, "GATE"),
        (Stage.EVALUATING, Stage.CULLED, {"worth": -0.06}, "OK"),
        (Stage.EVALUATING, Stage.CULLED, {"error_rate": 0.11}, "OK"),
        (Stage.FINE_TUNING, Stage.FOSSILIZED, {"mean_worth": 0.01}, "OK"),
        (Stage.FINE_TUNING, Stage.FOSSILIZED, {"mean_worth": 0.009}, "GATE"),
        (Stage.FINE_TUNING, Stage.FOSSILIZED, {"stability": 0.94}, "GATE"),
    ],
)
def test_gates(
    source: Stage, target: Stage, metrics: dict[str, float], expected: str
) -> None:
    got = outcomes([(source, target)], PASSING | metrics, epochs_in_stage=[100])
    assert got == [Outcome[expected]]


@pytest.mark.parametrize(
    ("threshold", "loss", "expected"),
    [(1e30, math.nan, "GATE"), (math.inf, math.nan, "OK"), (math.inf, 1e9, "OK")],
)
def test_an_infinite_threshold_asks_for_no_measurement(
    threshold: float, loss: float, expected: str
) -> None:
    graft = [(Stage.TRAINING, Stage.GRAFTING)]
    config = LifecycleConfig(reconstruction_threshold=threshold)
    measured = {"reconstruction_loss": loss}
    assert outcomes(graft, measured, config, epochs_in_stage=[100]) == [
        Outcome[expected]
    ]


def test_error_count_culls_above_five() -> None:
    got = outcomes(
        [(Stage.EVALUATING, Stage.CULLED)] * 3,
        {},
        epochs_in_stage=[30] * 3,
        error_count=[5, 6, 255],
    )
    assert got == [Outcome.GATE, Outcome.OK, Outcome.OK]


def test_a_seed_cannot_sit_in_evaluating_for_ever() -> None:
    cull = [(Stage.EVALUATING, Stage.CULLED)] * 2
    epochs = [31, 32]
    never, ok = Outcome.GATE, Outcome.OK
    assert outcomes(cull, {}, epochs_in_stage=epochs) == [never, never]
    limited = LifecycleConfig(max_epochs=32)
    assert outcomes(cull, {}, limited, epochs_in_stage=epochs) == [never, ok]


def test_the_first_rule_that_refuses_names_the_refusal() -> None:
    got = outcomes(
        [
            (Stage.TRAINING, Stage.FOSSILIZED),
            (Stage.TRAINING, Stage.GRAFTING),
            (Stage.TRAINING, Stage.GRAFTING),
            (Stage.TRAINING, Stage.ROLLED_BACK),
        ],
        {},
        epochs_in_stage=[0, 99, 100, 0],
    )
    assert got == [Outcome.ILLEGAL, Outcome.TOO_EARLY, Outcome.GATE, Outcome.OK]


def test_an_embargo_holds_a_culled_seed() -> None:
    got = outcomes(
        [
            (Stage.CULLED, Stage.DORMANT),
            (Stage.ROLLED_BACK, Stage.DORMANT),
            (Stage.CULLED, Stage.DORMANT),
            (Stage.CANCELLED, Stage.DORMANT),
        ],
        {},
        epochs_in_stage=[9, 9, 10, 0],
    )
    assert got == [Outcome.TOO_EARLY, Outcome.TOO_EARLY, Outcome.OK, Outcome.OK]


def test_a_seed_can_leave_a_stage_after_its_minimum_of_ticks() -> None:
    state = state_with([Stage.GRAFTING] + [Stage.DORMANT] * 5)
    state = resize(state, 3)
    ask = commands_for(6, {0: Stage.STABILIZATION})
    codes = []
    for _ in range(3):
        state, outcome = step(state, ask, Signals.unmeasured(), FAST)
        codes.append(int(outcome[0]))
    assert codes == [Outcome.TOO_EARLY, Outcome.TOO_EARLY, Outcome.OK]


def test_nan_metrics_are_refused_by_the_gate_and_disturb_nothing_else() -> None:
    stages = [Stage.TRAINING, Stage.EVALUATING, Stage.FINE_TUNING, Stage.EVALUATING]
    state = state_with(stages, epochs_in_stage=[200] * 4)
    wish = commands_for(
        4,
        {0: Stage.GRAFTING, 1: Stage.FINE_TUNING, 2: Stage.FOSSILIZED, 3: Stage.CULLED},
    )
    config = LifecycleConfig()
    new, outcome = transition(state, wish, Signals.unmeasured(), config)
    assert outcome.tolist() == [Outcome.GATE] * 4
    jax.tree.map(np.testing.assert_array_equal, new, state)


# Small integers, size, tracing.


def test_epochs_saturate_and_never_wrap() -> None:
    @jax.jit
    def live(state: SeedState, ticks: int) -> SeedState:
        return jax.lax.fori_loop(
            0,
            ticks,
            lambda _, s: lifecycle.age(s, Signals.unmeasured(**PASSING), FAST),
            state,
        )

    state = live(state_with([Stage.FOSSILIZED, Stage.GRAFTING]), 40_000)
    assert state.epochs_in_stage.tolist() == [40_000, 40_000]
    state = dataclasses.replace(
        state, epochs_in_stage=jnp.asarray([65_534, 65_535], jnp.uint16)
    )
    for _ in range(3):
        state = live(state, 1)
        assert state.epochs_in_stage.tolist() == [65_535, 65_535]
    assert state.graft.alpha[1] == FAST.grafting.max_alpha


def test_epochs_beyond_int16_are_late_enough() -> None:
    config = dataclasses.replace(FAST, min_epochs=(0, 0, 0, 65_535) + (0,) * 7)
    got = outcomes(
        [(Stage.GRAFTING, Stage.STABILIZATION)] * 3,
        {},
        config,
        epochs_in_stage=[32_768, 65_534, 65_535],
    )
    assert got == [Outcome.TOO_EARLY, Outcome.TOO_EARLY, Outcome.OK]


@pytest.mark.parametrize(
    "dtype", [jnp.bool_, jnp.uint8, jnp.uint16, jnp.int32, jnp.float32]
)
def test_saturating_add(dtype: Any) -> None:
    one = jnp.ones((2,), dtype)
    total = jnp.asarray([0, 3], jnp.uint8)
    for _ in range(300):
        total = saturating_add(total, one)
    assert total.dtype == jnp.uint8
    assert total.tolist() == [255, 255]


def test_saturating_add_of_large_numbers() -> None:
    total = jnp.asarray([0, 250, 255, 10], jnp.uint8)
    more = jnp.asarray([300, 7, 70_000, 2], jnp.int32)
    assert saturating_add(total, more).tolist() == [255, 255, 255, 12]
    big = saturating_add(jnp.asarray([65_000], jnp.uint16), 40_000)
    assert big.tolist() == [65_535]


@pytest.mark.parametrize("seeds", [2, 64, 1000])
def test_a_seed_takes_at_most_80_bytes(seeds: int) -> None:
    state = init_seeds(seeds, seeds)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert size <= 79 * seeds + 4  # and the layer's counter of steps


def test_dtypes_and_shapes_never_change() -> None:
    state = init_seeds(6, 3)
    new, outcome = step(state, no_commands(6), Signals.unmeasured(), FAST)
    same = jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, new
    )
    assert all(jax.tree.leaves(same))
    assert outcome.dtype == jnp.int8


def test_no_value_retraces_and_the_state_is_donated() -> None:
    traces = 0

    def counted(state: SeedState, commands: Commands, signals: Signals) -> Any:
        nonlocal traces
        traces += 1
        return lifecycle.step(state, commands, signals, FAST)

    run = jax.jit(counted, donate_argnums=0)
    state = init_seeds(SEEDS, 5)
    inputs = random_inputs(3)
    for t in range(40):
        before = state
        target = np.where(inputs.kind[t] > 0, inputs.wild[t] % 11, -1).astype(np.int8)
        commands = Commands(
            target=jnp.asarray(target),
            blueprint=jnp.asarray(inputs.blueprint[t]),
            strategy=jnp.asarray(inputs.strategy[t]),
        )
        state, _ = run(state, commands, at(inputs.signals, t))
        assert before.stage.is_deleted()
        assert before.history.newest.is_deleted()
    assert traces == 1
    assert run._cache_size() == 1


def test_the_jaxpr_has_no_callback_and_no_loop_over_seeds() -> None:
    jaxpr = str(
        jax.make_jaxpr(lambda s, c, m: lifecycle.step(s, c, m, FAST))(
            init_seeds(64, 8), no_commands(64), Signals.unmeasured()
        )
    )
    for word in ("callback", "while", "scan"):
        assert word not in jaxpr


# Bad input.


@pytest.mark.parametrize("capacity", [0, -1, 5])
def test_capacity_out_of_range(capacity: int) -> None:
    with pytest.raises(
        ValueError, match=rf"capacity must be an int, from 1 to .*got {capacity}"
    ):
        init_seeds(4, capacity)


@pytest.mark.parametrize("num_seeds", [0, 9])
def test_more_seeds_than_features(num_seeds: int) -> None:
    with pytest.raises(ValueError, match=r"num_seeds must be from 1.*\(8\)"):
        ChunkLayout(8, num_seeds)


def test_chunk_layout_wants_integers() -> None:
    with pytest.raises(TypeError, match="features must be an integer"):
        ChunkLayout(8.0, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 4])
def test_commands_for_seeds_that_do_not_exist(seed: int) -> None:
    with pytest.raises(IndexError, match=f"targets: there is no seed {seed};.*0 to 3"):
        commands_for(4, {seed: Stage.GERMINATED})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": {1: 11}}, "targets: value for seed 1 must be from 0 to 10"),
        ({"blueprints": {1: 128}}, "blueprints: value for seed 1"),
        ({"strategies": {0: 7}}, "strategies: value for seed 0 must be from 0 to 6"),
    ],
)
def test_commands_that_do_not_exist(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        commands_for(4, **arguments)


def test_commands_for_another_number_of_seeds() -> None:
    with pytest.raises(ValueError, match=r"commands.target must have one entry.*4 se"):
        transition(init_seeds(4, 2), no_commands(5), Signals.unmeasured(), FAST)


def test_an_unknown_signal_is_named() -> None:
    with pytest.raises(TypeError, match="unknown signal 'loss'"):
        Signals.unmeasured(loss=1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_epochs", (1, 2)),
        ("min_epochs", (0, 0, -1) + (0,) * 8),
        ("min_epochs", (0, 0, 65_536) + (0,) * 8),
        ("min_epochs", (0, 0, 1.5) + (0,) * 8),
        ("max_epochs", -1),
        ("max_epochs", 2.5),
        ("reconstruction_threshold", math.nan),
        ("min_worth", math.nan),
        ("min_stability", math.nan),
        ("cull_delta", math.nan),
        ("cull_error_rate", "much"),
        ("cull_error_count", math.nan),
        ("cull_error_count", 256),
        ("cull_error_count", -1),
        ("worth_window", 0),
        ("worth_window", 65536),
        ("min_improvement", math.nan),
        ("min_final_stability", None),
        ("grafting", 3),
    ],
)
def test_config_errors_name_the_field(field: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=field):
        LifecycleConfig(**{field: value})


def test_configs_are_hashable_values() -> None:
    stages = [0] * 11
    config = LifecycleConfig(min_epochs=stages)  # type: ignore[arg-type]
    assert hash(config) == hash(LifecycleConfig(min_epochs=tuple(stages)))
    assert config != LifecycleConfig()
