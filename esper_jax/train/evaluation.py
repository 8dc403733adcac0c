"""Held-out loss, and the worth of every seed: the loss without it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from esper_jax.growth.measure import asked_for_worth
from esper_jax.growth.state import Arrays, TrainState
from esper_jax.lifecycle.state import slot_coefficients
from esper_jax.parallel import collectives
from esper_jax.train.batches import Batches, cut
from esper_jax.train.losses import Result, classification, common_rows
from esper_jax.train.recipe import Batch, TrainRecipe

__all__ = ["counterfactuals", "evaluate"]


@jax.named_scope("esper/evaluate")
def evaluate(
    recipe: TrainRecipe, values: Arrays, data: Batch | Batches
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean loss and score.

    Of arrays, over all rows, ``recipe.eval_batch`` at a time. Of `Batches`, each batch
    counts by its rows, or by the weight that the objective gives it. A batch whose
    arrays share no number of rows counts by the numbers in its loss, or as one. A loss
    that is a single number is taken for the mean over its batch.

    Along ``recipe.axis_name`` each device has an equal part of the rows.

    Args:
      recipe: holds the model and its loss.
      values: of the model's variables, by name.
      data: what is evaluated: arrays, rows first, or batches.
    """
    if not isinstance(data, Batches):
        rows = common_rows(data)
        if rows is None:  # one batch, as a graph is: nothing to cut
            data = Batches((jax.tree.map(lambda a: jnp.asarray(a)[None], data),))
        elif _fillable(recipe, values, data, min(rows, recipe.eval_batch)):
            return _filled(recipe, values, data)
        else:
            data = cut(data, min(rows, recipe.eval_batch))

    def one(batch: Batch) -> tuple[Array, Array, Array]:
        result = recipe.result(recipe.parts.merge(values, train=False), batch)
        weight = _weight(recipe, result, batch)
        # A batch without weight counts nothing, also where its mean is 0 / 0.
        loss, score = (
            jnp.where(weight == 0, 0.0, jnp.mean(x).astype(jnp.float32) * weight)
            for x in (result.loss, result.score)
        )
        return loss, score, weight

    sums = [
        jax.tree.map(jnp.sum, jax.lax.map(one, group))
        if jax.tree.leaves(group)[0].shape[0] > 1
        else one(jax.tree.map(lambda a: a[0], group))
        for group in data.groups
    ]
    total = jax.tree.map(lambda *parts: sum(parts), *sums)
    loss, score, weight = collectives.mean(total, recipe.axis_name)
    return loss / weight, score / weight


def _weight(recipe: TrainRecipe, result: Result, batch: Batch) -> Float[Array, ""]:
    """How much a batch counts."""
    if result.weight is not None:
        return result.weight
    rows = recipe.rows(batch)
    if rows is None:
        rows = result.loss.size
    # From the loss, so that it varies over devices as the loss does.
    return jnp.ones_like(result.loss, jnp.float32).sum() * (rows / result.loss.size)


def _fillable(recipe: TrainRecipe, values: Arrays, data: Batch, size: int) -> bool:
    """Whether rows that only fill up the last batch can be left out of the mean.

    They cannot where a single number stands for the batch.
    """
    if recipe.objective is not None:
        return False
    if recipe.loss is classification:
        return True

    def result(values: Arrays, data: Batch) -> Result:
        batch = jax.tree.map(lambda a: jnp.asarray(a)[:size], data)
        return recipe.result(recipe.parts.merge(values, train=False), batch)

    shapes = jax.eval_shape(result, values, data)
    return shapes.loss.ndim == shapes.score.ndim == 1


