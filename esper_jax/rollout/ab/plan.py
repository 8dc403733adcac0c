"""What an A/B test is to do, fixed before its first run, and what it can then find."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from esper_jax.rollout.ab import anytime, paired
from esper_jax.rollout.ab.metrics import Metric, parse_metric
from esper_jax.run.changes import differing
from esper_jax.run.config import ConfigError, RunConfig, parse_config, to_dict

__all__ = [
    "Plan",
    "altered",
    "as_t_test",
    "least_pairs",
    "pairs_for",
    "pairs_worked_out",
    "plan_of",
    "power_with",
    "told",
]

_EFFICIENCY = 3 / math.pi
"""Pairs that the t-test takes over those of Wilcoxon's test, for normal differences."""

_WITHOUT_EFFECT = (
    "seed",
    "checkpoint",
    "monitor",
    "features.ab_testing",
    "features.performance_monitoring",
)
"""Keys and tables that change no number of a run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """An A/B test.

    Args:
      a: config of one arm. Pair number ``i`` runs with the seed ``a.seed + i``.
      b: config of the other; must train on the same data. Its seed is not used.
      metrics: names, as in `rollout.ab.metrics`. All of them are judged together.
      pairs: of runs; at most that many if ``sequential``.
      alpha: chance to see a difference in any metric where there is none.
      power: chance to see one of ``effect`` in a metric; for planning.
      effect: mean difference of a pair over the standard deviation of the differences.
      sequential: look after each pair, and stop at a difference in the first metric.

    Raises:
      ConfigError: naming the option, what was expected and what came.
    """

    a: RunConfig
    b: RunConfig
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
                f"--seeds: expected at least 2 pairs of runs, since {why}; got "
                f"{self.pairs}. Leave it out to have the number worked out"
            )
        most = min(paired.MOST_PAIRS, 2**32 - self.a.seed)
        if self.pairs > most:
            raise ConfigError(f"--seeds: expected at most {most}, got {self.pairs}")
        twice = [n for i, n in enumerate(self.metrics) if n in self.metrics[:i]]
        if not self.metrics or twice:
            got = f"{twice[0]!r} twice" if twice else "none"
            raise ConfigError(f"--metric: expected different metrics, got {got}")
        self.parsed()
        _check_arms(self.a, self.b)

    def parsed(self) -> list[Metric]:
        """Where each metric stands in a run's folder."""
        return [parse_metric(name, (self.a, self.b)) for name in self.metrics]

    @property
    def strict(self) -> float:
        """The level of each metric where nothing else is known of the others (Holm)."""
        return self.alpha / len(self.metrics)

    def config(self, arm: str, pair: int) -> RunConfig:
        """The config of a run.

        Args:
          arm: ``a`` or ``b``.
          pair: its number, from 0.
        """
        return dataclasses.replace(getattr(self, arm), seed=self.a.seed + pair)

    def to_dict(self) -> dict[str, Any]:
        """As JSON, which `plan_of` reads."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        told = {"a": to_dict(self.a), "b": to_dict(self.b)}
        return fields | told | {"metrics": list(self.metrics)}


def plan_of(table: Mapping[str, Any]) -> Plan:
    """The plan that `Plan.to_dict` wrote.

    Raises:
      ConfigError: if it is none.
    """
    try:
        arms = {arm: parse_config(table[arm]) for arm in ("a", "b")}
        return Plan(**{**table, **arms, "metrics": tuple(table["metrics"])})
    except (KeyError, TypeError) as error:
        raise ConfigError(f"no plan of an A/B test ({error})") from None


def altered(a: RunConfig, b: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Keys that differ and can change a number of a run; the values in both."""
    return differing(to_dict(a), to_dict(b), _WITHOUT_EFFECT)


def _check_numbers(alpha: float, power: float, effect: float) -> None:
    if not 0 < alpha <= 0.5:
        raise ConfigError(f"--alpha: expected above 0 and at most 0.5, got {alpha}")
    if not alpha < power < 1:
        raise ConfigError(
            f"--power: expected above --alpha ({alpha}) and below 1, got {power}"
        )
    if not 0.02 <= effect <= 100:
        raise ConfigError(
            "--effect: expected from 0.02 to 100 standard deviations of the "
            f"differences, got {effect}"
        )


def _check_arms(a: RunConfig, b: RunConfig) -> None:
    for name, config in (("A", a), ("B", b)):
        if not config.features.ab_testing:
            raise ConfigError(
                f"features.ab_testing of {name} is off: expected on for both configs. "
                "Turn the flag on, or override it: --set features.ab_testing=true"
            )
    changes = altered(a, b)
    if not changes:
        raise ConfigError(
            "A and B: expected configs that differ in more than seed, checkpoint and "
            "monitor, but every run of a pair would be the same twice. Change one with "
            "--set-b KEY=VALUE"
        )
    other = [key for key in changes if key.startswith("data.")]
    if other:
        was, now = changes[other[0]]
        raise ConfigError(
            f"{other[0]}: expected the same in A and B, since the runs of a pair share "
            f"their data; got {was!r} and {now!r}. Give both the same with --set "
            f"{other[0]}=VALUE, or compare runs on different data by hand"
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
            f"--effect: expected one that at most {paired.MOST_PAIRS} pairs find, got "
            f"{effect}; look for a larger one, or give --seeds"
        )
    return pairs


def power_with(plan: Plan) -> float:
    """The power of a plan for its effect in one metric."""
    if plan.sequential:
        chances = anytime.sequential_power(
            plan.effect, plan.pairs, plan.strict, plan.effect
        )
        return float(chances[-1])
    if plan.pairs < least_pairs(plan.strict):
        return 0.0
    return paired.power_of(as_t_test(plan.pairs), plan.effect, plan.strict)


def told(plan: Plan) -> list[str]:
    """What the plan can find, in lines, before anything runs."""
    needed = pairs_for(plan.effect, plan.power, plan.strict, plan.sequential)
    most = "at most " if plan.sequential else ""
    level = f"an error of {plan.alpha:g}" + (
        f" over {len(plan.metrics)} metrics" if len(plan.metrics) > 1 else ""
    )
    takes = f"more than {paired.MOST_PAIRS}" if needed is None else f"{most}{needed}"
    changes = [f"{k} {a!r} -> {b!r}" for k, (a, b) in altered(plan.a, plan.b).items()]
    lines = [
        f"B differs from A in {', '.join(changes[:8])}{', ...' * (len(changes) > 8)}",
        f"plan: a difference of {plan.effect:g} standard deviations (of the pairs' "
        f"differences) takes {takes} pairs for a power of {plan.power:g} at {level}",
        f"{most}{plan.pairs} pairs are run; their power for it is "
        f"{power_with(plan):.2f}",
    ]
    least = least_pairs(plan.strict)
    if plan.pairs < least:
        lines.append(
            f"note: with fewer than {least} pairs no difference can be told from "
            "chance at that error, however large; only the intervals will say something"
        )
    return lines
