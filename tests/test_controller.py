"""The heuristic: when and where it germinates, and how it moves seeds on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_jax.groups import Groups
from esper_jax.lifecycle.grafting import Strategy
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import NO_REQUEST, NUM_STAGES, Stage
from esper_jax.lifecycle.state import MAX_BLUEPRINTS, init_seeds
from esper_jax.monitor.words import why
from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.heuristic import decide
from esper_jax.policy.memory import Reason, init_memory
from esper_jax.policy.places import Limits, choose

CONFIG = ControllerConfig(patience=3, threshold=0.1)
FREE = LifecycleConfig(min_epochs=(0,) * NUM_STAGES)


def seeds(num_seeds=4, capacity=2, health=None, **stages):
    """Dormant seeds but for ``seed_3="TRAINING"`` and the like."""
    state = init_seeds(num_seeds, capacity)
    stage = state.stage
    for name, value in stages.items():
        stage = stage.at[int(name.removeprefix("seed_"))].set(Stage[value])
    if health is not None:
        state = dataclasses.replace(state, health=jnp.asarray(health, jnp.float32))
    return dataclasses.replace(state, stage=stage)


def run(layers, losses, config=CONFIG, lifecycle=FREE, **signals):
    """Targets after a sequence of held-out losses."""
    memory = init_memory()
    for loss in losses:
        measured = Signals.unmeasured(held_out_loss=loss, **signals)
        commands, memory = decide(
            layers, dict.fromkeys(layers, measured), memory, config, lifecycle
        )
    return {name: c.target.tolist() for name, c in commands.items()}, commands, memory


def test_germinates_the_least_healthy_chunk_of_the_model_at_a_plateau():
    layers = {
        "a": seeds(health=[0.9, 0.4, 0.8, 0.7]),
        "b": seeds(3, health=[0.9, 0.8, 0.3]),
    }
    for plateau in (2, 3):
        targets, commands, _ = run(layers, [1.0] + [0.95] * plateau)
        germinates = Stage.GERMINATED if plateau >= 3 else NO_REQUEST
        assert targets == {"a": [-1] * 4, "b": [-1, -1, germinates]}
    assert commands["b"].blueprint.tolist() == [-1, -1, CONFIG.blueprint]


def test_an_improving_loss_is_no_plateau():
    layers = {"a": seeds(health=[0.1] * 4)}
    targets, _, memory = run(layers, [0.8**i for i in range(12)])
    assert targets == {"a": [-1] * 4}
    assert memory.stale == 0


def test_a_loss_below_zero_can_stand_still_too():
    layers = {"a": seeds(health=[0.1] * 4)}
    targets, _, _ = run(layers, [-1.0, *[-1.05] * 3])
    assert targets["a"][0] == Stage.GERMINATED
    targets, _, memory = run(layers, [-1.0, -1.2, -1.4, -1.6])
    assert targets == {"a": [-1] * 4}
    assert memory.stale == 0


def test_a_loss_that_is_not_measured_is_no_improvement():
    layers = {"a": seeds(health=[0.1] * 4)}
    targets, _, memory = run(layers, [1.0, *[float("nan")] * 3])
    assert targets["a"][0] == Stage.GERMINATED
    assert memory.stale == 0


@pytest.mark.parametrize(
    "blocked",
    [
        {"a": seeds(seed_1="TRAINING", health=[0.1] * 4)},
        {"a": seeds(seed_1="GERMINATED", health=[0.1] * 4)},
        {"a": seeds(health=[jnp.nan] * 4)},
        {
            "a": dataclasses.replace(
                seeds(health=[0.1] * 4), seed_of_slot=jnp.array([1, 2], jnp.int32)
            )
        },
    ],
    ids=["one in training", "one waiting", "health unknown", "no free slot"],
)
def test_does_not_germinate(blocked):
    targets, _, _ = run(blocked, [1.0] * 9)
    assert Stage.GERMINATED not in targets["a"]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_germinating_at_a_loss_that_is_not_finite_spoils_no_later_tick(loss):
    layers = {"a": seeds(8, 8, health=[0.1] * 8)}
    config = dataclasses.replace(CONFIG, max_training=9)
    _, _, memory = run(layers, [1.0, *[loss] * 3], config)
    assert memory.reason == Reason.GERMINATED
    for stale, loss in ((0, 0.9), (1, 0.9), (0, 0.7), (0, 0.5)):
        measured = Signals.unmeasured(held_out_loss=loss)
        _, memory = decide(layers, {"a": measured}, memory, config, FREE)
        assert (memory.stale, memory.reason) == (stale, Reason.NOT_YET)
    assert memory.best_loss == np.float32(0.5)


def test_waits_for_the_next_plateau_after_germinating():
    layers = {"a": seeds(health=[0.1] * 4)}
    assert run(layers, [1.0] * 4)[0]["a"][0] == Stage.GERMINATED
    assert run(layers, [1.0] * 5)[0]["a"] == [-1] * 4


def test_disabled_germinates_nothing():
    config = dataclasses.replace(CONFIG, enabled=False)
    assert run({"a": seeds(health=[0.1] * 4)}, [1.0] * 9, config)[0]["a"] == [-1] * 4


def test_no_more_than_max_training_are_let_in():
    layers = {
        "a": seeds(seed_0="GERMINATED", seed_2="GERMINATED"),
        "b": seeds(seed_1="GERMINATED"),
    }
    targets, _, _ = run(layers, [1.0])
    assert targets == {"a": [Stage.TRAINING, -1, -1, -1], "b": [-1] * 4}
    config = dataclasses.replace(CONFIG, max_training=3)
    targets, _, _ = run(layers, [1.0], config)
    assert [t for row in targets.values() for t in row].count(Stage.TRAINING) == 3


def test_a_seed_whose_turn_does_not_come_is_cancelled():
    state = seeds(seed_0="TRAINING", seed_2="GERMINATED")
    for epochs, expected in ((199, NO_REQUEST), (200, Stage.CANCELLED)):
        waited = dataclasses.replace(
            state, epochs_in_stage=state.epochs_in_stage.at[2].set(epochs)
        )
        assert run({"a": waited}, [1.0])[0]["a"][2] == expected


GOOD = {
    "reconstruction_loss": 0.0,
    "worth": 0.1,
    "error_rate": 0.0,
    "mean_worth": 0.1,
    "stability": 1.0,
}


@pytest.mark.parametrize(
    ("stage", "epochs", "signals", "expected"),
    [
        ("TRAINING", 0, GOOD, Stage.GRAFTING),
        ("TRAINING", 5, {}, Stage.GRAFTING),  # asks, and is refused by the gate
        ("TRAINING", 200, {}, Stage.CULLED),
        ("GRAFTING", 399, GOOD, NO_REQUEST),  # the ramp has not ended
        ("GRAFTING", 400, GOOD, Stage.ROLLED_BACK),
        ("STABILIZATION", 0, {}, Stage.EVALUATING),
        ("EVALUATING", 0, GOOD, Stage.FINE_TUNING),
        ("EVALUATING", 0, {**GOOD, "worth": -0.1}, Stage.CULLED),
        ("EVALUATING", 200, {**GOOD, "worth": 0.0}, Stage.ROLLED_BACK),
        ("FINE_TUNING", 0, GOOD, Stage.FOSSILIZED),
        ("FINE_TUNING", 200, {}, Stage.CULLED),
        ("FOSSILIZED", 500, GOOD, NO_REQUEST),
        ("CULLED", 0, {}, Stage.DORMANT),
        ("CANCELLED", 0, {}, Stage.DORMANT),
        ("ROLLED_BACK", 0, {}, Stage.DORMANT),
    ],
)
def test_moves_a_seed_on(stage, epochs, signals, expected):
    state = seeds(seed_1=stage)
    state = dataclasses.replace(
        state, epochs_in_stage=state.epochs_in_stage.at[1].set(epochs)
    )
    targets, _, _ = run({"a": state}, [1.0], **signals)
    assert targets["a"] == [-1, expected, -1, -1]


def test_a_finished_ramp_leads_to_stabilization():
    state = seeds(seed_1="GRAFTING")
    graft = dataclasses.replace(state.graft, alpha=state.graft.alpha.at[1].set(1.0))
    targets, _, _ = run({"a": dataclasses.replace(state, graft=graft)}, [1.0])
    assert targets["a"][1] == Stage.STABILIZATION


def test_keeps_to_the_minimum_epochs():
    state = seeds(seed_1="TRAINING", seed_2="CULLED")
    assert run({"a": state}, [1.0], lifecycle=LifecycleConfig(), **GOOD)[0] == {
        "a": [-1] * 4
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("patience", 0),
        ("threshold", 1.0),
        ("threshold", float("nan")),
        ("max_training", 0),
        ("training_limit", 0),
        ("training_limit", 65536),
        ("waiting_limit", 0),
        ("waiting_limit", 65536),
        ("blueprint", -1),
        ("blueprint", MAX_BLUEPRINTS),
    ],
)
def test_config_names_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        ControllerConfig(**{field: value})


COSTS = {"a": np.array([[10] * 4, [30] * 4, [2] * 4])}


def ask(state, config, memory=None, costs=COSTS, ticks=1, **signals):
    """Seeds that germinate at the last of some ticks, their blueprint, the memory."""
    memory = memory or init_memory({"a": 4}, blueprints=3)
    signals = {"held_out_loss": 1.0} | signals
    for _ in range(ticks):
        measured = Signals.unmeasured(**signals)
        commands, memory = decide(
            {"a": state}, {"a": measured}, memory, config, FREE, costs
        )
    born = [i for i, t in enumerate(commands["a"].target) if t == Stage.GERMINATED]
    return born, commands["a"].blueprint.tolist(), memory


NOW = ControllerConfig(when="period", period=1, births=2, max_training=2)


def test_a_period_is_a_period():
    config = dataclasses.replace(NOW, period=3)
    state = seeds(health=[0.1] * 4)
    memory, born = None, []
    for _ in range(7):
        new, _, memory = ask(state, config, memory)
        born.append(bool(new))
    assert born == [False, False, True, False, False, True, False]


def test_random_times_come_at_their_rate_and_from_the_key():
    config = dataclasses.replace(NOW, when="random", period=4)
    state = seeds(health=[0.1] * 4)

    def times(key):
        memory = init_memory({"a": 4}, key=jax.random.key(key), blueprints=3)

        def step(memory, _):
            _, memory = decide(
                {"a": state},
                {"a": Signals.unmeasured(held_out_loss=1.0)},
                memory,
                config,
                FREE,
                COSTS,
            )
            return memory, memory.reason == Reason.GERMINATED

        return jax.lax.scan(step, memory, None, length=400)[1]

    first = times(0)
    assert 0.18 < jnp.mean(first) < 0.32
    assert not np.array_equal(first, times(1))
    np.testing.assert_array_equal(first, times(0))


def test_places():
    state = seeds(health=[0.9, 0.4, 0.8, 0.7])
    gradient = jnp.array([3.0, 1.0, jnp.nan, 2.0])
    assert ask(state, NOW)[0] == [1, 3]
    config = dataclasses.replace(NOW, where="gradient")
    assert ask(state, config, chunk_gradient=gradient)[0] == [0, 3]
    config = dataclasses.replace(NOW, where="round_robin", births=1)
    memory, visited = None, []
    for _ in range(5):
        new, _, memory = ask(state, config, memory)
        visited += new
    assert visited == [0, 1, 2, 3, 0]
    config = dataclasses.replace(NOW, where="random", births=1)
    memory, visited = None, set()
    for _ in range(24):
        new, _, memory = ask(state, config, memory)
        visited |= set(new)
    assert visited == {0, 1, 2, 3}


def test_no_more_at_once_than_slots_places_and_turns():
    state = seeds(capacity=2, health=[0.9, 0.4, 0.8, 0.7])
    many = dataclasses.replace(NOW, births=9, max_training=9)
    assert ask(state, many)[0] == [1, 3]  # two slots
    state = seeds(capacity=4, health=[0.9, 0.4, 0.8, jnp.nan])
    assert ask(state, many)[0] == [0, 1, 2]
    assert ask(state, dataclasses.replace(many, max_training=1))[0] == [1]
    # Blueprint 1 costs 30: a budget of 70 holds two.
    budget = dataclasses.replace(many, blueprint=1, budget=70)
    assert ask(state, budget)[0] == [1, 2]


def chosen(layers, births, at_once=99, room=jnp.inf, costs=None):
    """Seeds that `choose` picks by health, by layer."""
    groups = Groups.alone(tuple(layers))
    stacked = groups.stack(layers)
    picked = choose(
        groups,
        stacked,
        {name: state.health for name, state in stacked.items()},
        {
            n: jnp.array((costs or {}).get(n, [1] * s.num_seeds))
            for n, s in layers.items()
        },
        Limits(births=births, at_once=at_once, room=room),
    )
    return {name: np.flatnonzero(flags).tolist() for name, flags in picked.items()}


def test_a_layer_without_slots_does_not_stand_in_the_way_of_others():
    layers = {
        "a": seeds(4, capacity=1, health=[0.1, 0.2, 0.3, 0.4]),
        "b": seeds(2, capacity=1, health=[0.8, 0.7]),
        "c": seeds(2, capacity=2, health=[0.9, jnp.nan]),
    }
    assert chosen(layers, births=1) == {"a": [0], "b": [], "c": []}
    assert chosen(layers, births=2) == {"a": [0], "b": [1], "c": []}
    assert chosen(layers, births=9) == {"a": [0], "b": [1], "c": [0]}
    assert chosen(layers, births=9, at_once=2) == {"a": [0], "b": [1], "c": []}
    assert chosen(layers, births=9, at_once=0) == {"a": [], "b": [], "c": []}


def test_a_place_that_costs_too_much_does_not_stand_in_the_way_of_others():
    layers = {"a": seeds(2, 2, health=[0.1, 0.2]), "b": seeds(3, 3, health=[0.5] * 3)}
    costs = {"a": [9, 4], "b": [3, 3, 3]}
    assert chosen(layers, 9, room=8, costs=costs) == {"a": [1], "b": [0]}
    assert chosen(layers, 1, room=3, costs=costs) == {"a": [], "b": [0]}
    assert chosen(layers, 9, room=2, costs=costs) == {"a": [], "b": []}


@pytest.mark.parametrize("seed", range(3))
def test_choose_is_a_plain_loop_over_the_places(seed):
    rng = np.random.default_rng(seed)
    layers, costs = {}, {}
    for name, n in (("a", 7), ("b", 1), ("c", 5)):
        health = rng.choice([0.1, 0.2, 0.3, np.nan], n)
        layers[name] = seeds(n, rng.integers(1, n + 1), health=health)
        costs[name] = rng.integers(1, 4, n).tolist()
    births, at_once, room = (int(x) for x in rng.integers(1, 9, 3))
    expected = {name: [] for name in layers}
    places = sorted(
        (float(s.health[i]), order, i, name)
        for order, (name, s) in enumerate(layers.items())
        for i in range(s.num_seeds)
        if np.isfinite(s.health[i]) and costs[name][i] <= room
    )
    left, spent = min(births, at_once), 0
    for _, _, i, name in places:
        if len(expected[name]) == layers[name].capacity:
            continue
        spent += costs[name][i]
        if not left or spent > room:
            break
        left -= 1
        expected[name].append(i)
    expected = {name: sorted(found) for name, found in expected.items()}
    assert chosen(layers, births, at_once, room, costs) == expected


@pytest.mark.parametrize(
    ("what", "tried", "kept", "earned", "expected"),
    [
        ("performance", [2, 2, 0], [1, 1, 0], [0.1, 0.3, 0.0], 2),  # not tried yet
        ("performance", [2, 4, 1], [1, 1, 0], [0.1, 0.3, 0.0], 1),
        ("stability", [4, 4, 4], [1, 3, 2], [9.0, 0.1, 0.1], 1),
        ("risk_averse", [4, 4, 4], [4, 4, 0], [9.0, 9.0, 0.0], 2),
        ("novelty", [4, 3, 4], [4, 0, 4], [9.0, 0.0, 9.0], 1),
        ("hybrid", [4, 4, 4], [4, 1, 1], [4.0, 0.1, 0.1], 0),
        ("fixed", [4, 4, 4], [4, 1, 1], [4.0, 0.1, 0.1], 0),
    ],
)
def test_blueprints(what, tried, kept, earned, expected):
    memory = dataclasses.replace(
        init_memory({"a": 4}, blueprints=3),
        tried=jnp.array(tried),
        kept=jnp.array(kept),
        earned=jnp.array(earned, jnp.float32),
    )
    state = seeds(health=[0.1] * 4)
    config = dataclasses.replace(NOW, what=what, births=1)
    _, kinds, after = ask(state, config, memory)
    assert kinds == [expected, -1, -1, -1]
    assert after.tried.tolist() == [t + (i == expected) for i, t in enumerate(tried)]


def test_what_is_kept_is_booked_to_its_blueprint():
    state = seeds(seed_1="FINE_TUNING", seed_2="FINE_TUNING")
    state = dataclasses.replace(state, blueprint=jnp.array([0, 2, 1, 0], jnp.int8))
    worth = jnp.array([0.0, 0.25, -0.5, 0.0])
    _, _, memory = ask(
        state,
        ControllerConfig(enabled=False),
        mean_worth=worth,
        stability=1.0,
    )
    assert memory.kept.tolist() == [0, 0, 1]
    np.testing.assert_allclose(memory.earned, [0, 0, 0.25])


@pytest.mark.parametrize(
    ("signals", "losses", "expected"),
    [
        ({"drift": 1.0, "grad_norm": 1e9}, [1.0, 0.5], Strategy.DRIFT_CONTROLLED),
        ({"drift": 0.0, "grad_norm": 1e9}, [1.0, 0.5], Strategy.GRAD_NORM_GATED),
        ({"drift": 0.0, "grad_norm": 1.0}, [1.0, 0.5], Strategy.MOMENTUM),
        ({"drift": 0.0, "grad_norm": 1.0}, [1.0, 1.0], Strategy.LINEAR),
    ],
)
def test_the_strategy_follows_the_conditions(signals, losses, expected):
    config = ControllerConfig(how="conditions", patience=9)
    layers = {"a": seeds(seed_2="TRAINING", seed_1="GRAFTING")}
    _, commands, _ = run(layers, losses, config, reconstruction_loss=0.0, **signals)
    assert commands["a"].target.tolist()[2] == Stage.GRAFTING
    assert commands["a"].strategy.tolist() == [-1, -1, expected, -1]


RESTING = dict.fromkeys(["seed_0", "seed_1", "seed_2"], "CULLED")


@pytest.mark.parametrize(
    ("state", "changes", "signals", "reason"),
    [
        (seeds(health=[0.1] * 4), {}, {}, Reason.GERMINATED),
        (seeds(health=[0.1] * 4), {"enabled": False}, {}, Reason.DISABLED),
        (seeds(health=[0.1] * 4), {"budget": 0}, {}, Reason.BUDGET_SPENT),
        (seeds(health=[0.1] * 4), {"budget": 9}, {}, Reason.BUDGET_SPENT),
        (
            seeds(health=[0.1] * 4),
            {"target_accuracy": 0.9},
            {"held_out_accuracy": 0.9},
            Reason.TARGET_MET,
        ),
        (
            seeds(health=[0.1] * 4),
            {"target_accuracy": 0.9},
            {"held_out_accuracy": 0.89},
            Reason.GERMINATED,
        ),
        (seeds(health=[0.1] * 4), {"period": 2}, {}, Reason.NOT_YET),
        (
            seeds(seed_0="TRAINING", seed_1="GERMINATED", health=[0.1] * 4),
            {},
            {},
            Reason.BUSY,
        ),
        (seeds(**RESTING, seed_3="CULLED"), {}, {}, Reason.EMBARGOED),
        (seeds(**RESTING, seed_3="FOSSILIZED"), {}, {}, Reason.EMBARGOED),
        (
            seeds(**dict.fromkeys([f"seed_{i}" for i in range(4)], "FOSSILIZED")),
            {},
            {},
            Reason.FULL,
        ),
        (
            dataclasses.replace(
                seeds(health=[0.1] * 4), seed_of_slot=jnp.array([1, 2], jnp.int32)
            ),
            {},
            {},
            Reason.NO_SLOT,
        ),
        (seeds(), {}, {}, Reason.UNMEASURED),
        (
            seeds(health=[0.1] * 4),
            {"where": "gradient"},
            {},
            Reason.UNMEASURED,
        ),
    ],
)
def test_asked_for_the_impossible_it_does_nothing_and_says_why(
    state, changes, signals, reason
):
    lasting = LifecycleConfig(min_epochs=tuple(int(s >= Stage.CULLED) for s in Stage))
    memory = init_memory({"a": 4}, blueprints=3)
    measured = Signals.unmeasured(held_out_loss=1.0, **signals)
    commands, memory = decide(
        {"a": state},
        {"a": measured},
        memory,
        dataclasses.replace(NOW, **changes),
        lasting,
        COSTS,
    )
    assert memory.reason == reason
    born = jnp.any(commands["a"].target == Stage.GERMINATED)
    assert born == (reason == Reason.GERMINATED)
    assert ("nothing germinates" in why(reason)) == (reason != Reason.GERMINATED)


def test_a_budget_needs_costs():
    with pytest.raises(ValueError, match="costs"):
        ask(seeds(), dataclasses.replace(NOW, budget=5), costs=None)


TUNED = {"mean_worth": 0.1, "stability": 1.0}


@pytest.mark.parametrize(
    ("rent", "kept"),
    [
        ({}, True),
        ({"rent_per_parameter": 0.0009}, True),
        ({"rent_per_parameter": 0.0011}, False),
        ({"rent_per_operation": 0.0006}, False),
    ],
)
def test_a_seed_that_does_not_cover_its_rent_is_culled(rent, kept):
    config = ControllerConfig(tuning_limit=50, evaluation_limit=50, **rent)
    state = seeds(seed_1="FINE_TUNING", seed_2="EVALUATING")
    cost = {"parameters": 100.0, "operations": 200.0, **GOOD, **TUNED}
    first, second = (Stage.FOSSILIZED, Stage.FINE_TUNING) if kept else (-1, -1)
    assert run({"a": state}, [1.0], config, **cost)[0]["a"] == [-1, first, second, -1]
    old = dataclasses.replace(state, epochs_in_stage=state.epochs_in_stage + 50)
    if not kept:
        first, second = Stage.CULLED, Stage.ROLLED_BACK
    assert run({"a": old}, [1.0], config, **cost)[0]["a"] == [-1, first, second, -1]


@pytest.mark.parametrize(("now", "kept"), [(0.9, True), (1.01, True), (1.1, False)])
def test_a_seed_that_the_host_was_better_without_is_not_kept(now, kept):
    # Costly to remove, and yet the model is worse than when its grafting began.
    memory = dataclasses.replace(
        init_memory(),
        loss_mean=jnp.float32(now),
        before={"a": jnp.array([jnp.nan, 1.0, 1.0, jnp.nan])},
    )
    state = seeds(seed_1="FINE_TUNING", seed_2="FINE_TUNING")
    state = dataclasses.replace(
        state, epochs_in_stage=state.epochs_in_stage.at[2].set(200)
    )
    measured = Signals.unmeasured(held_out_loss=now, mean_worth=5.0, stability=1.0)
    commands, _ = decide(
        {"a": state}, {"a": measured}, memory, ControllerConfig(), FREE
    )
    expected = [Stage.FOSSILIZED] * 2 if kept else [NO_REQUEST, Stage.CULLED]
    assert commands["a"].target.tolist()[1:3] == expected


def test_what_the_host_was_before_grafting_is_remembered_until_the_seed_is_gone():
    layers = {"a": seeds(seed_1="TRAINING")}
    _, _, memory = run(layers, [1.0], reconstruction_loss=0.0)
    np.testing.assert_array_equal(memory.before["a"], [jnp.nan, 1.0, jnp.nan, jnp.nan])
    grafting = {"a": seeds(seed_1="GRAFTING")}
    measured = {"a": Signals.unmeasured(held_out_loss=0.5)}
    _, memory = decide(grafting, measured, memory, CONFIG, FREE)
    assert memory.before["a"][1] == 1.0
    _, memory = decide({"a": seeds()}, measured, memory, CONFIG, FREE)
    assert jnp.isnan(memory.before["a"][1])


def test_what_has_grown_is_rolled_back_when_the_data_have_changed():
    names = ("TRAINING", "GRAFTING", "EVALUATING", "FINE_TUNING", "FOSSILIZED")
    layers = {"a": seeds(8, 8, **{f"seed_{i}": n for i, n in enumerate(names)})}
    layers["a"] = dataclasses.replace(
        layers["a"], stage=layers["a"].stage.at[5].set(Stage.GERMINATED)
    )
    slow = LifecycleConfig()  # a rollback waits for no minimum
    config = dataclasses.replace(CONFIG, shift_tolerance=0.5)
    back = Stage.ROLLED_BACK
    changed = [back, back, back, back, -1, -1, -1, -1]
    for losses, expected in (
        ([1.0, 1.0, 1.6], changed),
        ([1.0, 1.0, 1.4], [-1] * 8),
        ([1.0, 1.0, jnp.nan], [-1] * 8),
        ([1.0, 1.0, jnp.inf], [-1] * 8),
        ([1.0, 1.0, jnp.inf, 1.6], changed),
        ([1.6], [-1] * 8),  # nothing to compare it with
        ([1.0, 1.0, 1.6, 1.6], [-1] * 8),  # which is the usual loss from then on
    ):
        targets, _, _ = run(layers, losses, config, slow)
        assert targets["a"] == expected, losses
    targets, _, _ = run(layers, [1.0, 100.0], CONFIG, slow)  # unless asked for
    assert targets["a"] == [-1] * 8


def test_after_a_change_of_data_a_plateau_is_measured_afresh():
    config = dataclasses.replace(CONFIG, shift_tolerance=0.5)
    layers = {"a": seeds(health=[0.1] * 4)}
    worse, better = [1.0, 0.5, 3.0], [2.5, 2.0, 1.6]  # above the best of before
    targets, _, memory = run(layers, worse + better, config)
    assert targets["a"] == [-1] * 4
    assert memory.stale == 0
    assert Stage.GERMINATED in run(layers, worse + better[:2])[0]["a"]  # without it


def test_grafting_can_wait_for_a_gain():
    config = dataclasses.replace(CONFIG, require_gain=True, training_limit=9)
    layers = {"a": seeds(seed_1="TRAINING")}
    for gain, expected in ((0.1, Stage.GRAFTING), (-0.1, -1), (jnp.nan, -1)):
        targets, _, _ = run(layers, [1.0], config, reconstruction_loss=0.0, gain=gain)
        assert targets["a"][1] == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("when", "never"),
        ("where", "there"),
        ("what", "that"),
        ("how", "so"),
        ("period", 0),
        ("births", 0),
        ("budget", -2),
        ("target_accuracy", -0.5),
        ("shift_tolerance", -0.5),
        ("shift_tolerance", float("nan")),
        ("rent_per_parameter", -1.0),
        ("keep_tolerance", float("nan")),
    ],
)
def test_config_names_the_new_fields_too(field, value):
    with pytest.raises(ValueError, match=field):
        ControllerConfig(**{field: value})
