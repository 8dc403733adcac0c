"""The rules of the lifecycle as data: minimum ages and gates.

To add a gate, add its threshold to `LifecycleConfig` and a `Gate` to `gates`. The
transition, the policy and the words of the events all read that table.
"""

import dataclasses
import functools
import math
import numbers
import operator
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer, UInt

from esper_jax.lifecycle.grafting import GraftConfig
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import LEGAL, NUM_STAGES, Stage
from esper_jax.lifecycle.state import SeedState

__all__ = [
    "LEGAL_PAIRS",
    "FoldInto",
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


FoldInto = Literal["never", "trained", "frozen"]
"""Whether linear fossils are folded into the weights of their layer: not at all, into
weights that train, or also into those of a frozen host."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LifecycleConfig:
    """Minimum ages and thresholds of the gates; hashable.

    The defaults are those of the original system.

    Args:
      min_epochs: epochs that a seed spends in each stage at least, by stage code.
      max_epochs: a seed may be culled after this many epochs in EVALUATING; 0 turns
        this rule off.
      reconstruction_threshold: largest reconstruction loss at which a seed may be
        grafted. Infinity turns this gate off, also where that loss is not measured, as
        in layers that are only called inside raw JAX transforms.
      min_worth: worth above which a seed may leave EVALUATING for FINE_TUNING. One that
        has not more, and is not culled, counts and waits, and does not learn.
      min_stability: stability needed for the same.
      cull_delta: a seed in EVALUATING may be culled if its worth is below this,
      cull_error_rate: or its error rate is above this,
      cull_error_count: or its error count is above this. From 0 to 255; 255 turns
        this rule off.
      min_improvement: mean worth needed for FOSSILIZED.
      min_final_stability: stability needed for FOSSILIZED.
      worth_window: number of ticks for which the worth of a seed in FINE_TUNING is
        measured before it may first be kept. From then on it is measured at every
        tick. Each measurement costs one evaluation of the held-out data. The default
        measures at every tick.
      fold: ``"trained"`` folds each fossil that is linear (`lora`, `affine`,
        `low_rank`) into the kernel and bias of its layer at the tick at which it
        becomes one: its slot is free again, and its chunk is dormant. Refused where
        those weights do not train, as a frozen host keeps its bits; ``"frozen"``
        changes them, too. See `growth.folds`.
      grafting: numbers of the grafting strategies.

    Raises:
      TypeError, ValueError: naming the field that is out of its range.
    """

    min_epochs: tuple[int, ...] = tuple(_MIN_EPOCHS.get(s, 0) for s in Stage)
    max_epochs: int = 0
    reconstruction_threshold: float = 0.01
    min_worth: float = 0.0
    min_stability: float = 0.8
    cull_delta: float = -0.05
    cull_error_rate: float = 0.1
    cull_error_count: int = 5
    min_improvement: float = 0.01
    min_final_stability: float = 0.95
    worth_window: int = 65535
    fold: FoldInto = "never"
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
        if self.fold not in get_args(FoldInto):
            raise ValueError(
                f"fold must be one of {get_args(FoldInto)}, got {self.fold!r}"
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "grafting":
                if not isinstance(value, GraftConfig):
                    raise TypeError(f"grafting must be a GraftConfig, got {value!r}")
            elif field.name not in ("min_epochs", "fold") and (
                not isinstance(value, numbers.Real) or math.isnan(value)
            ):
                raise ValueError(f"{field.name} must be a number, got {value!r}")


@dataclasses.dataclass(frozen=True)
class Gate:
    """One comparison that a transition must pass: ``metric compare threshold``.

    Args:
      metric: the original system's name of the value, which events report.
      compare: such as `operator.ge`.
      threshold: what the value is compared with.
      reads: the field of `Signals` or `SeedState` that holds the value; by default the
        one named ``metric``.
    """

    metric: str
    compare: Callable[[Any, Any], Any]
    threshold: float
    reads: str = ""

    @property
    def field(self) -> str:
        """The field of `Signals` or `SeedState` that the gate reads."""
        return self.reads or self.metric

    def measured(self, state: SeedState, signals: Signals) -> Array:
        """The value that the gate reads, for every seed."""
        source = signals if hasattr(signals, self.field) else state
        return getattr(source, self.field)

    def passes(self, state: SeedState, signals: Signals) -> Array:
        """Whether each seed passes the gate. False where the value is NaN."""
        return self.compare(self.measured(state, signals), self.threshold)


_GRAFTED = Stage.TRAINING, Stage.GRAFTING


def gates(config: LifecycleConfig) -> dict[tuple[Stage, Stage], tuple[str, list[Gate]]]:
    """The gates of each guarded transition.

    Returns:
      By source and target: whether ``"all"`` or ``"any"`` of the gates must pass, and
      the gates, of which there is one at least.
    """
    timed_out = Gate("epochs_in_stage", operator.ge, config.max_epochs)
    small = Gate("reconstruction_loss", operator.le, config.reconstruction_threshold)
    guards = {} if small.threshold == math.inf else {_GRAFTED: ("all", [small])}
    return guards | {
        (Stage.EVALUATING, Stage.FINE_TUNING): (
            "all",
            [
                Gate("performance_delta", operator.gt, config.min_worth, "worth"),
                Gate("stability_score", operator.ge, config.min_stability, "stability"),
            ],
        ),
        (Stage.EVALUATING, Stage.CULLED): (
            "any",
            [
                Gate("performance_delta", operator.lt, config.cull_delta, "worth"),
                Gate("error_rate", operator.gt, config.cull_error_rate),
                Gate("error_count", operator.gt, config.cull_error_count),
                *([timed_out] if config.max_epochs > 0 else []),
            ],
        ),
        (Stage.FINE_TUNING, Stage.FOSSILIZED): (
            "all",
            [
                Gate(
                    "total_improvement",
                    operator.ge,
                    config.min_improvement,
                    "mean_worth",
                ),
                Gate(
                    "final_stability",
                    operator.ge,
                    config.min_final_stability,
                    "stability",
                ),
            ],
        ),
    }


LEGAL_PAIRS = [
    np.uint8(source << 4 | target)
    for source, targets in LEGAL.items()
    for target in targets
]
"""The legal transitions, one byte each, encoded as in the history."""


def minimum_epochs(
    stage: Int[Array, "*S"], config: LifecycleConfig
) -> UInt[Array, "*S"]:
    """``config.min_epochs[stage]`` for every seed, uint16.

    Written with selects, which vectorise where a gather does not.
    """
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
    """Whether each seed passes the gates between its stage and ``target``.

    True where that transition has no gates.
    """
    passed = jnp.ones(target.shape, bool)
    for (source, goal), (rule, tests) in gates(config).items():
        results = [test.passes(state, signals) for test in tests]
        combine = operator.and_ if rule == "all" else operator.or_
        met = functools.reduce(combine, results)
        passed &= ~((state.stage == source) & (target == goal)) | met
    return passed
