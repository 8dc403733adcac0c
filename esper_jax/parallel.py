"""Training on several devices: a program over a mesh, rows for `jax.pmap`, and a check
that the devices agree.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from esper_jax.functional import count_recompiles, counted, is_key
from esper_jax.kernels.blend import check_sharding

if TYPE_CHECKING:
    from esper_jax.train import Program

__all__ = ["check_divides", "check_replicas", "over_mesh", "split_rows"]


def over_mesh(program: "Program", mesh: jax.sharding.Mesh) -> "Program":
    """A program whose functions run on all devices of a mesh, for `fit` or by hand.

    Each device has the whole state and an equal part of the rows (data parallel).

    Args:
      program: made by `build` with an ``axis_name``.
      mesh: has that axis and no other.

    Returns:
      The program: ``step`` takes a whole batch, ``tick`` and ``evaluate`` all held-out
      rows; the devices have to divide them. ``init`` gives a state on all devices;
      like `Program.init`, it takes a key, and other values if wanted.

    Raises:
      ValueError: if the mesh has another axis than the program, or one that is not
        Auto; by the functions, if the devices do not divide the rows.
    """
    axis_name = program.axis_name
    if axis_name is None or mesh.axis_names != (axis_name,):
        raise ValueError(
            f"mesh must have one axis, the program's axis_name ({axis_name!r}); got "
            f"{mesh.axis_names}. Give build(..., axis_name=...) the mesh's"
        )
    everywhere, rows = PartitionSpec(), PartitionSpec(axis_name)
    check_sharding(NamedSharding(mesh, everywhere))

    def mapped(function: Any, *specs: PartitionSpec) -> Any:
        return jax.shard_map(
            function, mesh=mesh, in_specs=(everywhere, *specs), out_specs=everywhere
        )

    def step(state: Any, batch: Any) -> Any:
        check_divides("batch", batch, mesh.size)
        return mapped(program.step, rows)(state, batch)

    def step_from(state: Any, data: Any, order: Array, batch_size: int) -> Any:
        if batch_size % mesh.size:
            raise ValueError(
                f"batch_size must be a multiple of the {mesh.size} devices, got "
                f"{batch_size}"
            )

        def one(state: Any, data: Any, order: Array) -> Any:
            return program.step_from(state, data, order, batch_size)

        return mapped(one, everywhere, everywhere)(state, data, order)

    def tick(state: Any, held_out: Any) -> Any:
        check_divides("held_out", held_out, mesh.size)
        return mapped(program.tick, rows)(state, held_out)

    def evaluate(state: Any, data: Any) -> Any:
        check_divides("data", data, mesh.size)
        return mapped(program.evaluate, rows)(state, data)

    def place(name: str, data: Any, divided: bool) -> Any:
        if divided:
            check_divides(name, data, mesh.size)
        sharding = NamedSharding(mesh, rows if divided else everywhere)
        return jax.tree.map(lambda x: _put(x, sharding), data)

    def init(rng: Array, values: Any = None) -> Any:
        given = () if values is None else (values,)
        if jax.process_count() == 1:
            state = program.init(rng, *given)
            return jax.device_put(state, NamedSharding(mesh, everywhere))

        # From the host's numbers: with several processes, an array of one of them
        # cannot be sent to the devices of another.
        given = jax.tree.map(lambda x: x if is_key(x) else np.asarray(x), given)

        @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, everywhere))
        def start(data: Array) -> Any:
            impl = jax.random.key_impl(rng)
            return program.init(jax.random.wrap_key_data(data, impl=impl), *given)

        return start(np.asarray(jax.random.key_data(rng)))

    traces: Counter[str] = Counter()
    return program._replace(
        init=init,
        step=jax.jit(counted(traces, step), donate_argnums=0),
        step_from=jax.jit(
            counted(traces, step_from), donate_argnums=0, static_argnums=3
        ),
        tick=jax.jit(counted(traces, tick), donate_argnums=0),
        evaluate=jax.jit(evaluate),
        place=place,
        recompiles=functools.partial(count_recompiles, traces),
    )


def _put(x: Any, sharding: NamedSharding) -> Array:
    """An array that every process has, on all devices of a mesh."""
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])


def split_rows(name: str, data: Any, devices: int) -> Any:
    """Data with a leading axis of ``D`` devices, as `jax.pmap` wants it.

    Args:
      name: of the argument, for the error.
      data: a pytree of arrays, rows first.
      devices: ``D``.

    Returns:
      Each leaf of shape (D, rows / D, ...); device ``d`` has the ``d``-th part.

    Raises:
      ValueError: if the devices do not divide the rows.
    """
    check_divides(name, data, devices)
    return jax.tree.map(
        lambda x: x.reshape(devices, x.shape[0] // devices, *x.shape[1:]), data
    )


def check_divides(name: str, data: Any, devices: int) -> None:
    """Refuses rows that the devices do not divide.

    Raises:
      ValueError: naming the argument and both numbers.
    """
    for rows in {leaf.shape[0] for leaf in jax.tree.leaves(data)}:
        if rows % devices:
            raise ValueError(
                f"{name} must have a number of rows that the {devices} devices divide; "
                f"got {rows}. Leave out {rows % devices} rows or add "
                f"{devices - rows % devices}"
            )


def check_replicas(state: Any, *, stacked: bool = False) -> None:
    """Raises if copies of a state on several devices are not the same, bit for bit.

    With several processes, all of them have to call it.

    Args:
      state: a pytree of arrays. Shards that hold the same part of an array are
        compared; so an array that is sharded and not replicated passes.
      stacked: whether the copies lie along a leading axis, as `jax.pmap` has them.

    Raises:
      ValueError: naming the first leaf that differs, and the devices.
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
    """Who holds a copy, of which part of the array, and the copy."""
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
