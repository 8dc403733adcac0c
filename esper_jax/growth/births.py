"""Fresh blueprints in the slots that changed hands."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from esper_jax.blueprints import Bank, init_slots
from esper_jax.growth.recipe import Recipe
from esper_jax.growth.state import TrainState
from esper_jax.lifecycle.state import SeedState

__all__ = ["give_birth"]


def give_birth(
    recipe: Recipe, state: TrainState, name: str, after: SeedState, key: Key[Array, ""]
) -> tuple[Bank, Any]:
    """A layer's bank and moments, fresh in the slots that changed hands.

    Args:
      recipe: holds the layer's blueprints and the bank's optimizer.
      state: before the tick.
      name: of the layer.
      after: the layer's seeds after the tick's transitions.
      key: draws the parameters.
    """
    bank, moments = state.banks[name], state.bank_opt[name]
    layout, kinds = recipe.parts.layouts[name], recipe.parts.kinds[name]
    changed = after.seed_of_slot != state.seeds[name].seed_of_slot
    born = changed & (after.seed_of_slot >= 0)

    def fill() -> tuple[Bank, Any]:
        keys = jax.random.split(key, born.size)
        owner = jnp.maximum(after.seed_of_slot, 0)
        kind = after.blueprint[owner].astype(jnp.int32)
        fresh = init_slots(keys, kind, kinds, layout.width, layout.features)

        def put(new: Array, old: Array) -> Array:
            where = born.reshape(born.shape + (1,) * (old.ndim - 1))
            return jnp.where(where, new.astype(old.dtype), old)

        filled = jax.tree.map(put, fresh, bank)
        return filled, recipe.bank_optimizer.reset(moments, filled, born)

    return jax.lax.cond(jnp.any(born), fill, lambda: (bank, moments))
