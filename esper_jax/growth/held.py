"""`Remembered` in few arrays, as `Growth` holds it between calls."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, UInt32

from esper_jax.bits import as_bits, from_bits, from_words, to_words
from esper_jax.growth.functions import Remembered
from esper_jax.layers.variables import VariableTree, named_leaves
from esper_jax.parallel.collectives import on_every_device
from esper_jax.trees import is_key

__all__ = ["GrowthVariable", "HeldTree"]

_LARGEST = 256
"""Elements above which an array stays a variable of its own."""

_IN_STEPS = {"train_loss", "grad_norm", "gradients", "steps"}
"""Fields of the monitor that steps change."""


class GrowthVariable(nnx.Variable):
    """An array of what growth `Remembered`."""


class HeldTree(VariableTree):
    """What growth remembers, as variables; small arrays that no step changes as one.

    A step passes every variable through the program, and each costs the host time. The
    policy's memory, the random key and the running means change at ticks alone: the
    variable ``words`` holds their bits. The other floats of `GrowthState` are held as
    their bits too, since they may be NaN (`bits.as_bits`).

    Args:
      remembered: before the first step.
    """

    def __init__(self, remembered: Remembered) -> None:
        leaves = named_leaves(remembered)
        self.whole = jax.tree.structure(remembered)
        small = _small(remembered)
        # In the order of the leaves: name, dtype, and None for one that is a variable.
        self.kinds: tuple[tuple[str, Any, _Kind | None], ...] = tuple(
            (name, leaf.dtype, _Kind.of(leaf) if name in small else None)
            for name, leaf in leaves.items()
        )
        rest = {n: _safe(n, leaf) for n, leaf in leaves.items() if n not in small}
        words = _pack([leaves[name] for name in small])
        super().__init__(GrowthVariable, {**rest, "words": words})

    def get_value(self) -> Remembered:
        """The tree."""
        arrays = self.get_arrays()
        kinds = tuple(kind for _, _, kind in self.kinds if kind is not None)
        small = iter(_unpack(arrays["words"], kinds))
        leaves = [
            from_bits(arrays[name], dtype) if kind is None else next(small)
            for name, dtype, kind in self.kinds
        ]
        return jax.tree.unflatten(self.whole, leaves)

    def set_value(self, tree: Remembered, old: Remembered | None = None) -> None:
        """Sets all variables.

        Args:
          tree: of the same structure.
          old: if given, what `get_value` returned: a variable is left as it is if it
            holds the very arrays of ``old``.
        """
        held = self.get_arrays()
        arrays: dict[str, Any] = {}
        small, same = [], old is not None
        before = jax.tree.leaves(tree if old is None else old)
        for (name, _, kind), new, was in zip(
            self.kinds, jax.tree.leaves(tree), before, strict=True
        ):
            if kind is None:
                arrays[name] = (
                    held[name] if old is not None and new is was else _safe(name, new)
                )
            else:
                small.append(new)
                same = same and new is was
        words = held["words"] if same else _pack(small)
        self.set_arrays({**arrays, "words": words})


@dataclasses.dataclass(frozen=True)
class _Kind:
    """An array among the words: its shape and dtype; its implementation, if a key."""

    shape: tuple[int, ...]
    dtype: str
    key: Any

    @classmethod
    def of(cls, leaf: Array) -> "_Kind":
        data = _data(leaf)
        key = jax.random.key_impl(leaf) if is_key(leaf) else None
        return cls(data.shape, np.dtype(data.dtype).name, key)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def _small(remembered: Remembered) -> tuple[str, ...]:
    """Names of the arrays that fit into words and that steps leave as they are."""
    leaves = jax.tree_util.tree_leaves_with_path(remembered)
    names = named_leaves(remembered)
    return tuple(
        name
        for name, (path, leaf) in zip(names, leaves, strict=True)
        if not _in_steps([key.name for key in path[:3] if hasattr(key, "name")])
        and _data(leaf).size <= _LARGEST
        and _data(leaf).dtype.itemsize <= 4
        and _data(leaf).dtype != bool
    )


def _in_steps(path: list[str]) -> bool:
    """Whether a step changes what is at a path of `Remembered`."""
    if path[0] != "growth":
        return True
    return path[1] == "step" or (path[1] == "monitor" and path[2] in _IN_STEPS)


def _safe(name: str, leaf: Array) -> Array:
    """An array as a variable holds it."""
    return as_bits(leaf) if name.startswith("growth") else leaf


def _data(leaf: Array) -> Array:
    return jax.random.key_data(leaf) if is_key(leaf) else jnp.asarray(leaf)


@jax.jit
def _pack(leaves: list[Array]) -> UInt32[Array, " N"]:
    whole = [on_every_device(_data(leaf)).reshape(-1) for leaf in leaves]
    return jnp.concatenate([to_words([data])[0] for data in whole])


def _unpack(words: UInt32[Array, " N"], kinds: tuple["_Kind", ...]) -> list[Array]:
    """Inverse of `_pack`."""
    with jax.debug_nans(False):  # NaN is "not measured" here
        return _unpacked(words, kinds)


@functools.partial(jax.jit, static_argnums=1)
def _unpacked(words: UInt32[Array, " N"], kinds: tuple[_Kind, ...]) -> list[Array]:
    ends = np.cumsum([kind.size for kind in kinds])
    parts = jnp.split(words, ends[:-1])
    leaves = []
    for kind, part in zip(kinds, parts, strict=True):
        data = from_words([part], [np.dtype(kind.dtype)])[0].reshape(kind.shape)
        if kind.key is not None:
            data = jax.random.wrap_key_data(data, impl=kind.key)
        leaves.append(data)
    return leaves
