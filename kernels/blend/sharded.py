"""Blend shard by shard: each device computes the chunks that it holds."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from esper_jax.blueprints import Bank
from esper_jax.chunks import ChunkLayout
from esper_jax.kernels.blend.adapters import Read
from esper_jax.kernels.blend.backend import Results
from esper_jax.kernels.blend.static import Slots, Static

__all__ = ["blend", "check_sharding", "divides_features", "shard_layout"]


def _names(entry: Any) -> tuple[str, ...]:
    """Mesh axes of one entry of a `PartitionSpec`."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _split(sharding: NamedSharding, ndim: int) -> tuple[list[Any], Any]:
    """The entries of the batch axes, and the entry of the features."""
    entries = [*sharding.spec, *[None] * (ndim - len(sharding.spec))]
    return entries[:-1], entries[-1]


def _size(sharding: NamedSharding, names: tuple[str, ...]) -> int:
    return math.prod(sharding.mesh.shape[name] for name in names)


def divides_features(sharding: NamedSharding, ndim: int) -> bool:
    """Whether the features of an array of ``ndim`` axes lie on several devices."""
    return _size(sharding, _names(_split(sharding, ndim)[1])) > 1


def check_sharding(sharding: Any) -> None:
    """Refuses what is neither None nor a sharding over a mesh of Auto axes.

    Raises:
      TypeError: if it is not a `NamedSharding`.
      ValueError: if the mesh has axes of another type.
    """
    if sharding is None:
        return
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            "sharding must be a jax.sharding.NamedSharding of the layer's output, its "
            f"features last, or None; got {sharding!r}"
        )
    types = sharding.mesh.axis_types
    if any(axis_type != AxisType.Auto for axis_type in types):
        raise ValueError(
            f"sharding: the axes of the mesh must be Auto, got {types}; make it with "
            "jax.make_mesh(sizes, names, axis_types=(AxisType.Auto, ...)), or leave "
            "sharding out: an array on explicit axes says itself how it lies"
        )


def shard_layout(layout: ChunkLayout, shards: int) -> ChunkLayout:
    """The layout of one of the equal shards that the features are cut into.

    Raises:
      ValueError: if a chunk would lie on two shards.
    """
    if shards == 1:
        return layout
    if layout.features % shards:
        raise ValueError(
            f"sharding: {layout.features} features cannot be cut into {shards} equal "
            "shards; choose a number of features that the devices divide"
        )
    width = layout.features // shards
    if not layout.even or width % layout.width:
        raise ValueError(
            f"sharding: chunks of {layout.width} features do not fit into shards of "
            f"{width} features ({layout.num_seeds} seeds over {layout.features} "
            f"features, {shards} shards), so that a chunk would lie on two devices. "
            f"Choose num_seeds among the multiples of {shards} that divide "
            f"{layout.features}"
        )
    return ChunkLayout(width, layout.num_seeds // shards)


def blend(
    local: Callable[[Static, Read, Array | None, Bank, Slots], Results],
    s: Static,
    sharding: NamedSharding,
    read_and_bias: tuple[Read, Float[Array, " F"] | None],
    bank: Bank,
    slots: Slots,
) -> Results:
    """The public `blend` of an array that is sharded.

    Every device has the whole bank and computes the slots whose chunks it holds. The
    results are those of one device, to the order of additions.

    Args:
      local: blend of one shard.
      s: of the whole array.
      sharding: how ``y`` is laid out; axes without an entry are not sharded.
      read_and_bias: the activation and the layer's input, which may be None; and the
        bias, or None.
      bank: parameters of the blueprints.
      slots: coefficients, kinds and owners, the same on every device.

    Raises:
      ValueError: if the sharding does not fit ``y`` or the layout.
    """
    (y, x, *_), bias = read_and_bias
    if len(sharding.spec) > y.ndim:
        raise ValueError(
            f"sharding must have at most {y.ndim} entries, one for each axis of the "
            f"layer's output; got {sharding.spec}"
        )
    batch, feature = _split(sharding, y.ndim)
    rows = tuple(name for entry in batch for name in _names(entry))
    columns = _names(feature)
    own = _own_share(s, sharding, rows, columns)
    _check_batch(sharding, y.shape, batch)

    def one(read: Read, bias: Array | None, bank: Bank, slots: Slots) -> Results:
        if columns:
            first = jax.lax.axis_index(columns) * own.layout.num_seeds
            slots = _slots_here(slots, first, own.layout.num_seeds)
        return _gathered(local(own, read, bias, bank, slots), rows, columns)

    spec, everywhere = PartitionSpec(*batch, feature), PartitionSpec()
    return jax.shard_map(
        one,
        mesh=sharding.mesh,
        in_specs=(
            Read(spec, PartitionSpec(*batch)),
            PartitionSpec(feature),
            everywhere,
            everywhere,
        ),
        out_specs=(spec, everywhere, everywhere),
        # Kernels do not say along which axes their outputs differ.
        check_vma=False,
    )(Read(y, x), bias, bank, slots)


def _own_share(
    s: Static, sharding: NamedSharding, rows: tuple[str, ...], columns: tuple[str, ...]
) -> Static:
    """The layout and the rows of statistics of one device."""
    sampled = s.statistics_rows
    if sampled:
        sampled = max(1, sampled // _size(sharding, rows))
    layout = shard_layout(s.layout, _size(sharding, columns))
    return dataclasses.replace(s, layout=layout, statistics_rows=sampled)


def _check_batch(
    sharding: NamedSharding, shape: tuple[int, ...], batch: list[Any]
) -> None:
    for size, entry in zip(shape, batch, strict=False):
        devices = _size(sharding, _names(entry))
        if size % devices:
            raise ValueError(
                f"sharding: an axis of {size} rows cannot be cut into {devices} equal "
                "shards; choose a batch that the devices divide"
            )


def _slots_here(slots: Slots, first: Array, count: int) -> Slots:
    """The slots as one device sees them: those of other devices' seeds are free.

    Args:
      slots: of the whole layer.
      first: the first seed whose chunk the device holds.
      count: number of seeds whose chunks it holds.
    """
    owner = slots.seed_of_slot
    here = (owner >= first) & (owner < first + count)
    alpha, beta = (jnp.where(here, c, 0.0) for c in (slots.alpha, slots.beta))
    return Slots(alpha, beta, slots.blueprint, jnp.where(here, owner - first, -1))


def _gathered(
    results: Results, rows: tuple[str, ...], columns: tuple[str, ...]
) -> Results:
    """One device's results, with statistics and reconstruction of the whole layer."""
    out, statistics, reconstruction = results
    if rows:
        statistics = jax.lax.psum(statistics, rows)
        reconstruction = jax.lax.pmean(reconstruction, rows)
    if columns:
        gather = functools.partial(jax.lax.all_gather, axis_name=columns, tiled=True)
        statistics = jax.tree.map(gather, statistics)
        reconstruction = jax.lax.psum(reconstruction, columns)
    return out, statistics, reconstruction
