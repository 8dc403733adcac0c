"""What a canary does: its stages, how long it watches, and what brings it back."""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any

from esper_jax.rollout.canary.evidence import Yardstick
from esper_jax.run.references import shown

__all__ = ["CanaryError", "Plan", "in_words"]


class CanaryError(ValueError):
    """A canary that cannot go on as asked; the message says what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Stages of a rollout, and the regressions that end it.

    The candidate is what has the flag, the baseline what has not. ``None`` leaves a
    trigger out.

    Args:
      percents: of the model ids that have the flag, stage after stage.
      watch: seconds that each stage lasts at least.
      error_increase: the share of errors may not be higher by this much.
      latency_ratio: latencies may not be longer by this factor.
      accuracy_drop: the mean accuracy may not be lower by this much.
      nan_rate: a single value of the candidate that is not finite ends the rollout; a
        stage lasts until it would have shown up in one of so many observations.
      accuracy_spread: differences of two accuracies beyond this count as this. 1 is
        right for single answers (0 or 1); a value near the spread between runs decides
        sooner where an accuracy is that of a whole run.
      slow_after: seconds after which an observation counts as an error.
      prove_at: only a candidate that is shown to be no regression gets beyond this
        percentage. Stages before the last one up to it exclude a regression that is
        larger by as much as fewer models have it: at 1% one of 25 times the size.
      alpha: chance that a candidate that is no worse is rolled back, at most.
      power: chance that a regression is stopped at ``prove_at`` or before, at least.
      patience: seconds after which a stage that is still not decided is rolled back;
        by default it is held.

    Raises:
      CanaryError: naming the argument, what was expected and what came.
    """

    percents: tuple[int, ...] = (1, 10, 25, 50, 100)
    watch: float = 3600.0
    error_increase: float | None = 0.02
    latency_ratio: float | None = 1.2
    accuracy_drop: float | None = 0.02
    nan_rate: float | None = 0.05
    accuracy_spread: float = 1.0
    slow_after: float | None = None
    prove_at: int = 25
    alpha: float = 0.05
    power: float = 0.95
    patience: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "percents", _percents(self.percents))
        for name in ("error_increase", "accuracy_drop", "nan_rate"):
            if getattr(self, name) is not None:
                _check(self, name, 0, 1, "a share above 0 and below 1, or none")
        for name in ("alpha", "power"):
            _check(self, name, 0, 1, "a chance above 0 and below 1")
        if self.latency_ratio is not None:
            _check(self, "latency_ratio", 1, math.inf, "a factor above 1, or none")
        _check(self, "watch", 0, math.inf, "seconds above 0")
        for name in ("slow_after", "patience"):
            if getattr(self, name) is not None:
                _check(self, name, 0, math.inf, "seconds above 0, or none")
        _check(self, "prove_at", 0, 100, "a percentage above 0 and below 100")
        most = math.nextafter(1, 2)
        _check(self, "accuracy_spread", 0, most, "above 0 and at most 1")
        self._check_together()

    def _check_together(self) -> None:
        drop = self.accuracy_drop
        if drop is not None and drop >= self.accuracy_spread:
            raise CanaryError(
                f"accuracy_spread: expected more than accuracy_drop, which is {drop:g},"
                f" got {self.accuracy_spread:g}"
            )
        if self.patience is not None and self.patience <= self.watch:
            raise CanaryError(
                f"patience: expected more than watch, which is {self.watch:g} seconds, "
                f"got {self.patience:g}"
            )
        if self.slow_after is not None and self.error_increase is None:
            raise CanaryError(
                "slow_after: expected error_increase, too, which counts what is slow"
            )
        if not self.yardsticks and self.nan_rate is None:
            raise CanaryError(
                "expected at least one trigger, got none: set error_increase, "
                "latency_ratio, accuracy_drop or nan_rate"
            )
        if self.yardsticks and self.percents[0] == 100:
            raise CanaryError(
                "percents: expected a stage below 100, where there is a baseline to "
                f"compare {', '.join(self.yardsticks)} with, got 100 alone"
            )

    @property
    def yardsticks(self) -> dict[str, Yardstick]:
        """How each trigger compares, by what it watches."""
        found = {}
        if self.error_increase is not None:
            found["error"] = Yardstick(self.error_increase, 1.0, True)
        if self.latency_ratio is not None:
            found["latency"] = Yardstick(math.log(self.latency_ratio), 0.0)
        if self.accuracy_drop is not None:
            found["accuracy"] = Yardstick(self.accuracy_drop, self.accuracy_spread)
        return found

    @property
    def stage_alpha(self) -> float:
        """Error that one trigger may make in one stage (Bonferroni)."""
        return self.alpha / (len(self.percents) * max(len(self.yardsticks), 1))

    @property
    def miss(self) -> float:
        """Chance that a regression is let through, at most."""
        return 1 - self.power

    def excluded(self, stage: int, yardstick: Yardstick) -> float:
        """The smallest regression that a stage must exclude, in the values' unit."""
        size = yardstick.margin * self._larger(stage)
        if not yardstick.width:
            return size
        return max(yardstick.margin, min(size, yardstick.width / 2))

    def sightings(self, stage: int) -> int:
        """Observations of the candidate in which a NaN would have shown up."""
        if self.nan_rate is None:
            return 1
        rate = max(self.nan_rate, min(self.nan_rate * self._larger(stage), 0.5))
        return math.ceil(math.log(self.miss) / math.log1p(-rate))

    def _larger(self, stage: int) -> float:
        """By how much what a stage excludes is larger than a regression.

        What may go unseen is then the same harm at each stage: share times size.
        """
        proof = max((p for p in self.percents if p <= self.prove_at), default=1)
        return max(1.0, proof / self.percents[stage])


def _percents(value: Any) -> tuple[int, ...]:
    """The stages, checked."""
    if not isinstance(value, Iterable) or isinstance(value, str):
        raise CanaryError(
            f"percents: expected whole numbers such as 1, 10, 100; got {shown(value)}"
        )
    percents = tuple(value)
    if not percents:
        raise CanaryError(
            "percents: expected at least one stage such as 1, 10, 100; got none"
        )
    for percent in percents:
        whole = isinstance(percent, int) and not isinstance(percent, bool)
        if not whole or not 0 < percent <= 100:
            raise CanaryError(
                "percents: expected whole numbers above 0 and up to 100, got "
                f"{shown(percent)}"
            )
    for before, after in itertools.pairwise(percents):
        if after <= before:
            raise CanaryError(
                f"percents: expected each above the one before, got {after} after "
                f"{before}"
            )
    return percents


def _check(plan: Plan, name: str, low: float, high: float, expected: str) -> None:
    """Checks that a number lies between two others.

    Raises:
      CanaryError: if it does not, or is no number.
    """
    value = getattr(plan, name)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low < value < high:
        raise CanaryError(f"{name}: expected {expected}, got {shown(value)}")


def in_words(seconds: float) -> str:
    """A time such as ``90s``, ``12m`` or ``1.5h``."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length or (seconds >= length and seconds % length == 0):
            return f"{seconds / length:.3g}{unit}"
    return f"{seconds:.3g}s"
