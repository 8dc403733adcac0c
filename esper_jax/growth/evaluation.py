"""Held-out loss, and the worth of every seed: the loss without it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from esper_jax.growth.parts import ModelParts
from esper_jax.growth.state import Arrays, TrainState
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.stages import Stage
from esper_jax.lifecycle.state import SeedState, slot_coefficients
from esper_jax.parallel import collectives

__all__ = ["AT_ONCE", "counterfactuals", "evaluate"]

Batch = tuple[Any, Any]


Loss = Callable[[Any, Any], tuple[Array, Array]]


AT_ONCE = 4
"""Counterfactuals that are evaluated side by side, which bounds their memory."""


def evaluate(
    parts: ModelParts,
    loss: Loss,
    eval_batch: int,
    axis_name: str | None,
    values: Arrays,
    data: Batch,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean loss and score over all rows, ``eval_batch`` at a time.

    With an ``axis_name``, each device has an equal part of the rows.
    """
    rows = jax.tree.leaves(data)[0].shape[0]
    size = min(eval_batch, rows)
    batches = -(-rows // size)
    missing = batches * size - rows
    weights = (jnp.arange(batches * size) < rows).astype(jnp.float32)

    def filled(a: Array) -> Array:
        """With the first rows again at the end, which then do not count."""
        return jnp.concatenate([a, a[:missing]]) if missing else a

    def batched(a: Array) -> Array:
        """Each batch has rows from everywhere, so that every device has a part of it
        where the rows are divided among several."""
        return jnp.swapaxes(a.reshape(size, batches, *a.shape[1:]), 0, 1)

    def one(part: tuple[Batch, Array]) -> tuple[Array, Array]:
        (x, y), weight = part
        losses, scores = loss(parts.merge(values, train=False)(x), y)
        return jnp.sum(losses * weight), jnp.sum(scores * weight)

    data = jax.tree.map(lambda a: filled(jnp.asarray(a)), data)
    if batches == 1:
        total = one((data, weights))
    else:
        sums = jax.lax.map(one, jax.tree.map(batched, (data, weights)))
        total = jax.tree.map(jnp.sum, sums)
    return collectives.mean((total[0] / rows, total[1] / rows), axis_name)


def counterfactuals(
    parts: ModelParts,
    evaluate: Callable[..., tuple[Array, Array]],
    state: TrainState,
    gates: LifecycleConfig,
    held_out: Batch,
    base_loss: Array,
    at_once: int,
    allowed: Array,
) -> dict[str, Float[Array, " K"]]:
    """Worth of the seed in each slot: the held-out loss with its alpha at 0, less the
    loss as it is. NaN for a slot whose alpha is 0, with nothing to take away, for a
    fossil, about which nothing is left to decide, and for a seed in FINE_TUNING about
    which nothing is to be decided soon.

    The losses without each of the seeds are vmapped, ``at_once`` of them at a time; the
    cost follows the number of seeds on probation, and is none where there is none.
    """
    alphas = {name: slot_coefficients(s)[0] for name, s in state.seeds.items()}
    flat = jnp.concatenate(list(alphas.values()))
    on_probation = jnp.concatenate(
        [_on_probation(s, gates) for s in state.seeds.values()]
    )
    ends = np.cumsum([a.size for a in alphas.values()])[:-1]
    asked = on_probation & (flat != 0) & allowed
    size = min(at_once, flat.size)
    # Those that are asked for come first; the last group is filled up with others.
    order = jnp.argsort(~asked, stable=True)
    order = jnp.pad(order, (0, -flat.size % size), constant_values=flat.size)
    groups = -(-jnp.sum(asked) // size)

    def without(slot: Array) -> Array:
        probe = jnp.where(jnp.arange(flat.size) == slot, -flat, 0.0)
        probes = dict(zip(alphas, jnp.split(probe, ends), strict=True))
        return evaluate(parts.values(state, probes), held_out)[0] - base_loss

    def group(i: Array, worth: Array) -> Array:
        slots = jax.lax.dynamic_slice_in_dim(order, i * size, size)
        losses = jax.vmap(without)(slots) if size > 1 else without(slots[0])[None]
        return worth.at[slots].set(losses, mode="drop")

    worth = jnp.full(flat.shape, jnp.nan, base_loss.dtype)
    worth = jax.lax.fori_loop(0, groups, group, worth)
    worth = jnp.where(asked, worth, jnp.nan)
    return dict(zip(alphas, jnp.split(worth, ends), strict=True))


def _on_probation(state: SeedState, gates: LifecycleConfig) -> Bool[Array, " K"]:
    """Slots whose seed is asked for its worth: not one that is kept for good, and one
    in FINE_TUNING only from the window of measurement on."""
    owner = jnp.maximum(state.seed_of_slot, 0)
    stage = state.stage[owner]
    age = state.epochs_in_stage[owner].astype(jnp.int32)
    soon = age + gates.worth_window >= gates.min_epochs[Stage.FINE_TUNING]
    asked = (stage != Stage.FOSSILIZED) & ((stage != Stage.FINE_TUNING) | soon)
    return (state.seed_of_slot >= 0) & asked
