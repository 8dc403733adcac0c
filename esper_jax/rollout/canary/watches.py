"""What a trigger sees of the two arms in one stage."""

import dataclasses
import math

import numpy as np
from jaxtyping import Bool, Float

from esper_jax.rollout.canary.evidence import (
    BETS,
    Evidence,
    Yardstick,
    compare,
    with_comparisons,
)
from esper_jax.rollout.canary.observations import Batch
from esper_jax.rollout.canary.plan import Plan

__all__ = ["Watch", "figure", "odds", "values_of", "watched"]

_REFERENCE = 512
"""Values of the baseline that stand in for it at 100%, at most; at least half of it."""

_AT_ONCE = 4096
"""Values that are compared with those at once, to bound the memory."""

_LEAST_LATENCY = 1e-9
"""Latencies are compared by their logarithm, and coarse clocks measure 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch:
    """What one trigger has seen in a stage, candidate first.

    Args:
      evidence: of its comparisons.
      waiting: values of one arm that wait for one of the other; higher is worse.
      waits: whether they are the candidate's.
      seen: observations of each arm that have the value.
      sums: of these values (of the logarithm of latencies).
      baseline: values of the baseline from all of the last stage below 100%.
    """

    evidence: Evidence = dataclasses.field(default_factory=Evidence)
    waiting: tuple[float, ...] = ()
    waits: bool = False
    seen: tuple[int, int] = (0, 0)
    sums: tuple[float, float] = (0.0, 0.0)
    baseline: tuple[float, ...] = ()


def values_of(plan: Plan, batch: Batch) -> dict[str, Float[np.ndarray, " N"]]:
    """What each trigger looks at, higher for worse; NaN where it was not measured."""
    error = batch.error
    if plan.slow_after is not None:
        slow = np.where(np.isnan(batch.latency), error, batch.latency > plan.slow_after)
        error = np.fmax(error, slow)  # whatever of the two was measured
    values = {
        "error": error,
        "latency": np.log(np.maximum(batch.latency, _LEAST_LATENCY)),
        "accuracy": -batch.accuracy,
    }
    return {name: values[name] for name in plan.yardsticks}


def watched(
    watch: Watch,
    plan: Plan,
    stage: int,
    name: str,
    batch: Batch,
) -> Watch:
    """What a trigger has seen after further observations.

    Args:
      watch: before them.
      plan: of the rollout.
      stage: index into the plan's percents.
      name: of the trigger.
      batch: the observations.
    """
    values = values_of(plan, batch)[name]
    measured = ~np.isnan(values)
    candidate, values = batch.candidate[measured], values[measured]
    if not len(values):
        return watch
    arms = [values[candidate], values[~candidate]]
    (seen, sums), (of_one, of_other) = (watch.seen, watch.sums), arms
    watch = dataclasses.replace(
        watch,
        seen=(seen[0] + len(of_one), seen[1] + len(of_other)),
        sums=(sums[0] + float(of_one.sum()), sums[1] + float(of_other.sum())),
    )
    yardstick = plan.yardsticks[name]
    exclude = plan.excluded(stage, yardstick)
    if plan.percents[stage] == 100:
        evidence = _at_the_end(watch, yardstick, arms[0], plan.stage_alpha)
        return dataclasses.replace(watch, evidence=evidence)
    if plan.percents[stage + 1 : stage + 2] == (100,):
        kept = _spread(watch.baseline, seen[1], arms[1])
        watch = dataclasses.replace(watch, baseline=kept)
    return _compared(watch, yardstick, exclude, candidate, values)


def _spread(
    kept: tuple[float, ...], seen: int, new: Float[np.ndarray, " N"]
) -> tuple[float, ...]:
    """Values that are spread evenly over all so far, whenever one looks.

    The last ones alone would be those of a moment, in a service of many requests.

    Args:
      kept: of those before.
      seen: values before.
      new: the values after them.
    """
    step, wider = _every(seen), _every(seen + len(new))
    return (*kept[:: wider // step], *new[-seen % wider :: wider].tolist())


def _every(number: int) -> int:
    """The power of two that leaves `_REFERENCE` of so many values, at most."""
    return 1 << (max(-(-number // _REFERENCE), 1) - 1).bit_length()


def _compared(
    watch: Watch,
    yardstick: Yardstick,
    exclude: float,
    candidate: Bool[np.ndarray, " N"],
    values: Float[np.ndarray, " N"],
) -> Watch:
    """The watch after comparing values of the arms with each other."""
    waited = np.full(len(watch.waiting), watch.waits, bool)
    values = np.concatenate([np.array(watch.waiting), values])
    candidate = np.concatenate([waited, candidate])
    new = compare(values, candidate)
    waiting = tuple(values[new.rest :].tolist())
    return dataclasses.replace(
        watch,
        evidence=with_comparisons(watch.evidence, new, yardstick, exclude),
        waiting=waiting,
        waits=bool(waiting) and bool(candidate[-1]),
    )


def _at_the_end(
    watch: Watch, yardstick: Yardstick, values: Float[np.ndarray, " N"], alpha: float
) -> Evidence:
    """Evidence of harm where the baseline is only remembered.

    Nothing cancels here what moves all traffic, such as the load of another time of the
    day. So only what is worse by more than the margin counts.

    The mean score of a candidate that is worse by the margin at most, over values of
    the baseline that are given, exceeds 0 by more than ``slack`` with a chance of
    ``alpha / 2`` at most (W. Hoeffding, 1963). This takes them as drawn apart from the
    decision to advance.
    """
    count = len(watch.baseline)
    if not count or not len(values):
        return watch.evidence
    slack = math.sqrt(2 * math.log(2 / alpha) / count)
    baseline, margin = np.array(watch.baseline), yardstick.margin
    different, which = np.unique(values, return_inverse=True)  # errors are 0 or 1
    scores = np.concatenate(
        [
            yardstick.scores(part[:, None] - baseline, margin).mean(axis=1)
            for part in np.array_split(different, -(-len(different) // _AT_ONCE))
        ]
    )[which]
    grown = np.log1p((scores[:, None] - slack) / (1 + slack) * BETS).sum(axis=0)
    return dataclasses.replace(
        watch.evidence,
        harm=tuple((np.array(watch.evidence.harm) + grown).tolist()),
        number=watch.evidence.number + len(values),
    )


def figure(name: str, watch: Watch) -> str:
    """A trigger's means in both arms, in words."""
    seen, sums = list(watch.seen), list(watch.sums)
    if not seen[1]:  # at 100%
        seen[1], sums[1] = len(watch.baseline), sum(watch.baseline)
    means = [s / n if n else math.nan for n, s in zip(seen, sums, strict=True)]
    if name == "latency":
        candidate, baseline = (f"{math.exp(mean):.3g}s" for mean in means)
    else:
        sign = -1 if name == "accuracy" else 1
        candidate, baseline = (f"{sign * mean + 0.0:.4g}" for mean in means)
    return f"{name} {candidate} against {baseline}"


def odds(log: float) -> str:
    """Evidence in words, from its logarithm; it may be too large for a float."""
    return f"{math.exp(log):.3g}" if log < 100 else f"1e{log / math.log(10):.0f}"
