"""`SeedState` in few arrays, as a model holds it between calls.

A step passes every array of a model through the program. Fields of one dtype that
change together share an array, so that there are ten of them and not thirty-three.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_jax.lifecycle.state import SeedState, init_seeds

__all__ = ["NAMES", "pack", "unpack"]


def _shapes(seeds: int, slots: int) -> Any:
    """Without arrays, which would make JAX look for its devices during the import."""
    return jax.eval_shape(functools.partial(init_seeds, seeds, slots))


@functools.cache
def _places() -> dict[str, list[int]]:
    """Name of each array, and the indices of the leaves that it holds, in order."""
    seeds, slots = 3, 2
    together: dict[str, dict[str, int]] = {}
    leaves = jax.tree_util.tree_leaves_with_path(_shapes(seeds, slots))
    for index, (path, leaf) in enumerate(leaves):
        kind = {(seeds,): "seed", (slots,): "slot", (): "layer"}[leaf.shape]
        field = path[0].name
        key = field if field == "statistics" else f"{kind}_{leaf.dtype}"
        together.setdefault(key, {})["_".join(k.name for k in path)] = index
    return {
        key if len(fields) > 1 else next(iter(fields)): list(fields.values())
        for key, fields in together.items()
    }


NAMES = tuple(_places())
"""Names of the arrays."""

_TREE = jax.tree.structure(_shapes(1, 1))


def pack(state: SeedState, old: SeedState | None = None) -> dict[str, Any]:
    """The arrays by name: ``(*stack, n, S)`` or ``(*stack, n, K)`` of ``n`` fields.

    An array that holds one field alone has its name and shape.

    Args:
      state: of a layer, or of a stack of them.
      old: if given, arrays all of whose fields are the very ones of ``old`` are left
        out.
    """
    leaves = jax.tree.leaves(state)
    before = [None] * len(leaves) if old is None else jax.tree.leaves(old)
    packed = {}
    for name, places in _places().items():
        if all(leaves[i] is before[i] for i in places):
            continue
        fields = [leaves[i] for i in places]
        host = all(isinstance(field, np.ndarray) for field in fields)
        stack = np.stack if host else jnp.stack
        packed[name] = fields[0] if len(fields) == 1 else stack(fields, axis=-2)
    return packed


def unpack(packed: Mapping[str, Any]) -> SeedState:
    """Inverse of `pack`. Takes shapes (`jax.ShapeDtypeStruct`) as well."""
    leaves = {}
    for name, places in _places().items():
        array = packed[name]
        for row, index in enumerate(places):
            leaves[index] = array if len(places) == 1 else _row(array, row)
    return jax.tree.unflatten(_TREE, [leaves[i] for i in range(len(leaves))])


def _row(array: Any, row: int) -> Any:
    if isinstance(array, jax.ShapeDtypeStruct):
        shape = (*array.shape[:-2], array.shape[-1])
        return jax.ShapeDtypeStruct(shape, array.dtype)
    return array[..., row, :]
