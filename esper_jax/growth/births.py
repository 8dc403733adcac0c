"""Fresh blueprints in the slots that changed hands."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from esper_jax.blueprints import Bank, aim, aiming, aims, collected, init_slots
from esper_jax.groups import flat_slots
from esper_jax.growth.recipe import Recipe
from esper_jax.lifecycle.state import SeedState

__all__ = ["births", "born_in", "collected_by", "starting"]


def born_in(before: SeedState, after: SeedState) -> Bool[Array, "*L K"]:
    """Slots that a newborn seed got at a tick."""
    changed = after.seed_of_slot != before.seed_of_slot
    return changed & (after.seed_of_slot >= 0)


def starting(
    recipe: Recipe, before: dict[str, SeedState], after: dict[str, SeedState]
) -> dict[str, Bool[Array, "L K"]]:
    """Slots that stop collecting the gradient at a tick, as they begin to train.

    Of the groups in which there may be some.
    """
    starts = {}
    for name in before:
        if aims(kinds := recipe.parts.kinds[name]):
            which = jax.vmap(functools.partial(aiming, blueprints=kinds))
            stays = after[name].seed_of_slot == before[name].seed_of_slot
            starts[name] = which(before[name]) & ~which(after[name]) & stays
    return starts


@jax.named_scope("esper/signals")
def collected_by(
    recipe: Recipe, seeds: dict[str, SeedState], banks: dict[str, Bank]
) -> dict[str, Float[Array, " L"]]:
    """What each layer's newborn parts have collected; NaN where there are none."""
    return {
        name: jax.vmap(functools.partial(collected, blueprints=kinds))(banks[name], of)
        if aims(kinds := recipe.parts.kinds[name])
        else jnp.full(of.stage.shape[0], jnp.nan, jnp.float32)
        for name, of in seeds.items()
    }


@jax.named_scope("esper/births")
def births(
    recipe: Recipe,
    seeds: tuple[dict[str, SeedState], dict[str, SeedState]],
    banks: dict[str, Bank],
    moments: dict[str, Any],
    key: Key[Array, ""],
) -> tuple[dict[str, Bank], dict[str, Any]]:
    """Banks and moments, fresh in the slots that changed hands.

    What begins to train in the gradient's direction gets it; its moments are 0 still.

    Args:
      recipe: holds the layers' blueprints and the bank's optimizer.
      seeds: before and after the tick's transitions, by group.
      banks: before the tick, by group.
      moments: state of the bank's optimizer for the ``L * K`` slots of each group.
      key: draws the parameters.
    """
    groups = recipe.parts.groups
    drawn = jax.random.split(key, len(groups.order))
    banks, moments = dict(banks), dict(moments)
    starts = starting(recipe, *seeds)
    for name, group in groups.of.items():
        born = born_in(seeds[0][name], seeds[1][name])
        own = drawn[np.array([groups.order.index(n) for n in group.layers])]

        def fill(name: str = name, born: Array = born, own: Array = own) -> Any:
            bank = _filled(recipe, name, seeds[1][name], banks[name], (born, own))
            reset = recipe.bank_optimizer.reset(
                moments[name], flat_slots(bank), flat_slots(born)
            )
            return bank, reset

        banks[name], moments[name] = jax.lax.cond(
            jnp.any(born), fill, lambda name=name: (banks[name], moments[name])
        )
        if name in starts:
            banks[name] = _aimed(recipe, name, seeds[1][name], banks[name], starts, own)
    return banks, moments


def _filled(
    recipe: Recipe,
    group: str,
    seeds: SeedState,
    bank: Bank,
    births: tuple[Bool[Array, "L K"], Key[Array, " L"]],
) -> Bank:
    """A group's bank with fresh blueprints where something was born."""
    born, keys = births
    layout, kinds = recipe.parts.layouts[group], recipe.parts.kinds[group]

    def fresh(key: Key[Array, ""], seeds: SeedState) -> Bank:
        slots = jax.random.split(key, seeds.capacity)
        return init_slots(slots, _kinds(seeds), kinds, layout.width, layout.features)

    def put(new: Array, old: Array) -> Array:
        where = born.reshape(born.shape + (1,) * (old.ndim - born.ndim))
        return jnp.where(where, new.astype(old.dtype), old)

    return jax.tree.map(put, jax.vmap(fresh)(keys, seeds), bank)


def _aimed(
    recipe: Recipe,
    group: str,
    seeds: SeedState,
    bank: Bank,
    starts: dict[str, Bool[Array, "L K"]],
    keys: Key[Array, " L"],
) -> Bank:
    """A group's bank with a direction where something begins to train."""
    of_layer = functools.partial(aim, blueprints=recipe.parts.kinds[group])
    return jax.lax.cond(
        jnp.any(starts[group]),
        lambda: jax.vmap(of_layer)(bank, keys, seeds, starts[group]),
        lambda: bank,
    )


def _kinds(state: SeedState) -> Int[Array, " K"]:
    owner = jnp.maximum(state.seed_of_slot, 0)
    return state.blueprint[owner].astype(jnp.int32)
