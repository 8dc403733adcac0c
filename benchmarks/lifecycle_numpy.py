"""The lifecycle in numpy, on whole arrays: what `lifecycle.py` compares with."""

import dataclasses
from typing import Any

import jax
import numpy as np

from esper_jax.lifecycle import (
    Commands,
    LifecycleConfig,
    Outcome,
    SeedState,
    Signals,
    Stage,
    Strategy,
    gates,
)
from esper_jax.lifecycle.grafting import GraftMemory
from esper_jax.lifecycle.history import History, pack_history, unpack_history
from esper_jax.lifecycle.stages import LEGAL, NUM_STAGES

__all__ = ["check_numpy", "numpy_step"]

_TABLE = np.zeros((NUM_STAGES, NUM_STAGES), bool)
for _source, _targets in LEGAL.items():
    _TABLE[_source, list(_targets)] = True


def numpy_step(
    state: SeedState, commands: Commands, signals: Signals, config: LifecycleConfig
) -> tuple[SeedState, np.ndarray]:
    """`lifecycle.step` with numpy: the new state, and the outcome of each request."""
    epochs = np.minimum(state.epochs_in_stage, 65534) + np.uint16(1)
    climbing = state.stage == Stage.GRAFTING
    climbed = _climb(state.graft, state.strategy, signals, epochs, config)
    graft = {
        name: np.where(climbing, new, getattr(state.graft, name))
        for name, new in climbed.items()
    }
    state = dataclasses.replace(state, epochs_in_stage=epochs)
    outcome = _judge(state, commands, signals, config)
    slot_of_seed, owner, served = _give_slots(state, commands, outcome)
    stage, target = state.stage, np.maximum(commands.target, 0)
    requested = commands.target != -1
    born = np.zeros(stage.shape, bool)
    born[served] = True
    waits = (outcome == Outcome.OK) & (target == Stage.GERMINATED) & ~born
    outcome = np.where(waits, np.int8(Outcome.NO_CAPACITY), outcome)
    accepted = outcome == Outcome.OK

    entered = accepted & (target == Stage.GRAFTING)
    fresh = {"alpha": config.grafting.min_alpha, "velocity": 0.0, "pause": 0}
    fresh |= {"stable_alpha": config.grafting.min_alpha, "previous_loss": np.nan}
    fresh |= {"unstable_checks": 0}
    restyled = (commands.strategy >= 0) & (accepted | ~requested)
    new = dataclasses.replace(
        state,
        stage=np.where(accepted, target, stage),
        parent_stage=np.where(accepted, stage, state.parent_stage),
        blueprint=np.where(
            born & (commands.blueprint >= 0), commands.blueprint, state.blueprint
        ),
        strategy=np.where(restyled, commands.strategy, state.strategy),
        epochs_in_stage=np.where(accepted, np.uint16(0), epochs),
        error_count=np.where(born, np.uint8(0), state.error_count),
        history=_push(state.history, stage * 16 + target, accepted),
        slot_of_seed=slot_of_seed,
        graft=GraftMemory(
            **{
                name: np.where(entered, value.dtype.type(fresh[name]), value)
                for name, value in graft.items()
            }
        ),
        worth=np.where(accepted, np.float32(np.nan), state.worth),
        worth_ticks=np.where(accepted, np.uint8(0), state.worth_ticks),
        seed_of_slot=owner,
    )
    return new, outcome


def _judge(
    state: SeedState, commands: Commands, signals: Signals, config: LifecycleConfig
) -> np.ndarray:
    """Outcome of each request before slots are considered."""
    stage, target = state.stage, np.maximum(commands.target, 0)
    requested = commands.target != -1
    legal = _TABLE[stage, target]
    exempt = (target == Stage.CANCELLED) | (target == Stage.ROLLED_BACK)
    minimum = np.array(config.min_epochs)[stage]
    late_enough = exempt | (state.epochs_in_stage >= minimum)
    passed = np.ones(stage.shape, bool)
    for (source, goal), (rule, tests) in gates(config).items():
        results = [test.passes(state, signals) for test in tests]
        met = np.all(results, 0) if rule == "all" else np.any(results, 0)
        passed &= ~((stage == source) & (target == goal)) | met
    return np.select(
        [~requested, ~legal, ~late_enough, ~passed],
        [
            np.int8(Outcome.NONE),
            np.int8(Outcome.ILLEGAL),
            np.int8(Outcome.TOO_EARLY),
            np.int8(Outcome.GATE),
        ],
        np.int8(Outcome.OK),
    )


