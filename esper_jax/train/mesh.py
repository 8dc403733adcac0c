"""A program over a mesh of devices."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from esper_jax.kernels.blend import check_sharding
from esper_jax.parallel.replicas import check_divides
from esper_jax.train.batches import Batches
from esper_jax.train.program import Program
from esper_jax.train.tracing import compiled
from esper_jax.trees import is_key

__all__ = ["over_mesh"]


def over_mesh(program: Program, mesh: jax.sharding.Mesh) -> Program:
    """A program whose functions run on all devices of a mesh, for `fit` or by hand.

    Each device has the whole state and an equal part of the rows (data parallel).

    Args:
      program: made by `build` with an ``axis_name``.
      mesh: has that axis and no other.

    Returns:
      The program. ``step`` takes a whole batch, ``tick`` and ``evaluate`` take all
      held-out rows; the devices must divide them. ``init`` returns a state on all
      devices and takes the arguments of `Program.init`.

    Raises:
      ValueError: if the mesh has another axis than the program, or an axis that is
        not Auto. The functions raise it if the devices do not divide the rows.
    """
    axis_name = program.axis_name
    if axis_name is None or mesh.axis_names != (axis_name,):
        raise ValueError(
            f"mesh must have one axis, the program's axis_name ({axis_name!r}); got "
            f"{mesh.axis_names}. Give build(..., axis_name=...) the mesh's"
        )
    everywhere = NamedSharding(mesh, PartitionSpec())
    check_sharding(everywhere)

    def init(rng: Array, values: Any = None) -> Any:
        return _start(program, everywhere, rng, () if values is None else (values,))

    def place(name: str, data: Any, divided: bool) -> Any:
        sharding = everywhere
        if divided:
            _check_divides(name, data, mesh.size)
            sharding = NamedSharding(mesh, _rows(axis_name, data))
        return jax.tree.map(lambda x: _put(x, sharding), data)

    return program._replace(init=init, place=place, **_mapped(program, mesh))


def _mapped(program: Program, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """The program's functions, jitted and mapped over the devices, by name."""
    everywhere = PartitionSpec()

    def rows(data: Any) -> PartitionSpec:
        return _rows(program.axis_name, data)

    def mapped(function: Any, *specs: PartitionSpec) -> Any:
        return jax.shard_map(
            function, mesh=mesh, in_specs=(everywhere, *specs), out_specs=everywhere
        )

    def step(state: Any, batch: Any) -> Any:
        _check_divides("batch", batch, mesh.size)
        return mapped(program.step, rows(batch))(state, batch)

    def step_with_aux(state: Any, batch: Any) -> Any:
        _check_divides("batch", batch, mesh.size)
        return mapped(program.step_with_aux, rows(batch))(state, batch)

    def step_from(state: Any, data: Any, order: Array, batch_size: int) -> Any:
        if batch_size % mesh.size:
            raise ValueError(
                f"batch_size must be a multiple of the {mesh.size} devices, got "
                f"{batch_size}"
            )

        def one(state: Any, data: Any, order: Array) -> Any:
            return program.step_from(state, data, order, batch_size)

        return mapped(one, everywhere, everywhere)(state, data, order)

    def tick(state: Any, held_out: Any, *outside: Any) -> Any:
        _check_divides("held_out", held_out, mesh.size)
        specs = (rows(held_out), *(everywhere for _ in outside))
        return mapped(program.tick, *specs)(state, held_out, *outside)

    def evaluate(state: Any, data: Any) -> Any:
        _check_divides("data", data, mesh.size)
        return mapped(program.evaluate, rows(data))(state, data)

    return compiled(
        program.check,
        step=step,
        step_with_aux=step_with_aux,
        step_from=step_from,
        tick=tick,
        evaluate=evaluate,
    )


def _rows(axis_name: str | None, data: Any) -> PartitionSpec:
    """How the rows of arrays, or of stacked batches, lie over the devices."""
    if isinstance(data, Batches):
        return PartitionSpec(None, axis_name)
    return PartitionSpec(axis_name)


def _check_divides(name: str, data: Any, devices: int) -> None:
    if isinstance(data, Batches):
        data = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), data)
    check_divides(name, data, devices)


def _start(
    program: Program, sharding: NamedSharding, rng: Array, values: tuple[Any, ...]
) -> Any:
    """The program's first state, on all devices."""
    if jax.process_count() == 1:
        return jax.device_put(program.init(rng, *values), sharding)

    # From the host's numbers: with several processes, an array of one of them cannot be
    # sent to the devices of another.
    values = jax.tree.map(lambda x: x if is_key(x) else np.asarray(x), values)

    @functools.partial(jax.jit, out_shardings=sharding)
    def start(data: Array) -> Any:
        impl = jax.random.key_impl(rng)
        return program.init(jax.random.wrap_key_data(data, impl=impl), *values)

    return start(np.asarray(jax.random.key_data(rng)))


def _put(x: Any, sharding: NamedSharding) -> Array:
    """Puts an array that every process has on all devices of a mesh."""
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])
