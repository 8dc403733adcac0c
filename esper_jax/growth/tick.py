"""A tick: what was measured becomes signals, a decision, and new seeds.

Held-out metrics, counterfactuals, signals, the policy, the lifecycle and the birth of
new blueprints, for all layers, as one pure function.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from esper_jax import lifecycle
from esper_jax.growth.births import give_birth
from esper_jax.growth.evaluation import counterfactuals, evaluate
from esper_jax.growth.measure import layer_signals, measure
from esper_jax.growth.recipe import Batch, Recipe
from esper_jax.growth.reports import LayerReport, TickReport, moves_of
from esper_jax.growth.state import TrainState
from esper_jax.lifecycle.commands import Commands
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.state import SeedState, coefficients
from esper_jax.parallel import collectives

__all__ = ["tick"]


def tick(
    recipe: Recipe, state: TrainState, held_out: Batch
) -> tuple[TrainState, TickReport]:
    """Measures, decides and carries out what was decided, for all layers.

    Args:
      recipe: what the model is grown by.
      state: after the steps since the last tick.
      held_out: data that the gates and the policy read, rows first.

    Returns:
      The new state and the report.
    """
    agree = jnp.ones((), bool)
    if recipe.debug and recipe.axis_name is not None:
        agree = collectives.replicas_agree(state, recipe.axis_name)
    loss, accuracy = evaluate(recipe, recipe.parts.values(state), held_out)
    # Devices that differ would not all take part in the same evaluations.
    worth = counterfactuals(recipe, state, held_out, loss, agree)
    measured = measure(recipe.parts, state, loss, accuracy)
    costs = recipe.costs()
    seeds, signals = {}, {}
    for name in state.seeds:
        layer, signals[name] = layer_signals(
            state, name, worth[name], costs[name], measured
        )
        seeds[name] = lifecycle.age(layer, signals[name], recipe.gates)
    commands, memory = recipe.decide(
        seeds, signals, state.memory, recipe.policy, recipe.gates, costs
    )
    rng, birth = jax.random.split(state.rng)
    grown, layers = _carry_out(recipe, state, seeds, signals, commands, birth)
    new = dataclasses.replace(
        state,
        ticks=state.ticks + 1,
        rng=rng,
        memory=memory,
        monitor=measured.monitor,
        **grown,
    )
    steps = jnp.where(state.monitor.steps > 0, state.monitor.steps, jnp.nan)
    report = TickReport(
        tick=new.ticks,
        step=state.step,
        train_loss=state.monitor.train_loss / steps,
        loss=loss,
        accuracy=accuracy,
        reason=memory.reason,
        replicas_agree=agree,
        layers=layers,
    )
    return new, report


def _carry_out(
    recipe: Recipe,
    state: TrainState,
    seeds: dict[str, SeedState],
    signals: dict[str, Signals],
    commands: dict[str, Commands],
    key: Key[Array, ""],
) -> tuple[dict[str, Any], dict[str, LayerReport]]:
    """The transitions and births of all layers.

    Returns:
      The new ``seeds``, ``banks`` and ``bank_opt`` of the state, and the reports.
    """
    after, banks, bank_opt, reports = {}, {}, {}, {}
    keys = jax.random.split(key, len(seeds))
    for (name, layer), own in zip(seeds.items(), keys, strict=True):
        after[name], outcome = lifecycle.transition(
            layer, commands[name], signals[name], recipe.gates
        )
        banks[name], bank_opt[name] = give_birth(recipe, state, name, after[name], own)
        reports[name] = LayerReport(
            **moves_of(layer, after[name], commands[name].target, outcome),
            stage=after[name].stage,
            alpha=coefficients(after[name])[0],
            signals=signals[name],
        )
    return {"seeds": after, "banks": banks, "bank_opt": bank_opt}, reports
