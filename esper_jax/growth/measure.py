"""What was summed over a tick's steps becomes signals."""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from esper_jax.blueprints import living_parameters, operations
from esper_jax.growth import gradients
from esper_jax.growth.gradients import GradientSums
from esper_jax.growth.parts import ModelParts
from esper_jax.growth.recipe import Recipe
from esper_jax.growth.state import Arrays, Monitor
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.signals import DECAY, Signals, health, running_moments
from esper_jax.lifecycle.stages import Stage
from esper_jax.lifecycle.state import (
    SeedState,
    saturating_add,
    slot_coefficients,
    start_tick,
)

__all__ = ["Measured", "asked_for_worth", "group_signals", "measure", "sampled"]


class Measured(NamedTuple):
    """What a tick measured of the whole model."""

    monitor: Monitor
    """The new running means, its sums cleared."""
    common: Signals
    """The signals that all seeds share, each of shape ()."""
    drift: dict[str, Float[Array, ""]]
    """Drift of each layer's host weights."""


def measure(
    recipe: Recipe,
    old: Monitor,
    host: Arrays,
    loss: Float[Array, ""],
    accuracy: Float[Array, ""],
) -> Measured:
    """Measures what all seeds share.

    Args:
      recipe: holds the model and says what is measured.
      old: before the tick.
      host: parameters of the host, by variable.
      loss: on the held-out data.
      accuracy: on the same data.
    """
    loss_mean, loss_variance = running_moments(old.loss_mean, old.loss_variance, loss)
    accuracy_mean, accuracy_variance = running_moments(
        old.accuracy_mean, old.accuracy_variance, accuracy
    )
    initial = jnp.where(jnp.isfinite(old.initial_loss), old.initial_loss, loss)
    drift, host_mean = _drift(recipe.parts, old, host)
    stability = 1.0 - jnp.sqrt(loss_variance) / jnp.abs(initial)
    zero = jnp.zeros_like
    monitor = Monitor(
        initial_loss=initial,
        loss_mean=loss_mean,
        loss_variance=loss_variance,
        accuracy_mean=accuracy_mean,
        accuracy_variance=accuracy_variance,
        host_mean=host_mean,
        train_loss=zero(old.train_loss),
        grad_norm=zero(old.grad_norm),
        gradients=jax.tree.map(zero, old.gradients),
        steps=zero(old.steps),
    )
    common = Signals.unmeasured(
        stability=jnp.where(jnp.isfinite(loss), stability, jnp.nan),
        loss_variance=loss_variance,
        accuracy_variance=accuracy_variance,
        grad_norm=old.grad_norm / sampled(recipe, old)
        if recipe.wants("grad_norm")
        else jnp.nan,
        held_out_loss=loss,
        held_out_accuracy=accuracy,
    )
    return Measured(monitor, common, drift)


def group_signals(
    recipe: Recipe,
    seeds: Mapping[str, SeedState],
    old: Monitor,
    of_slots: tuple[
        Mapping[str, Float[Array, "L K"]], Mapping[str, Float[Array, " L"]]
    ],
    measured: Measured,
) -> tuple[dict[str, SeedState], dict[str, Signals]]:
    """The signals of all seeds, and the seeds with the tick's sums absorbed.

    Args:
      recipe: holds the model and says what is measured.
      seeds: before the tick, by group.
      old: the running measurements before the tick.
      of_slots: worth of the seed in each slot, NaN where it was not measured; and what
        each layer's newborn parts collected; both by group.
      measured: what all seeds share.
    """
    worth, collected = of_slots
    costs = recipe.costs()
    of_host = _of_host(recipe, old, measured, collected)
    steps, common = sampled(recipe, old), measured.common
    absorbed, signals = {}, {}
    for key, state in seeds.items():
        absorb = functools.partial(
            _layer_signals, costs=costs[key], common=common, steps=steps
        )
        absorbed[key], signals[key] = jax.vmap(absorb)(state, worth[key], of_host[key])
    return absorbed, signals


class _OfHost(NamedTuple):
    """What the steps of a tick measured of a layer's host weights."""

    drift: Float[Array, "*L"]
    sums: GradientSums
    weight: Float[Array, "*L"]
    """Mean squared norm of the kernel's gradient."""


def _of_host(
    recipe: Recipe,
    old: Monitor,
    measured: Measured,
    collected: Mapping[str, Float[Array, " L"]],
) -> dict[str, _OfHost]:
    """By group; NaN where it was not measured."""
    groups, drift, sums = recipe.parts.groups, measured.drift, old.gradients
    of = {}
    for key, group in groups.of.items():
        count, seeds = len(group.layers), recipe.parts.layouts[key].num_seeds
        each = jnp.full(count, jnp.nan, jnp.float32)
        every = jnp.full((count, seeds), jnp.nan, jnp.float32)
        weight = collected[key] / _or_nan(old.steps) ** 2
        of[key] = _OfHost(each, GradientSums(each, every, every), weight)
    if recipe.wants("drift"):
        of = {k: of[k]._replace(drift=d) for k, d in groups.stack(drift).items()}
    if sums:
        of = {k: of[k]._replace(sums=s) for k, s in groups.stack(sums).items()}
    for name, fields in (
        ("chunk_gradient", ("chunk",)),
        ("gradient_ratio", ("host", "seed")),
    ):
        if sums and not recipe.wants(name):
            of = {k: _without(x, fields) for k, x in of.items()}
    return of


