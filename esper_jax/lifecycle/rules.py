"""The rules of the lifecycle: minimum ages and gates, as data."""

import dataclasses
import functools
import math
import numbers
import operator
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer, UInt

from esper_jax.lifecycle.grafting import GraftConfig
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import LEGAL, NUM_STAGES, Stage
from esper_jax.lifecycle.state import SeedState

__all__ = [
    "LEGAL_PAIRS",
    "Gate",
    "LifecycleConfig",
    "gates",
    "gates_pass",
    "minimum_epochs",
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


LEGAL_PAIRS = [
    np.uint8(source << 4 | target)
    for source, targets in LEGAL.items()
    for target in targets
]
"""The legal transitions, one byte each as in the history."""


def minimum_epochs(
    stage: Int[Array, "*S"], config: LifecycleConfig
) -> UInt[Array, "*S"]:
    """``config.min_epochs[stage]``: selects vectorise where a gather does not."""
    minimum = jnp.zeros(stage.shape, jnp.uint16)
    for code, epochs in enumerate(config.min_epochs):
        if epochs:
            minimum = jnp.where(stage == code, jnp.uint16(epochs), minimum)
    return minimum


def gates_pass(
    state: SeedState,
    target: Integer[Array, "*S"],
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
