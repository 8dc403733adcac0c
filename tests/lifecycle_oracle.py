"""The lifecycle for one seed at a time, in plain Python: slow and obviously right.

Written from the rules, not from the vectorised code. Numbers are Python floats, except
where a threshold is compared with a float32 measurement.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

DORMANT, GERMINATED, TRAINING, GRAFTING, STABILIZATION, EVALUATING = range(6)
FINE_TUNING, FOSSILIZED, CULLED, CANCELLED, ROLLED_BACK = range(6, 11)
NONE, OK, ILLEGAL, TOO_EARLY, GATE, NO_CAPACITY = range(6)

MAY_BECOME = {
    DORMANT: {GERMINATED},
    GERMINATED: {TRAINING, CANCELLED},
    TRAINING: {GRAFTING, CULLED, CANCELLED, ROLLED_BACK},
    GRAFTING: {STABILIZATION, ROLLED_BACK},
    STABILIZATION: {EVALUATING, ROLLED_BACK},
    EVALUATING: {FINE_TUNING, CULLED, ROLLED_BACK},
    FINE_TUNING: {FOSSILIZED, CULLED, ROLLED_BACK},
    FOSSILIZED: set(),
    CULLED: {DORMANT},
    CANCELLED: {DORMANT},
    ROLLED_BACK: {DORMANT},
}


@dataclasses.dataclass
class Seed:
    """One seed."""

    strategy: int = 0
    stage: int = DORMANT
    parent: int = DORMANT
    blueprint: int = 0
    epochs: int = 0
    errors: int = 0
    slot: int = -1
    history: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    alpha: float = 0.0
    velocity: float = 0.0
    remembered: float = 0.0
    previous: float = math.nan
    pause: int = 0
    unstable: int = 0

    def enter_grafting(self, c: Any) -> None:
        """The first epoch of GRAFTING."""
        self.alpha = self.remembered = c.min_alpha
        self.velocity, self.previous = 0.0, math.nan
        self.pause = self.unstable = 0


class Layer:
    """Some seeds and the slots that they share."""

    def __init__(self, num_seeds: int, capacity: int, strategy: int = 0) -> None:
        self.seeds = [Seed(strategy) for _ in range(num_seeds)]
        self.slots = [-1] * capacity

    def tick(
        self,
        targets: list[int],
        blueprints: list[int],
        strategies: list[int],
        measured: list[dict[str, float]],
        config: Any,
    ) -> list[int]:
        """One tick; everything has one entry a seed."""
        for seed, m in zip(self.seeds, measured, strict=True):
            seed.epochs = min(seed.epochs + 1, 65535)
            if seed.stage == GRAFTING:
                climb(seed, m, config.grafting)
        verdicts = [
            judge(seed, target, m, config)
            for seed, target, m in zip(self.seeds, targets, measured, strict=True)
        ]
        # Slots given up in this tick can be taken in it.
        for seed, target, verdict in zip(self.seeds, targets, verdicts, strict=True):
            if verdict == OK and target in (CULLED, CANCELLED, ROLLED_BACK):
                self.slots[seed.slot] = -1
                seed.slot = -1
        for i, seed in enumerate(self.seeds):
            if verdicts[i] == OK and targets[i] == GERMINATED:
                if -1 not in self.slots:
                    verdicts[i] = NO_CAPACITY
                else:
                    seed.slot = self.slots.index(-1)
                    self.slots[seed.slot] = i
                    seed.errors = 0
                    if blueprints[i] >= 0:
                        seed.blueprint = blueprints[i]
            if verdicts[i] in (OK, NONE) and 0 <= strategies[i] <= 6:
                seed.strategy = strategies[i]
            if verdicts[i] == OK:
                seed.history = [(seed.stage, targets[i]), *seed.history][:10]
                seed.parent, seed.stage, seed.epochs = seed.stage, targets[i], 0
                if targets[i] == GRAFTING:
                    seed.enter_grafting(config.grafting)
        return verdicts


def judge(seed: Seed, target: int, m: dict[str, float], config: Any) -> int:
    """What becomes of the request, free slots apart."""
    if target == -1:
        return NONE
    if target not in MAY_BECOME[seed.stage]:
        return ILLEGAL
    exempt = target in (CANCELLED, ROLLED_BACK)
    if not exempt and seed.epochs < config.min_epochs[seed.stage]:
        return TOO_EARLY
    return OK if gate(seed, target, m, config) else GATE


def gate(seed: Seed, target: int, m: dict[str, float], config: Any) -> bool:
    """Whether the measurements allow the transition."""
    f32 = np.float32
    if (seed.stage, target) == (TRAINING, GRAFTING):
        return m["reconstruction_loss"] <= f32(config.reconstruction_threshold)
    if (seed.stage, target) == (EVALUATING, FINE_TUNING):
        return m["worth"] > f32(config.min_worth) and m["stability"] >= f32(
            config.min_stability
        )
    if (seed.stage, target) == (EVALUATING, CULLED):
        return (
            m["worth"] < f32(config.cull_delta)
            or m["error_rate"] > f32(config.cull_error_rate)
            or seed.errors > config.cull_error_count
            or (config.max_epochs > 0 and seed.epochs >= config.max_epochs)
        )
    if (seed.stage, target) == (FINE_TUNING, FOSSILIZED):
        return m["mean_worth"] >= f32(config.min_improvement) and m["stability"] >= f32(
            config.min_final_stability
        )
    return True


def climb(seed: Seed, m: dict[str, float], c: Any) -> None:
    """One epoch of GRAFTING after the first."""
    step = STRATEGIES[seed.strategy](seed, m, c, 1.0 / c.ramp_duration)
    seed.alpha = min(max(seed.alpha + step, c.min_alpha), c.max_alpha)
    if math.isfinite(m["reconstruction_loss"]):
        seed.previous = m["reconstruction_loss"]


def _linear(seed: Seed, m: dict[str, float], c: Any, base: float) -> float:
    return base


def _drift_controlled(seed: Seed, m: dict[str, float], c: Any, base: float) -> float:
    if seed.pause > 0:
        seed.pause -= 1
        return 0.0
    if m["drift"] > np.float32(c.drift_threshold):
        seed.pause = int(c.pause_duration)
        return 0.0
    return base


def _momentum(seed: Seed, m: dict[str, float], c: Any, base: float) -> float:
    delta = m["worth"]
    gain = 0.01 * delta if math.isfinite(delta) else 0.0
    seed.velocity = c.momentum_factor * seed.velocity + gain
    return max(0.0, base + seed.velocity)


def _adaptive(seed: Seed, m: dict[str, float], c: Any, base: float) -> float:
    if seed.pause > 0 or m["drift"] > 0.5 * np.float32(c.drift_threshold):
        return _drift_controlled(seed, m, c, base)
    if m["worth"] > np.float32(0.01):
        return _momentum(seed, m, c, base)
    return base


def _stability(seed: Seed, m: dict[str, float], c: Any, base: float) -> float:
    if seed.epochs % c.stability_window == 0:
        if (
            m["loss_variance"] < np.float32(c.max_loss_variance)
            and m["grad_norm"] < np.float32(c.max_grad_norm)
            and m["accuracy_variance"] < np.float32(c.max_accuracy_variance)
        ):
            seed.remembered, seed.unstable = seed.alpha, 0
        else:
            seed.unstable += 1
        if seed.unstable == 3:
            seed.alpha, seed.unstable = seed.remembered, 0
            return 0.0
    return base / 2 if seed.unstable else base


def _performance_linked(seed: Seed, m: dict[str, float], c: Any, base: float) -> float:
    now, before = m["reconstruction_loss"], seed.previous
    if not (math.isfinite(now) and before > 0):
        return base
    fall = min(max((before - now) / before, 0.0), 1.0)
    return base * (1.0 + c.performance_gain * fall)


def _grad_norm_gated(seed: Seed, m: dict[str, float], c: Any, base: float) -> float:
    lower, upper = np.float32(c.grad_norm_lower), np.float32(c.grad_norm_upper)
    return base if lower <= m["grad_norm"] <= upper else 0.0


STRATEGIES = (
    _linear,
    _drift_controlled,
    _momentum,
    _adaptive,
    _stability,
    _performance_linked,
    _grad_norm_gated,
)


def rows(signals: Any) -> list[dict[str, float]]:
    """Measurements by name and seed as one dictionary a seed."""
    columns = [values.tolist() for values in signals.values()]
    return [dict(zip(signals, row, strict=True)) for row in zip(*columns, strict=True)]


def replay(
    layer: Layer, ticks: int, commands: Any, signals: Any, errors: Any, config: Any
) -> Iterator[list[int]]:
    """Runs recorded inputs, each with a leading axis of ticks; yields the outcomes.

    Before each tick ``errors[tick]`` are added to the error counts, up to 255.
    """
    for t in range(ticks):
        for seed, more in zip(layer.seeds, errors[t], strict=True):
            seed.errors = min(seed.errors + int(more), 255)
        yield layer.tick(
            *(commands[n][t].tolist() for n in ("target", "blueprint", "strategy")),
            rows({name: values[t] for name, values in signals.items()}),
            config,
        )
