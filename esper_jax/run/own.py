"""A model, data and a loss of one's own in a config, checked before a run is written.

    [model]
    factory = "package.module:function"   # function(**other keys, rngs) -> nnx.Module
    [growth]
    layers = ["blocks/0/mlp"]             # what grows, unless the model says it itself
    [data]
    factory = "package.module:function"   # function(**other keys) -> three parts
    [train]
    loss = "package.module:function"      # or objective; as in train.build

The parts of the data are training, held-out and test data, each what `fit` takes:
arrays, rows first, or an iterable of batches. They come as a tuple, as a dictionary
(``train``, ``held_out``, ``test``) or as a `Dataset`, which also tells the classes.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from esper_jax.data import Dataset
from esper_jax.growth.state import TrainState
from esper_jax.layers.bed import SeedBed
from esper_jax.layers.growable import make_growable
from esper_jax.lifecycle.grafting import Strategy
from esper_jax.run.config import GrowthConfig, RunConfig
from esper_jax.run.references import ConfigError, call, failure, imported
from esper_jax.train.batches import DataError, Passes, is_iterable
from esper_jax.train.program import Program

__all__ = [
    "begins_anew",
    "check_one_step",
    "has_own_loss",
    "is_own",
    "losses",
    "one_batch",
    "own_data",
    "own_model",
]

_PARTS = ("train", "held_out", "test")


def has_own_loss(config: RunConfig) -> bool:
    """Whether a config names a loss or an objective."""
    return bool(config.train.loss or config.train.objective)


def is_own(config: RunConfig) -> bool:
    """Whether anything of one's own takes part in a run."""
    return bool(config.model.factory or config.data.factory or has_own_loss(config))


def own_data(config: RunConfig) -> Dataset:
    """What ``data.factory`` returns.

    Raises:
      ConfigError: if it cannot be called, or returns something else.
    """
    key, reference = "data.factory", config.data.factory
    options = config.data.options
    made = call(key, imported(key, reference, **options), **options)
    if isinstance(made, Mapping) and set(made) == set(_PARTS):
        made = tuple(made[part] for part in _PARTS)
    if not isinstance(made, Dataset):
        if not isinstance(made, tuple) or len(made) != len(_PARTS):
            length = f" of {len(made)}" if isinstance(made, tuple | list | dict) else ""
            raise ConfigError(
                f"{key}: expected {reference} to return (train, held_out, test), a "
                f"dictionary of them or a Dataset; got {type(made).__name__}{length}"
            )
        made = Dataset(*made)
    peeked = dict(zip(_PARTS, (_begun(part) for part in made[:3]), strict=True))
    if config.compare.static and any(map(is_iterable, peeked.values())):
        raise ConfigError(f"compare.static: expected arrays from {reference}")
    if config.train.steps_per_tick and begins_anew(peeked["train"]):
        peeked["train"] = Passes(peeked["train"])
    return made._replace(**peeked)


def begins_anew(data: Any) -> bool:
    """Whether data are batches that can be gone through again and again."""
    return is_iterable(data) and (callable(data) or iter(data) is not data)


def _begun(part: Any) -> Any:
    """The same data, of which `one_batch` can look at the first batch."""
    positioned = hasattr(part, "get_state") and hasattr(part, "set_state")
    if not is_iterable(part) or begins_anew(part) or positioned:
        return part
    first = list(itertools.islice(part, 1))
    return _Begun(first, part)


class _Begun:
    """An iterator without a position whose first batch was looked at."""

    def __init__(self, first: list[Any], rest: Any) -> None:
        self.first = first
        self._batches = itertools.chain(first, rest)

    def __iter__(self) -> "_Begun":
        return self

    def __next__(self) -> Any:
        return next(self._batches)


def one_batch(name: str, data: Any, rows: int) -> Any:
    """A batch of data, without taking it away.

    Args:
      name: of the part, for errors.
      data: as `own_data` returns it.
      rows: of a batch, where the data are arrays.

    Raises:
      ConfigError: if there is none.
    """
    if not is_iterable(data):
        return jax.tree.map(lambda a: a[:rows], data)
    if isinstance(data, _Begun):
        found = data.first
    else:
        state = data.get_state() if hasattr(data, "get_state") else None
        found = list(itertools.islice(data() if callable(data) else data, 1))
        if state is not None and hasattr(data, "set_state"):
            data.set_state(state)
    if not found:
        raise ConfigError(f"data.factory: expected a batch of {name}, got none")
    return found[0]


