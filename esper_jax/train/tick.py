"""Our own loop's tick: held-out loss and worth inside one traced function."""

import jax.numpy as jnp

from esper_jax.growth.reports import TickReport
from esper_jax.growth.state import TrainState
from esper_jax.growth.tick import Seen, advance
from esper_jax.parallel import collectives
from esper_jax.train.batches import Batches
from esper_jax.train.evaluation import counterfactuals, evaluate
from esper_jax.train.recipe import Batch, TrainRecipe

__all__ = ["tick"]


def tick(
    recipe: TrainRecipe, state: TrainState, held_out: Batch | Batches
) -> tuple[TrainState, TickReport]:
    """Measures, decides and carries out what was decided, for all layers.

    Args:
      recipe: what the model is trained and grown by.
      state: after the steps since the last tick.
      held_out: data that the gates and the policy read; see `evaluate`.

    Returns:
      The new state and the report.
    """
    agree = jnp.ones((), bool)
    if recipe.debug and recipe.axis_name is not None:
        agree = collectives.replicas_agree(state, recipe.axis_name)
    shown = recipe.shown(state)
    loss, accuracy = evaluate(recipe, recipe.parts.values(shown), held_out)
    # Devices that differ would not all take part in the same evaluations.
    worth = counterfactuals(recipe, shown, held_out, loss, agree)
    return advance(recipe, state, Seen(loss, accuracy, worth, agree))
