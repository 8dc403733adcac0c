"""A tick: what was measured becomes signals, a decision, and new seeds.

Held-out metrics, counterfactuals, signals, `controller.decide`, `lifecycle` and the
birth of new blueprints, for all layers, as one pure function.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from esper_jax import blueprints, collectives, controller, gradients, lifecycle
from esper_jax.blueprints import Bank
from esper_jax.chunks import ChunkLayout
from esper_jax.controller import ControllerConfig, Decide
from esper_jax.functional import Arrays, ModelParts, Monitor, TrainState
from esper_jax.lifecycle import LifecycleConfig
from esper_jax.optim import PerSlot
from esper_jax.signals import Signals, health
from esper_jax.stages import Stage
from esper_jax.state import (
    SeedState,
    coefficients,
    saturating_add,
    slot_coefficients,
    start_tick,
)

__all__ = ["AT_ONCE", "LayerReport", "TickReport", "evaluate", "tick"]

Batch = tuple[Any, Any]
Loss = Callable[[Any, Any], tuple[Array, Array]]

AT_ONCE = 4
"""Counterfactuals that are evaluated side by side, which bounds their memory."""

_DECAY = 0.9
"""Of the running means and variances of held-out metrics, per tick."""


@struct.dataclass
class LayerReport:
    """What a tick did to the seeds of one layer, each field one entry a seed."""

    outcome: Int[Array, " S"]
    source: Int[Array, " S"]
    target: Int[Array, " S"]
    """The stage requested, -1 for none."""
    slot: Int[Array, " S"]
    """The slot owned before or after."""
    stage: Int[Array, " S"]
    """The stage after the tick."""
    alpha: Float[Array, " S"]
    epochs: Int[Array, " S"]
    """Epochs in the source stage."""
    errors: Int[Array, " S"]
    signals: Signals


@struct.dataclass
class TickReport:
    """What a tick measured and did; leaves the device once a tick."""

    tick: Int[Array, ""]
    step: Int[Array, ""]
    train_loss: Float[Array, ""]
    loss: Float[Array, ""]
    """On the held-out data that the gates read."""
    accuracy: Float[Array, ""]
    reason: Int[Array, ""]
    """Why the controller germinated something, or did not: `Reason`."""
    replicas_agree: Bool[Array, ""]
    """False if devices were found to have different states; only looked for in debug
    mode."""
    layers: dict[str, LayerReport]


def evaluate(
    parts: ModelParts,
    loss: Loss,
    eval_batch: int,
    axis_name: str | None,
    values: Arrays,
    data: Batch,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean loss and score over all rows, ``eval_batch`` at a time.

    With an ``axis_name``, each device has an equal part of the rows.
    """
    rows = jax.tree.leaves(data)[0].shape[0]
    size = min(eval_batch, rows)
    batches = -(-rows // size)
    missing = batches * size - rows
    weights = (jnp.arange(batches * size) < rows).astype(jnp.float32)

    def filled(a: Array) -> Array:
        """With the first rows again at the end, which then do not count."""
        return jnp.concatenate([a, a[:missing]]) if missing else a

    def batched(a: Array) -> Array:
        """Each batch has rows from everywhere, so that every device has a part of it
        where the rows are divided among several."""
        return jnp.swapaxes(a.reshape(size, batches, *a.shape[1:]), 0, 1)

    def one(part: tuple[Batch, Array]) -> tuple[Array, Array]:
        (x, y), weight = part
        losses, scores = loss(parts.merge(values, train=False)(x), y)
        return jnp.sum(losses * weight), jnp.sum(scores * weight)

    data = jax.tree.map(lambda a: filled(jnp.asarray(a)), data)
    if batches == 1:
        total = one((data, weights))
    else:
        sums = jax.lax.map(one, jax.tree.map(batched, (data, weights)))
        total = jax.tree.map(jnp.sum, sums)
    return collectives.mean((total[0] / rows, total[1] / rows), axis_name)


def _counterfactuals(
    parts: ModelParts,
    evaluate: Callable[..., tuple[Array, Array]],
    state: TrainState,
    gates: LifecycleConfig,
    held_out: Batch,
    base_loss: Array,
    at_once: int,
    allowed: Array,
) -> dict[str, Float[Array, " K"]]:
    """Worth of the seed in each slot: the held-out loss with its alpha at 0, less the
    loss as it is. NaN for a slot whose alpha is 0, with nothing to take away, for a
    fossil, about which nothing is left to decide, and for a seed in FINE_TUNING about
    which nothing is to be decided soon.

    The losses without each of the seeds are vmapped, ``at_once`` of them at a time; the
    cost follows the number of seeds on probation, and is none where there is none.
    """
    alphas = {name: slot_coefficients(s)[0] for name, s in state.seeds.items()}
    flat = jnp.concatenate(list(alphas.values()))
    on_probation = jnp.concatenate(
        [_on_probation(s, gates) for s in state.seeds.values()]
    )
    ends = np.cumsum([a.size for a in alphas.values()])[:-1]
    asked = on_probation & (flat != 0) & allowed
    size = min(at_once, flat.size)
    # Those that are asked for come first; the last group is filled up with others.
    order = jnp.argsort(~asked, stable=True)
    order = jnp.pad(order, (0, -flat.size % size), constant_values=flat.size)
    groups = -(-jnp.sum(asked) // size)

    def without(slot: Array) -> Array:
        probe = jnp.where(jnp.arange(flat.size) == slot, -flat, 0.0)
        probes = dict(zip(alphas, jnp.split(probe, ends), strict=True))
        return evaluate(parts.values(state, probes), held_out)[0] - base_loss

    def group(i: Array, worth: Array) -> Array:
        slots = jax.lax.dynamic_slice_in_dim(order, i * size, size)
        losses = jax.vmap(without)(slots) if size > 1 else without(slots[0])[None]
        return worth.at[slots].set(losses, mode="drop")

    worth = jnp.full(flat.shape, jnp.nan, base_loss.dtype)
    worth = jax.lax.fori_loop(0, groups, group, worth)
    worth = jnp.where(asked, worth, jnp.nan)
    return dict(zip(alphas, jnp.split(worth, ends), strict=True))


def _on_probation(state: SeedState, gates: LifecycleConfig) -> Bool[Array, " K"]:
    """Slots whose seed is asked for its worth: not one that is kept for good, and one
    in FINE_TUNING only from the window of measurement on."""
    owner = jnp.maximum(state.seed_of_slot, 0)
    stage = state.stage[owner]
    age = state.epochs_in_stage[owner].astype(jnp.int32)
    soon = age + gates.worth_window >= gates.min_epochs[Stage.FINE_TUNING]
    asked = (stage != Stage.FOSSILIZED) & ((stage != Stage.FINE_TUNING) | soon)
    return (state.seed_of_slot >= 0) & asked


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


def _measure(
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


def _parameters(state: SeedState, costs: Int[np.ndarray, "N S"]) -> Array:
    """Parameters of each living seed's blueprint, float32; NaN for any other."""
    kind = jnp.clip(state.blueprint.astype(jnp.int32), 0, len(costs) - 1)
    own = jnp.asarray(costs, jnp.float32)[kind, jnp.arange(state.num_seeds)]
    return jnp.where(state.slot_of_seed >= 0, own, jnp.nan)


def _absorb(state: SeedState, worth: Float[Array, " K"]) -> tuple[SeedState, Signals]:
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


def tick(
    parts: ModelParts,
    evaluate: Callable[..., tuple[Array, Array]],
    bank_optimizer: PerSlot,
    gates: LifecycleConfig,
    policy: ControllerConfig,
    state: TrainState,
    held_out: Batch,
    decide: Decide = controller.decide,
    compare_along: str | None = None,
    at_once: int = AT_ONCE,
) -> tuple[TrainState, TickReport]:
    """Measures, decides and carries out what was decided, for all layers.

    Along the mapped axis ``compare_along``, if given, the states are compared first.
    Counterfactuals are evaluated ``at_once`` side by side.
    """
    agree = jnp.ones((), bool)
    if compare_along is not None:
        agree = collectives.replicas_agree(state, compare_along)
    loss, accuracy = evaluate(parts.values(state), held_out)
    # Where devices differ they would not all take part in the same evaluations.
    worth = _counterfactuals(
        parts, evaluate, state, gates, held_out, loss, at_once, agree
    )
    monitor, drift, stability, grad_norm = _measure(parts, state, loss, accuracy)

    costs = {
        name: blueprints.param_counts(kinds, parts.layouts[name].sizes)
        for name, kinds in parts.kinds.items()
    }
    seeds, signals = {}, {}
    for name, layer in state.seeds.items():
        sums = state.monitor.gradients[name]
        parameters = _parameters(layer, costs[name])
        ratio = gradients.gradient_ratio(sums, layer)
        layer, own = _absorb(layer, worth[name])
        signals[name] = dataclasses.replace(
            own,
            stability_score=stability,
            final_stability=stability,
            drift=jnp.asarray(drift[name], jnp.float32),
            loss_variance=monitor.loss_variance,
            accuracy_variance=monitor.accuracy_variance,
            grad_norm=grad_norm,
            held_out_loss=loss,
            held_out_accuracy=accuracy,
            gradient_ratio=ratio,
            chunk_gradient=gradients.chunk_gradient(sums, state.monitor.steps),
            parameters=parameters,
            operations=blueprints.operations(parameters),
        )
        seeds[name] = lifecycle.age(layer, signals[name], gates)

    commands, memory = decide(seeds, signals, state.memory, policy, gates, costs)
    rng, birth = jax.random.split(state.rng)
    after, banks, bank_opt, reports = {}, {}, {}, {}
    for (name, layer), key in zip(
        seeds.items(), jax.random.split(birth, len(seeds)), strict=True
    ):
        after[name], outcome = lifecycle.transition(
            layer, commands[name], signals[name], gates
        )
        banks[name], bank_opt[name] = _give_birth(
            bank_optimizer,
            key,
            layer,
            after[name],
            state.banks[name],
            state.bank_opt[name],
            parts.kinds[name],
            parts.layouts[name],
        )
        reports[name] = LayerReport(
            outcome=outcome,
            source=layer.stage,
            target=commands[name].target,
            slot=jnp.maximum(layer.slot_of_seed, after[name].slot_of_seed),
            stage=after[name].stage,
            alpha=coefficients(after[name])[0],
            epochs=layer.epochs_in_stage,
            errors=layer.error_count,
            signals=signals[name],
        )
    new = dataclasses.replace(
        state,
        ticks=state.ticks + 1,
        rng=rng,
        banks=banks,
        bank_opt=bank_opt,
        seeds=after,
        memory=memory,
        monitor=monitor,
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
        layers=reports,
    )
    return new, report


def _give_birth(
    optimizer: PerSlot,
    key: Key[Array, ""],
    before: SeedState,
    after: SeedState,
    bank: Bank,
    opt_state: Any,
    kinds: tuple[blueprints.Blueprint, ...],
    layout: ChunkLayout,
) -> tuple[Bank, Any]:
    """Fresh parameters and fresh moments in the slots that changed hands."""
    born = (after.seed_of_slot != before.seed_of_slot) & (after.seed_of_slot >= 0)

    def fill() -> tuple[Bank, Any]:
        keys = jax.random.split(key, born.size)
        owner = jnp.maximum(after.seed_of_slot, 0)
        kind = after.blueprint[owner].astype(jnp.int32)
        fresh = blueprints.init_slots(keys, kind, kinds, layout.width, layout.features)

        def put(new: Array, old: Array) -> Array:
            where = born.reshape(born.shape + (1,) * (old.ndim - 1))
            return jnp.where(where, new.astype(old.dtype), old)

        filled = jax.tree.map(put, fresh, bank)
        return filled, optimizer.reset(opt_state, filled, born)

    return jax.lax.cond(jnp.any(born), fill, lambda: (bank, opt_state))
