"""Where to germinate and what: choices over the chunks of all layers at once.

A place's score is the better the lower it is; NaN and infinity rule it out.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import Stage
from esper_jax.lifecycle.state import SeedState
from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.memory import ControllerMemory

__all__ = ["choose", "choose_blueprint", "cost_of", "scores", "spent"]


def scores(
    where: str,
    seeds: Mapping[str, SeedState],
    signals: Mapping[str, Signals],
    turn: Int[Array, ""],
    key: Key[Array, ""],
) -> tuple[dict[str, Float[Array, " S"]], Callable[[Mapping[str, Array]], Array]]:
    """The score of every chunk, dormant or not.

    Returns:
      Scores by layer, and a function from the chunks that were chosen to the next turn
      of the round robin.
    """
    sizes = [s.num_seeds for s in seeds.values()]
    total, ends = sum(sizes), np.cumsum(sizes)[:-1]
    place = jnp.arange(total)

    def next_turn(born: Mapping[str, Array]) -> Array:
        flat = jnp.concatenate(list(born.values()))
        ahead = jnp.where(flat, (place - turn) % total, -1)
        return ((turn + jnp.max(ahead) + 1) % total).astype(jnp.int32)

    if where == "health":
        by_layer = {name: s.health for name, s in seeds.items()}
    elif where == "gradient":
        by_layer = {
            name: -jnp.broadcast_to(signals[name].chunk_gradient, s.stage.shape)
            for name, s in seeds.items()
        }
    else:
        flat = (
            ((place - turn) % total).astype(jnp.float32)
            if where == "round_robin"
            else jax.random.uniform(key, (total,))
        )
        by_layer = dict(zip(seeds, jnp.split(flat, ends), strict=True))
    return by_layer, next_turn


def choose_blueprint(
    config: "ControllerConfig",
    memory: "ControllerMemory",
    costs: Mapping[str, Int[np.ndarray, "N S"]],
) -> Int[Array, ""]:
    """Index of the blueprint to germinate; the lower one of two that are as good."""
    if config.what == "fixed":
        return jnp.asarray(config.blueprint, jnp.int32)
    tried = memory.tried.astype(jnp.float32)
    each = jnp.where(tried > 0, memory.earned / jnp.maximum(tried, 1), jnp.nan)
    best = jnp.nanmax(jnp.where(jnp.isnan(each), 0.0, each))
    # What was never tried may be as good as the best so far.
    performance = jnp.where(tried > 0, each, best) / jnp.where(best > 0, best, 1.0)
    stability = (memory.kept + 1) / (tried + 2)
    novelty = 1 / (1 + tried)
    count = tried.shape[0]
    mean = np.mean([cost[:count].mean(axis=1) for cost in costs.values()], axis=0)
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


def spent(state: SeedState, costs: Int[np.ndarray, "N S"]) -> Int[Array, ""]:
    """Parameters of all living seeds of a layer."""
    kind = jnp.clip(state.blueprint.astype(jnp.int32), 0, len(costs) - 1)
    own = jnp.asarray(costs, jnp.int32)[kind, jnp.arange(state.num_seeds)]
    return jnp.sum(jnp.where(state.slot_of_seed >= 0, own, 0))


def choose(
    seeds: Mapping[str, SeedState],
    scores: Mapping[str, Float[Array, " S"]],
    costs: Mapping[str, Int[Array, " S"]],
    *,
    most: int,
    room: Any,
    at_once: Any,
) -> dict[str, Bool[Array, " S"]]:
    """The chunks to germinate in, at most ``most`` over all layers.

    Dormant ones with the lowest scores, as far as slots, ``at_once`` (how many more may
    wait or train) and ``room`` (parameters left in the budget) go.
    """
    flat, layer, free = [], [], []
    for i, (name, state) in enumerate(seeds.items()):
        slots = jnp.sum(state.seed_of_slot < 0)
        usable = (state.stage == Stage.DORMANT) & (slots > 0)
        usable &= jnp.isfinite(scores[name])
        flat.append(jnp.where(usable, scores[name], jnp.inf))
        layer.append(np.full(state.num_seeds, i))
        free.append(slots)
    joined = jnp.concatenate(flat)
    count = min(most, joined.size)
    negative, index = jax.lax.top_k(-joined, count)
    home = jnp.asarray(np.concatenate(layer))[index]
    candidate = jnp.isfinite(negative)
    earlier = jnp.tril(jnp.ones((count, count), bool), -1) & candidate
    in_layer = jnp.sum(earlier & (home[:, None] == home), axis=1)
    candidate &= in_layer < jnp.stack(free)[home]
    candidate &= jnp.arange(count) < at_once
    price = jnp.concatenate([costs[name] for name in seeds])[index]
    candidate &= jnp.cumsum(jnp.where(candidate, price, 0)) <= room
    chosen = jnp.zeros(joined.shape, bool).at[index].set(candidate)
    ends = np.cumsum([s.size for s in flat])[:-1]
    return dict(zip(seeds, jnp.split(chosen, ends), strict=True))
