"""Numbers and choices of the heuristic."""

import dataclasses
from typing import Literal, get_args

from esper_jax.lifecycle.state import MAX_BLUEPRINTS

__all__ = ["ControllerConfig", "How", "What", "When", "Where"]

When = Literal["plateau", "period", "random"]
"""What makes it time to germinate."""

Where = Literal["health", "gradient", "round_robin", "random"]
"""Which dormant chunk is taken first."""

What = Literal["fixed", "performance", "stability", "risk_averse", "novelty", "hybrid"]
"""Which blueprint germinates: the configured one; the one that earned most worth a try;
the one whose seeds were most often kept; the one with the fewest parameters; the one
tried least; or the one with the largest sum of the last four, each from 0 to 1."""

How = Literal["fixed", "conditions"]
"""Which strategy a seed is grafted with."""

_COUNTS = (
    ("patience", 1, 2**31 - 1),
    ("period", 1, 2**31 - 1),
    ("births", 1, 2**31 - 1),
    ("max_training", 1, 2**31 - 1),
    ("budget", -1, 2**31 - 1),
    ("blueprint", 0, MAX_BLUEPRINTS - 1),
    # A limit that epochs_in_stage (uint16) cannot hold would wrap when compared.
    ("waiting_limit", 1, 65535),
    ("training_limit", 1, 65535),
    ("grafting_limit", 1, 65535),
    ("evaluation_limit", 1, 65535),
    ("tuning_limit", 1, 65535),
)
"""Fields that count something, and their range."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """Numbers of the heuristic; hashable.

    Args:
      when: when it is time to germinate: ``"plateau"`` (the held-out loss has not
        improved for ``patience`` ticks), ``"period"`` (``period`` ticks after the last
        germination) or ``"random"`` (at each tick with probability ``1 / period``).
      patience: ticks without improvement of the held-out loss that make a plateau.
      threshold: relative improvement of the held-out loss that counts as one.
      period: ticks.
      where: which dormant chunk is taken first: ``"health"`` (dead or of low variance),
        ``"gradient"`` (its host weights have the largest gradient), ``"round_robin"``
        or ``"random"``.
      what: which blueprint germinates; see `What`.
      blueprint: index of the blueprint that germinates where ``what`` is ``"fixed"``.
      how: the strategy that a seed is grafted with: its own (``"fixed"``), or one
        chosen by ``"conditions"``: DRIFT_CONTROLLED where the host's weights drift,
        else GRAD_NORM_GATED where gradients are wild, else MOMENTUM where the loss has
        just improved, else LINEAR.
      births: most seeds that germinate at one tick.
      max_training: most seeds that may be in TRAINING, or wait for it, at once.
      budget: most parameters that all living seeds may have together; -1 for no limit.
      target_accuracy: held-out accuracy from which on nothing more germinates; -1 for
        none.
      rent_per_parameter: worth, in units of the held-out loss, that a seed must bring
        for each of its parameters.
      rent_per_operation: worth that it must bring for each floating-point operation
        that it adds to a row's forward pass. A seed whose mean worth does not cover its
        rent is not kept.
      keep_tolerance: refuses to keep a seed while the mean held-out loss exceeds its
        value when grafting began by more than this share of it. Once the host has
        adapted to a seed, removing it hurts, even if the model was better before.
      shift_tolerance: when the held-out loss exceeds its running mean by more than this
        share of it, the data have changed: all seeds that have learned something, and
        are not kept for good, are rolled back. -1 turns this off. A network trained on
        the old data adapts more slowly than a fresh one (E. Nikishin et al., The
        primacy bias in deep reinforcement learning, ICML 2022; S. Dohare et al., Loss
        of plasticity in deep continual learning, Nature 632, 2024). The chunks are free
        for fresh seeds after their embargo. A `Governor` with a lower limit treats such
        a rise as breakage.
      require_gain: grafts a seed only while its first-order gain is above 0.
      waiting_limit: ticks in GERMINATED after which a seed whose turn has not come is
        cancelled.
      training_limit: ticks in TRAINING after which a seed that may not be grafted is
        culled.
      grafting_limit: ticks in GRAFTING after which a seed whose ramp has not ended is
        rolled back.
      evaluation_limit: ticks in EVALUATING after which a seed that is neither good
        enough to tune nor bad enough to cull is rolled back.
      tuning_limit: ticks in FINE_TUNING after which a seed that may not be kept is
        culled.
      enabled: if False, nothing germinates. Living seeds go on.

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
        for name, least, most in _COUNTS:
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
