"""The evolution strategy: antithetic perturbations, ranks, Adam.

Follows T. Salimans et al., Evolution Strategies as a Scalable Alternative to
Reinforcement Learning, arXiv:1703.03864. A run is one pure function whose score comes
at its end, after hundreds of steps that no gradient should be taken through, and a
policy has a few thousand weights: that is what evolution strategies are for. PPO would
need a value of each tick, and to sample decisions that are taken by their maximum here.

Any pytree of float arrays can be evolved: the weights of a network, or the numbers of
the heuristic that it is compared with.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int, Key

from esper_jax.learning.config import EvolutionConfig

__all__ = ["Evolution", "begin", "candidates", "fitness", "improved"]


@struct.dataclass
class Evolution:
    """Where an evolution stands."""

    mean: Any
    """The numbers that are evolved."""
    adam: Any
    """State of Adam."""
    generation: Int[Array, ""]
    """Generations so far, int32."""


def begin(numbers: Any, config: EvolutionConfig) -> Evolution:
    """An evolution that begins with some numbers."""
    mean = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), numbers)
    return Evolution(mean, _adam(config).init(mean), jnp.zeros((), jnp.int32))


def candidates(
    state: Evolution, key: Key[Array, ""], config: EvolutionConfig
) -> tuple[Any, Any]:
    """The candidates of a generation: ``n`` perturbations, their opposites, the mean.

    Args:
      state: before the generation.
      key: draws the perturbations.
      config: says how many, and how large.

    Returns:
      The candidates, ``2 * n + 1`` along a leading axis, and the ``n`` perturbations.
    """
    leaves, tree = jax.tree.flatten(state.mean)
    pairs = (config.population - 2) // 2
    drawn = [
        jax.random.normal(k, (pairs, *x.shape))
        for k, x in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
    ]
    noise = jax.tree.unflatten(tree, drawn)

    def around(mean: Array, noise: Array) -> Array:
        step = config.sigma * noise
        return jnp.concatenate([mean + step, mean - step, mean[None]])

    return jax.tree.map(around, state.mean, noise), noise


def fitness(scores: Float[Array, "M T"]) -> Float[Array, " M"]:
    """How each candidate ranks, from -1 to 1; ties share a rank.

    Each task counts alike: its scores are taken in units of their deviation among the
    candidates. One that is not finite is the task's lowest.
    """
    known = jnp.isfinite(scores)
    lowest = jnp.min(jnp.where(known, scores, jnp.inf), axis=0)
    scores = jnp.where(known, scores, jnp.where(jnp.isfinite(lowest), lowest, 0.0))
    spread = jnp.std(scores, axis=0) + 0.005  # half a point: less is chance
    mean = jnp.mean((scores - jnp.mean(scores, axis=0)) / spread, axis=1)
    return jnp.mean(jnp.sign(mean[:, None] - mean[None, :]), axis=1)


def improved(
    state: Evolution,
    noise: Any,
    ranks: Float[Array, " M"],
    config: EvolutionConfig,
) -> Evolution:
    """The next generation.

    Args:
      state: before it.
      noise: the ``n`` perturbations.
      ranks: fitness of those and of their opposites, ``2 * n``.
      config: numbers of the optimizer.
    """
    pairs = len(ranks) // 2
    change = (ranks[:pairs] - ranks[pairs:]) / (2 * pairs * config.sigma)
    down = jax.tree.map(lambda e: -jnp.tensordot(change, e, axes=1), noise)
    updates, adam = _adam(config).update(down, state.adam, state.mean)
    mean = optax.apply_updates(state.mean, updates)
    return Evolution(mean, adam, state.generation + 1)


def _adam(config: EvolutionConfig) -> optax.GradientTransformation:
    return optax.adamw(config.learning_rate, weight_decay=config.weight_decay)
