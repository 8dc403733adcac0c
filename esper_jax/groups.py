"""Layers of one shape, stacked: what is done for each is done once for all.

The arrays of a group have a leading axis ``L`` of layers. Functions of one layer run
over it by `jax.vmap`, so that the size of a program follows the number of shapes, and
not of layers.
"""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

__all__ = ["Group", "Groups", "flat_slots", "slots_of_layers"]


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers of one shape.

    Args:
      beds: path of each `SeedBed` and the leading axes of its arrays: () for a single
        layer, the axes of a stack (`nnx.scan`, `nnx.vmap`) otherwise.
      layers: name of each layer, in the order of the beds.
    """

    beds: tuple[tuple[str, tuple[int, ...]], ...]
    layers: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Groups:
    """All layers of a model, by group.

    Args:
      of: the groups, by name.
      order: names of all layers, in the order that decisions follow.
    """

    of: Mapping[str, Group]
    order: tuple[str, ...]

    @classmethod
    def alone(cls, layers: Sequence[str]) -> "Groups":
        """Each layer as a group of its own, of the same name."""
        of = {name: Group(((name, ()),), (name,)) for name in layers}
        return cls(of, tuple(layers))

    def names(self) -> dict[str, str]:
        """The group of each layer, by the layer's name."""
        return {name: key for key, group in self.of.items() for name in group.layers}

    def apart(self, by: Mapping[str, Hashable]) -> "Groups":
        """The same layers, those of a group apart that differ in ``by``.

        Args:
          by: anything of each layer; one thing for all of a stack.
        """
        of = {}
        for group in self.of.values():
            start, kinds = 0, dict[Hashable, tuple[list[Any], list[str]]]()
            for path, stack in group.beds:
                layers = group.layers[start : start + math.prod(stack)]
                start += len(layers)
                beds, names = kinds.setdefault(by[layers[0]], ([], []))
                beds.append((path, stack))
                names.extend(layers)
            for beds, names in kinds.values():
                of[names[0]] = Group(tuple(beds), tuple(names))
        return self if len(of) == len(self.of) else Groups(of, self.order)

    def join(self, by_bed: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays of beds, ``(*stack, ...)``, by group, ``(L, ...)``."""

        def joined(beds: tuple[tuple[str, tuple[int, ...]], ...], *x: Any) -> Any:
            flat = [
                a.reshape((math.prod(stack), *a.shape[len(stack) :]))
                for a, (_, stack) in zip(x, beds, strict=True)
            ]
            return flat[0] if len(flat) == 1 else _numpy(flat).concatenate(flat)

        return {
            key: jax.tree.map(
                lambda *x, beds=group.beds: joined(beds, *x),
                *(by_bed[path] for path, _ in group.beds),
            )
            for key, group in self.of.items()
        }

    def part(self, by_group: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays of groups by bed: inverse of `join`."""
        parts: dict[str, Any] = {}
        for key, group in self.of.items():
            start = 0
            for path, stack in group.beds:
                stop = start + math.prod(stack)
                parts[path] = jax.tree.map(
                    lambda a, i=start, j=stop, stack=stack: a[i:j].reshape(
                        (*stack, *a.shape[1:])
                    ),
                    by_group[key],
                )
                start = stop
        return parts

    def stack(self, by_layer: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays of layers, ``(...)``, by group, ``(L, ...)``."""
        return {
            key: jax.tree.map(
                lambda *x: _numpy(x).stack(x), *(by_layer[n] for n in group.layers)
            )
            for key, group in self.of.items()
        }

    def split(self, by_group: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays of groups by layer: inverse of `stack`."""
        split = {
            name: jax.tree.map(lambda a, i=i: a[i, ...], by_group[key])
            for key, group in self.of.items()
            for i, name in enumerate(group.layers)
        }
        return {name: split[name] for name in self.order}

    def flat(self, by_group: Mapping[str, Array]) -> Array:
        """Arrays ``(L, W)``, of any width, as one, layer after layer in `order`."""
        joined = jnp.concatenate([by_group[key].reshape(-1) for key in self.of])
        places = self._places({key: by_group[key].shape[1] for key in self.of})
        return joined if _is_range(places) else joined[places]

    def unflat(self, flat: Array, widths: Mapping[str, int]) -> dict[str, Array]:
        """Inverse of `flat`, for the given widths by group."""
        places = self._places(widths)
        if not _is_range(places):
            flat = flat[np.argsort(places)]
        ends = np.cumsum([len(self.of[key].layers) * widths[key] for key in self.of])
        parts = jnp.split(flat, ends[:-1])
        return {
            key: part.reshape(-1, widths[key])
            for key, part in zip(self.of, parts, strict=True)
        }

    def _places(self, widths: Mapping[str, int]) -> np.ndarray:
        """Where each element of `flat` is in the concatenated groups."""
        start, ranges = 0, {}
        for key, group in self.of.items():
            for name in group.layers:
                ranges[name] = np.arange(start, start + widths[key])
                start += widths[key]
        return np.concatenate([ranges[name] for name in self.order])


def _is_range(places: np.ndarray) -> bool:
    return bool(np.array_equal(places, np.arange(places.size)))


def _numpy(arrays: Sequence[Any]) -> Any:
    """numpy for arrays of the host, which then need no device; else `jax.numpy`."""
    return np if all(isinstance(a, np.ndarray) for a in arrays) else jnp


def flat_slots(tree: Any) -> Any:
    """Arrays ``(L, K, ...)`` as ``(L * K, ...)``."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tree)


def slots_of_layers(tree: Any, layers: int) -> Any:
    """Inverse of `flat_slots`, for a number of layers."""
    return jax.tree.map(lambda a: a.reshape(layers, -1, *a.shape[1:]), tree)
