"""One update of host and blueprints."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from esper_jax.blueprints import Bank
from esper_jax.groups import flat_slots, slots_of_layers
from esper_jax.growth.parts import values_of
from esper_jax.growth.state import Arrays, TrainState
from esper_jax.growth.update import BankGradients, Learned, update_banks
from esper_jax.growth.watch import StepGradients, watch
from esper_jax.lifecycle.state import (
    SeedState,
    start_tick,
)
from esper_jax.parallel import collectives
from esper_jax.train.recipe import Batch, TrainRecipe
from esper_jax.trees import is_key

__all__ = ["train_step"]


def train_step(
    recipe: TrainRecipe, state: TrainState, batch: Batch
) -> tuple[TrainState, tuple[Float[Array, ""], Any]]:
    """One update of host and blueprints; returns the state, and loss and aux.

    Args:
      recipe: holds the model, its loss and the optimizers.
      state: of the run.
      batch: ``(x, y)``, rows first; what the objective takes, if there is one.
    """
    recipe = recipe.for_slots(state.seeds)
    learned = _learn(recipe, state, batch)
    with jax.named_scope("esper/optimizer"):
        updates, opt_state = recipe.optimizer.update(
            learned.params, state.opt_state, state.params, value=learned.loss
        )
    parts, groups = recipe.parts, recipe.parts.groups
    counted = {n: _counted(s, learned.seeds[n]) for n, s in state.seeds.items()}
    seeds = parts.by_bed(state.seeds)
    grads = BankGradients(
        parts.by_bed(learned.banks),
        parts.by_bed(learned.gains),
        groups.stack({name: s.steps for name, s in learned.seeds.items()}),
    )
    new = update_banks(
        recipe,
        seeds,
        Learned(
            banks=parts.by_bed(state.banks),
            gains=groups.stack({name: s.gain for name, s in state.seeds.items()}),
            errors=groups.stack({name: s.errors for name, s in state.seeds.items()}),
            moments=flat_slots(groups.stack(state.bank_opt)),
        ),
        grads,
        step=state.step,
        value=learned.loss,
    )
    of_step = StepGradients(learned.params, grads.banks, seeds)
    gains, errors = groups.split(new.gains), groups.split(new.errors)
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        seeds={
            name: dataclasses.replace(s, gain=gains[name], errors=errors[name])
            for name, s in counted.items()
        },
        banks=parts.by_layer(new.banks),
        bank_opt=groups.split(
            {
                key: slots_of_layers(moments, len(groups.of[key].layers))
                for key, moments in new.moments.items()
            }
        ),
        rest=learned.rest,
        monitor=watch(recipe, state.monitor, of_step, learned.loss),
    )
    return state, (learned.loss, learned.aux)


def _counted(seeds: SeedState, measured: SeedState) -> SeedState:
    """A layer's seeds with what one pass measured."""
    return dataclasses.replace(
        seeds,
        statistics=jax.tree.map(jnp.add, seeds.statistics, measured.statistics),
        reconstruction=seeds.reconstruction + measured.reconstruction,
        steps=seeds.steps + measured.steps,
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
    aux: Any
    """What the loss or the objective returned beside the loss."""


def _learn(recipe: TrainRecipe, state: TrainState, batch: Batch) -> _Learned:
    """Loss and gradients of one batch."""
    parts, axis_name = recipe.parts, recipe.axis_name
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
        result = recipe.result(model, batch)
        return jnp.mean(result.loss), (values_of(model), result.aux)

    (value, (after, aux)), grads = jax.value_and_grad(
        objective, argnums=(0, 1, 2), has_aux=True
    )(*trained)
    value, (params, banks, gains) = collectives.mean((value, grads), axis_name)
    return _Learned(
        loss=value,
        params=params,
        banks=banks,
        gains=gains,
        seeds=parts.take(after, "seeds"),
        rest=_shared(state.rest, _unchanged(state.rest, after), axis_name),
        aux=collectives.whole_batch(aux, recipe.rows(batch), axis_name),
    )


def _unchanged(before: Arrays, after: Arrays) -> Arrays:
    """The other variables after a step, which must have the shapes they had.

    What the model created in the call, as `nnx.Module.sow` does, is left out.

    Raises:
      ValueError: if one has another shape, which would compile each step anew.
    """
    for name, old in before.items():
        old, new = (jax.tree.map(jnp.shape, x) for x in (old, after[name]))
        if old != new:
            raise ValueError(
                f"variable {name!r} must keep its shape in a call of the model; it had "
                f"{old} and has {new}. If it is sown, take it out of the model with "
                "nnx.pop before build, or sow nnx.Intermediate"
            )
    return {name: after[name] for name in before}


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
        return after

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
