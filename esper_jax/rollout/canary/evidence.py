"""Evidence for and against "the candidate is worse", that may be looked at at any time.

Each observation of one arm is compared with observations of the other arm that came
at about the same time, so what moves both arms (the time of day, the load) cancels.
The scores of these comparisons lie in -1 to 1; a positive one speaks against the
candidate. A bet of the share ``b`` of one's wealth on the next score multiplies the
wealth by ``1 + b * score``. Where the mean score is at most 0, whatever came before,
the wealth is a nonnegative supermartingale that starts at 1. By Ville's inequality it
then ever exceeds ``1 / alpha`` with a probability of at most ``alpha``, however often
one looks and whatever one stops for. The wealth here is the mean over a few fixed
bets, which keeps this. It holds for any distribution, and for any number of scores.

Source: I. Waudby-Smith, A. Ramdas, Estimating means of bounded random variables by
betting, JRSS B 86(1), 2024 (there "diversified Kelly"); G. Shafer, Testing by betting,
JRSS A 184(2), 2021. Scores of signs are the placements of Mann and Whitney's test
(Annals of Mathematical Statistics 18(1), 1947), which canary analysis uses elsewhere,
too (Kayenta), but there with a fixed number of observations.
"""

import dataclasses
import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

__all__ = [
    "BETS",
    "MOST",
    "MOST_NEEDED",
    "Comparisons",
    "Evidence",
    "Yardstick",
    "compare",
    "needed",
    "with_comparisons",
]

BETS = 0.95 * (0.01 / 0.95) ** (np.arange(8) / 7)
"""Shares of the wealth that are bet, from bold to careful."""

MOST = 64
"""Observations of one arm that are compared with one of the other, at most."""

MOST_NEEDED = 10**9
"""Stands for more comparisons than anyone makes."""

_START = (0.0,) * len(BETS)


class Yardstick(NamedTuple):
    """How the values of a trigger are compared. A higher value is worse."""

    margin: float
    """Difference that is a regression, in the unit of the values."""
    width: float
    """Differences beyond this count as this; 0 where only their signs count."""
    rare: bool = False
    """Whether a value is 1 for a fault and 0 else."""

    def scores(
        self, differences: Float[np.ndarray, "*R P"], shift: float
    ) -> Float[np.ndarray, "*R P"]:
        """Scores of pairs, from -1 to 1.

        If the candidate's values are spread as the baseline's, moved by ``shift`` or
        more, the mean is at least 0; if moved by ``shift`` or less, at most 0 (with
        ``width`` at least 1 and values from 0 to 1: if their means differ by that).

        Args:
          differences: candidate less baseline.
          shift: taken off first.
        """
        moved = differences - shift
        if not self.width:
            return np.sign(moved)
        return np.clip(moved / self.width, -1.0, 1.0)


class Comparisons(NamedTuple):
    """``N`` comparisons, each of one observation with ``P`` or fewer of the other arm.

    Which observations meet depends on the order in which the arms came, and never on
    the values.
    """

    differences: Float[np.ndarray, " P"]
    """Candidate less baseline, comparison after comparison."""
    firsts: Int[np.ndarray, " N"]
    """Where each comparison begins in ``differences``."""
    sizes: Int[np.ndarray, " N"]
    """How many differences it has."""
    rest: int
    """Index of the first observation that still waits for one of the other arm."""

    def scores(self, yardstick: Yardstick, shift: float) -> Float[np.ndarray, " N"]:
        """One score for each comparison: the mean over its pairs."""
        if not len(self.firsts):
            return np.zeros(0)
        of_pairs = yardstick.scores(self.differences, shift)
        return np.add.reduceat(of_pairs, self.firsts) / self.sizes


