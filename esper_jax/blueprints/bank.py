"""The bank: parameters of a layer's slots."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from esper_jax.blueprints.kinds import Adapter, Blueprint, Custom, Dense

__all__ = ["Bank", "dense_masks", "hidden_width", "init_bank", "init_slots"]


@struct.dataclass
class Bank:
    """Parameters of the blueprints of one layer, float32, a slot on the leading axis.

    ``C`` is the chunk width, ``H`` the largest hidden width of the blueprints.
    """

    w1: Float[Array, "*K C H"]
    b1: Float[Array, "*K H"]
    w2: Float[Array, "*K H C"]
    b2: Float[Array, "*K C"]
    scale: Float[Array, "*K C"]
    custom: dict[str, Any]
    """A pytree for each `Custom` and each `Adapter`, by name."""


def hidden_width(blueprints: Sequence[Blueprint], width: int) -> int:
    """``H``: hidden width of the shared arrays, at least 1."""
    dense = [b.hidden(width) for b in blueprints if isinstance(b, Dense)]
    return max([1, *dense])


def _init_slot(
    key: Any,
    kind: Any,
    blueprints: Sequence[Blueprint],
    width: int,
    features: int | None,
) -> Bank:
    """Fresh parameters of one slot for the blueprint with id ``kind`` (traced).

    ``W1`` is LeCun-normal in the hidden units that the blueprint uses. All else of the
    common form is 0.
    """
    hidden = hidden_width(blueprints, width)
    used = jnp.asarray(dense_masks(blueprints, width)[0])[kind]
    w1 = jax.random.normal(key, (width, hidden), jnp.float32) / math.sqrt(width)
    return Bank(
        w1=jnp.where(used, w1, 0.0),
        b1=jnp.zeros(hidden, jnp.float32),
        w2=jnp.zeros((hidden, width), jnp.float32),
        b2=jnp.zeros(width, jnp.float32),
        scale=jnp.zeros(width, jnp.float32),
        custom={
            b.name: b.fresh(key, width, features)
            for b in blueprints
            if isinstance(b, Custom | Adapter)
        },
    )


def init_slots(
    keys: Key[Array, " K"],
    kinds: Int[Array, " K"],
    blueprints: Sequence[Blueprint],
    width: int,
    features: int | None = None,
) -> Bank:
    """Fresh parameters for ``K`` slots.

    Args:
      keys: a random key for each slot.
      kinds: the blueprint id of each slot; a run-time value.
      blueprints: the layer's blueprints, as `resolve` returns them.
      width: chunk width ``C``.
      features: width of the layer ``F``; needed where a blueprint reads or writes all
        of it.

    Returns:
      The bank.
    """
    return jax.vmap(
        lambda key, kind: _init_slot(key, kind, blueprints, width, features)
    )(keys, kinds)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def init_bank(
    key: Key[Array, ""],
    capacity: int,
    blueprints: Sequence[Blueprint],
    width: int,
    features: int | None = None,
) -> Bank:
    """A bank of ``capacity`` fresh slots, each with the first blueprint."""
    keys = jax.random.split(key, capacity)
    kinds = jnp.zeros(capacity, jnp.int32)
    return init_slots(keys, kinds, blueprints, width, features)


def dense_masks(
    blueprints: Sequence[Blueprint], width: int
) -> tuple[Bool[np.ndarray, "N H"], Bool[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
    """Which parts of the common form each blueprint uses: hidden units, biases, scale.

    All false for blueprints that are not `Dense`.
    """
    hidden = np.arange(hidden_width(blueprints, width))
    return (
        np.stack(
            [
                hidden < (b.hidden(width) if isinstance(b, Dense) else 0)
                for b in blueprints
            ]
        ),
        np.array([isinstance(b, Dense) and b.bias for b in blueprints]),
        np.array([isinstance(b, Dense) and b.scale for b in blueprints]),
    )
