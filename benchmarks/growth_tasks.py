"""Data sets, hosts and what may grow in them, for `growth.py`.

All settings that were chosen by looking at results are in this file.
`benchmarks/RESULTS.md` says what else was tried.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from esper_jax import data
from esper_jax.blueprints import group, param_counts
from esper_jax.data import Dataset
from esper_jax.hosts import MLP, CharMLP, ConvNet
from esper_jax.layers import SeedBed

__all__ = ["TASKS", "Rows", "Task", "costs", "host_size", "layer_names", "rows_of"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A data set, a host, and what may grow in it.

    Args:
      data: makes the data set from the random seed of its split.
      held_out: rows that are held out of those to learn from while arms are tuned.
      pooled: whether each run draws for itself which rows these are; else the last.
      make: ``make(rngs, widths, **options) -> model``; the options are those of the
        layers' `SeedBed`.
      widths: of each of the host's layers.
      positions: how often each layer, the readout last, is applied to one row.
      places: of each layer, in which a part is tried.
      hidden: units of a part.
      budget: most parameters of the grown model, host included.
      epochs: passes over the data.
      batch: rows a step.
      warm_up: steps in which the learning rate rises; below 1, their share of all.
      rates: peak learning rates to begin tuning with, evenly apart in their logarithm.
      decays: the same of AdamW's weight decay.
    """

    data: Callable[[int], Dataset]
    held_out: int
    pooled: bool = True
    make: Callable[..., nnx.Module]
    widths: tuple[int, ...]
    positions: tuple[int, ...]
    places: int
    hidden: int
    budget: int
    epochs: int
    batch: int
    warm_up: float = 0.08
    rates: tuple[float, ...] = (0.005, 0.01, 0.02, 0.04, 0.08)
    decays: tuple[float, ...]

    def options(self, grows: bool) -> dict[str, Any]:
        """What ``make`` passes to the layers' `SeedBed`."""
        if not grows:
            return {"num_seeds": 1, "capacity": 1, "blueprints": ("noop",)}
        part = group(hidden=self.hidden)
        return {
            "num_seeds": self.places,
            "capacity": self.places,
            "blueprints": (part,),
        }

    def about(self) -> str:
        """The settings in words."""
        return (
            f"Host of widths {self.widths}, {self.places} places a layer, parts of "
            f"{self.hidden} units, at most {self.budget} parameters; {self.epochs} "
            f"epochs, batch {self.batch}, warm-up {self.warm_up:g}"
        )

    def widened(self, parameters: int) -> tuple[int, ...]:
        """Widths of the narrowest host with at least so many parameters.

        They keep the proportions of the host's, to rounding.
        """
        step = 0
        while True:
            widths = [w + round(step * w / max(self.widths)) for w in self.widths]
            if host_size(self, widths) >= parameters:
                return tuple(widths)
            step += 1


class Rows(NamedTuple):
    """What is learned from, and what results are reported on: each ``(x, y)``."""

    learned: Any
    test: Any


def rows_of(task: Task, split: int) -> Rows:
    """The data of a task. What a data set holds out comes after what it trains on."""
    parts = task.data(split)
    both = zip(parts.train, parts.held_out, strict=True)
    return Rows(tuple(np.concatenate(pair) for pair in both), parts.test)


def _mlp(inputs: int, outputs: int) -> Callable[..., nnx.Module]:
    def make(rngs: nnx.Rngs, widths: Sequence[int], **options: Any) -> nnx.Module:
        return MLP(inputs, widths, outputs, activation="gelu", rngs=rngs, **options)

    return make


def _conv(rngs: nnx.Rngs, widths: Sequence[int], **options: Any) -> nnx.Module:
    return ConvNet(widths, 10, strides=(1, 2, 2), rngs=rngs, **options)


def _char(rngs: nnx.Rngs, widths: Sequence[int], **options: Any) -> nnx.Module:
    return CharMLP(48, 16, 8, widths, rngs=rngs, **options)


TASKS = {
    "mnist1d-mlp": Task(
        data=data.mnist1d,
        held_out=600,
        make=_mlp(40, 10),
        widths=(56, 56),
        positions=(1, 1, 1),
        places=8,
        hidden=8,
        budget=15_210,
        epochs=120,
        batch=100,
        decays=(0.1, 0.2, 0.4, 0.8, 1.6),
    ),
    "mnist1d-conv": Task(
        data=data.mnist1d,
        held_out=600,
        make=_conv,
        widths=(8, 12, 16),
        positions=(40, 20, 10, 1),
        places=8,
        hidden=8,
        budget=5_210,
        epochs=100,
        batch=100,
        decays=(0.02, 0.05, 0.1, 0.2, 0.4),
    ),
    "text": Task(
        data=data.text,
        held_out=2000,
        pooled=False,
        make=_char,
        widths=(48, 48),
        positions=(1, 1, 1),
        places=12,
        hidden=8,
        budget=24_000,
        epochs=30,
        batch=200,
        decays=(0.1, 0.2, 0.4, 0.8, 1.6),
    ),
    "digits": Task(
        data=data.digits,
        held_out=240,
        make=_mlp(64, 10),
        widths=(20, 20),
        positions=(1, 1, 1),
        places=4,
        hidden=4,
        budget=2_900,
        epochs=120,
        batch=49,
        decays=(0.02, 0.05, 0.1, 0.2, 0.4),
    ),
    "spirals": Task(
        data=data.spirals,
        held_out=200,
        make=_mlp(2, 2),
        widths=(20, 20),
        positions=(1, 1, 1),
        places=4,
        hidden=4,
        budget=1_060,
        epochs=150,
        batch=50,
        decays=(0.0, 0.01, 0.03, 0.1, 0.3),
    ),
}


def bare_host(task: Task, widths: Sequence[int]) -> nnx.Module:
    """A host of the given widths in which nothing can grow."""
    return task.make(nnx.Rngs(0), widths, **task.options(False))


def host_size(task: Task, widths: Sequence[int]) -> int:
    """Parameters of the host with the given widths, counted on the model itself."""

    def values() -> Any:
        no_part = nnx.All(nnx.Param, lambda path, _: "bed" not in path)
        return nnx.state(bare_host(task, widths), no_part)

    shapes = jax.tree.leaves(jax.eval_shape(values))
    return sum(int(np.prod(leaf.shape)) for leaf in shapes)


def layer_sizes(task: Task, widths: Sequence[int]) -> list[int]:
    """Parameters of each layer of the host, the readout last.

    Embeddings are left out: they are looked up, not multiplied.
    """

    def values() -> Any:
        model: Any = bare_host(task, widths)
        model = getattr(model, "mlp", model)
        layers = [nnx.state(layer.base, nnx.Param) for layer in model.layers]
        return [*layers, nnx.state(model.readout, nnx.Param)]

    return [
        sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(layer))
        for layer in jax.eval_shape(values)
    ]


def layer_names(task: Task) -> list[str]:
    """Names of the layers that can grow, as in ``state.seeds`` of a `TrainState`."""
    inner = "mlp/" if task.make is _char else ""
    return [f"{inner}layers/{i}" for i in range(len(task.widths))]


def costs(task: Task) -> dict[str, np.ndarray]:
    """Parameters of a part in each place, by layer."""
    model = nnx.eval_shape(
        lambda: task.make(nnx.Rngs(0), task.widths, **task.options(True))
    )
    beds = [n for _, n in nnx.iter_graph(model) if isinstance(n, SeedBed)]
    return {
        name: np.asarray(param_counts(bed.blueprints, bed.layout.sizes)[0])
        for name, bed in zip(layer_names(task), beds, strict=True)
    }
