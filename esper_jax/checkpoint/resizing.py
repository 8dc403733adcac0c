"""Changes the number of slots of a saved `TrainState`, in the host's memory.

A checkpoint holds as many slots a layer as the run that saved it had. Before its arrays
are placed on devices they are adapted to the state that they are restored into.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from esper_jax.checkpoint.host_leaves import (
    HostLeaf,
    LeafError,
    flatten,
    path_of,
    to_host,
)
from esper_jax.growth.state import TrainState
from esper_jax.lifecycle.slots import move_slots, resize, slot_sources
from esper_jax.lifecycle.state import SeedState

__all__ = ["resized"]

Leaves = dict[str, HostLeaf]


def resized(leaves: Leaves, like: Any) -> tuple[Leaves, dict[str, tuple[int, int]]]:
    """The leaves of a saved state with as many slots as ``like`` has.

    In a larger capacity every slot keeps its place, and new slots get the blueprints
    and moments that ``like`` has there. In a smaller one the slots of living seeds are
    moved together. `lifecycle.slots` does both, as for `grow_capacity`. Leaves that do
    not fit for another reason are left as they are.

    Args:
      leaves: by name; not changed.
      like: any tree. Each `TrainState` in it decides how many slots its layers get.

    Returns:
      The leaves, and the old and new capacity of each layer where they differ.

    Raises:
      LeafError: naming the layer, if a living seed would be lost, or if the capacity
        grows and ``like`` holds shapes instead of arrays.
    """
    wanted = flatten(like)
    new, changed = dict(leaves), {}
    for prefix, state in _train_states(like):
        for layer, target in state.seeds.items():
            seeds = _seeds(leaves, (*prefix, "seeds", layer), target)
            if seeds is None or seeds.capacity == target.capacity:
                continue
            try:
                source = slot_sources(seeds, target.capacity)
            except ValueError as error:
                raise LeafError(
                    f"layer {layer!r}, saved with capacity {seeds.capacity}, into "
                    f"capacity {target.capacity}: {error}"
                ) from None
            slots = {
                name: leaf
                for name, (keys, leaf) in wanted.items()
                if _has_slots(keys, prefix, layer)
                if name in leaves and leaves[name].array.shape[:1] == (seeds.capacity,)
            }
            new |= _moved(leaves, slots, source)
            new |= _probes(leaves, wanted, prefix, layer)
            new |= _as_leaves(
                (*prefix, "seeds", layer), resize(seeds, target.capacity, source)
            )
            changed[layer] = seeds.capacity, target.capacity
    return new, changed


def _train_states(like: Any) -> Iterator[tuple[tuple[str, ...], TrainState]]:
    """Each `TrainState` in a tree, and its path."""

    def found(node: Any) -> bool:
        return isinstance(node, TrainState)

    for path, node in jax.tree_util.tree_leaves_with_path(like, is_leaf=found):
        if found(node):
            yield path_of(path), node


def _seeds(
    leaves: Leaves, path: tuple[str, ...], target: SeedState
) -> SeedState | None:
    """The saved seeds of a layer as host arrays; None if their shapes do not fit."""
    arrays = []
    for name, (_, like) in flatten(target).items():
        leaf = leaves.get("/".join((*path, name)))
        if leaf is None or leaf.array.ndim != len(like.shape):
            return None
        arrays.append(leaf.array)
    seeds = jax.tree.unflatten(jax.tree.structure(target), arrays)
    same = seeds.seed_of_slot.ndim == 1 and seeds.num_seeds == target.num_seeds
    return seeds if same else None


def _has_slots(keys: tuple[str, ...], prefix: tuple[str, ...], layer: str) -> bool:
    """Whether a leaf outside the seeds belongs to the slots of a layer."""
    if keys[: len(prefix)] != prefix:
        return False
    field, name, *_ = (*keys[len(prefix) :], "", "")
    return field in ("banks", "bank_opt") and name == layer


def _probes(
    leaves: Leaves,
    wanted: Mapping[str, tuple[tuple[str, ...], Any]],
    prefix: tuple[str, ...],
    layer: str,
) -> Leaves:
    """The probe of a layer, or of its stack; always 0."""
    owner = layer.split("[")[0]
    bed = f"{owner}/" if owner else ""
    names = [
        "/".join((*prefix, "rest", f"{bed}{end}")) for end in ("bed/probe", "probe")
    ]
    return {
        name: _with(leaves[name], np.zeros(wanted[name][1].shape, np.float32))
        for name in names
        if name in leaves and name in wanted
    }


def _moved(leaves: Leaves, slots: Mapping[str, Any], source: np.ndarray) -> Leaves:
    """The leaves with their slots moved; ``slots`` are the leaves to restore into."""
    old = {name: leaves[name].array for name in slots}
    if (source >= 0).all():  # no new slot, so nothing is read from the given state
        fresh = {
            name: np.zeros_like(a, shape=(len(source), *a.shape[1:]))
            for name, a in old.items()
        }
    else:
        for name, leaf in slots.items():
            if not isinstance(leaf, jax.Array | np.ndarray):
                raise LeafError(
                    f"leaf {name}: expected an array with values for the new slots of "
                    f"a larger capacity, got {type(leaf).__name__}"
                )
        fresh = {name: leaf.array for name, leaf in to_host(dict(slots)).items()}
    return {
        name: _with(leaves[name], move_slots(array, fresh[name], source))
        for name, array in old.items()
        if (array.shape[1:], array.dtype) == (fresh[name].shape[1:], fresh[name].dtype)
    }


def _with(leaf: HostLeaf, array: np.ndarray) -> HostLeaf:
    return dataclasses.replace(leaf, array=array)


def _as_leaves(path: tuple[str, ...], seeds: SeedState) -> Leaves:
    host = to_host(seeds).values()
    new = [dataclasses.replace(leaf, keys=(*path, *leaf.keys)) for leaf in host]
    return {"/".join(leaf.keys): leaf for leaf in new}
