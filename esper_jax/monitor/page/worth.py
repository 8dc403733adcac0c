"""What kept seeds are worth, and how sure that is."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import stdtrit

from esper_jax.lifecycle.stages import Stage
from esper_jax.monitor.page.lives import Seed
from esper_jax.monitor.page.records import Records, finite, items

__all__ = ["Worth", "mean_interval", "worth_of_fossils"]

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Worth:
    """What a fossil was worth before it was kept.

    Args:
      seed: the fossil.
      kept: tick at which it was kept.
      mean: in units of the held-out loss; None if it was not measured.
      low: lower end of the interval; None if that cannot be told.
      high: upper end.
      ticks: how many ticks measured it; 0 if the records do not say.
    """

    seed: Seed
    kept: int
    mean: float | None
    low: float | None
    high: float | None
    ticks: int


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The ends of Student's 95% interval of a mean over ticks; None for less than two.

    Neighbouring ticks measure nearly the same model, so n of them count as the
    ``n (1 - r) / (1 + r)`` independent ones of an autoregressive series, where r is
    their correlation at lag 1, if positive (Bartlett 1935; Zwiers and von Storch 1995);
    as two at least.
    """
    if len(values) < 2:
        return None
    series = np.asarray(values, np.float64)
    away = series - series.mean()
    squares = float(away @ away)
    correlation = float(away[1:] @ away[:-1]) / squares if squares > 0 else 0.0
    correlation = min(max(correlation, 0.0), 0.999)
    count = max(2.0, len(series) * (1 - correlation) / (1 + correlation))
    error = math.sqrt(squares / (len(series) - 1) / count)
    half = float(stdtrit(count - 1, (1 + LEVEL) / 2)) * error
    mean = float(series.mean())
    return mean - half, mean + half


def worth_of_fossils(records: Records, seeds: Sequence[Seed]) -> list[Worth]:
    """The worth of each fossil over the ticks of its tuning, by layer and number.

    Runs of before the records held the worth of each tick give the mean alone, which
    the event has with which the seed was kept.
    """
    told = {
        (e["layer"], e["seed"]): items(e.get("measured"))
        for e in records.events
        if e["to"] == Stage.FOSSILIZED.name and e["outcome"] == "OK"
    }
    return [
        _worth(seed, told.get((seed.layer, seed.number), {}))
        for seed in seeds
        if seed.last == Stage.FOSSILIZED
    ]


def _worth(seed: Seed, told: Mapping[str, object]) -> Worth:
    kept = next(s.start for s in reversed(seed.spans) if s.stage == Stage.FOSSILIZED)
    values = [
        worth
        for span in seed.life
        if span.stage == Stage.FINE_TUNING
        for worth in span.worths
    ]
    if not values:
        return Worth(seed, kept, finite(told.get("total_improvement")), None, None, 0)
    low, high = mean_interval(values) or (None, None)
    return Worth(seed, kept, float(np.mean(values)), low, high, len(values))
