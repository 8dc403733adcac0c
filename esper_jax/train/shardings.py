"""Keeps the shardings that a model's variables came with in the state of a run."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from esper_jax.growth.state import Arrays, TrainState

__all__ = ["Spread", "shardings_of", "spread"]

Spread = Mapping[str, tuple[tuple[int, ...], NamedSharding]]
"""Shape and sharding of each variable that lies on several devices, by name."""


def shardings_of(values: Arrays) -> Spread:
    """How variables lie on a mesh, as `nnx.with_partitioning` makes them."""
    return {
        name: (value.shape, value.sharding)
        for name, value in values.items()
        if isinstance(value, jax.Array)
        and isinstance(value.sharding, NamedSharding)
        and value.sharding.mesh.size > 1
    }


def spread(state: TrainState, how: Spread) -> TrainState:
    """The state on the mesh of the model.

    What belongs to a variable (its moments, its running mean) lies as the variable
    does; all else is on every device.
    """
    if not how:
        return state
    mesh = next(iter(how.values()))[1].mesh
    everywhere = NamedSharding(mesh, PartitionSpec())

    def put(path: tuple[Any, ...], leaf: Any) -> Any:
        for key in path:
            shape, sharding = how.get(getattr(key, "key", None) or "", (None, None))
            if sharding is not None and np.shape(leaf) == shape:
                return jax.device_put(leaf, sharding)
        return jax.device_put(leaf, everywhere)

    return jax.tree_util.tree_map_with_path(put, state)
