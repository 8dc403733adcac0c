"""The two configs of an A/B test, and how it is judged."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from esper_jax.rollout.ab.design import Design
from esper_jax.rollout.ab.metrics import Metric, parse_metric
from esper_jax.run.changes import differing
from esper_jax.run.config import ConfigError, RunConfig, parse_config, to_dict

__all__ = ["Plan", "altered", "changes_told", "plan_of"]

_WITHOUT_EFFECT = (
    "seed",
    "checkpoint",
    "monitor",
    "features.ab_testing",
    "features.performance_monitoring",
)
"""Keys and tables that change no number of a run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Design):
    """An A/B test of two configs; the metrics are named as in `rollout.ab.metrics`.

    Args:
      a: config of one arm. Pair number ``i`` runs with the seed ``a.seed + i``.
      b: config of the other; must train on the same data. Its seed is not used.
    """

    a: RunConfig
    b: RunConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.a.seed + self.pairs > 2**32:
            raise ConfigError(
                f"seed of A: expected {self.pairs} seeds from it on that are below "
                f"2**32, got {self.a.seed}"
            )
        self.parsed()
        _check_arms(self.a, self.b)

    def parsed(self) -> list[Metric]:
        """Where each metric stands in a run's folder."""
        return [parse_metric(name, (self.a, self.b)) for name in self.metrics]

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


def changes_told(plan: Plan) -> str:
    """How B differs from A, in a line."""
    changes = [f"{k} {a!r} -> {b!r}" for k, (a, b) in altered(plan.a, plan.b).items()]
    more = ", ..." if len(changes) > 8 else ""
    return f"B differs from A in {', '.join(changes[:8])}{more}"


def _check_arms(a: RunConfig, b: RunConfig) -> None:
    for name, config in (("A", a), ("B", b)):
        if not config.features.ab_testing:
            raise ConfigError(
                f"features.ab_testing of {name} is off: expected on for both configs. "
                "Turn it on where it was turned off: in [features] of the config, in "
                "the file of flags, or in ESPER_FEATURE_AB_TESTING"
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
