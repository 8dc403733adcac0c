"""From a config to what runs: its data and its program."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from esper_jax.data import DATASETS, Dataset
from esper_jax.growth.parts import values_of
from esper_jax.hosts import MLP
from esper_jax.lifecycle.grafting import Strategy
from esper_jax.policy.interface import PolicyFactory, barren, idle
from esper_jax.policy.learned import learned
from esper_jax.policy.learned_file import read_policy
from esper_jax.policy.trial import trial
from esper_jax.run.config import ConfigError, GrowthConfig, ModelConfig, RunConfig
from esper_jax.run.features import apply_features, policy_under
from esper_jax.run.own import losses, own_data, own_model
from esper_jax.train.program import Program, build

__all__ = ["Build", "SharedPrograms", "build_run", "load_data"]

Build = Callable[[RunConfig, Dataset, str | None], Program]
"""Makes the program of a run, as `build_run` does."""


_OF_A_RUN = ("checkpoint", "compare", "governor", "monitor")
"""Tables that change no program."""


def load_data(config: RunConfig) -> Dataset:
    """The data set of a config.

    Raises:
      ConfigError: if it needs a package that is not installed, or one's own cannot be
        used.
    """
    if config.data.factory:
        return own_data(config)
    try:
        return DATASETS[config.data.name](config.data.seed)
    except ImportError as error:
        raise ConfigError(f"data.name: {error}") from None


def build_run(
    config: RunConfig, data: Dataset, axis_name: str | None = None
) -> Program:
    """The program of a config: an MLP or one's own, with AdamW for host and blueprints.

    Args:
      config: of the run.
      data: of the run.
      axis_name: of the devices that the rows are divided among; see `build`.

    Raises:
      ConfigError: if the model or the loss cannot be used, the policy or the lifecycle
        does not suit the model, or the built-in model does not fit on the device.
    """
    return _program(config, _model(config, data, axis_name), axis_name)


class SharedPrograms:
    """`build_run` for many runs: those that differ in seed or length compile once.

    Each still begins with the values that its own seed draws, and ends with the same
    bits as alone. A model of one's own whose form depends on the seed is compiled anew.
    """

    def __init__(self) -> None:
        self._made: dict[Any, tuple[Any, Program]] = {}

    def __call__(
        self, config: RunConfig, data: Dataset, axis_name: str | None = None
    ) -> Program:
        """The program of a config; see `build_run`."""
        model = _model(config, data, axis_name)
        values, form = values_of(model), nnx.graphdef(model)
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), values)
        key = _form(config), axis_name
        known, program = self._made.get(key, (None, None))
        if program is None or known != (form, shapes):
            program = _program(config, model, axis_name)
            self._made[key] = (form, shapes), program
        shared = program
        return program._replace(
            init=lambda rng, values=values: shared.init(rng, values)
        )


def _form(config: RunConfig) -> RunConfig:
    """The config without what the program of a run does not depend on."""
    bare = RunConfig()
    others = {name: getattr(bare, name) for name in _OF_A_RUN}
    # A learned policy is told how long the run is.
    ticks = config.train.ticks if config.policy == "learned" else 1
    train = dataclasses.replace(config.train, ticks=ticks)
    return dataclasses.replace(config, seed=0, train=train, **others)


def _model(config: RunConfig, data: Dataset, axis_name: str | None) -> nnx.Module:
    """The model of a config, with what its seed draws."""
    model = own_model(config) if config.model.factory else _perceptron(config, data)
    try:
        apply_features(model, config.features)
    except ValueError as error:
        raise ConfigError(f"features.{error}") from None
    for _, node in nnx.iter_graph(model):
        # Else it would normalize with each device's own rows.
        if isinstance(node, nnx.BatchNorm) and node.axis_name is None:
            node.axis_name = axis_name
    return model


def _program(config: RunConfig, model: nnx.Module, axis_name: str | None) -> Program:
    train = config.train
    named = losses(config)
    try:
        return build(
            model,
            optax.adamw(train.learning_rate, weight_decay=train.weight_decay),
            optax.adamw(
                train.blueprint_learning_rate, weight_decay=train.blueprint_weight_decay
            ),
            lifecycle_config=config.lifecycle,
            policy=_policy(config),
            wrt=None if train.frozen else nnx.Param,
            axis_name=axis_name,
            **named,
        )
    except ValueError as error:
        where = "model.factory: " if config.model.factory else ""
        raise ConfigError(f"{where}{error}") from None


def _policy(config: RunConfig) -> PolicyFactory:
    features = config.features
    if config.policy == "heuristic":
        return policy_under(features, config.controller)
    policy = trial(config.trial) if config.policy == "trial" else _learned(config)
    if not features.growth:  # its memory all the same, which a resumed run needs
        policy = barren(policy)
    return policy if features.chunked_layers else idle(policy)


def _learned(config: RunConfig) -> PolicyFactory:
    """The network of a config, told how long the run is and whether the host trains."""
    told = config.learned
    told = dataclasses.replace(
        told,
        ticks=told.ticks or config.train.ticks,
        gradients=told.gradients and not config.train.frozen,
    )
    return learned(read_policy(told.path).weights, told, config.controller)


def _perceptron(config: RunConfig, data: Dataset) -> MLP:
    growth, train = config.growth, data.train
    pair = isinstance(train, tuple) and len(train) == 2
    if not pair or np.ndim(train[0]) != 2 or data.num_classes is None:
        raise ConfigError(
            "model: the built-in perceptron needs data.factory to return a Dataset "
            "with num_classes and arrays (x, y), x of shape (N, D). Name a model of "
            "your own in model.factory for other data"
        )
    inputs, classes = train[0].shape[-1], data.num_classes
    _check_memory([inputs, *config.model.hidden, classes])

    make = _maker(inputs, classes, config.model, growth)
    with jax.debug_nans(False):  # NaN is what no seed has measured yet
        return make(jax.random.key(config.seed))


@functools.lru_cache(maxsize=8)
def _maker(
    inputs: int, classes: int, model: ModelConfig, growth: GrowthConfig
) -> Callable[[Any], MLP]:
    """Makes the perceptron from a key: one program, whatever the seed."""

    @nnx.jit
    def make(key: Any) -> MLP:
        return MLP(
            inputs,
            model.hidden,
            classes,
            activation=model.activation,
            num_seeds=growth.num_seeds,
            capacity=growth.capacity,
            blueprints=growth.blueprints,
            strategy=Strategy[growth.strategy.upper()],
            incubation=growth.incubation,
            rngs=nnx.Rngs(key),
        )

    return make


def _check_memory(sizes: Sequence[int]) -> None:
    """Refuses a perceptron that cannot fit on the device.

    Counts parameters, their gradients and their two moments, and nothing else.

    Raises:
      ConfigError: saying how much it would need.
    """
    parameters = sum((a + 1) * b for a, b in itertools.pairwise(sizes))
    known: Mapping[str, Any] = jax.local_devices()[0].memory_stats() or {}
    room = known.get("bytes_limit") or _memory()
    if 16 * parameters > room:
        raise ConfigError(
            f"model.hidden: a host of {parameters:.3g} parameters needs at least "
            f"{16 * parameters / 2**30:.3g} GiB to train, and the device has "
            f"{room / 2**30:.3g} GiB; expected smaller widths"
        )


def _memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
