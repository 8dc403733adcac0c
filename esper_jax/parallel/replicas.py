"""Divides rows among devices, and checks that replicas agree."""

import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array

__all__ = ["check_divides", "check_replicas", "split_rows"]


def split_rows(name: str, data: Any, devices: int) -> Any:
    """Data with a leading axis of ``D`` devices, as `jax.pmap` expects it.

    Args:
      name: name of the argument, for the error message.
      data: a pytree of arrays, rows first.
      devices: ``D``.

    Returns:
      The tree with leaves of shape (D, rows / D, ...). Device ``d`` gets the ``d``-th
      block of rows.

    Raises:
      ValueError: if the number of rows is not a multiple of ``D``.
    """
    check_divides(name, data, devices)
    return jax.tree.map(
        lambda x: x.reshape(devices, x.shape[0] // devices, *x.shape[1:]), data
    )


def check_divides(name: str, data: Any, devices: int) -> None:
    """Refuses data whose number of rows is not a multiple of ``devices``.

    Raises:
      ValueError: if so; it names the argument and both numbers.
    """
    for rows in {leaf.shape[0] for leaf in jax.tree.leaves(data)}:
        if rows % devices:
            raise ValueError(
                f"{name} must have a number of rows that the {devices} devices divide; "
                f"got {rows}. Leave out {rows % devices} rows or add "
                f"{devices - rows % devices}"
            )


def check_replicas(state: Any, *, stacked: bool = False) -> None:
    """Raises if the copies of a state on several devices are not bit-identical.

    With several processes, all of them must call it.

    Args:
      state: a pytree of arrays. Shards that hold the same part of an array are
        compared, so an array that is sharded without replication always passes.
      stacked: whether the copies lie along a leading axis, as with `jax.pmap`.

    Raises:
      ValueError: if so; it names the first leaf that differs, and the devices.
    """
    leaves = [
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if isinstance(leaf, jax.Array)
    ]
    digests = []
    for name, leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        first: dict[str, tuple[str, bytes]] = {}
        for holder, part, copy in _copies(leaf, stacked):
            own = hashlib.sha256(copy.tobytes()).digest()
            other, expected = first.setdefault(part, (holder, own))
            if own != expected:
                raise ValueError(_apart(name, holder, other))
        whole = stacked or leaf.is_fully_replicated
        digests.append(next(iter(first.values()))[1] if whole else bytes(32))
    if jax.process_count() > 1:
        table = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
        gathered = np.asarray(multihost_utils.process_allgather(table))
        for process, leaf in np.argwhere((gathered != gathered[0]).any(-1)):
            raise ValueError(_apart(leaves[leaf][0], f"process {process}", "process 0"))


def _copies(leaf: Array, stacked: bool) -> Iterator[tuple[str, str, np.ndarray]]:
    """Holder of each copy in this process, part of the array, and the copy."""
    for shard in leaf.addressable_shards:
        data = np.asarray(shard.data)
        if not stacked:
            yield str(shard.device), str(shard.index), data
            continue
        start = shard.index[0].start or 0
        for i, copy in enumerate(data):
            yield f"replica {start + i}", str(shard.index[1:]), copy


def _apart(name: str, one: str, other: str) -> str:
    return (
        f"state{name} must be the same on all devices, but that of {one} differs from "
        f"that of {other}. Start all replicas from one state and one random key"
    )