def _without(of: _OfHost, fields: Collection[str]) -> _OfHost:
    """With some of the sums unmeasured."""
    unknown = {f: jnp.full_like(getattr(of.sums, f), jnp.nan) for f in fields}
    return of._replace(sums=dataclasses.replace(of.sums, **unknown))


def sampled(recipe: Recipe, monitor: Monitor) -> Float[Array, ""]:
    """At how many of the steps since the last tick gradients were measured.

    NaN if there were none.
    """
    return _or_nan(-(-monitor.steps // recipe.measure_every))


def _layer_signals(
    layer: SeedState,
    worth: Float[Array, " K"],
    of: _OfHost,
    costs: Int[np.ndarray, "N S"],
    common: Signals,
    steps: Float[Array, ""],
) -> tuple[SeedState, Signals]:
    """The signals of one layer's seeds, and the seeds with the tick's sums absorbed."""
    lives = layer.slot_of_seed >= 0
    owned = living_parameters(costs, layer.blueprint, lives).astype(jnp.float32)
    parameters = jnp.where(lives, owned, jnp.nan)
    delta = _by_seed(layer, worth)
    mean_worth, worth_ticks = _mean_worth(layer, delta)
    errors = jnp.nan_to_num(_by_seed(layer, layer.errors.astype(jnp.float32)))
    calls = _or_nan(layer.steps)
    score = health(layer.statistics).score
    signals = dataclasses.replace(
        common,
        drift=of.drift.astype(jnp.float32),
        reconstruction_loss=_by_seed(layer, layer.reconstruction / calls),
        worth=delta,
        mean_worth=mean_worth,
        error_rate=errors / calls,
        gain=_by_seed(layer, -layer.gain / calls),
        gradient_ratio=gradients.gradient_ratio(of.sums, layer),
        chunk_gradient=gradients.chunk_gradient(of.sums, steps),
        weight_gradient=jnp.full_like(parameters, of.weight),
        parameters=parameters,
        operations=operations(parameters),
    )
    layer = dataclasses.replace(
        start_tick(layer),
        health=jnp.where(jnp.isnan(score), layer.health, score),
        worth=mean_worth,
        worth_ticks=worth_ticks,
        error_count=saturating_add(layer.error_count, errors),
    )
    return layer, signals


def _or_nan(count: Int[Array, ""]) -> Float[Array, ""]:
    """A count as float32; NaN where it is 0."""
    return jnp.where(count > 0, count.astype(jnp.float32), jnp.nan)


def asked_for_worth(state: SeedState, gates: LifecycleConfig) -> Bool[Array, " K"]:
    """Slots whose seed is asked for its worth.

    Those that count in the output and may still be removed. A fossil is not asked,
    since no decision depends on it. A seed in FINE_TUNING is from the window of
    measurement on.
    """
    owner = jnp.maximum(state.seed_of_slot, 0)
    stage = state.stage[owner]
    age = state.epochs_in_stage[owner].astype(jnp.int32)
    soon = age + gates.worth_window >= gates.min_epochs[Stage.FINE_TUNING]
    asked = (stage != Stage.FOSSILIZED) & ((stage != Stage.FINE_TUNING) | soon)
    return (slot_coefficients(state)[0] != 0) & asked


def _drift(
    parts: ModelParts, old: Monitor, host: Arrays
) -> tuple[dict[str, Float[Array, ""]], dict[str, dict[str, Array]]]:
    """Drift of each layer's host weights from their running mean, and the new mean."""
    drift: dict[str, Array] = {}
    host_mean: dict[str, dict[str, Array]] = {}
    for name, mean in old.host_mean.items():
        weights = parts.host_weights(host, name)
        if not weights:  # a frozen host does not drift
            drift[name], host_mean[name] = jnp.zeros((), jnp.float32), {}
            continue
        away = optax.tree.norm(jax.tree.map(jnp.subtract, weights, mean))
        scale = optax.tree.norm(mean)
        drift[name] = jnp.asarray(
            away / jnp.where(scale > 0, scale, jnp.nan), jnp.float32
        )
        host_mean[name] = jax.tree.map(
            lambda m, w: DECAY * m + (1 - DECAY) * w, mean, weights
        )
    return drift, host_mean


def _mean_worth(
    state: SeedState, delta: Float[Array, " S"]
) -> tuple[Float[Array, " S"], Array]:
    """Mean worth of each seed over the ticks in its stage, and how many those are."""
    ticks = saturating_add(state.worth_ticks, ~jnp.isnan(delta))
    change = (delta - state.worth) / ticks.astype(jnp.float32)
    mean = jnp.where(jnp.isnan(state.worth), delta, state.worth + change)
    return jnp.where(jnp.isnan(delta), state.worth, mean), ticks


def _by_seed(state: SeedState, per_slot: Float[Array, " K"]) -> Float[Array, " S"]:
    """A measurement by slot, seen from the seeds; NaN for a seed without a slot."""
    slot = state.slot_of_seed
    return jnp.where(slot >= 0, per_slot[jnp.maximum(slot, 0)], jnp.nan)