def own_model(config: RunConfig) -> nnx.Module:
    """What ``model.factory`` returns, with ``growth.layers`` made growable.

    Raises:
      ConfigError: if it cannot be called, returns no model, or nothing can grow.
    """
    key, growth = "model.factory", config.growth
    options = {**config.model.options, "rngs": nnx.Rngs(config.seed)}
    function = imported(key, config.model.factory, **options)
    model = call(key, function, **options)
    if not isinstance(model, nnx.Module):
        raise ConfigError(
            f"{key}: expected {config.model.factory} to return a Flax NNX module, got "
            f"{type(model).__name__}"
        )
    grows = any(isinstance(node, SeedBed) for _, node in nnx.iter_graph(model))
    if growth.layers:
        call(
            "growth",
            make_growable,
            model,
            growth.layers,
            growth.num_seeds,
            capacity=growth.capacity,
            blueprints=growth.blueprints,
            strategy=Strategy[growth.strategy.upper()],
            incubation=growth.incubation,
            rngs=nnx.Rngs(config.seed + 1),
        )
    elif not grows:
        raise ConfigError(
            "growth.layers: expected the paths of the layers that grow, since the "
            f"model of {config.model.factory} has none that can; it has {_paths(model)}"
        )
    elif growth != GrowthConfig():
        raise ConfigError(
            f"growth: the model of {config.model.factory} says itself what grows; "
            "leave the table out, or name further layers in growth.layers"
        )
    return model


def _paths(model: nnx.Module) -> str:
    paths = [
        "/".join(map(str, path))
        for path, node in nnx.iter_graph(model)
        if path and isinstance(node, nnx.Module)
    ]
    return ", ".join(paths[:20]) + (", ..." if len(paths) > 20 else "")


def losses(config: RunConfig) -> dict[str, Any]:
    """The arguments of `build` for ``train.loss`` or ``train.objective``.

    Raises:
      ConfigError: if one cannot be called with two arguments.
    """
    named = {"loss": config.train.loss, "objective": config.train.objective}
    return {
        name: imported(f"train.{name}", reference, None, None)
        for name, reference in named.items()
        if reference
    }


def check_one_step(
    config: RunConfig, program: Program, state: TrainState, data: Dataset
) -> None:
    """Looks at all arrays and at one batch of what comes in batches, and traces a step.

    Of held-out and test data an evaluation is traced. Nothing is computed.

    Raises:
      ConfigError: if the data do not fit, or a trace fails; it says at which line.
    """
    train = config.train
    names = [
        *(["model.factory"] if config.model.factory else []),
        *(["data.factory"] if config.data.factory else []),
        *(["train.loss"] if train.loss else []),
        *(["train.objective"] if train.objective else []),
    ]
    for part, function in (
        ("train", program.step),
        ("held_out", program.evaluate),
        ("test", program.evaluate),
    ):
        arrays = getattr(data, part)
        batch = one_batch(part, arrays, train.batch_size)
        try:
            if is_iterable(arrays):
                program.check(f"a batch of {part}", batch, False)
            else:
                program.check(part, arrays, part == "train")
        except DataError as error:
            raise ConfigError(f"data.factory: {error}") from None
        try:
            jax.eval_shape(lambda s, run=function, b=batch: run(s, b), state)
        except Exception as error:
            what = "step" if part == "train" else "evaluation"
            raise ConfigError(
                f"{', '.join(names)}: one {what} with a batch of {part} failed "
                f"({_described(batch)}): {failure(error)}"
            ) from error


def _described(batch: Any) -> str:
    leaves = jax.tree.leaves(batch)
    shapes = [f"{getattr(x, 'dtype', '')}{list(np.shape(x))}" for x in leaves[:6]]
    more = ", ..." if len(leaves) > 6 else ""
    return f"{type(batch).__name__} of {', '.join(shapes)}{more}"
