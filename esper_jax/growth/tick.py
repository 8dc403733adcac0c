"""A tick: what was measured becomes signals, a decision, and new seeds.

Held-out metrics, counterfactuals, signals, `policy.decide`, `lifecycle` and the
birth of new blueprints, for all layers, as one pure function.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from esper_jax import blueprints, lifecycle
from esper_jax import policy as policies
from esper_jax.growth import gradients
from esper_jax.growth.births import give_birth
from esper_jax.growth.evaluation import AT_ONCE, Batch, counterfactuals
from esper_jax.growth.measure import absorb, measure, parameters
from esper_jax.growth.parts import ModelParts
from esper_jax.growth.reports import LayerReport, TickReport
from esper_jax.growth.state import TrainState
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.state import coefficients
from esper_jax.optim import PerSlot
from esper_jax.parallel import collectives
from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.heuristic import Decide

__all__ = ["tick"]


def tick(
    parts: ModelParts,
    evaluate: Callable[..., tuple[Array, Array]],
    bank_optimizer: PerSlot,
    gates: LifecycleConfig,
    policy: ControllerConfig,
    state: TrainState,
    held_out: Batch,
    decide: Decide = policies.decide,
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
    worth = counterfactuals(
        parts, evaluate, state, gates, held_out, loss, at_once, agree
    )
    monitor, drift, stability, grad_norm = measure(parts, state, loss, accuracy)

    costs = {
        name: blueprints.param_counts(kinds, parts.layouts[name].sizes)
        for name, kinds in parts.kinds.items()
    }
    seeds, signals = {}, {}
    for name, layer in state.seeds.items():
        sums = state.monitor.gradients[name]
        owned = parameters(layer, costs[name])
        ratio = gradients.gradient_ratio(sums, layer)
        layer, own = absorb(layer, worth[name])
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
            parameters=owned,
            operations=blueprints.operations(owned),
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
        banks[name], bank_opt[name] = give_birth(
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
