"""A tick: what was measured becomes signals, a decision, and new seeds.

Signals, the policy, the lifecycle and the birth of new blueprints, for all layers, as
one pure function.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from esper_jax import lifecycle
from esper_jax.growth.births import give_birth
from esper_jax.growth.measure import layer_signals, measure
from esper_jax.growth.recipe import Recipe
from esper_jax.growth.reports import LayerReport, TickReport, moves_of
from esper_jax.growth.state import TrainState
from esper_jax.lifecycle.commands import Commands
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.state import SeedState, coefficients

__all__ = ["Seen", "advance"]


class Seen(NamedTuple):
    """What was measured on held-out data."""

    loss: Float[Array, ""]
    accuracy: Float[Array, ""]
    worth: dict[str, Float[Array, " K"]]
    """Worth of the seed in each slot, by layer; NaN where it was not measured."""
    agree: Bool[Array, ""]
    """Whether all devices hold the same state, as far as that was looked at."""


def advance(
    recipe: Recipe, state: TrainState, seen: Seen
) -> tuple[TrainState, TickReport]:
    """Decides and carries out what was decided, for all layers.

    Args:
      recipe: what the model is grown by.
      state: after the steps since the last tick.
      seen: what was measured on held-out data.

    Returns:
      The new state and the report.
    """
    measured = measure(recipe.parts, state, seen.loss, seen.accuracy)
    costs = recipe.costs()
    seeds, signals = {}, {}
    for name in state.seeds:
        layer, signals[name] = layer_signals(
            state, name, seen.worth[name], costs[name], measured
        )
        seeds[name] = lifecycle.age(layer, signals[name], recipe.gates)
    commands, memory = recipe.policy.decide(seeds, signals, state.memory)
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
    steps = state.monitor.steps.astype(jnp.float32)
    steps = jnp.where(steps > 0, steps, jnp.nan)
    report = TickReport(
        tick=new.ticks,
        step=state.step,
        train_loss=state.monitor.train_loss / steps,
        loss=seen.loss,
        accuracy=seen.accuracy,
        reason=jnp.asarray(getattr(memory, "reason", -1), jnp.int8),
        replicas_agree=seen.agree,
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
