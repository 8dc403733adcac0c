"""The network of a learned policy: a few thousand weights, shared by all places.

Each place (a seed of a layer) is read by the same weights, beside the mean and the
maximum over all places. So what is decided follows the places when they are put in
another order, and their number does not matter. Each place has a small state that it
remembers between ticks.

Letters: ``P`` places of all layers, ``F`` numbers read of each, ``N`` blueprints, ``R``
remembered numbers of a place.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from esper_jax.lifecycle.grafting import Strategy
from esper_jax.lifecycle.stages import NUM_STAGES, Stage

__all__ = ["REMEMBERED", "Outputs", "Weights", "apply", "init_weights", "shapes"]

WIDTH = 16
"""Of the two layers of hidden numbers."""
REMEMBERED = 8
"""``R``."""
OF_BLUEPRINTS = 4
"""Numbers read of each blueprint on each place; see `sight.of_blueprints`."""
KEPT = 0.5
"""How much of what is remembered stays at each tick."""

Weights = Mapping[str, Any]
"""Arrays of float32 by name, as `shapes` names them."""


class Outputs(NamedTuple):
    """What the network says, in logits; the highest that is allowed is asked for."""

    target: Float[Array, "P 12"]
    """Of each `Stage` to go to, and of staying."""
    strategy: Float[Array, "P 7"]
    """Of each `Strategy`."""
    blueprint: Float[Array, "P N"]
    """Of each blueprint."""
    remembered: Float[Array, "P R"]
    """What each place remembers now."""

    def finite(self) -> Bool[Array, ""]:
        """Whether all of them are finite."""
        return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in self]))


def shapes(features: int) -> dict[str, tuple[int, ...]]:
    """The shape of each array of weights.

    Args:
      features: ``F``.
    """
    w, r = WIDTH, REMEMBERED
    outputs = NUM_STAGES + 1 + len(Strategy) + OF_BLUEPRINTS
    return {
        "read": (features, w),
        "recall": (r, w),
        "read_bias": (w,),
        "remember": (3 * w, r),
        "remember_bias": (r,),
        "think": (3 * w + r, w),
        "think_bias": (w,),
        "say": (w, outputs),
        "say_bias": (outputs,),
    }


def init_weights(key: Key[Array, ""], features: int) -> dict[str, Float[Array, "..."]]:
    """Random weights that grow everywhere, advance what may advance and remove nothing.

    What is tuned goes on being tuned. All of it is said softly, so that small changes
    of the weights change what is done.

    Args:
      key: draws them.
      features: ``F``.
    """
    weights = {}
    for name, shape in shapes(features).items():
        key, own = jax.random.split(key)
        drawn = jax.random.normal(own, shape) / np.sqrt(shape[0])
        weights[name] = jnp.zeros(shape) if name.endswith("_bias") else drawn
    weights["say"] = 0.3 * weights["say"]
    ends = [Stage.FOSSILIZED, Stage.CULLED, Stage.CANCELLED, Stage.ROLLED_BACK]
    bias = np.zeros(weights["say_bias"].shape, np.float32)
    bias[:NUM_STAGES] = 0.3
    bias[ends] = -0.3
    weights["say_bias"] = jnp.asarray(bias)
    return weights


def apply(
    weights: Weights,
    read: Float[Array, "P F"],
    blueprints: Float[Array, "P N 4"],
    remembered: Float[Array, "P R"],
) -> Outputs:
    """What the network says about each place.

    Args:
      weights: of the network.
      read: of each place, finite.
      blueprints: of each blueprint on each place, finite.
      remembered: by each place, from the tick before.
    """
    recalled = remembered @ weights["recall"]
    each = jnp.tanh(read @ weights["read"] + recalled + weights["read_bias"][None])
    pooled = jnp.concatenate([jnp.mean(each, axis=0), jnp.max(each, axis=0)])
    pooled = jnp.broadcast_to(pooled, (len(each), pooled.size))
    whole = jnp.concatenate([each, pooled], axis=1)
    new = jnp.tanh(whole @ weights["remember"] + weights["remember_bias"][None])
    remembered = KEPT * remembered + (1 - KEPT) * new
    thought = jnp.concatenate([whole, remembered], axis=1)
    thought = jnp.tanh(thought @ weights["think"] + weights["think_bias"][None])
    said = thought @ weights["say"] + weights["say_bias"][None]
    ends = np.cumsum([NUM_STAGES + 1, len(Strategy)])
    target, strategy, query = jnp.split(said, ends, axis=1)
    kind = jnp.einsum("pq,pnq->pn", query, blueprints)
    return Outputs(target, strategy, kind, remembered)
