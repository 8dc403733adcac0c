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
from esper_jax.lifecycle.packing import NAMES, pack, unpack

__all__ = ["Bed", "find_beds", "group_layers", "name_of"]


@dataclasses.dataclass(frozen=True)
class Bed:
    """Where a layer's `SeedBed` is in the model."""

    path: str
    """Path of the `SeedBed`."""
    owner: str
    """Path of the `ChunkedLayer` that holds the bed, or the bed's own path."""
    bank: tuple[tuple[str, ...], Any]
    """Names of the bank's variables, and its tree."""
    capacity: int
    """Slots when the model was taken apart."""
    stack: tuple[int, ...] = ()
    """Leading axes of the variables of a stack of layers; () for a single layer."""
    index: tuple[int, ...] = ()
    """Index of the layer along the axes of ``stack``; () for a single layer."""

    def variables(self, name: str) -> list[str]:
        """Names of the variables that hold ``bank``, ``seeds`` or ``probe``."""
        place = f"{self.path}/{name}"
        if name == "probe":
            return [place]
        names = NAMES if name == "seeds" else self.bank[0]
        return [f"{place}/{array}" for array in names]

    def read(self, values: Mapping[str, Any], name: str) -> Any:
        """The bed's ``bank``, ``seeds`` or ``probe``, with the axes of its stack.

        Args:
          values: of all variables, by name.
          name: which of them.
        """
        arrays = [values[variable] for variable in self.variables(name)]
        if name == "probe":
            return arrays[0]
        if name == "seeds":
            return unpack(dict(zip(NAMES, arrays, strict=True)))
        return jax.tree.unflatten(self.bank[1], arrays)

    def write(self, name: str, tree: Any) -> dict[str, Any]:
        """Values of the variables by name: inverse of `read`.

        Args:
          name: ``bank``, ``seeds`` or ``probe``.
          tree: its new value.
        """
        arrays = pack(tree).values() if name == "seeds" else jax.tree.leaves(tree)
        return dict(zip(self.variables(name), arrays, strict=True))


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
    bank = node.bank.names, node.bank.treedef
    slots = node.seeds.get_value().capacity
    if not stack:
        return {owner: Bed(path, owner, bank, slots)}
    return {
        f"{owner}[{','.join(map(str, index))}]": Bed(
            path, owner, bank, slots, stack, index
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
        arrays = [values[name] for name in bed.variables("bank")]
        shapes = [(x.shape[len(bed.stack) :], x.dtype) for x in arrays]
        key = layouts[layer], kinds[layer], bed.capacity, bed.bank, *shapes
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
