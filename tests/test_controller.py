"""The heuristic: when and where it germinates, and how it moves seeds on."""

import dataclasses

import jax.numpy as jnp
import pytest

from esper_jax.controller import ControllerConfig, decide, init_memory
from esper_jax.lifecycle import LifecycleConfig
from esper_jax.signals import Signals
from esper_jax.stages import NO_REQUEST, NUM_STAGES, Stage
from esper_jax.state import init_seeds

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
    "performance_delta": 0.1,
    "stability_score": 1.0,
    "error_rate": 0.0,
    "total_improvement": 0.1,
    "final_stability": 1.0,
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
        ("EVALUATING", 0, {**GOOD, "performance_delta": -0.1}, Stage.CULLED),
        ("EVALUATING", 200, {**GOOD, "performance_delta": 0.0}, Stage.ROLLED_BACK),
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
        ("blueprint", -1),
    ],
)
def test_config_names_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        ControllerConfig(**{field: value})
