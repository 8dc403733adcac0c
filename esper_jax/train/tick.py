"""Our own loop's tick: held-out loss and worth inside one traced function."""

import dataclasses

import jax.numpy as jnp

from esper_jax.groups import flat_slots, slots_of_layers
from esper_jax.growth.births import births, collected_by
from esper_jax.growth.outside import Outside
from esper_jax.growth.reports import TickReport
from esper_jax.growth.state import GrowthState, TrainState
from esper_jax.growth.tick import Seen, advance
from esper_jax.parallel import collectives
from esper_jax.train.batches import Batches
from esper_jax.train.evaluation import counterfactuals, evaluate
from esper_jax.train.recipe import Batch, TrainRecipe

__all__ = ["tick"]


def tick(
    recipe: TrainRecipe,
    state: TrainState,
    held_out: Batch | Batches,
    outside: Outside | None = None,
) -> tuple[TrainState, TickReport]:
    """Measures, decides and carries out what was decided, for all layers.

    Args:
      recipe: what the model is trained and grown by.
      state: after the steps since the last tick.
      held_out: data that the gates and the policy read; see `evaluate`.
      outside: what is asked from outside, by layer; None where nothing can be.

    Returns:
      The new state and the report.
    """
    recipe = recipe.for_slots(state.seeds)
    agree = jnp.ones((), bool)
    if recipe.debug and recipe.axis_name is not None:
        agree = collectives.replicas_agree(state, recipe.axis_name)
    shown = recipe.shown(state)
    loss, accuracy = evaluate(recipe, recipe.parts.values(shown), held_out)
    # Devices that differ would not all take part in the same evaluations.
    worth = counterfactuals(recipe, shown, held_out, loss, agree)
    groups = recipe.parts.groups
    seeds, banks = groups.stack(state.seeds), groups.stack(state.banks)
    collected = collected_by(recipe, seeds, banks)
    seen = Seen(loss, accuracy, groups.stack(worth), agree, collected)
    growth = GrowthState(
        step=state.step,
        ticks=state.ticks,
        rng=state.rng,
        memory=state.memory,
        monitor=state.monitor,
    )
    growth, after, birth, report = advance(
        recipe, growth, seeds, state.params, seen, outside
    )
    banks, slots = births(
        recipe,
        (seeds, after),
        banks,
        flat_slots(groups.stack(state.bank_opt)),
        birth,
    )
    moments = {
        key: slots_of_layers(of, len(groups.of[key].layers))
        for key, of in slots.items()
    }
    new = dataclasses.replace(
        state,
        ticks=growth.ticks,
        rng=growth.rng,
        memory=growth.memory,
        monitor=growth.monitor,
        seeds=groups.split(after),
        banks=groups.split(banks),
        bank_opt=groups.split(moments),
    )
    reports = groups.split(report.layers)
    if recipe.folds:
        seeds, weights, reports = recipe.folded(
            new.seeds, new.banks, {**new.params, **new.rest}, reports
        )
        new = dataclasses.replace(
            new,
            seeds=seeds,
            params={name: weights.get(name, x) for name, x in new.params.items()},
            rest={name: weights.get(name, x) for name, x in new.rest.items()},
        )
    return new, dataclasses.replace(report, layers=reports)
