"""What a step's gradients do to the layers that can grow."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, UInt

from esper_jax.blueprints import Bank, aiming, aims, collect
from esper_jax.groups import flat_slots, slots_of_layers
from esper_jax.growth.recipe import Recipe
from esper_jax.lifecycle.stages import Stage
from esper_jax.lifecycle.state import SeedState, saturating_add, slot_coefficients

__all__ = ["BankGradients", "Learned", "update_banks"]


class BankGradients(NamedTuple):
    """What one backward pass gives for the banks."""

    banks: dict[str, Bank]
    """Gradients of the banks, by bed."""
    gains: dict[str, Float[Array, "*stack K"]]
    """Gradients with respect to each slot's alpha, by bed."""
    calls: dict[str, Int[Array, " L"]]
    """How often the forward pass called each layer, by group."""


class Learned(NamedTuple):
    """What a step changes of the layers."""

    banks: dict[str, Bank]
    """By bed."""
    gains: dict[str, Float[Array, "L K"]]
    """Sums of the tick, by group."""
    errors: dict[str, UInt[Array, "L K"]]
    """Steps of the tick with gradients that were not finite, by group."""
    moments: dict[str, Any]
    """Of the optimizer, for the ``L * K`` slots of each group."""


@jax.named_scope("esper/banks")
def update_banks(
    recipe: Recipe,
    seeds: dict[str, SeedState],
    learned: Learned,
    grads: BankGradients,
    **extra: Any,
) -> Learned:
    """Updates the slots that learn, of all layers.

    A slot whose gradient is not finite waits a step. That is an error; so is, in a slot
    that only counts, a correction that is not finite. While nothing lives in any layer,
    the gradients are not read.

    Args:
      recipe: holds the bank's optimizer.
      seeds: of each bed.
      learned: before the step.
      grads: of this step.
      **extra: for the optimizer: ``step``, the run's, and ``value``, the loss.
    """
    stage = jnp.concatenate([state.stage.reshape(-1) for state in seeds.values()])
    collects = any(map(aims, recipe.parts.kinds.values()))
    first = Stage.GERMINATED if collects else Stage.TRAINING
    return jax.lax.cond(
        jnp.any((stage >= first) & (stage <= Stage.FOSSILIZED)),
        lambda: _learn(recipe, seeds, learned, grads, extra),
        lambda: learned,
    )


def _learn(
    recipe: Recipe,
    seeds: dict[str, SeedState],
    learned: Learned,
    grads: BankGradients,
    extra: dict[str, Any],
) -> Learned:
    groups, optimizer = recipe.parts.groups, recipe.bank_optimizer
    owners = groups.join({p: _owners(state) for p, state in seeds.items()})
    joined = groups.join(grads.banks), groups.join(grads.gains)
    banks, moments = groups.join(learned.banks), dict(learned.moments)
    collecting = _collecting(recipe, seeds)
    wrong = {}
    for key, (alpha, beta) in owners.items():
        bank_grads, gains = joined[0][key], joined[1][key]
        finite = _finite_slots(bank_grads) & jnp.isfinite(gains)
        learning = beta != 0
        # A layer that is called several times in a step has as many errors.
        calls = grads.calls[key][:, None]
        wrong[key] = jnp.where((learning | (alpha != 0)) & ~finite, calls, 0)

        def update(
            key: str = key, active: Array = learning & finite, grads: Bank = bank_grads
        ) -> tuple[Bank, Any]:
            old = flat_slots(banks[key])
            updates, new = optimizer.update(
                flat_slots(grads), moments[key], old, active=flat_slots(active), **extra
            )
            bank = optax.apply_updates(old, updates)
            return slots_of_layers(bank, len(active)), new

        banks[key], moments[key] = jax.lax.cond(
            jnp.any(learning), update, lambda key=key: (banks[key], moments[key])
        )
        if key in collecting:
            where, kinds = collecting[key] & finite, recipe.parts.kinds[key]
            banks[key] = collect(banks[key], bank_grads, where, kinds)
    return Learned(
        banks=groups.part(banks),
        gains={key: old + joined[1][key] for key, old in learned.gains.items()},
        errors={
            key: saturating_add(old, wrong[key]) for key, old in learned.errors.items()
        },
        moments=moments,
    )


def _collecting(
    recipe: Recipe, seeds: dict[str, SeedState]
) -> dict[str, Bool[Array, "L K"]]:
    """Slots that collect the gradient, of the groups in which there may be some."""
    joined = recipe.parts.groups.join(seeds)
    return {
        key: jax.vmap(functools.partial(aiming, blueprints=kinds))(joined[key])
        for key in joined
        if aims(kinds := recipe.parts.kinds[key])
    }


def _owners(state: SeedState) -> tuple[Float[Array, "*stack K"], ...]:
    """Alpha and beta of each slot, whatever the leading axes."""
    coefficients = slot_coefficients
    for _ in range(state.seed_of_slot.ndim - 1):
        coefficients = jax.vmap(coefficients)
    return coefficients(state)[:2]


def _finite_slots(grads: Bank) -> Bool[Array, "L K"]:
    leaves = [
        jnp.all(jnp.isfinite(leaf), axis=tuple(range(2, leaf.ndim)))
        for leaf in jax.tree.leaves(grads)
    ]
    return functools.reduce(jnp.logical_and, leaves)
