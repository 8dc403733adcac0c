"""Outcomes in words, and the view of one seed."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_jax import lifecycle
from esper_jax.growth.reports import SeedMoves
from esper_jax.lifecycle.commands import Commands
from esper_jax.lifecycle.grafting import Strategy
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import Outcome, Stage
from esper_jax.lifecycle.state import SeedState, init_seeds
from esper_jax.monitor import words
from esper_jax.monitor.views import SeedViews
from esper_jax.policy.memory import Reason

CONFIG = LifecycleConfig(max_epochs=60)


@pytest.mark.parametrize(
    ("source", "target", "outcome", "measured", "text"),
    [
        (
            Stage.EVALUATING,
            Stage.FINE_TUNING,
            Outcome.GATE,
            {"performance_delta": -0.003, "stability_score": 0.9},
            "seed 17 stays in EVALUATING: performance_delta -0.003 is not above 0",
        ),
        (
            Stage.EVALUATING,
            Stage.FINE_TUNING,
            Outcome.GATE,
            {"performance_delta": 0.0, "stability_score": 0.5},
            "seed 17 stays in EVALUATING: performance_delta 0 is not above 0, "
            "stability_score 0.5 is not at least 0.8",
        ),
        (
            Stage.EVALUATING,
            Stage.CULLED,
            Outcome.GATE,
            {"performance_delta": 0.1, "error_count": 2, "epochs_in_stage": 40},
            "seed 17 stays in EVALUATING: performance_delta 0.1 is not below -0.05, "
            "error_rate was not measured, error_count 2 is not above 5, "
            "epochs_in_stage 40 is not at least 60",
        ),
        (
            Stage.FINE_TUNING,
            Stage.FOSSILIZED,
            Outcome.GATE,
            {"total_improvement": math.nan, "final_stability": 0.949990001},
            "seed 17 stays in FINE_TUNING: total_improvement was not measured, "
            "final_stability 0.94999 is not at least 0.95",
        ),
        (
            Stage.TRAINING,
            Stage.GRAFTING,
            Outcome.GATE,
            {"reconstruction_loss": 0.010001},
            "seed 17 stays in TRAINING: reconstruction_loss 0.010001 is not at most "
            "0.01",
        ),
        (
            Stage.TRAINING,
            Stage.GRAFTING,
            Outcome.OK,
            {"reconstruction_loss": 0.004},
            "seed 17: TRAINING -> GRAFTING (reconstruction_loss 0.004 is at most 0.01)",
        ),
        (
            Stage.EVALUATING,
            Stage.CULLED,
            Outcome.OK,
            {"performance_delta": 0.1, "error_count": 6, "epochs_in_stage": 70},
            "seed 17: EVALUATING -> CULLED (error_count 6 is above 5, "
            "epochs_in_stage 70 is at least 60)",
        ),
        (
            Stage.DORMANT,
            Stage.GERMINATED,
            Outcome.OK,
            {},
            "seed 17: DORMANT -> GERMINATED",
        ),
        (
            Stage.DORMANT,
            Stage.GERMINATED,
            Outcome.NO_CAPACITY,
            {},
            "seed 17 stays in DORMANT: no slot is free",
        ),
        (
            Stage.TRAINING,
            Stage.GRAFTING,
            Outcome.TOO_EARLY,
            {"epochs_in_stage": 40, "reconstruction_loss": 0.0},
            "seed 17 stays in TRAINING: epochs_in_stage 40 is not at least 100",
        ),
        (
            Stage.GRAFTING,
            Stage.FOSSILIZED,
            Outcome.ILLEGAL,
            {},
            "seed 17 stays in GRAFTING: FOSSILIZED cannot follow GRAFTING, only "
            "STABILIZATION or ROLLED_BACK can",
        ),
        (
            Stage.FOSSILIZED,
            Stage.DORMANT,
            Outcome.ILLEGAL,
            {},
            "seed 17 stays in FOSSILIZED: DORMANT cannot follow FOSSILIZED, "
            "nothing can",
        ),
        (
            Stage.DORMANT,
            42,
            Outcome.ILLEGAL,
            {},
            "seed 17 stays in DORMANT: there is no stage 42",
        ),
        (
            Stage.DORMANT,
            -1,
            Outcome.NONE,
            {},
            "seed 17 stays in DORMANT: nothing was requested",
        ),
    ],
)
def test_explain(
    source: Stage, target: int, outcome: Outcome, measured: dict, text: str
) -> None:
    assert words.explain(17, source, target, outcome, measured, CONFIG) == text


def test_every_reason_has_words_of_its_own() -> None:
    assert len({words.why(reason) for reason in Reason}) == len(Reason)
    assert words.why(jnp.int8(Reason.BUSY)) == words.why(Reason.BUSY)
    assert words.why(Reason.BUDGET_SPENT).endswith("the budget of parameters is spent")
    with pytest.raises(ValueError, match=str(len(Reason))):
        words.why(len(Reason))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.949990001, "0.95"), (-3e-5, "-3e-05"), (9999.4, "9999"), (12345.6, "12345.6")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert words.format_number(value) == text


def test_drained_events_agree_with_what_the_lifecycle_did() -> None:
    rng = np.random.default_rng(0)
    n = 400
    stage = rng.integers(0, 11, n).astype(np.int8)
    stage[:10] = Stage.DORMANT
    state = dataclasses.replace(
        init_seeds(n, 5),
        stage=jnp.asarray(stage),
        epochs_in_stage=jnp.asarray(rng.choice([0, 30, 70, 200], n), jnp.uint16),
        error_count=jnp.asarray(rng.choice([0, 9], n), jnp.uint8),
    )
    target = rng.integers(-1, 12, n).astype(np.int8)
    target[:10] = Stage.GERMINATED
    nothing = np.full(n, -1, np.int8)
    values = np.array([math.nan, -0.2, 0.0, 0.01, 0.5, 0.8, 0.95, 1.0], np.float32)
    signals = Signals(
        **{f.name: rng.choice(values, n) for f in dataclasses.fields(Signals)}
    )
    new, outcome = jax.jit(lifecycle.transition, static_argnums=3)(
        state,
        Commands(target=target, blueprint=nothing, strategy=nothing),
        signals,
        CONFIG,
    )
    moves = SeedMoves(
        source=stage,
        target=target,
        outcome=outcome,
        slot=np.asarray(new.slot_of_seed),
        epochs=np.asarray(state.epochs_in_stage),
        errors=np.asarray(state.error_count),
    )
    found = words.drain(moves, signals, CONFIG)
    assert [e.seed for e in found] == np.flatnonzero(target != -1).tolist()
    assert {e.outcome for e in found} == set(Outcome) - {Outcome.NONE, Outcome.BATCH}
    for event in found:
        assert event.outcome == outcome[event.seed]
        assert event.source == stage[event.seed]
        assert str(event) == event.text
        moved = f"seed {event.seed}: {event.source.name} -> "
        assert event.text.startswith(moved) == (event.outcome == Outcome.OK)
        if event.outcome == Outcome.GATE:
            assert "is not" in event.text or "was not measured" in event.text
        if event.outcome == Outcome.OK:
            assert "is not" not in event.text
            assert "was not measured" not in event.text


@pytest.fixture
def state() -> SeedState:
    state = init_seeds(20, 4, Strategy.MOMENTUM)
    return dataclasses.replace(
        state,
        stage=state.stage.at[17].set(int(Stage.GRAFTING)),
        parent_stage=state.parent_stage.at[17].set(int(Stage.TRAINING)),
        blueprint=state.blueprint.at[17].set(1),
        epochs_in_stage=state.epochs_in_stage.at[17].set(12),
        slot_of_seed=state.slot_of_seed.at[17].set(3),
        seed_of_slot=state.seed_of_slot.at[3].set(17),
        health=state.health.at[17].set(0.875),
        history=dataclasses.replace(
            state.history, newest=state.history.newest.at[17].set(0x011223)
        ),
        graft=dataclasses.replace(
            state.graft, alpha=state.graft.alpha.at[17].set(0.24)
        ),
    )


def test_a_seed_prints_how_it_stands(state: SeedState) -> None:
    seeds = SeedViews(state, ["residual_mlp", "low_rank"])
    assert str(seeds[17]) == (
        "seed 17: GRAFTING for 12 epochs, slot 3\n"
        "  blueprint low_rank, strategy MOMENTUM, alpha 0.24\n"
        "  health 0.875, worth not measured, errors 0\n"
        "  last transitions: TRAINING -> GRAFTING, GERMINATED -> TRAINING, "
        "DORMANT -> GERMINATED"
    )
    assert str(seeds[0]) == (
        "seed 0: DORMANT for 0 epochs, no slot\n"
        "  blueprint none, strategy MOMENTUM, alpha 0\n"
        "  health not measured, worth not measured, errors 0\n"
        "  last transitions: none"
    )


def test_views_are_a_sequence(state: SeedState) -> None:
    seeds = SeedViews(state)
    assert len(seeds) == len(list(seeds)) == 20
    assert str(seeds[-3]) == str(seeds[17]) == str(seeds[16:18][1])
    assert seeds[17].parent_stage == Stage.TRAINING
    assert seeds[17].blueprint == "1"
    with pytest.raises(IndexError, match=r"there is no seed 20; .* 0 to 19"):
        seeds[20]


def test_a_view_outlives_the_state(state: SeedState) -> None:
    seeds = SeedViews(state)
    jax.tree.map(lambda x: x.delete(), state)
    assert seeds[17].slot == 3


def test_views_of_several_layers_at_once_are_refused(state: SeedState) -> None:
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    with pytest.raises(ValueError, match=r"state must be of one layer.*\(2, 20\)"):
        SeedViews(stacked)