def _filled(
    recipe: TrainRecipe, values: Arrays, data: Batch
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean loss and score of arrays whose last batch is filled up with other rows."""
    rows = jax.tree.leaves(data)[0].shape[0]
    size = min(recipe.eval_batch, rows)
    batches = -(-rows // size)
    missing = batches * size - rows
    weights = (jnp.arange(batches * size) < rows).astype(jnp.float32)

    def filled(a: Array) -> Array:
        """Repeats the first rows at the end, where they get no weight."""
        return jnp.concatenate([a, a[:missing]]) if missing else a

    def batched(a: Array) -> Array:
        """Cuts into batches with rows from everywhere.

        So every device has a part of each batch where the rows are divided.
        """
        return jnp.swapaxes(a.reshape(size, batches, *a.shape[1:]), 0, 1)

    def one(part: tuple[Batch, Array]) -> tuple[Array, Array]:
        batch, weight = part
        result = recipe.result(recipe.parts.merge(values, train=False), batch)
        return jnp.sum(result.loss * weight), jnp.sum(result.score * weight)

    data = jax.tree.map(lambda a: filled(jnp.asarray(a)), data)
    if batches == 1:
        total = one((data, weights))
    else:
        sums = jax.lax.map(one, jax.tree.map(batched, (data, weights)))
        total = jax.tree.map(jnp.sum, sums)
    return collectives.mean((total[0] / rows, total[1] / rows), recipe.axis_name)


@jax.named_scope("esper/worth")
def counterfactuals(
    recipe: TrainRecipe,
    state: TrainState,
    held_out: Batch | Batches,
    base_loss: Float[Array, ""],
    allowed: Bool[Array, ""],
) -> dict[str, Float[Array, " K"]]:
    """Worth of the seed in each slot, by layer.

    The worth is the held-out loss with the seed's alpha at 0, less the loss as it is.
    It is NaN where there is nothing to measure or to decide: in a slot whose alpha is
    0, for a fossil, and for a seed in FINE_TUNING that cannot be kept soon.

    The losses are vmapped, ``recipe.at_once`` at a time. The cost follows the number of
    seeds that are asked for, and is nothing where there are none.

    Args:
      recipe: holds the model, its loss and the gates.
      state: of the run.
      held_out: data that the losses are measured on.
      base_loss: the loss as it is.
      allowed: if False, nothing is measured.
    """
    alphas = {name: slot_coefficients(s)[0] for name, s in state.seeds.items()}
    flat = jnp.concatenate(list(alphas.values()))
    ends = np.cumsum([a.size for a in alphas.values()])[:-1]
    asked = jnp.concatenate(
        [asked_for_worth(s, recipe.gates) for s in state.seeds.values()]
    )
    asked &= allowed

    def without(slot: Array) -> Array:
        probe = jnp.where(jnp.arange(flat.size) == slot, -flat, 0.0)
        probes = dict(zip(alphas, jnp.split(probe, ends), strict=True))
        values = recipe.parts.values(state, probes)
        return evaluate(recipe, values, held_out)[0] - base_loss

    worth = _only_where(asked, without, recipe.at_once, base_loss.dtype)
    return dict(zip(alphas, jnp.split(worth, ends), strict=True))


def _only_where(
    asked: Bool[Array, " N"],
    function: Callable[[Array], Array],
    at_once: int,
    dtype: jnp.dtype,
) -> Float[Array, " N"]:
    """``function(i)`` where ``asked[i]``, else NaN; ``at_once`` calls side by side."""
    size = min(at_once, asked.size)
    # Those that are asked for come first. Others fill up the last group.
    order = jnp.argsort(~asked, stable=True)
    order = jnp.pad(order, (0, -asked.size % size), constant_values=asked.size)
    groups = -(-jnp.sum(asked) // size)

    def group(i: Array, results: Array) -> Array:
        which = jax.lax.dynamic_slice_in_dim(order, i * size, size)
        # JAX cannot vmap a branch whose operands vary along a mapped axis.
        new = jax.vmap(function)(which) if size > 1 else function(which[0])[None]
        return results.at[which].set(new, mode="drop")

    results = jnp.full(asked.shape, jnp.nan, dtype)
    results = jax.lax.fori_loop(0, groups, group, results)
    return jnp.where(asked, results, jnp.nan)
