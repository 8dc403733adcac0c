"""Statistics of paired differences with a number of pairs that was fixed beforehand.

Pure functions of NumPy arrays whose last axis is ``N`` pairs; axes before it are for
many experiments at once. `rollout.ab.anytime` is for looking after each pair.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special, stats

__all__ = [
    "MOST_PAIRS",
    "TTest",
    "detectable",
    "holm",
    "pairs_needed",
    "power_of",
    "sign_p",
    "t_test",
    "wilcoxon_p",
]

MOST_PAIRS = 10_000
"""More pairs than that are not planned for."""

_EXACT = 50
"""Pairs up to which the rank test is exact."""

_ROUNDING = 1e-12
"""A spread below this share of the mean is no spread."""


class TTest(NamedTuple):
    """Student's t-test of paired differences."""

    mean: Float[np.ndarray, "*R"]
    spread: Float[np.ndarray, "*R"]
    """Standard deviation of the differences."""
    low: Float[np.ndarray, "*R"]
    high: Float[np.ndarray, "*R"]
    p: Float[np.ndarray, "*R"]
    """Two-sided p-value of the mean being 0."""


def t_test(differences: Float[np.ndarray, "*R N"], alpha: float) -> TTest:
    """Mean difference with its ``1 - alpha`` interval, and the paired t-test.

    Where all differences are equal there is no spread to judge by: the interval is a
    point, and the p-value is that of the signs alone, ``2 ** (1 - N)`` (1 if all are
    0).

    Args:
      differences: of at least two pairs, finite.
      alpha: error that the interval allows.

    Raises:
      ValueError: for less than two pairs.
    """
    number = differences.shape[-1]
    if number < 2:
        raise ValueError(
            f"differences must be of at least 2 pairs, since one has no spread; got "
            f"{number}"
        )
    mean = differences.mean(axis=-1)
    spread = differences.std(axis=-1, ddof=1)
    flat = spread <= _ROUNDING * np.abs(mean)
    spread = np.where(flat, 0.0, spread)
    error = spread / math.sqrt(number)
    half = special.stdtrit(number - 1, 1 - alpha / 2) * error
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * special.stdtr(number - 1, -np.abs(mean) / error)
    same = np.where(mean == 0, 1.0, 2.0 ** (1 - number))
    return TTest(mean, spread, mean - half, mean + half, np.where(flat, same, p))


def wilcoxon_p(differences: Float[np.ndarray, " N"]) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test.

    Pairs without a difference are left out (Wilcoxon 1945). Above 50 pairs it is
    SciPy's normal approximation. Up to them it is exact, with ties too, where SciPy's
    is not: every sign is as likely as the other, whatever the ranks.
    """
    kept = differences[differences != 0]
    if len(kept) > _EXACT:
        return float(stats.wilcoxon(kept, method="asymptotic").pvalue)
    # Twice the ranks are whole numbers; those of ties are means of two or more.
    ranks = np.rint(2 * stats.rankdata(np.abs(kept))).astype(int)
    total = int(ranks.sum())
    chances = np.zeros(total + 1)  # of each sum of the positive ranks
    chances[0] = 1.0
    for rank in ranks:
        moved = np.zeros_like(chances)
        moved[rank:] = chances[: total + 1 - rank]
        chances = (chances + moved) / 2
    away = np.abs(2 * np.arange(total + 1) - total)
    seen = abs(2 * int(ranks[kept > 0].sum()) - total)
    return min(float(chances[away >= seen].sum()), 1.0)


def sign_p(first: int, second: int) -> float:
    """Two-sided p-value that two kinds of events are equally likely, given how many."""
    if not first + second:
        return 1.0
    return float(stats.binomtest(first, first + second).pvalue)


def holm(p_values: Float[np.ndarray, "*R M"]) -> Float[np.ndarray, "*R M"]:
    """Holm's adjusted p-values of the ``M`` tests on the last axis.

    Those at most ``alpha`` are rejected with a family-wise error of ``alpha``, however
    the tests depend on each other.

    Source: S. Holm, A Simple Sequentially Rejective Multiple Test Procedure,
    Scandinavian Journal of Statistics 6(2), 1979.
    """
    order = np.argsort(p_values, axis=-1, kind="stable")
    left = np.arange(p_values.shape[-1], 0, -1)
    stepped = np.take_along_axis(p_values, order, -1) * left
    stepped = np.minimum(np.maximum.accumulate(stepped, axis=-1), 1.0)
    adjusted = np.empty_like(stepped)
    np.put_along_axis(adjusted, order, stepped, -1)
    return adjusted


def power_of(pairs: int, effect: float, alpha: float) -> float:
    """Power of the two-sided paired t-test, by the noncentral t distribution.

    Args:
      pairs: number of them, at least 2.
      effect: mean of the differences over their standard deviation.
      alpha: level of the test.
    """
    freedom = pairs - 1
    shift = abs(effect) * math.sqrt(pairs)
    if shift > 37:  # the other end of what SciPy's series reach; it is 1 to all digits
        return 1.0
    bound = special.stdtrit(freedom, 1 - alpha / 2)
    other_side = stats.nct.cdf(-bound, freedom, shift)
    above = float(stats.nct.sf(bound, freedom, shift))
    return min(above + float(np.nan_to_num(other_side)), 1.0)


def pairs_needed(effect: float, power: float, alpha: float) -> int | None:
    """The least number of pairs whose t-test has the power; None above `MOST_PAIRS`.

    Args:
      effect: mean of the differences over their standard deviation, not 0.
      power: wanted, below 1.
      alpha: level of the test.
    """
    low, high = 1, MOST_PAIRS  # too few; enough, if any are
    if power_of(high, effect, alpha) < power:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if power_of(middle, effect, alpha) < power:
            low = middle
        else:
            high = middle
    return high


def detectable(pairs: int, power: float, alpha: float) -> float:
    """The least effect, in standard deviations, that the t-test has the power for.

    Args:
      pairs: number of them, at least 2.
      power: wanted, below 1.
      alpha: level of the test.
    """
    low, high = 0.0, 1.0
    while power_of(pairs, high, alpha) < power:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        if power_of(pairs, middle, alpha) < power:
            low = middle
        else:
            high = middle
    return high
