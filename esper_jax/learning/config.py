"""What a policy is trained on and how: the tables of ``configs/policy.toml``."""

import dataclasses
import tomllib
from collections.abc import Sequence
from pathlib import Path

from esper_jax.blueprints import resolve
from esper_jax.run.building import built
from esper_jax.run.overrides import set_key
from esper_jax.run.references import ConfigError

__all__ = ["DIGITS", "EvolutionConfig", "Family", "PolicyConfig", "load_policy_config"]


DIGITS = 1797
"""Rows of the smallest data set that tasks are drawn from."""


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Hosts of one shape, which share a program; hashable.

    Args:
      hidden: width of each hidden layer of an `MLP`; channels of a `ConvNet`.
      host: ``"mlp"`` or ``"conv"``.
      num_seeds: seeds, and slots, of each layer.
      blueprints: names of those that may grow.
      ticks: of a run.
      steps: of each tick; each sees ``batch`` rows, all of them once a tick.
      batch: rows of a step.
      held_out: rows that the gates and the policy read.
      test: rows by which a run is rated.

    Raises:
      ValueError: naming the field that is out of its range.
    """

    hidden: tuple[int, ...] = (16, 16)
    host: str = "mlp"
    num_seeds: int = 4
    blueprints: tuple[str, ...] = ("residual_mlp", "context", "low_rank")
    ticks: int = 30
    steps: int = 8
    batch: int = 32
    held_out: int = 256
    test: int = 512

    def __post_init__(self) -> None:
        for name in ("num_seeds", "steps", "batch", "held_out", "test"):
            _at_least(name, getattr(self, name), 1)
        _at_least("ticks", self.ticks, 4)
        if not self.hidden or min(self.hidden) < self.num_seeds:
            raise ValueError(
                f"hidden must hold widths of at least num_seeds ({self.num_seeds}), "
                f"got {self.hidden}"
            )
        if self.host not in ("mlp", "conv"):
            raise ValueError(f"host must be 'mlp' or 'conv', got {self.host!r}")
        resolve(self.blueprints)
        drawn = self.rows + self.held_out + self.test
        if drawn > DIGITS:
            raise ValueError(
                f"steps * batch + held_out + test must be at most {DIGITS}, the number "
                "of digits, or some would be both learned from and tested by; got "
                f"{drawn}"
            )

    @property
    def rows(self) -> int:
        """Rows to train on."""
        return self.steps * self.batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvolutionConfig:
    """Numbers of the evolution strategy.

    Args:
      generations: at most.
      population: runs of each task in a generation, one for each candidate. Two of them
        are the policy itself and a run in which nothing grows; the others are pairs of
        opposite perturbations.
      tasks: tasks of each family in a generation, the same for all candidates.
      sigma: standard deviation of the perturbations.
      learning_rate: of Adam.
      weight_decay: of Adam.
      rent: score, in accuracy, that each parameter must bring which is alive at the
        end, in units of the host's: 0.01 is one point for as many parameters as the
        host has.
      every: generations between two saves.

    Raises:
      ValueError: naming the field that is out of its range.
    """

    generations: int = 200
    population: int = 128
    tasks: int = 16
    sigma: float = 0.05
    learning_rate: float = 0.02
    weight_decay: float = 0.001
    rent: float = 0.01
    every: int = 10

    def __post_init__(self) -> None:
        for name in ("generations", "tasks", "every"):
            _at_least(name, getattr(self, name), 1)
        if self.population < 4 or self.population % 2:
            raise ValueError(
                f"population must be even and at least 4, got {self.population}"
            )
        for name in ("sigma", "learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name} must be above 0 and finite, got {getattr(self, name)}"
                )
        for name in ("weight_decay", "rent"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name} must be at least 0 and finite, got {getattr(self, name)}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Everything that the training of a policy depends on.

    Args:
      seed: draws the first weights, the tasks and the perturbations.
      families: of hosts; each is a program that is compiled.
      evolution: how the policy is trained.
    """

    seed: int = 0
    families: tuple[Family, ...] = (Family(),)
    evolution: EvolutionConfig = dataclasses.field(default_factory=EvolutionConfig)

    def __post_init__(self) -> None:
        _at_least("seed", self.seed, 0)
        if not self.families:
            raise ValueError("families must hold at least one, got none")


def load_policy_config(path: Path, overrides: Sequence[str] = ()) -> PolicyConfig:
    """Reads a TOML file and applies overrides.

    Args:
      path: of the file.
      overrides: each ``key.path=value``.

    Raises:
      ConfigError: naming the file or the key, what was expected and what came.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from None
    for override in overrides:
        set_key(table, override)
    config: PolicyConfig = built(PolicyConfig, table, "")
    return config
