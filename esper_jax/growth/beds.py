"""Where a model can grow: its `SeedBed` modules, by layer and by shape."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from esper_jax import blueprints
from esper_jax.chunks import ChunkLayout
from esper_jax.groups import Group, Groups
from esper_jax.layers.bed import SeedBed, stack_of

__all__ = ["Bed", "find_beds", "group_layers", "name_of"]


@dataclasses.dataclass(frozen=True)
class Bed:
    """Where a layer's `SeedBed` is in the model."""

    path: str
    """Path of the `SeedBed`."""
    owner: str
    """Path of the `ChunkedLayer` that holds the bed, or the bed's own path."""
    forms: Mapping[str, tuple[tuple[str, ...], Any]]
    """Of ``bank``, ``seeds`` and ``probe``: names of the leaves, and the tree."""
    capacity: int
    """Slots when the model was taken apart."""
    stack: tuple[int, ...] = ()
    """Leading axes of the variables of a stack of layers; () for a single layer."""
    index: tuple[int, ...] = ()
    """Index of the layer along the axes of ``stack``; () for a single layer."""

    def variables(self, name: str) -> list[str]:
        """Names of the variables that hold the bed's bank, seeds or probe."""
        leaves = self.forms[name][0]
        place = f"{self.path}/{name}"
        return [f"{place}/{leaf}" for leaf in leaves] or [place]


def name_of(path: tuple[Any, ...]) -> str:
    """A path as a name: joined by slashes."""
    return "/".join(map(str, path))


_Found = tuple[
    dict[str, Bed], dict[str, ChunkLayout], dict[str, tuple[blueprints.Blueprint, ...]]
]


def find_beds(model: nnx.Module) -> _Found:
    """Each layer's bed, chunks and blueprints, by layer name."""
    beds, layouts, kinds = {}, {}, {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, SeedBed):
            owner = name_of(path[:-1] if path and path[-1] == "bed" else path)
            for name, bed in _layers(node, name_of(path), owner).items():
                beds[name], layouts[name] = bed, node.layout
                kinds[name] = node.blueprints
    if "" in [bed.path for bed in beds.values()]:
        raise ValueError(
            "model must hold a SeedBed, not be one: a bare SeedBed has no host to grow"
        )
    if not beds:
        raise ValueError(
            "model must hold at least one ChunkedLayer or SeedBed: without one, "
            "nothing can grow"
        )
    return beds, layouts, kinds


def _layers(node: SeedBed, path: str, owner: str) -> dict[str, Bed]:
    """The layers that share a `SeedBed`: one, or each of a stack, by name."""
    stack = stack_of(node, path)
    forms = {
        "bank": (node.bank.names, node.bank.treedef),
        "seeds": (node.seeds.names, node.seeds.treedef),
        "probe": ((), jax.tree.structure(0)),
    }
    slots = node.seeds.get_value().capacity
    if not stack:
        return {owner: Bed(path, owner, forms, slots)}
    return {
        f"{owner}[{','.join(map(str, index))}]": Bed(
            path, owner, forms, slots, stack, index
        )
        for index in np.ndindex(stack)
    }


def group_layers(
    beds: Mapping[str, Bed],
    layouts: Mapping[str, ChunkLayout],
    kinds: Mapping[str, tuple[blueprints.Blueprint, ...]],
    values: Mapping[str, Any],
) -> Groups:
    """Groups the layers whose chunks, slots, blueprints and banks have one shape.

    Args:
      beds: of each layer, by name.
      layouts: of each layer.
      kinds: of each layer.
      values: of the model's variables, by name; shapes are enough.
    """
    members: dict[Any, list[str]] = {}
    for layer, bed in beds.items():
        bank = [values[name] for name in bed.variables("bank")]
        shapes = [(x.shape[len(bed.stack) :], x.dtype) for x in bank]
        key = layouts[layer], kinds[layer], bed.capacity, bed.forms["bank"], *shapes
        members.setdefault(key, []).append(layer)
    of = {
        layers[0]: Group(
            beds=tuple(dict.fromkeys((beds[n].path, beds[n].stack) for n in layers)),
            layers=tuple(layers),
        )
        for layers in members.values()
    }
    # As jit orders the keys of dictionaries, and so decisions over many layers.
    return Groups(of, tuple(sorted(beds)))
