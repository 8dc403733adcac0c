"""One update of host and blueprints."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from esper_jax.blueprints.bank import Bank
from esper_jax.growth import gradients
from esper_jax.growth.evaluation import Batch, Loss
from esper_jax.growth.parts import ModelParts, values_of
from esper_jax.growth.state import Arrays, TrainState
from esper_jax.lifecycle.state import (
    SeedState,
    saturating_add,
    slot_coefficients,
    start_tick,
)
from esper_jax.optim import PerSlot
from esper_jax.parallel import collectives
from esper_jax.trees import is_key

__all__ = ["train_step"]


def train_step(
    parts: ModelParts,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    bank_optimizer: PerSlot,
    axis_name: str | None,
    state: TrainState,
    batch: Batch,
) -> TrainState:
    """One update of host and blueprints."""
    x, y = batch
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
        losses, _ = loss(model(x), y)
        return jnp.mean(losses), values_of(model)

    (value, after), grads = jax.value_and_grad(
        objective, argnums=(0, 1, 2), has_aux=True
    )(*trained)
    value, (grads, bank_grads, gains) = collectives.mean((value, grads), axis_name)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    seeds, banks, bank_opt = {}, {}, {}
    for name, measured in parts.take(after, "seeds").items():
        seeds[name], banks[name], bank_opt[name] = _update_bank(
            bank_optimizer,
            state.seeds[name],
            measured,
            state.banks[name],
            state.bank_opt[name],
            bank_grads[name],
            gains[name],
            state.step,
        )
    sums = {
        name: gradients.add(
            state.monitor.gradients[name],
            parts.host_weights(grads, name),
            bank_grads[name],
            state.seeds[name],
            parts.layouts[name],
            owns=parts.has_base(name),
        )
        for name in parts.beds
    }
    monitor = dataclasses.replace(
        state.monitor,
        gradients=sums,
        train_loss=state.monitor.train_loss + value,
        grad_norm=state.monitor.grad_norm + optax.tree.norm(grads),
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
        rest=_shared(state.rest, after, axis_name),
        monitor=monitor,
    )


def _own(rest: Arrays, axis_name: str) -> Arrays:
    """The other variables as one device uses them: random streams of its own."""

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
    """The other variables after a step: their mean over the devices (as of batch
    statistics). The random streams stay those that all devices share."""

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
    optimizer: PerSlot,
    seeds: SeedState,
    measured: SeedState,
    bank: Bank,
    opt_state: Any,
    grads: Bank,
    gain: Float[Array, " K"],
    step: Int[Array, ""],
) -> tuple[SeedState, Bank, Any]:
    """Updates the slots that learn; one whose gradient is not finite waits a step.

    That, and a correction that is not finite in a slot that only counts, is an error.
    ``measured`` holds what this step alone measured.
    """
    alpha, beta, _ = slot_coefficients(seeds)
    finite = _finite_slots(grads) & jnp.isfinite(gain)
    learning = beta != 0
    living = learning | (alpha != 0)

    def update() -> tuple[Bank, Any]:
        updates, new = optimizer.update(
            grads, opt_state, bank, active=learning & finite, step=step
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
