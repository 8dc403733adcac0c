"""Fresh blueprints in the slots that changed hands."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from esper_jax import blueprints
from esper_jax.blueprints.bank import Bank
from esper_jax.chunks import ChunkLayout
from esper_jax.lifecycle.state import SeedState
from esper_jax.optim import PerSlot

__all__ = ["give_birth"]


def give_birth(
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
