"""A tick: what was measured becomes signals, a decision, and new seeds.

Signals, the policy and the lifecycle of all layers, as one pure function; `births` is
another. Layers of one shape are one group, for which each is done once.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from esper_jax import lifecycle
from esper_jax.growth.measure import group_signals, measure
from esper_jax.growth.outside import Outside, grant, yielding
from esper_jax.growth.recipe import Recipe
from esper_jax.growth.reports import LayerReport, TickReport, moves_of
from esper_jax.growth.state import Arrays, GrowthState, Monitor
from esper_jax.lifecycle.commands import Commands
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import NO_REQUEST
from esper_jax.lifecycle.state import SeedState, coefficients
from esper_jax.policy.memory import not_heard

__all__ = ["Advanced", "Seen", "advance"]


class Seen(NamedTuple):
    """What was measured on held-out data."""

    loss: Float[Array, ""]
    accuracy: Float[Array, ""]
    worth: dict[str, Float[Array, "L K"]]
    """Worth of the seed in each slot, by group; NaN where it was not measured."""
    agree: Bool[Array, ""]
    """Whether all devices hold the same state, as far as that was looked at."""
    collected: dict[str, Float[Array, " L"]]
    """What each layer's newborn parts collected of the gradient, by group."""


class Advanced(NamedTuple):
    """What a tick gives."""

    state: GrowthState
    seeds: dict[str, SeedState]
    """By group."""
    birth: Key[Array, ""]
    """Key for `births`."""
    report: TickReport
    """Its layers are by group, stacked."""


def advance(
    recipe: Recipe,
    state: GrowthState,
    seeds: dict[str, SeedState],
    host: Arrays,
    seen: Seen,
    outside: Outside | None = None,
) -> Advanced:
    """Decides and carries out what was decided, for all layers.

    Slots that changed hands still hold their old blueprints; see `births`.

    Args:
      recipe: what the model is grown by.
      state: after the steps since the last tick.
      seeds: by group.
      host: parameters of the host, by variable; read only where drift is measured.
      seen: what was measured on held-out data.
      outside: what is asked from outside, by layer; None where nothing can be.
    """
    old = state.monitor
    with jax.named_scope("esper/signals"):
        measured = measure(recipe, old, host, seen.loss, seen.accuracy)
        seeds, signals = group_signals(
            recipe, seeds, old, (seen.worth, seen.collected), measured
        )
    with jax.named_scope("esper/lifecycle"):
        older = jax.vmap(functools.partial(lifecycle.age, config=recipe.gates))
        aged = {key: older(seeds[key], signal) for key, signal in signals.items()}
    commands, memory = _commands(recipe, aged, signals, state.memory)
    with jax.named_scope("esper/lifecycle"):
        if outside is None:
            move = jax.vmap(functools.partial(_move, recipe.gates))
            moved = {key: move(aged[key], signals[key], commands[key]) for key in aged}
        else:
            asked = outside.by_group(recipe.parts.groups)
            moved, unheard = _moved(recipe.gates, aged, signals, commands, asked)
            memory = not_heard(unheard, memory, state.memory)
    rng, birth = jax.random.split(state.rng)
    new = dataclasses.replace(
        state,
        ticks=state.ticks + 1,
        rng=rng,
        memory=memory,
        monitor=measured.monitor,
    )
    report = _report(new, old, seen, {key: layer for key, (_, layer) in moved.items()})
    return Advanced(
        new, {key: after for key, (after, _) in moved.items()}, birth, report
    )


def _move(
    gates: LifecycleConfig, seeds: SeedState, signals: Signals, commands: Commands
) -> tuple[SeedState, LayerReport]:
    """The transitions of one layer."""
    after, outcome = lifecycle.transition(seeds, commands, signals, gates)
    report = LayerReport(
        **moves_of(seeds, after, commands.target, outcome),
        stage=after.stage,
        alpha=coefficients(after)[0],
        blueprint=after.blueprint,
        signals=signals,
        health=after.health,
    )
    return after, report


def _moved(
    gates: LifecycleConfig,
    seeds: dict[str, SeedState],
    signals: dict[str, Signals],
    commands: dict[str, Commands],
    outside: Outside,
) -> tuple[dict[str, tuple[SeedState, LayerReport]], Bool[Array, ""]]:
    """The transitions of all layers, by group: the outside's, then the policy's.

    Returns:
      Seeds and report, and whether the policy asked for a germination in vain.
    """
    granted = grant(gates, seeds, signals, outside)
    move = jax.vmap(functools.partial(_move, gates))
    moved, unheard = {}, jnp.asarray(False)
    for key, before in seeds.items():
        asked = outside.commands[key]
        left, by, mute = yielding(
            commands[key], asked, outside.germination, outside.policy
        )
        unheard |= mute
        after, report = move(granted.seeds[key], signals[key], left)
        first = asked.target != NO_REQUEST
        both: dict[str, Any] = moves_of(
            before,
            after,
            jnp.where(first, asked.target, left.target),
            jnp.where(first, granted.outcome[key], report.outcome),
        )
        moved[key] = after, dataclasses.replace(report, **both, by=by)
    return moved, unheard


@jax.named_scope("esper/policy")
def _commands(
    recipe: Recipe,
    seeds: dict[str, SeedState],
    signals: dict[str, Signals],
    memory: object,
) -> tuple[dict[str, Commands], object]:
    """What the policy asks for, by group, and its new memory."""
    policy, groups = recipe.policy, recipe.parts.groups
    if policy.stacked:
        return policy.decide(seeds, signals, memory)
    commands, memory = policy.decide(groups.split(seeds), groups.split(signals), memory)
    return groups.stack(commands), memory


def _report(
    state: GrowthState,
    old: Monitor,
    seen: Seen,
    layers: dict[str, LayerReport],
) -> TickReport:
    steps = old.steps.astype(jnp.float32)
    steps = jnp.where(steps > 0, steps, jnp.nan)
    return TickReport(
        tick=state.ticks,
        step=state.step,
        train_loss=old.train_loss / steps,
        loss=seen.loss,
        accuracy=seen.accuracy,
        reason=jnp.asarray(getattr(state.memory, "reason", -1), jnp.int8),
        replicas_agree=seen.agree,
        layers=layers,
    )
