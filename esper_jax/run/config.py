"""The configuration of a run: a TOML file checked key by key against dataclasses."""

import dataclasses
import importlib.util
import math
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esper_jax.blueprints import ACTIVATIONS, resolve
from esper_jax.data import DATASETS
from esper_jax.lifecycle.grafting import Strategy
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.stages import Incubation, Stage
from esper_jax.monitor.config import MonitorConfig
from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.learned import LearnedConfig, learned_lives
from esper_jax.policy.trial_config import TrialConfig, trial_lives
from esper_jax.run.building import built
from esper_jax.run.features import Features
from esper_jax.run.overrides import set_key
from esper_jax.run.references import ConfigError, check_reference, shown, written
from esper_jax.train.faults import GovernorConfig

__all__ = [
    "CheckpointConfig",
    "CompareConfig",
    "ConfigError",
    "DataConfig",
    "GrowthConfig",
    "ModelConfig",
    "RunConfig",
    "TrainConfig",
    "load_config",
    "parse_config",
    "to_dict",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data to train on.

    Args:
      name: a key of `DATASETS`.
      seed: draws the split.
      factory: ``"package.module:function"`` of one's own instead, called with the other
        keys of the table; see `run.own`.
      options: those keys.
    """

    name: str = "digits"
    seed: int = 0
    factory: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_reference("factory", self.factory)
        _one_of("name", self.name, DATASETS)
        _at_least("seed", self.seed, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The host: a multilayer perceptron.

    Args:
      hidden: width of each hidden layer.
      activation: a key of `ACTIVATIONS`.
      factory: ``"package.module:function"`` of one's own instead, called with the other
        keys of the table and ``rngs``; see `run.own`.
      options: those keys.
    """

    hidden: tuple[int, ...] = (64,)
    activation: str = "relu"
    factory: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_reference("factory", self.factory)
        if not self.hidden:
            raise ValueError("hidden must hold at least one width, got none")
        for width in self.hidden:
            _at_least("hidden", width, 1)
        _one_of("activation", self.activation, ACTIVATIONS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    """What may grow in each hidden layer.

    Args:
      layers: paths of the layers of a model of one's own (``model.factory``) that are
        made growable; none if it has such layers already.
      num_seeds: seeds in each hidden layer.
      capacity: how many seeds of a layer can live at once.
      blueprints: names of the blueprints that may grow.
      strategy: grafting strategy, a name of `Strategy` in lower case.
      incubation: what a seed in TRAINING learns from: ``"task"``, ``"bounded"`` or
        ``"reconstruction"``.
    """

    layers: tuple[str, ...] = ()
    num_seeds: int = 4
    capacity: int = 4
    blueprints: tuple[str, ...] = ("residual_mlp",)
    strategy: str = "linear"
    incubation: str = "task"

    def __post_init__(self) -> None:
        _at_least("num_seeds", self.num_seeds, 1)
        if not 1 <= self.capacity <= self.num_seeds:
            raise ValueError(
                f"capacity must be from 1 to num_seeds ({self.num_seeds}), "
                f"got {self.capacity}"
            )
        resolve(self.blueprints)
        _one_of("strategy", self.strategy, [s.name.lower() for s in Strategy])
        _one_of("incubation", self.incubation, typing.get_args(Incubation))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, and with which optimizers.

    Args:
      ticks: epochs to train for; each ends with a tick.
      batch_size: rows per step, of data that are arrays.
      steps_per_tick: steps before each tick where the data are batches; 0 for a tick
        after each pass.
      loss: ``"package.module:function"`` of one's own, ``loss(outputs, y)`` as in
        `train.build`; cross-entropy by default.
      objective: or ``objective(model, batch)`` instead.
      frozen: whether the host stays as it is, and only what grows learns.
      learning_rate: of the host's AdamW.
      weight_decay: of the host's AdamW.
      blueprint_learning_rate: of each slot's AdamW.
      blueprint_weight_decay: of each slot's AdamW.
    """

    ticks: int = 100
    batch_size: int = 64
    steps_per_tick: int = 0
    loss: str = ""
    objective: str = ""
    frozen: bool = False
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    blueprint_learning_rate: float = 3e-4
    blueprint_weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        _counts("ticks", self.ticks)
        _counts("batch_size", self.batch_size)
        _counts("steps_per_tick", self.steps_per_tick, 0)
        check_reference("loss", self.loss)
        check_reference("objective", self.objective)
        if self.loss and self.objective:
            raise ValueError("loss and objective must not both be given")
        for name in ("learning_rate", "blueprint_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be above 0 and finite, got {getattr(self, name)}"
                )
        for name in ("weight_decay", "blueprint_weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be at least 0 and finite, got {getattr(self, name)}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and which checkpoints to keep.

    Args:
      every: ticks between two checkpoints; the last tick is always saved.
      keep: how many of the newest checkpoints to keep.
      keep_best: ``"loss"`` or ``"accuracy"`` also keeps the checkpoint that is best by
        it on held-out data; ``""`` does not.
      keep_every: also keeps the steps that are multiples of this number; 0 for none.
      pinned: steps that are never removed.
    """

    every: int = 50
    keep: int = 5
    keep_best: str = ""
    keep_every: int = 0
    pinned: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _counts("every", self.every)
        _counts("keep", self.keep)
        _one_of("keep_best", self.keep_best, ("", "loss", "accuracy"))
        _at_least("keep_every", self.keep_every, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What to compare the run with when it has ended.

    Args:
      static: also trains a wider host in which nothing grows, with at least as many
        parameters as the grown model.
      plot: draws held-out accuracy over time, with the events marked, into
        ``accuracy.png``. Needs the extra ``plot``.
    """

    static: bool = False
    plot: bool = False

    def __post_init__(self) -> None:
        if self.plot and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("plot needs matplotlib: pip install 'esper-jax[plot]'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a run depends on. Each field but ``seed`` and ``policy`` is a
    table of the TOML file.

    There ``lifecycle.min_epochs`` is a table from stage names to epochs; stages that it
    does not name keep their default.

    Args:
      seed: draws the parameters and the order of the rows.
      policy: what decides: ``"heuristic"``, by the table ``controller``; ``"trial"``,
        by the table ``trial``; or ``"learned"``, a network, by the table ``learned``.
        Keys of ``lifecycle`` that are not given are those of `policy.trial_lives` or
        `policy.learned_lives` then.
    """

    seed: int = 0
    policy: str = "heuristic"
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    growth: GrowthConfig = dataclasses.field(default_factory=GrowthConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    lifecycle: LifecycleConfig = dataclasses.field(default_factory=LifecycleConfig)
    controller: ControllerConfig = dataclasses.field(default_factory=ControllerConfig)
    trial: TrialConfig = dataclasses.field(default_factory=TrialConfig)
    learned: LearnedConfig = dataclasses.field(default_factory=LearnedConfig)
    governor: GovernorConfig = dataclasses.field(default_factory=GovernorConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    compare: CompareConfig = dataclasses.field(default_factory=CompareConfig)
    monitor: MonitorConfig = dataclasses.field(default_factory=MonitorConfig)
    features: Features = dataclasses.field(default_factory=Features)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(
                f"seed must be at least 0 and below 2**32, got {self.seed}"
            )
        _one_of("policy", self.policy, ("heuristic", "trial", "learned"))
        if self.compare.static and self.train.frozen:
            raise ValueError(
                "compare.static trains a host, so train.frozen must be false; got true"
            )
        if self.model.factory:
            if self.compare.static:
                raise ValueError("compare.static is for the built-in model")
            return  # what else must fit is checked where the model is made
        if self.growth.layers:
            raise ValueError(
                "growth.layers is for a model of your own (model.factory), got "
                f"{self.growth.layers}"
            )
        if self.growth.num_seeds > min(self.model.hidden):
            raise ValueError(
                f"growth.num_seeds must be at most the narrowest layer of model.hidden "
                f"({min(self.model.hidden)}), got {self.growth.num_seeds}"
            )
        for table in ("controller", "trial"):
            chosen = getattr(self, table).blueprint
            if chosen >= len(self.growth.blueprints):
                raise ValueError(
                    f"{table}.blueprint must be an index into growth.blueprints "
                    f"(0 to {len(self.growth.blueprints) - 1}), got {chosen}"
                )


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a TOML file and applies overrides.

    Args:
      path: of the file.
      overrides: each ``key.path=value``. A value that is not TOML is taken as a string.

    Raises:
      ConfigError: naming the file or the key, what was expected and what came.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply") from None
    except ValueError as error:  # of TOML, of UTF-8, or of too many digits
        raise ConfigError(f"{path}: is not TOML: {error}") from None
    for override in overrides:
        set_key(table, override)
    return parse_config(table)


def parse_config(table: Mapping[str, Any]) -> RunConfig:
    """Makes a `RunConfig` from nested tables.

    Raises:
      ConfigError: for an unknown key, a wrong type or an impossible value.
    """
    return built(RunConfig, _with_lives(table), "")


_LIVES = {"trial": trial_lives, "learned": learned_lives}
"""Lifecycles of the policies that need another one than the default."""


def _with_lives(table: Any) -> Any:
    """The tables with the lifecycle of their policy, of which they may change keys."""
    own = table.get("lifecycle", {}) if isinstance(table, Mapping) else None
    if not isinstance(own, Mapping) or table.get("policy") not in tuple(_LIVES):
        return table
    lives = _written_lifecycle(_LIVES[table["policy"]]())
    for name in ("min_epochs", "grafting"):
        if isinstance(own.get(name, {}), Mapping):
            own = {**own, name: {**lives[name], **own.get(name, {})}}
    return {**table, "lifecycle": {**lives, **own}}


def _written_lifecycle(lifecycle: LifecycleConfig) -> dict[str, Any]:
    epochs = {stage.name: lifecycle.min_epochs[stage] for stage in Stage}
    return {**dataclasses.asdict(lifecycle), "min_epochs": epochs}


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The nested tables that `parse_config` reads back as the same config."""
    tables = dataclasses.asdict(config)
    for name in ("data", "model"):
        tables[name] = written(tables[name])
    return tables | {"lifecycle": _written_lifecycle(config.lifecycle)}


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _counts(name: str, value: int, least: int = 1) -> None:
    """Checks what is counted in, or compared with, an int32."""
    _at_least(name, value, least)
    if value >= 2**31:
        raise ValueError(f"{name} must be below 2**31, got {value}")


def _one_of(name: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(choices)}; got {shown(value)}"
        )
