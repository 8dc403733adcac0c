"""How an A/B test is judged, fixed before its first pair, and what it can then find."""

import dataclasses
import math

from esper_jax.rollout.ab import anytime, paired
from esper_jax.run.config import ConfigError

__all__ = [
    "Design",
    "as_t_test",
    "least_pairs",
    "pairs_for",
    "pairs_worked_out",
    "power_with",
    "told",
]

_EFFICIENCY = 3 / math.pi
"""Pairs that the t-test takes over those of Wilcoxon's test, for normal differences."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
    """How paired runs are judged, whoever made them.

    Args:
      metrics: names. All of them are judged together.
      pairs: of runs; at most that many if ``sequential``.
      alpha: chance to see a difference in any metric where there is none.
      power: chance to see one of ``effect`` in a metric; for planning.
      effect: mean difference of a pair over the standard deviation of the differences.
      sequential: look after each pair, and stop at a difference in the first metric.

    Raises:
      ConfigError: naming what is wrong, what was expected and what came.
    """

    metrics: tuple[str, ...] = ("final_loss",)
    pairs: int
    alpha: float = 0.05
    power: float = 0.8
    effect: float = 0.8
    sequential: bool = False

    def __post_init__(self) -> None:
        _check_numbers(self.alpha, self.power, self.effect)
        if self.pairs < 2:
            why = "one pair has no spread" if self.pairs == 1 else "nothing would run"
            raise ConfigError(
                f"pairs (--seeds): expected at least 2 pairs of runs, since {why}; got "
                f"{self.pairs}. The command works the number out without --seeds"
            )
        if self.pairs > paired.MOST_PAIRS:
            raise ConfigError(
                f"pairs (--seeds): expected at most {paired.MOST_PAIRS}, got "
                f"{self.pairs}"
            )
        twice = [n for i, n in enumerate(self.metrics) if n in self.metrics[:i]]
        if not self.metrics or twice:
            got = f"{twice[0]!r} twice" if twice else "none"
            raise ConfigError(
                f"metrics (--metric): expected different metrics, got {got}"
            )

    @property
    def strict(self) -> float:
        """The level of each metric where nothing else is known of the others (Holm)."""
        return self.alpha / len(self.metrics)


def _check_numbers(alpha: float, power: float, effect: float) -> None:
    if not 0 < alpha <= 0.5:
        raise ConfigError(f"alpha: expected above 0 and at most 0.5, got {alpha}")
    if not alpha < power < 1:
        raise ConfigError(
            f"power: expected above alpha ({alpha}) and below 1, got {power}"
        )
    if not 0.02 <= effect <= 100:
        raise ConfigError(
            "effect: expected from 0.02 to 100 standard deviations of the "
            f"differences, got {effect}"
        )


def least_pairs(alpha: float) -> int:
    """Pairs below which no test of symmetry can reject at a level."""
    return 1 + math.ceil(math.log2(1 / alpha) - 1e-9)


def as_t_test(pairs: int) -> int:
    """Pairs whose t-test alone has the power of both tests with ``pairs``; 2 at least.

    Wilcoxon's test is the weaker one: asymptotically its power for normal differences
    is that of the t-test with 3 / pi of the pairs (Pitman).
    """
    return max(2, math.floor(pairs * _EFFICIENCY))


def pairs_for(
    effect: float, power: float, alpha: float, sequential: bool
) -> int | None:
    """The least number of pairs that finds an effect; None above `MOST_PAIRS`.

    With a fixed number: that of the t-test, by the noncentral t distribution, over the
    relative efficiency of Wilcoxon's test, which has to agree. Sequential: by
    simulation, the pairs to allow at most.

    Args:
      effect: in standard deviations of the differences.
      power: wanted.
      alpha: level of the metric.
      sequential: whether to look after each pair.
    """
    number = paired.pairs_needed(effect, power, alpha)
    if number is None:
        return None
    number = max(math.ceil(number / _EFFICIENCY), least_pairs(alpha))
    if not sequential:
        return number
    most = min(8 * number, paired.MOST_PAIRS)
    return anytime.sequential_pairs(effect, power, alpha, effect, most)


def pairs_worked_out(
    effect: float, power: float, alpha: float, *, metrics: int, sequential: bool
) -> int:
    """`pairs_for` where nobody says how many.

    Raises:
      ConfigError: if a number is impossible, or it takes too many pairs.
    """
    _check_numbers(alpha, power, effect)
    pairs = pairs_for(effect, power, alpha / metrics, sequential)
    if pairs is None:
        raise ConfigError(
            f"effect: expected one that at most {paired.MOST_PAIRS} pairs find, got "
            f"{effect}; look for a larger one, or say how many (--seeds)"
        )
    return pairs


def power_with(design: Design) -> float:
    """The power of a design for its effect in one metric."""
    if design.sequential:
        chances = anytime.sequential_power(
            design.effect, design.pairs, design.strict, design.effect
        )
        return float(chances[-1])
    if design.pairs < least_pairs(design.strict):
        return 0.0
    return paired.power_of(as_t_test(design.pairs), design.effect, design.strict)


def told(design: Design) -> list[str]:
    """What a design can find, in lines, before anything runs."""
    needed = pairs_for(design.effect, design.power, design.strict, design.sequential)
    most = "at most " if design.sequential else ""
    level = f"an error of {design.alpha:g}" + (
        f" over {len(design.metrics)} metrics" if len(design.metrics) > 1 else ""
    )
    takes = f"more than {paired.MOST_PAIRS}" if needed is None else f"{most}{needed}"
    lines = [
        f"plan: a difference of {design.effect:g} standard deviations (of the pairs' "
        f"differences) takes {takes} pairs for a power of {design.power:g} at {level}",
        f"{most}{design.pairs} pairs are run; their power for it is "
        f"{power_with(design):.2f}",
    ]
    least = least_pairs(design.strict)
    if design.pairs < least:
        lines.append(
            f"note: with fewer than {least} pairs no difference can be told from "
            "chance at that error, however large; only the intervals will say something"
        )
    return lines
