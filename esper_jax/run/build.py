"""From a config to what runs: its data and its program."""

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from esper_jax.data import DATASETS, Dataset
from esper_jax.hosts import MLP
from esper_jax.lifecycle.grafting import Strategy
from esper_jax.run.config import ConfigError, RunConfig
from esper_jax.run.features import apply_features, policy_under
from esper_jax.run.own import losses, own_data, own_model
from esper_jax.train.program import Program, build

__all__ = ["build_run", "load_data"]


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
      ConfigError: if the model or the loss cannot be used, or the built-in model does
        not fit on the device.
    """
    train = config.train
    model = own_model(config) if config.model.factory else _perceptron(config, data)
    try:
        apply_features(model, config.features)
    except ValueError as error:
        raise ConfigError(f"features.{error}") from None
    for _, node in nnx.iter_graph(model):
        # Else it would normalize with each device's own rows.
        if isinstance(node, nnx.BatchNorm) and node.axis_name is None:
            node.axis_name = axis_name
    named = losses(config)
    try:
        return build(
            model,
            optax.adamw(train.learning_rate, weight_decay=train.weight_decay),
            optax.adamw(
                train.blueprint_learning_rate, weight_decay=train.blueprint_weight_decay
            ),
            lifecycle_config=config.lifecycle,
            policy=policy_under(config.features, config.controller),
            axis_name=axis_name,
            **named,
        )
    except ValueError as error:
        if not config.model.factory:
            raise
        raise ConfigError(f"model.factory: {error}") from None


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

    @jax.debug_nans(False)  # NaN is what no seed has measured yet
    @nnx.jit  # one program instead of one for each operation
    def make() -> MLP:
        return MLP(
            inputs,
            config.model.hidden,
            classes,
            activation=config.model.activation,
            num_seeds=growth.num_seeds,
            capacity=growth.capacity,
            blueprints=growth.blueprints,
            strategy=Strategy[growth.strategy.upper()],
            incubation=growth.incubation,
            rngs=nnx.Rngs(config.seed),
        )

    return make()


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
