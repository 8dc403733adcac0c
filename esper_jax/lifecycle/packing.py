"""`SeedState` in few arrays, as a model holds it between calls.

A step passes every array of a model through the program. Fields of one dtype that
change together share an array, so that there are ten of them and not thirty-three.

Those that may be NaN, ``seed_float32``, are held as the integers of their bits: see
`trees.as_bits`.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_jax.lifecycle.state import SeedState, init_seeds
from esper_jax.trees import as_bits, from_bits

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

_UNMEASURED = "seed_float32"
"""The array whose fields are NaN where nothing was measured."""

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
        array = _stacked([leaves[i] for i in places])
        packed[name] = as_bits(array) if name == _UNMEASURED else array
    return packed


def unpack(packed: Mapping[str, Any]) -> SeedState:
    """Inverse of `pack`. Takes shapes (`jax.ShapeDtypeStruct`) as well."""
    leaves: dict[int, Any] = {}
    for name, places in _places().items():
        array = packed[name]
        if name == _UNMEASURED:
            array = from_bits(array, jnp.float32)
        rows = _rows(array) if len(places) > 1 else [array]
        leaves |= zip(places, rows, strict=True)
    return jax.tree.unflatten(_TREE, [leaves[i] for i in range(len(leaves))])


def _stacked(fields: list[Any]) -> Any:
    if len(fields) == 1:
        return fields[0]
    if any(isinstance(field, jax.core.Tracer) for field in fields):
        return jnp.stack(fields, axis=-2)
    array = np.stack([np.asarray(field) for field in fields], axis=-2)
    host = all(isinstance(field, np.ndarray) for field in fields)
    return array if host else _on_device(array)


def _rows(array: Any) -> list[Any]:
    """The fields that an array holds."""
    if isinstance(array, jax.ShapeDtypeStruct):
        shape = (*array.shape[:-2], array.shape[-1])
        return [jax.ShapeDtypeStruct(shape, array.dtype)] * array.shape[-2]
    if isinstance(array, jax.core.Tracer):
        return [array[..., row, :] for row in range(array.shape[-2])]
    rows = [np.asarray(array)[..., row, :] for row in range(array.shape[-2])]
    return rows if isinstance(array, np.ndarray) else [_on_device(row) for row in rows]


def _on_device(array: np.ndarray) -> jax.Array:
    with jax.debug_nans(False):  # NaN is "not measured" here
        return jnp.asarray(array)