def compare(
    values: Float[np.ndarray, " V"], candidate: Bool[np.ndarray, " V"]
) -> Comparisons:
    """Compares observations of the two arms, in the order in which they came.

    A comparison begins with observations of one arm, and ends with the first one of
    the other. At most the last `MOST` of those before it take part.

    Args:
      values: of both arms; a higher one is worse.
      candidate: whether each is of the candidate.
    """
    begins, ends, start = [], [], 0
    for change in (np.flatnonzero(candidate[1:] != candidate[:-1]) + 1).tolist():
        if change > start:
            begins.append(max(start, change - MOST))
            ends.append(change)
            start = change + 1
    rest = max(start, len(values) - MOST)
    if not ends:
        none = np.zeros(0, np.int64)
        return Comparisons(np.zeros(0), none, none, rest)
    last = np.array(ends)
    sizes = last - np.array(begins)
    firsts = np.cumsum(sizes) - sizes
    of_run = np.arange(sizes.sum()) + np.repeat(np.array(begins) - firsts, sizes)
    sign = np.repeat(np.where(candidate[last], 1.0, -1.0), sizes)
    differences = sign * (np.repeat(values[last], sizes) - values[of_run])
    return Comparisons(differences, firsts, sizes, rest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the comparisons of one trigger in one stage have shown.

    Args:
      harm: logarithm of the wealth of each of `BETS` against "not worse at all".
      within: the same against "worse by the margin".
      clear: the same against "worse by what the stage must exclude".
      number: of comparisons.
      total: sum of their scores without a shift.
      squares: sum of the squares of these.
      shifted: sum of their scores at what the stage must exclude.
    """

    harm: tuple[float, ...] = _START
    within: tuple[float, ...] = _START
    clear: tuple[float, ...] = _START
    number: int = 0
    total: float = 0.0
    squares: float = 0.0
    shifted: float = 0.0

    def log_harm(self) -> float:
        """Logarithm of the evidence that the candidate is worse."""
        return _mixed(self.harm)

    def log_within(self) -> float:
        """Logarithm of the evidence that it is not worse by the margin."""
        return _mixed(self.within)

    def log_clear(self) -> float:
        """Logarithm of the evidence that it is not worse by what is to be excluded."""
        return _mixed(self.clear)


def _mixed(logs: tuple[float, ...]) -> float:
    """Logarithm of the mean wealth, from those of each bet."""
    return float(np.logaddexp.reduce(np.array(logs)) - math.log(len(logs)))


def with_comparisons(
    evidence: Evidence, new: Comparisons, yardstick: Yardstick, exclude: float
) -> Evidence:
    """The evidence after further comparisons.

    It is the same, to rounding, whether they come at once or in several calls.

    Args:
      evidence: before them.
      new: the comparisons.
      yardstick: of the trigger.
      exclude: what the stage must exclude, at least the margin.
    """
    if not len(new.firsts):
        return evidence
    plain = new.scores(yardstick, 0.0)
    at_margin = new.scores(yardstick, yardstick.margin)
    same = exclude == yardstick.margin
    excluded = at_margin if same else new.scores(yardstick, exclude)
    return Evidence(
        harm=_after(evidence.harm, plain),
        within=_after(evidence.within, -at_margin),
        clear=_after(evidence.clear, -excluded),
        number=evidence.number + len(plain),
        total=evidence.total + float(plain.sum()),
        squares=evidence.squares + float((plain**2).sum()),
        shifted=evidence.shifted + float(excluded.sum()),
    )


def _after(
    logs: tuple[float, ...], scores: Float[np.ndarray, " N"]
) -> tuple[float, ...]:
    grown = np.log1p(scores[:, None] * BETS).sum(axis=0)
    return tuple((np.array(logs) + grown).tolist())


def needed(evidence: Evidence, yardstick: Yardstick, alpha: float, power: float) -> int:
    """Comparisons after which a regression would have been found.

    Found means that the evidence of harm exceeds ``1 / alpha``. With the best of the
    bets, its logarithm grows by about ``b * effect - b**2 * (spread + effect**2) / 2``
    each time, with a variance of ``b**2 * spread``; its wealth is one part of all.

    Args:
      evidence: so far: how much scores vary, and by how much the regression that is to
        be excluded moves them.
      yardstick: of the trigger.
      alpha: error that is allowed.
      power: chance of finding it.

    Returns:
      The number; `MOST_NEEDED` where there is nothing to tell from yet.
    """
    if not evidence.number:
        return MOST_NEEDED
    mean = evidence.total / evidence.number
    effect = mean - evidence.shifted / evidence.number
    if effect <= 0:
        return MOST_NEEDED
    # As if one score more had been as far from the mean as a score can be.
    apart = max(evidence.squares - evidence.number * mean**2, 0.0)
    spread = (apart + 1.0) / (evidence.number + 1)
    if yardstick.rare:  # more faults vary more
        spread += effect * (1 - effect)
    bet = min(float(BETS[0]), effect / (spread + effect**2))
    growth = bet * effect - bet**2 * (spread + effect**2) / 2
    noise = NormalDist().inv_cdf(power) * bet * math.sqrt(spread)
    goal = math.log(len(BETS) / alpha)
    root = (noise + math.sqrt(noise**2 + 4 * growth * goal)) / (2 * growth)
    return min(math.ceil(root**2), MOST_NEEDED)
