"""`SeedState` in four arrays, as a model holds it between calls.

A step passes every array of a model through the program, and each costs the host time.
So what a step does not change shares arrays of 32-bit words, and the sums that it adds
to share one.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_jax.bits import from_words, to_words, words_of
from esper_jax.lifecycle.state import SeedState, init_seeds

__all__ = ["NAMES", "pack", "unpack"]

NAMES = ("seeds", "slots", "steps", "sums")
"""Names of the arrays: uint32 words of what is known of each seed, ``(*stack, n, S)``,
and of each slot, ``(*stack, n, K)``; calls, int32; sums of all calls, float32
``(*stack, 4 S + K)``: `Statistics`, then ``reconstruction``."""

_SUMS = ("statistics", "reconstruction")


def _shapes(seeds: int, slots: int) -> Any:
    """Without arrays, which would make JAX look for its devices during the import."""
    return jax.eval_shape(functools.partial(init_seeds, seeds, slots))


@functools.cache
def _places() -> tuple[dict[str, tuple[int, ...]], tuple[Any, ...]]:
    """Indices of the leaves that each array holds, in order, and all leaves' dtypes."""
    seeds, slots = 3, 2
    places: dict[str, list[int]] = {name: [] for name in NAMES}
    leaves = jax.tree_util.tree_leaves_with_path(_shapes(seeds, slots))
    for index, (path, leaf) in enumerate(leaves):
        kind = {(seeds,): "seeds", (slots,): "slots", (): "steps"}[leaf.shape]
        places["sums" if path[0].name in _SUMS else kind].append(index)
    dtypes = tuple(leaf.dtype for _, leaf in leaves)
    return {name: tuple(indices) for name, indices in places.items()}, dtypes


_TREE = jax.tree.structure(_shapes(1, 1))


def pack(state: SeedState, old: SeedState | None = None) -> dict[str, Any]:
    """The arrays by name.

    Args:
      state: of a layer, or of a stack of them.
      old: if given, arrays all of whose fields are the very ones of ``old`` are left
        out.
    """
    leaves = jax.tree.leaves(state)
    before = [None] * len(leaves) if old is None else jax.tree.leaves(old)
    return {
        name: _packed(name, [leaves[i] for i in places])
        for name, places in _places()[0].items()
        if any(leaves[i] is not before[i] for i in places)
    }


def unpack(packed: Mapping[str, Any]) -> SeedState:
    """Inverse of `pack`. Takes shapes (`jax.ShapeDtypeStruct`) as well."""
    if any(isinstance(packed[name], jax.ShapeDtypeStruct) for name in NAMES):
        return jax.eval_shape(unpack, {name: packed[name] for name in NAMES})
    places, dtypes = _places()
    widths = {name: packed[name].shape[-1] for name in ("seeds", "slots")}
    leaves: dict[int, Any] = {}
    for name in NAMES:
        of = [dtypes[i] for i in places[name]]
        leaves |= zip(
            places[name], _fields(name, packed[name], of, widths), strict=True
        )
    return jax.tree.unflatten(_TREE, [leaves[i] for i in range(len(leaves))])


def _packed(name: str, fields: list[Any]) -> Any:
    if name == "steps":
        return fields[0]
    if name == "sums":
        return _computed(lambda xp, *x: xp.concatenate(x, axis=-1), *fields)
    return _computed(lambda xp, *x: xp.stack(to_words(x), axis=-2), *fields)


def _fields(
    name: str, array: Any, dtypes: list[Any], widths: Mapping[str, int]
) -> list[Any]:
    """The fields that an array holds."""
    if name == "steps":
        return [array]
    if name == "sums":
        ends = np.cumsum([widths["seeds"]] * (len(dtypes) - 1))
        return _computed(lambda xp, x: xp.split(x, ends, axis=-1), array)

    def rows(_: Any, x: Any) -> list[Any]:
        return from_words([x[..., row, :] for row in range(words_of(dtypes))], dtypes)

    return _computed(rows, array)


def _computed(f: Any, *arrays: Any) -> Any:
    """``f(numpy or jax.numpy, *arrays)``: on the host, unless an array is traced.

    On the device, each operation on a new shape would compile. Arrays of a device come
    back on one.
    """
    if any(isinstance(x, jax.core.Tracer) for x in arrays):
        return f(jnp, *arrays)
    out = f(np, *map(np.asarray, arrays))
    if all(isinstance(x, np.ndarray) for x in arrays):
        return out
    with jax.debug_nans(False):  # NaN is "not measured" here
        return jax.tree.map(jnp.asarray, out)
