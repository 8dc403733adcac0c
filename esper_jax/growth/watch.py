"""What a step adds to the running measurements of the whole model."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from esper_jax.blueprints import Bank
from esper_jax.growth import gradients
from esper_jax.growth.recipe import Recipe
from esper_jax.growth.state import Arrays, Monitor
from esper_jax.lifecycle.state import SeedState

__all__ = ["StepGradients", "start_monitor", "watch"]


class StepGradients(NamedTuple):
    """Gradients of a step."""

    host: Arrays
    """Of the host's parameters, by variable."""
    banks: dict[str, Bank]
    """Of the banks, by bed."""
    seeds: dict[str, SeedState]
    """The seeds of each bed."""


def start_monitor(recipe: Recipe, params: Arrays) -> Monitor:
    """A monitor before the first step, with room for what is measured.

    Args:
      recipe: holds the model and says what is measured.
      params: of the host, by variable.
    """
    parts = recipe.parts
    drift = {}
    if recipe.wants("drift"):
        drift = {name: parts.host_weights(params, name) for name in parts.beds}
    layers = parts.beds if recipe.wants("chunk_gradient", "gradient_ratio") else ()
    return Monitor.start(
        jax.tree.map(jnp.array, drift),
        {name: parts.layouts[name].num_seeds for name in layers},
    )


@jax.named_scope("esper/watch")
def watch(
    recipe: Recipe,
    monitor: Monitor,
    step: StepGradients,
    loss: Float[Array, ""] | None,
) -> Monitor:
    """The running measurements with one more step.

    Only every ``recipe.measure_every``-th step reads the gradients.

    Args:
      recipe: says what is measured.
      monitor: so far.
      step: its gradients.
      loss: of the step; None if it is not known.
    """
    new = dataclasses.replace(
        monitor,
        train_loss=monitor.train_loss
        + (jnp.nan if loss is None else jnp.asarray(loss, jnp.float32)),
        steps=monitor.steps + 1,
    )
    if not recipe.wants("chunk_gradient", "gradient_ratio", "grad_norm"):
        return new

    def measured() -> tuple[Any, Array]:
        return _gradients(recipe, monitor, step), _norm(recipe, monitor, step.host)

    sums, norm = (
        measured()
        if recipe.measure_every == 1
        else jax.lax.cond(
            monitor.steps % recipe.measure_every == 0,
            measured,
            lambda: (monitor.gradients, monitor.grad_norm),
        )
    )
    return dataclasses.replace(new, gradients=sums, grad_norm=norm)


def _norm(recipe: Recipe, monitor: Monitor, host: Arrays) -> Float[Array, ""]:
    if not recipe.wants("grad_norm"):
        return monitor.grad_norm
    # A frozen host has no gradients, and 0 is their norm. Where parameters train, those
    # that were not given are not known.
    known = host or not recipe.parts.trained
    return monitor.grad_norm + (optax.tree.norm(host) if known else jnp.nan)


def _gradients(recipe: Recipe, monitor: Monitor, step: StepGradients) -> Any:
    """The sums of gradient norms of the layers that are measured."""
    parts = recipe.parts
    seeds, banks = parts.by_layer(step.seeds), parts.by_layer(step.banks)
    return {
        name: gradients.add(
            sums,
            parts.host_weights(step.host, name),
            banks[name],
            seeds[name],
            parts.layouts[name],
            owns=parts.has_base(name),
        )
        for name, sums in monitor.gradients.items()
    }
