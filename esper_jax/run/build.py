"""From a config to what runs: its data and its program."""

import jax
import optax
from flax import nnx

from esper_jax.data import DATASETS, Dataset
from esper_jax.hosts import MLP
from esper_jax.lifecycle.grafting import Strategy
from esper_jax.run.config import ConfigError, RunConfig
from esper_jax.train.program import Program, build

__all__ = ["build_run", "load_data"]


def load_data(config: RunConfig) -> Dataset:
    """The data set of a config.

    Raises:
      ConfigError: if it needs a package that is not installed.
    """
    try:
        return DATASETS[config.data.name](config.data.seed)
    except ImportError as error:
        raise ConfigError(f"data.name: {error}") from None


def build_run(config: RunConfig, data: Dataset) -> Program:
    """The program of a config: an MLP, with AdamW for the host and the blueprints."""
    growth, train = config.growth, config.train

    @jax.debug_nans(False)  # NaN is what no seed has measured yet
    @nnx.jit  # one program instead of one for each operation
    def make() -> MLP:
        return MLP(
            data.train[0].shape[-1],
            config.model.hidden,
            data.num_classes,
            activation=config.model.activation,
            num_seeds=growth.num_seeds,
            capacity=growth.capacity,
            blueprints=growth.blueprints,
            strategy=Strategy[growth.strategy.upper()],
            incubation=growth.incubation,
            rngs=nnx.Rngs(config.seed),
        )

    return build(
        make(),
        optax.adamw(train.learning_rate, weight_decay=train.weight_decay),
        optax.adamw(
            train.blueprint_learning_rate, weight_decay=train.blueprint_weight_decay
        ),
        lifecycle_config=config.lifecycle,
        controller_config=config.controller,
    )