def _give_slots(
    state: SeedState, commands: Commands, outcome: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slot of each seed, owner of each slot, and the seeds that were given a slot."""
    target, allowed = np.maximum(commands.target, 0), outcome == Outcome.OK
    freed = allowed & (target >= Stage.CULLED)
    slot_of_seed = np.where(freed, -1, state.slot_of_seed)
    owner = state.seed_of_slot
    owner = np.where((owner >= 0) & freed[owner], -1, owner)
    wanting = np.flatnonzero(allowed & (target == Stage.GERMINATED))
    free = np.flatnonzero(owner < 0)
    served = wanting[: free.size]
    owner[free[: served.size]] = served
    slot_of_seed[served] = free[: served.size]
    return slot_of_seed, owner, served


def _push(history: History, entry: np.ndarray, accepted: np.ndarray) -> History:
    recent = unpack_history(history)
    shifted = np.concatenate([entry.astype(np.uint8)[:, None], recent[:, :-1]], axis=1)
    return pack_history(np.where(accepted[:, None], shifted, recent))


def _climb(
    m: GraftMemory, strategy: Any, s: Signals, epochs: Any, config: LifecycleConfig
) -> dict[str, np.ndarray]:
    """Fields of the graft memory after one more tick in GRAFTING."""
    c = config.grafting
    base = np.float32(1 / c.ramp_duration)
    adaptive = strategy == Strategy.ADAPTIVE
    paused = m.pause > 0
    wary = adaptive & (paused | (s.drift > 0.5 * c.drift_threshold))
    drifts = (strategy == Strategy.DRIFT_CONTROLLED) | wary
    started = np.where(s.drift > c.drift_threshold, np.uint16(c.pause_duration), 0)
    pause = np.where(drifts, np.where(paused, m.pause - 1, started), m.pause)

    gathers = adaptive & ~wary & (s.worth > 0.01)
    gathers |= strategy == Strategy.MOMENTUM
    gain = np.where(np.isfinite(s.worth), s.worth, 0)
    velocity = np.float32(c.momentum_factor) * m.velocity + np.float32(0.01) * gain

    steady = strategy == Strategy.STABILITY
    check = steady & (epochs % c.stability_window == 0)
    stable = _stable(s, config)
    count = np.where(
        check, np.where(stable, 0, m.unstable_checks + 1), m.unstable_checks
    )
    revert = steady & (count >= 3)

    fall = (m.previous_loss - s.reconstruction_loss) / m.previous_loss
    fall = np.where((m.previous_loss > 0) & np.isfinite(fall), np.clip(fall, 0, 1), 0)
    is_open = (s.grad_norm >= c.grad_norm_lower) & (s.grad_norm <= c.grad_norm_upper)

    step = np.select(
        [
            drifts,
            gathers,
            revert,
            steady & (count > 0),
            strategy == Strategy.PERFORMANCE_LINKED,
            strategy == Strategy.GRAD_NORM_GATED,
        ],
        [
            np.where(paused | (s.drift > c.drift_threshold), np.float32(0), base),
            np.maximum(np.float32(0), base + velocity),
            np.float32(0),
            base / 2,
            base * (1 + np.float32(c.performance_gain) * fall),
            np.where(is_open, base, np.float32(0)),
        ],
        base,
    )
    alpha = np.where(revert, m.stable_alpha, m.alpha) + step
    measured = np.isfinite(s.reconstruction_loss)
    return {
        "alpha": np.clip(alpha, c.min_alpha, c.max_alpha).astype(np.float32),
        "velocity": np.where(gathers, velocity, m.velocity).astype(np.float32),
        "stable_alpha": np.where(check & stable, m.alpha, m.stable_alpha),
        "previous_loss": np.where(measured, s.reconstruction_loss, m.previous_loss),
        "pause": pause.astype(np.uint16),
        "unstable_checks": np.where(revert, 0, count).astype(np.uint8),
    }


def _stable(s: Signals, config: LifecycleConfig) -> np.ndarray:
    """Whether loss, gradient and accuracy are calm, for `Strategy.STABILITY`."""
    c = config.grafting
    return (
        (s.loss_variance < c.max_loss_variance)
        & (s.grad_norm < c.max_grad_norm)
        & (s.accuracy_variance < c.max_accuracy_variance)
    )


def check_numpy(ours: tuple[SeedState, Any], theirs: tuple[SeedState, Any]) -> None:
    """Compares two results of a step: integers exactly, floats to 1e-5."""

    def same(path: Any, a: Any, b: Any) -> None:
        a, b, name = np.asarray(a), np.asarray(b), jax.tree_util.keystr(path)
        if a.dtype.kind == "f":
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(a, b, name)

    jax.tree_util.tree_map_with_path(same, ours, theirs)
