"""Gradient norms between two ticks: of a layer, its chunks and its seeds."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float

from esper_jax.chunks import ChunkLayout
from esper_jax.lifecycle.state import SeedState, coefficients
from esper_jax.parallel import collectives

__all__ = ["GradientSums", "add", "chunk_gradient", "gradient_ratio"]


@struct.dataclass
class GradientSums:
    """Gradient norms of a layer, float32, summed over the measured steps of a tick."""

    host: Float[Array, "*L"]
    """Norm over all weights of the host layer."""
    chunk: Float[Array, "*S"]
    """Norm over the weights that write each chunk; NaN if they are not known."""
    seed: Float[Array, "*S"]
    """Norm over the blueprint of each living seed; 0 for other seeds."""

    @classmethod
    def start(cls, num_seeds: int) -> "GradientSums":
        """Sums before the first step: all 0."""
        return cls(
            host=jnp.zeros((), jnp.float32),
            chunk=jnp.zeros(num_seeds, jnp.float32),
            seed=jnp.zeros(num_seeds, jnp.float32),
        )


def add(
    sums: GradientSums,
    host: Mapping[str, Array],
    bank: Any,
    seeds: SeedState,
    layout: ChunkLayout,
    owns: bool,
) -> GradientSums:
    """Adds the gradient norms of one step.

    Args:
      sums: sums so far.
      host: gradients of the host layer's weights.
      bank: gradients of the layer's bank, slots on the leading axis.
      seeds: the layer's seeds.
      layout: the layer's chunks.
      owns: whether the host's weights write the layer's output. If so, the weights with
        the layer's features on their last axis are divided by chunk.

    Returns:
      The sums with this step's norms added.
    """
    slots = jnp.sqrt(
        functools.reduce(
            jnp.add,
            [
                jnp.sum(jnp.square(g.astype(jnp.float32)), axis=tuple(range(1, g.ndim)))
                for g in jax.tree.leaves(bank)
            ],
        )
    )
    place = jnp.where(seeds.seed_of_slot >= 0, seeds.seed_of_slot, seeds.num_seeds)
    return GradientSums(
        host=sums.host + optax.tree.norm(host),
        chunk=sums.chunk + _by_chunk(host if owns else {}, layout),
        seed=sums.seed.at[place].add(slots, mode="drop"),
    )


def _by_chunk(host: Mapping[str, Array], layout: ChunkLayout) -> Float[Array, " S"]:
    columns = [
        jnp.sum(jnp.square(g.astype(jnp.float32)), axis=tuple(range(g.ndim - 1)))
        for g in host.values()
        if g.ndim and g.shape[-1] == layout.features
    ]
    if not columns:
        return jnp.full(layout.num_seeds, jnp.nan, jnp.float32)
    squares = collectives.on_every_device(functools.reduce(jnp.add, columns))
    return jnp.sqrt(jnp.sum(layout.split(squares), axis=-1))


def gradient_ratio(sums: GradientSums, seeds: SeedState) -> Float[Array, " S"]:
    """Mean norm of each learning seed over its host layer's; NaN for other seeds."""
    learns = coefficients(seeds)[1] != 0
    host = jnp.where(sums.host > 0, sums.host, jnp.nan)
    return jnp.where(learns, sums.seed / host, jnp.nan)


def chunk_gradient(sums: GradientSums, steps: Float[Array, ""]) -> Float[Array, " S"]:
    """Mean gradient norm of the weights that write each chunk.

    Args:
      sums: of the layer.
      steps: how many steps were summed; NaN if none.
    """
    return sums.chunk / steps
