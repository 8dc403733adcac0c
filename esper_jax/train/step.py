"""One update of host and blueprints."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Key

from esper_jax.blueprints import Bank
from esper_jax.growth import gradients
from esper_jax.growth.parts import values_of
from esper_jax.growth.recipe import Batch, Recipe
from esper_jax.growth.state import Arrays, TrainState
from esper_jax.lifecycle.state import (
    SeedState,
    saturating_add,
    slot_coefficients,
    start_tick,
)
from esper_jax.parallel import collectives
from esper_jax.trees import is_key

__all__ = ["train_step"]


def train_step(recipe: Recipe, state: TrainState, batch: Batch) -> TrainState:
    """One update of host and blueprints.

    Args:
      recipe: holds the model, its loss and the optimizers.
      state: of the run.
      batch: ``(x, y)``, rows first.
    """
    learned = _learn(recipe, state, batch)
    updates, opt_state = recipe.optimizer.update(
        learned.params, state.opt_state, state.params
    )
    seeds, banks, bank_opt = {}, {}, {}
    for name in state.seeds:
        seeds[name], banks[name], bank_opt[name] = _update_bank(
            recipe, state, name, learned
        )
    monitor = dataclasses.replace(
        state.monitor,
        gradients=_add_gradients(recipe, state, learned),
        train_loss=state.monitor.train_loss + learned.loss,
        grad_norm=state.monitor.grad_norm + optax.tree.norm(learned.params),
        steps=state.monitor.steps + 1,
    )
    return dataclasses.replace(
        state,
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        seeds=seeds,
        banks=banks,
        bank_opt=bank_opt,
        rest=learned.rest,
        monitor=monitor,
    )


class _Learned(NamedTuple):
    """What one forward and backward pass gives."""

    loss: Float[Array, ""]
    params: Arrays
    """Gradients of the host's parameters."""
    banks: dict[str, Bank]
    """Gradients of the banks, by layer."""
    gains: dict[str, Float[Array, " K"]]
    """Gradients with respect to alpha, by layer."""
    seeds: dict[str, SeedState]
    """Seeds that hold what this pass alone measured, by layer."""
    rest: Arrays
    """The model's other variables afterwards."""


def _learn(recipe: Recipe, state: TrainState, batch: Batch) -> _Learned:
    """Loss and gradients of one batch."""
    (x, y), parts, axis_name = batch, recipe.parts, recipe.axis_name
    trained = (state.params, state.banks, parts.take(state.rest, "probe"))
    rest = state.rest
    if axis_name is not None:
        trained, rest = collectives.varying(trained, axis_name), _own(rest, axis_name)
    # Each step measures from 0, so that what was measured before is not summed twice.
    unmeasured = {name: start_tick(seeds) for name, seeds in state.seeds.items()}

    def objective(params: Arrays, banks: Arrays, probes: Arrays) -> tuple[Array, Any]:
        current = dataclasses.replace(
            state, params=params, banks=banks, rest=rest, seeds=unmeasured
        )
        model = parts.merge(parts.values(current, probes), train=True)
        losses, _ = recipe.loss(model(x), y)
        return jnp.mean(losses), values_of(model)

    (value, after), grads = jax.value_and_grad(
        objective, argnums=(0, 1, 2), has_aux=True
    )(*trained)
    value, (params, banks, gains) = collectives.mean((value, grads), axis_name)
    return _Learned(
        loss=value,
        params=params,
        banks=banks,
        gains=gains,
        seeds=parts.take(after, "seeds"),
        rest=_shared(state.rest, after, axis_name),
    )


def _add_gradients(
    recipe: Recipe, state: TrainState, learned: _Learned
) -> dict[str, gradients.GradientSums]:
    """The tick's sums of gradient norms with this step's, by layer."""
    parts = recipe.parts
    return {
        name: gradients.add(
            state.monitor.gradients[name],
            parts.host_weights(learned.params, name),
            learned.banks[name],
            state.seeds[name],
            parts.layouts[name],
            owns=parts.has_base(name),
        )
        for name in parts.beds
    }


def _own(rest: Arrays, axis_name: str) -> Arrays:
    """The other variables as one device uses them, with random streams of its own."""

    def own(x: Array) -> Array:
        if is_key(x):
            return _fold(x, jax.lax.axis_index(axis_name))
        inexact = jnp.issubdtype(x.dtype, jnp.inexact)
        return collectives.varying(x, axis_name) if inexact else x

    return jax.tree.map(own, rest)


def _fold(keys: Key[Array, "*N"], data: Array) -> Key[Array, "*N"]:
    fold = functools.partial(jax.random.fold_in, data=data)
    for _ in range(keys.ndim):
        fold = jax.vmap(fold)
    return fold(keys)


def _shared(before: Arrays, after: Arrays, axis_name: str | None) -> Arrays:
    """The other variables after a step.

    Floating ones, such as batch statistics, become their mean over the devices. Random
    streams stay those that all devices share.
    """

    if axis_name is None:
        return {name: after[name] for name in before}

    def share(name: str, old: Array, new: Array) -> Array:
        if is_key(old):
            return old
        if jnp.issubdtype(old.dtype, jnp.inexact):
            return collectives.mean(new, axis_name)
        if collectives.differs(new, axis_name):
            raise ValueError(
                f"variable {name!r} ({old.dtype}) must be the same on all devices, but "
                "the model computes it from the rows that each device has. Reduce it "
                f"over {axis_name!r} in the model, or make it floating point"
            )
        return new

    return {
        name: jax.tree.map(functools.partial(share, name), old, after[name])
        for name, old in before.items()
    }


def _update_bank(
    recipe: Recipe, state: TrainState, name: str, learned: _Learned
) -> tuple[SeedState, Bank, Any]:
    """Updates the slots of a layer that learn.

    A slot whose gradient is not finite waits a step. That is an error; so is, in a slot
    that only counts, a correction that is not finite.
    """
    seeds, bank, opt_state = state.seeds[name], state.banks[name], state.bank_opt[name]
    measured, grads, gain = (
        learned.seeds[name],
        learned.banks[name],
        learned.gains[name],
    )
    alpha, beta, _ = slot_coefficients(seeds)
    finite = _finite_slots(grads) & jnp.isfinite(gain)
    learning = beta != 0
    living = learning | (alpha != 0)

    def update() -> tuple[Bank, Any]:
        updates, new = recipe.bank_optimizer.update(
            grads, opt_state, bank, active=learning & finite, step=state.step
        )
        return optax.apply_updates(bank, updates), new

    bank, opt_state = jax.lax.cond(jnp.any(learning), update, lambda: (bank, opt_state))
    # A layer that is called several times in a step has as many errors.
    wrong = jnp.where(living & ~finite, measured.steps, 0)
    seeds = dataclasses.replace(
        seeds,
        statistics=jax.tree.map(jnp.add, seeds.statistics, measured.statistics),
        reconstruction=seeds.reconstruction + measured.reconstruction,
        steps=seeds.steps + measured.steps,
        gain=seeds.gain + gain,
        errors=saturating_add(seeds.errors, wrong),
    )
    return seeds, bank, opt_state


def _finite_slots(grads: Bank) -> Bool[Array, " K"]:
    leaves = [
        jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))
        for leaf in jax.tree.leaves(grads)
    ]
    return functools.reduce(jnp.logical_and, leaves)
