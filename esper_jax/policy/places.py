"""Where to germinate and what: choices over the chunks of all layers at once.

The lower a place's score, the better. NaN and infinity rule a place out. Layers come
by group, stacked: ``L`` layers of ``S`` chunks.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from esper_jax.groups import Groups
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import Stage
from esper_jax.lifecycle.state import SeedState
from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.memory import ControllerMemory

__all__ = ["Limits", "by_seed", "choose", "choose_blueprint", "cost_of", "scores"]


def scores(
    where: str,
    groups: Groups,
    seeds: Mapping[str, SeedState],
    signals: Mapping[str, Signals],
    turn: Int[Array, ""],
    key: Key[Array, ""],
) -> tuple[dict[str, Float[Array, "L S"]], Callable[[Mapping[str, Array]], Array]]:
    """The score of every chunk, dormant or not.

    Args:
      where: a choice of `ControllerConfig`.
      groups: the layers, whose order the round robin follows.
      seeds: the seeds of each group, by name.
      signals: this tick's measurements of each group.
      turn: chunk at which the round robin goes on, counted over all layers.
      key: for random scores.

    Returns:
      Scores by group, and a function from the chunks that were chosen to the next turn
      of the round robin.
    """
    widths = {name: s.num_seeds for name, s in seeds.items()}
    total = sum(s.stage.size for s in seeds.values())
    place = jnp.arange(total)

    def next_turn(born: Mapping[str, Array]) -> Array:
        ahead = jnp.where(groups.flat(born), (place - turn) % total, -1)
        return ((turn + jnp.max(ahead) + 1) % total).astype(jnp.int32)

    if where == "health":
        by_group = {name: s.health for name, s in seeds.items()}
    elif where == "gradient":
        by_group = {
            name: -by_seed(signals[name].chunk_gradient, s) for name, s in seeds.items()
        }
    else:
        flat = (
            ((place - turn) % total).astype(jnp.float32)
            if where == "round_robin"
            else jax.random.uniform(key, (total,))
        )
        by_group = groups.unflat(flat, widths)
    return by_group, next_turn


def by_seed(signal: Array, state: SeedState) -> Float[Array, "L S"]:
    """A signal of a layer or of its seeds, for each seed."""
    if signal.ndim < state.stage.ndim:
        signal = signal[..., None]
    return jnp.broadcast_to(signal, state.stage.shape)


def choose_blueprint(
    config: ControllerConfig,
    memory: ControllerMemory,
    groups: Groups,
    costs: Mapping[str, Int[np.ndarray, "N S"]],
) -> Int[Array, ""]:
    """Index of the blueprint to germinate; of two equally good ones, the lower."""
    if config.what == "fixed":
        return jnp.asarray(config.blueprint, jnp.int32)
    tried = memory.tried.astype(jnp.float32)
    each = jnp.where(tried > 0, memory.earned / jnp.maximum(tried, 1), jnp.nan)
    best = jnp.nanmax(jnp.where(jnp.isnan(each), 0.0, each))
    # A blueprint that was never tried may be as good as the best so far.
    performance = jnp.where(tried > 0, each, best) / jnp.where(best > 0, best, 1.0)
    stability = (memory.kept + 1).astype(jnp.float32) / (tried + 2)
    novelty = 1 / (1 + tried)
    count = tried.shape[0]
    of = groups.names()
    each_layer = [costs[of[name]][:count].mean(axis=1) for name in groups.order]
    mean = np.mean(each_layer, axis=0)
    thrift = jnp.asarray(1 - mean / max(mean.max(), 1), jnp.float32)
    score = {
        "performance": jnp.where(tried > 0, performance, jnp.inf),
        "stability": stability,
        "risk_averse": thrift,
        "novelty": novelty,
        "hybrid": performance + stability + thrift + novelty,
    }[config.what]
    return jnp.argmax(score).astype(jnp.int32)


def cost_of(kind: Int[Array, ""], costs: Int[np.ndarray, "N S"]) -> Int[Array, " S"]:
    """Parameters of one blueprint on each chunk of a layer."""
    return jnp.asarray(costs, jnp.int32)[jnp.minimum(kind, len(costs) - 1)]


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much may germinate at one tick."""

    births: int
    """Most seeds."""
    at_once: Any
    """Most seeds that may still begin to wait or train; may be traced."""
    room: Any
    """Parameters left in the budget, infinity for no limit; may be traced."""


def choose(
    groups: Groups,
    seeds: Mapping[str, SeedState],
    scores: Mapping[str, Float[Array, "L S"]],
    costs: Mapping[str, Int[Array, " S"]],
    limits: Limits,
) -> dict[str, Bool[Array, "L S"]]:
    """The chunks to germinate in.

    A chunk is a candidate if it is dormant, has a finite score, its layer has a free
    slot left for it, and its cost alone fits the room. Candidates are taken in the
    order of their scores, over all layers, until a limit is reached.

    Args:
      groups: the layers, whose order decides between equal scores.
      seeds: the seeds of each group, by name.
      scores: as `scores` returns them.
      costs: parameters of the blueprint on each chunk.
      limits: how much may germinate.
    """
    best, index, price = {}, {}, {}
    for name, state in seeds.items():
        best[name], index[name] = jax.vmap(
            functools.partial(_candidates, cost=costs[name], limits=limits)
        )(state, scores[name])
        price[name] = costs[name][index[name]]
    joined, prices = groups.flat(best), groups.flat(price)
    order = jnp.argsort(joined, stable=True)
    taken = jnp.isfinite(joined[order])
    taken &= jnp.cumsum(taken) <= jnp.minimum(limits.births, limits.at_once)
    spent = jnp.cumsum(jnp.where(taken, prices[order], 0))
    taken &= spent.astype(jnp.result_type(limits.room)) <= limits.room
    taken = jnp.zeros(joined.shape, bool).at[order].set(taken)
    parts = groups.unflat(taken, {name: b.shape[1] for name, b in best.items()})

    def put(flags: Array, index: Array, part: Array) -> Array:
        return flags.at[index].set(part)

    return {
        name: jax.vmap(put)(jnp.zeros(s.stage.shape, bool), index[name], parts[name])
        for name, s in seeds.items()
    }


def _candidates(
    state: SeedState,
    score: Float[Array, " S"],
    cost: Int[Array, " S"],
    limits: Limits,
) -> tuple[Float[Array, " N"], Int[Array, " N"]]:
    """A layer's best chunks, at most ``births``: their scores and which they are.

    The score of a chunk that is no candidate is infinity.
    """
    affordable = cost.astype(jnp.result_type(limits.room)) <= limits.room
    usable = (state.stage == Stage.DORMANT) & jnp.isfinite(score) & affordable
    count = min(limits.births, state.num_seeds)
    negative, index = jax.lax.top_k(-jnp.where(usable, score, jnp.inf), count)
    free = jnp.sum(state.seed_of_slot < 0)
    return jnp.where(jnp.arange(count) < free, -negative, jnp.inf), index
