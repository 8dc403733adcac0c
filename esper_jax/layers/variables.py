"""The variables that a layer which can grow adds to a Flax NNX model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from esper_jax.lifecycle.packing import pack, unpack
from esper_jax.lifecycle.signals import Statistics
from esper_jax.lifecycle.state import SeedState

__all__ = [
    "BlueprintParam",
    "GraftProbe",
    "SeedTree",
    "SeedVariable",
    "VariableTree",
    "named_leaves",
]


class BlueprintParam(nnx.Variable):
    """An array of the bank: parameters of the blueprints.

    No `nnx.Param`, so that an optimizer of the host's parameters does not see it.
    """


class SeedVariable(nnx.Variable):
    """An array of the layer's `SeedState`; see `SeedTree`."""


class GraftProbe(nnx.Variable):
    """Added to each slot's alpha; always 0 while training.

    The loss's gradient with respect to the probe is the gradient with respect to alpha.
    With the probe at ``-alpha`` of one slot, the loss is that without its seed: a
    counterfactual.
    """


nnx.register_variable_name("bank", BlueprintParam)
nnx.register_variable_name("seeds", SeedVariable)
nnx.register_variable_name("probe", GraftProbe)


class VariableTree(nnx.Module):
    """A pytree held as one NNX variable a leaf.

    So whatever handles arrays by path (pure dicts, safetensors, Orbax) sees plain
    arrays. An attribute is named by its leaf's keys, joined by underscores.

    Args:
      kind: the variables' type.
      tree: a pytree of arrays.
    """

    def __init__(self, kind: type[nnx.Variable], tree: Any) -> None:
        leaves, self.treedef = named_leaves(tree), jax.tree.structure(tree)
        self.names: tuple[str, ...] = tuple(leaves)
        for name, leaf in leaves.items():
            setattr(self, name, kind(leaf))

    def get_value(self) -> Any:
        """The pytree."""
        leaves = [getattr(self, name).get_value() for name in self.names]
        return jax.tree.unflatten(self.treedef, leaves)

    def set_value(self, tree: Any) -> None:
        """Sets all leaves.

        Args:
          tree: of the same structure.
        """
        leaves = jax.tree.leaves(tree)
        for name, leaf in zip(self.names, leaves, strict=True):
            getattr(self, name).set_value(leaf)

    def get_arrays(self) -> dict[str, Any]:
        """The leaves by name."""
        return {name: getattr(self, name).get_value() for name in self.names}

    def set_arrays(self, arrays: Mapping[str, Any]) -> None:
        """Sets all leaves by name."""
        for name in self.names:
            getattr(self, name).set_value(arrays[name])

    @property
    def writable(self) -> bool:
        """Whether the variables can be written in the current trace."""
        return all(getattr(self, name)._can_update for name in self.names)


class SeedTree(VariableTree):
    """A `SeedState` held as the few variables of `lifecycle.packing`.

    Args:
      state: of one layer.
    """

    def __init__(self, state: SeedState) -> None:
        super().__init__(SeedVariable, pack(state))

    def get_value(self) -> SeedState:
        """The seeds."""
        return unpack(self.get_arrays())

    def set_value(self, tree: SeedState) -> None:
        """Sets the seeds."""
        self.set_arrays(pack(tree))

    def record(
        self,
        seeds: SeedState,
        statistics: Statistics,
        reconstruction: Float[Array, " K"],
    ) -> None:
        """Adds one forward pass's statistics to the tick's sums.

        Each array is added to as a whole, which XLA does in place.

        Args:
          seeds: what `get_value` returned.
          statistics: of each chunk.
          reconstruction: of each slot.
        """
        more = dataclasses.replace(
            seeds,
            statistics=statistics,
            reconstruction=reconstruction,
            steps=jnp.ones_like(seeds.steps),
        )
        for name, array in pack(more, seeds).items():
            variable = getattr(self, name)
            variable.set_value(variable.get_value() + array)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their keys, joined by underscores, in order.

    A name that stands twice (``a_b`` and ``{"a": {"b": ...}}``) gets a number.
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = first = "_".join(map(_key, path))
        number = 2
        while name in named:
            name, number = f"{first}_{number}", number + 1
        named[name] = leaf
    return named


def _key(key: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"a tree must be of dictionaries, tuples and dataclasses: {key!r}")
