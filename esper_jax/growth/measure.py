"""What was summed over a tick becomes signals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from esper_jax.growth.parts import ModelParts
from esper_jax.growth.state import Monitor, TrainState
from esper_jax.lifecycle.signals import Signals, health
from esper_jax.lifecycle.state import SeedState, saturating_add, start_tick

__all__ = ["absorb", "measure", "parameters"]

_DECAY = 0.9
"""Of the running means and variances of held-out metrics, per tick."""


def _running(mean: Array, variance: Array, value: Array) -> tuple[Array, Array]:
    """Exponential running mean and variance; NaN means that there is none yet.

    A value that is not finite leaves them as they were.
    """
    first, measured = jnp.isnan(mean), jnp.isfinite(value)
    change = value - mean
    new_mean = jnp.where(first, value, mean + (1 - _DECAY) * change)
    new_variance = jnp.where(first, 0.0, _DECAY * (variance + (1 - _DECAY) * change**2))
    return (
        jnp.where(measured, new_mean, mean),
        jnp.where(measured, new_variance, variance),
    )


def measure(
    parts: ModelParts, state: TrainState, loss: Array, accuracy: Array
) -> tuple[Monitor, dict[str, Float[Array, ""]], Float[Array, ""], Float[Array, ""]]:
    """The new monitor, the drift of each layer's host weights, stability, grad norm."""
    old = state.monitor
    loss_mean, loss_variance = _running(old.loss_mean, old.loss_variance, loss)
    accuracy_mean, accuracy_variance = _running(
        old.accuracy_mean, old.accuracy_variance, accuracy
    )
    initial = jnp.where(jnp.isfinite(old.initial_loss), old.initial_loss, loss)
    drift, host_mean = {}, {}
    for name, mean in old.host_mean.items():
        weights = parts.host_weights(state.params, name)
        away = optax.tree.norm(jax.tree.map(jnp.subtract, weights, mean))
        scale = optax.tree.norm(mean)
        drift[name] = jnp.asarray(away / jnp.where(scale > 0, scale, jnp.nan))
        host_mean[name] = jax.tree.map(
            lambda m, w: _DECAY * m + (1 - _DECAY) * w, mean, weights
        )
    stability = 1.0 - jnp.sqrt(loss_variance) / jnp.abs(initial)
    stability = jnp.where(jnp.isfinite(loss), stability, jnp.nan)
    grad_norm = old.grad_norm / jnp.where(old.steps > 0, old.steps, jnp.nan)
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
    return monitor, drift, stability, grad_norm


def _by_seed(state: SeedState, per_slot: Float[Array, " K"]) -> Float[Array, " S"]:
    """A per-slot measurement seen from the seeds; NaN for a seed without a slot."""
    slot = state.slot_of_seed
    return jnp.where(slot >= 0, per_slot[jnp.maximum(slot, 0)], jnp.nan)


def parameters(state: SeedState, costs: Int[np.ndarray, "N S"]) -> Array:
    """Parameters of each living seed's blueprint, float32; NaN for any other."""
    kind = jnp.clip(state.blueprint.astype(jnp.int32), 0, len(costs) - 1)
    own = jnp.asarray(costs, jnp.float32)[kind, jnp.arange(state.num_seeds)]
    return jnp.where(state.slot_of_seed >= 0, own, jnp.nan)


def absorb(state: SeedState, worth: Float[Array, " K"]) -> tuple[SeedState, Signals]:
    """Turns the tick's sums into health, worth and error counts, and into the seed's
    own signals. The sums are cleared."""
    steps = jnp.where(state.steps > 0, state.steps, jnp.nan).astype(jnp.float32)
    delta = _by_seed(state, worth)
    ticks = saturating_add(state.worth_ticks, ~jnp.isnan(delta))
    change = (delta - state.worth) / ticks.astype(jnp.float32)
    running = jnp.where(jnp.isnan(state.worth), delta, state.worth + change)
    mean_worth = jnp.where(jnp.isnan(delta), state.worth, running)
    errors = jnp.nan_to_num(_by_seed(state, state.errors.astype(jnp.float32)))
    score = health(state.statistics).score
    signals = Signals.unmeasured(
        reconstruction_loss=_by_seed(state, state.reconstruction / steps),
        performance_delta=delta,
        total_improvement=mean_worth,
        error_rate=errors / steps,
        gain=_by_seed(state, -state.gain / steps),
    )
    state = dataclasses.replace(
        start_tick(state),
        health=jnp.where(jnp.isnan(score), state.health, score),
        worth=mean_worth,
        worth_ticks=ticks,
        error_count=saturating_add(state.error_count, errors),
    )
    return state, signals
