"""The state before the first step."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from esper_jax.growth.state import Arrays, GovernorMemory, TrainState
from esper_jax.growth.watch import start_monitor
from esper_jax.train.recipe import TrainRecipe

__all__ = ["initial_state"]

_CONTROLLER = 0x5EED
"""Folded into the run's key to give the policy's key.

Not 0 or 1, since folding with those equals splitting."""


def initial_state(
    recipe: TrainRecipe, initial: Arrays, rng: Key[Array, ""]
) -> TrainState:
    """The state before the first step.

    Args:
      recipe: holds the model and the optimizers.
      initial: values of the model's variables, by name.
      rng: random key of the run.
    """
    parts = recipe.parts
    # What the model has sown is no part of the state.
    values = {name: jax.tree.map(jnp.array, initial[name]) for name in parts.variables}
    banks, seeds = parts.take(values, "bank"), parts.take(values, "seeds")
    for bed in parts.beds.values():
        for variable in (*bed.variables("bank"), *bed.variables("seeds")):
            values.pop(variable, None)
    params = {name: values.pop(name) for name in parts.host_params()}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        ticks=jnp.zeros((), jnp.int32),
        rng=jnp.array(rng),
        params=params,
        opt_state=recipe.optimizer.init(params),
        banks=banks,
        bank_opt={
            layer: recipe.bank_optimizer.init(bank) for layer, bank in banks.items()
        },
        seeds=seeds,
        rest=values,
        memory=recipe.policy.init(parts.shapes(), jax.random.fold_in(rng, _CONTROLLER)),
        monitor=start_monitor(recipe, params),
        governor=GovernorMemory.start(),
    )
