"""Collectives for functions inside `jax.pmap` or `jax.shard_map`.

The rules about gradients and replicas are all here. ``D`` is the number of devices
along the mapped axis.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, UInt

__all__ = [
    "automatic",
    "axis_size",
    "differs",
    "fingerprint",
    "mean",
    "on_every_device",
    "replicas_agree",
    "same_varying",
    "total",
    "varying",
    "whole_batch",
]


def axis_size(axis_name: str) -> int:
    """``D``, the number of devices along a mapped axis.

    Raises:
      ValueError: if no enclosing function is mapped over an axis of that name.
    """
    try:
        return jax.lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"axis_name {axis_name!r} is not an axis of the function that is being "
            f"mapped. Call this inside jax.pmap(..., axis_name={axis_name!r}), or "
            f"inside jax.shard_map over a mesh with an axis of that name; with plain "
            "jit, leave axis_name out"
        ) from None


def automatic(f: Callable[..., Any], y: Array, *arguments: Any, others: int = 0) -> Any:
    """``f(y, *arguments)``, divided by XLA as it sees fit on explicit axes, too.

    For functions whose operations do not say how their results lie, such as gathers of
    chunks. The first result lies as ``y`` does.

    Args:
      f: returns one array, or one and ``others`` trees.
      y: its first argument.
      *arguments: the rest.
      others: number of further results, which are whole on every device.
    """
    sharding = jax.typeof(y).sharding
    axes = sharding.mesh.explicit_axes
    if not axes:
        return f(y, *arguments)
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    results = (sharding, *[whole] * others) if others else sharding
    return jax.sharding.auto_axes(f, axes=axes, out_sharding=results)(y, *arguments)


def on_every_device(x: Any) -> Any:
    """The same array, whole on every device of a mesh of explicit axes.

    Operations whose result could lie in several ways need it there. Without such axes
    XLA decides, and this does nothing.
    """
    if jax.typeof(x).sharding.mesh.explicit_axes:
        return jax.sharding.reshard(x, PartitionSpec())
    return x


def _axes_of(x: Any) -> frozenset[Any]:
    """The mapped axes along which a value is known to differ."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def differs(x: Any, axis_name: str) -> bool:
    """Whether a value is known to differ along a mapped axis.

    Only ``shard_map(check_vma=True)`` tracks this.
    """
    return axis_name in _axes_of(x)


def varying(tree: Any, axis_name: str) -> Any:
    """The same values, marked as each device's own.

    A device's gradient of such a value is the gradient of its own loss alone. Without
    the mark, ``shard_map(check_vma=True)`` sums the gradient of a replicated value over
    the devices, and `mean` of that sum would be ``D`` times too large. `pmap` and
    ``check_vma=False`` do not sum. With the mark, none of them does, and `mean` reduces
    the gradients.
    """

    axis_size(axis_name)

    def cast(x: Array) -> Array:
        if axis_name in _axes_of(x):
            return x
        return jax.lax.pcast(x, axis_name, to="varying")

    return jax.tree.map(cast, tree)


def same_varying(*trees: Any) -> tuple[Any, ...]:
    """The trees, each leaf varying along every axis that some leaf varies along.

    All branches of a conditional must vary along the same axes, and so must all
    arguments of a custom gradient.
    """
    axes = frozenset[Any]().union(*map(_axes_of, jax.tree.leaves(trees)))
    return functools.reduce(varying, sorted(axes, key=str), trees)


def mean(tree: Any, axis_name: str | None) -> Any:
    """Mean over the devices of an axis; the tree itself if ``axis_name`` is None."""
    return tree if axis_name is None else _reduced(jax.lax.pmean, tree, axis_name)


def total(tree: Any, axis_name: str | None) -> Any:
    """Sum over the devices of an axis; the tree itself if ``axis_name`` is None."""
    return tree if axis_name is None else _reduced(jax.lax.psum, tree, axis_name)


def whole_batch(tree: Any, rows: int | None, axis_name: str | None) -> Any:
    """What each device computed from its own rows, for the whole batch.

    Args:
      tree: numbers and arrays. Those with ``rows`` on the first axis get the rows of
        all devices; others become their mean over the devices, whole numbers too.
      rows: that one device has; None if that is not known.
      axis_name: None leaves the tree as it is.
    """
    if axis_name is None:
        return tree
    devices = axis_size(axis_name)

    def whole(x: Any) -> Array:
        x = jnp.asarray(x)
        number = jnp.issubdtype(x.dtype, jnp.inexact)
        if rows is None or x.shape[:1] != (rows,):
            return jax.lax.pmean(x if number else x.astype(jnp.float32), axis_name)
        # As a sum, since its result is known to be the same on all devices.
        wide = x if number else x.astype(jnp.int32)
        place = jnp.zeros((devices, *x.shape), wide.dtype)
        place = place.at[jax.lax.axis_index(axis_name)].set(wide)
        summed = jax.lax.psum(place, axis_name).astype(x.dtype)
        return summed.reshape(devices * rows, *x.shape[1:])

    return jax.tree.map(whole, tree)


def _reduced(reduce: Callable[..., Any], tree: Any, axis_name: str) -> Any:
    axis_size(axis_name)  # raises a clear error if there is no such axis
    return reduce(tree, axis_name)


def fingerprint(tree: Any) -> UInt[Array, ""]:
    """A uint32 hash of every bit of every leaf; cheap, and can be jitted.

    Changing a single word always changes it. Any other change goes unnoticed with a
    chance of about one in 2**32. Not for security.
    """
    mixed = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if leaf.dtype == bool:
            leaf = leaf.astype(jnp.uint8)
        bits = min(32, 8 * leaf.dtype.itemsize)
        words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{bits}"))
        words = words.astype(jnp.uint32).reshape(-1)
        # Weights and factor are odd, so multiplying cannot map a changed word to 0.
        weights = 2 * jnp.arange(words.size, dtype=jnp.uint32) + 1
        sums = jnp.sum(words * weights, dtype=jnp.uint32)
        mixed = mixed * jnp.uint32(0x01000193) + sums
    return mixed


def replicas_agree(tree: Any, axis_name: str) -> Bool[Array, ""]:
    """Whether all devices of a mapped axis hold the same values, bit for bit."""
    own = varying(fingerprint(tree), axis_name)
    lowest, highest = (
        reduce(own.astype(jnp.int32), axis_name)
        for reduce in (jax.lax.pmin, jax.lax.pmax)
    )
    return lowest == highest
