"""Growth's arrays by name, and nested as Flax Linen nests them.

``hidden/bank/w1`` is ``variables["bank"]["hidden"]["bank"]["w1"]``.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from esper_jax.bits import as_bits, from_bits
from esper_jax.growth.beds import Bed
from esper_jax.growth.functions import Remembered
from esper_jax.growth.parts import ModelParts
from esper_jax.growth.state import Arrays
from esper_jax.layers.variables import named_leaves
from esper_jax.lifecycle.packing import NAMES
from esper_jax.trees import is_key

__all__ = [
    "COLLECTIONS",
    "Variables",
    "flat",
    "mapping",
    "named",
    "nested",
    "remembered_in",
    "slots_in",
]

Variables = dict[str, Any]
"""The collections ``bank``, ``seeds``, ``probe`` and ``growth``; others are kept."""

COLLECTIONS = ("bank", "seeds", "probe")
"""Those that a Linen model holds."""


def mapping(argument: str, given: Any) -> Mapping[str, Any]:
    """What was given, if it is a mapping.

    Raises:
      TypeError: naming the argument.
    """
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{argument} must be a dictionary of collections, as init returns it; got "
            f"{type(given).__name__}"
        )
    return given


def flat(
    argument: str,
    parts: ModelParts,
    nested: Mapping[str, Any],
    collections: tuple[str, ...],
) -> Arrays:
    """The arrays of growth in some collections, by name.

    Raises:
      ValueError: if one is missing, naming the argument.
    """
    found: Arrays = {}
    for collection in collections:
        tree = mapping(argument, nested).get(collection) or {}
        found |= flatten_dict(mapping(f"{argument}[{collection!r}]", tree), sep="/")
    own: Arrays = {}
    for bed in parts.beds.values():
        for collection in collections:
            for name in bed.variables(collection):
                if name not in found:
                    raise ValueError(
                        f"{argument} must hold the collection {collection}, with "
                        f"{name!r} for one; got {', '.join(nested) or 'nothing'}"
                    )
                own[name] = found[name]
    return own


def nested(parts: ModelParts, values: Arrays) -> Variables:
    """The collections from arrays by name: inverse of `flat`."""
    beds = parts.beds.values()
    return {
        collection: unflatten_dict(
            {name: values[name] for bed in beds for name in bed.variables(collection)},
            sep="/",
        )
        for collection in COLLECTIONS
    }


def slots_in(
    argument: str, parts: ModelParts, values: Arrays, collections: tuple[str, ...]
) -> dict[str, int]:
    """The number of slots that each layer has, by layer.

    Args:
      argument: what the arrays were given as.
      parts: the layers.
      values: as `flat` returns them.
      collections: those that the arrays are of.

    Raises:
      ValueError: if the collections of a layer do not agree, naming both.
    """
    slots: dict[str, int] = {}
    for layer, bed in parts.beds.items():
        counts = {c: _slots(bed, values, c) for c in collections}
        first = counts[collections[0]]
        if set(counts.values()) != {first}:
            told = ", ".join(f"{c} {count}" for c, count in counts.items())
            raise ValueError(
                f"{argument}: the collections of layer {layer!r} must have one number "
                f"of slots; got {told}. Pass those that belong together: shrink "
                "changes all of them"
            )
        slots[layer] = first
    return slots


def _slots(bed: Bed, values: Arrays, collection: str) -> int:
    """Slots of a layer by one collection; 0 if an axis is missing."""
    index = NAMES.index("slots") if collection == "seeds" else 0
    shape = jnp.shape(values[bed.variables(collection)[index]])
    axes = shape[-1:] if collection == "seeds" else shape[len(bed.stack) :]
    return int(axes[0]) if axes else 0


def named(remembered: Remembered) -> Arrays:
    """What growth remembers, as the collection ``growth``.

    Random keys are plain integers there, which every file format takes, and so are
    floats that may be NaN: see `bits.as_bits`.
    """
    kept = remembered._replace(growth=jax.tree.map(as_bits, remembered.growth))
    leaves = named_leaves(kept)
    return {n: jax.random.key_data(x) if is_key(x) else x for n, x in leaves.items()}


def remembered_in(like: Remembered, variables: Variables) -> Remembered:
    """Inverse of `named`.

    Raises:
      ValueError: if an array is missing, or of another shape.
    """
    given = mapping("variables", variables).get("growth") or {}
    leaves = named_leaves(like)
    missing = [name for name in leaves if name not in given]
    if missing:
        raise ValueError(
            "variables must hold the collection growth, as init returns it; there is "
            f"no {missing[0]!r} in it"
        )
    arrays = [
        jax.random.wrap_key_data(given[name], impl=jax.random.key_impl(leaf))
        if is_key(leaf)
        else from_bits(jnp.asarray(given[name]), leaf.dtype)
        for name, leaf in leaves.items()
    ]
    for (name, leaf), array in zip(leaves.items(), arrays, strict=True):
        if array.shape != leaf.shape:
            raise ValueError(
                f"variables: {name!r} of the collection growth must have shape "
                f"{leaf.shape}, as the other collections say; got {array.shape}. Pass "
                "collections that belong together: shrink changes all of them"
            )
    return jax.tree.unflatten(jax.tree.structure(like), arrays)
