"""What a step's gradients do to the layers that can grow."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from esper_jax.blueprints import Bank
from esper_jax.growth import gradients
from esper_jax.growth.parts import ModelParts
from esper_jax.growth.state import Arrays
from esper_jax.lifecycle.state import SeedState, saturating_add, slot_coefficients
from esper_jax.optim import PerSlot

__all__ = ["Layer", "LayerGradients", "add_gradients", "update_layer"]


class Layer(NamedTuple):
    """What grows in one layer."""

    seeds: SeedState
    bank: Bank
    moments: Any
    """State of the bank's optimizer."""


class LayerGradients(NamedTuple):
    """What one backward pass gives for one layer."""

    bank: Bank
    gain: Float[Array, " K"]
    """Gradient with respect to each slot's alpha."""
    calls: Int[Array, ""]
    """How often the forward pass called the layer."""


def update_layer(
    optimizer: PerSlot, layer: Layer, grads: LayerGradients, **extra: Any
) -> Layer:
    """Updates the slots of a layer that learn.

    A slot whose gradient is not finite waits a step. That is an error; so is, in a slot
    that only counts, a correction that is not finite.

    Args:
      optimizer: of the bank.
      layer: what grows in it.
      grads: of this step.
      **extra: for the optimizer: ``step``, the run's, and ``value``, the loss.
    """
    seeds, bank, moments = layer
    alpha, beta, _ = slot_coefficients(seeds)
    finite = _finite_slots(grads.bank) & jnp.isfinite(grads.gain)
    learning = beta != 0
    living = learning | (alpha != 0)

    def update() -> tuple[Bank, Any]:
        updates, new = optimizer.update(
            grads.bank, moments, bank, active=learning & finite, **extra
        )
        return optax.apply_updates(bank, updates), new

    bank, moments = jax.lax.cond(jnp.any(learning), update, lambda: (bank, moments))
    # A layer that is called several times in a step has as many errors.
    wrong = jnp.where(living & ~finite, grads.calls, 0)
    seeds = replace(
        seeds,
        gain=seeds.gain + grads.gain,
        errors=saturating_add(seeds.errors, wrong),
    )
    return Layer(seeds, bank, moments)


def add_gradients(
    parts: ModelParts,
    sums: Mapping[str, gradients.GradientSums],
    seeds: Mapping[str, SeedState],
    host: Arrays,
    banks: Mapping[str, Bank],
) -> dict[str, gradients.GradientSums]:
    """The tick's sums of gradient norms with this step's, by layer.

    Args:
      parts: the model.
      sums: so far.
      seeds: of each layer.
      host: gradients of the host's parameters, by name.
      banks: gradients of each layer's bank.
    """
    return {
        name: gradients.add(
            sums[name],
            parts.host_weights(host, name),
            banks[name],
            seeds[name],
            parts.layouts[name],
            owns=parts.has_base(name),
        )
        for name in parts.beds
    }


def _finite_slots(grads: Bank) -> Bool[Array, " K"]:
    leaves = [
        jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))
        for leaf in jax.tree.leaves(grads)
    ]
    return functools.reduce(jnp.logical_and, leaves)
