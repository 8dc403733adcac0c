"""Value and derivative of each activation, for kernels that differentiate by hand."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from esper_jax.blueprints import Blueprint, Dense

__all__ = ["ACTIVATIONS", "EXACT", "Functions", "activate", "gelu_gate"]


@dataclasses.dataclass(frozen=True)
class Functions:
    """The transcendental functions that activations are made of.

    A backend may give approximate ones that its device computes in one instruction.

    Args:
      sigmoid_of_double: ``sigmoid(2 x)``.
      tanh: ``tanh(x)``.
    """

    sigmoid_of_double: Callable[[Array], Array]
    tanh: Callable[[Array], Array]


EXACT = Functions(lambda x: jax.nn.sigmoid(2.0 * x), jnp.tanh)
"""JAX's own functions, to float32 precision."""


def gelu_gate(x: Array, square: Array) -> Array:
    """What gelu takes the tanh of; ``square`` is ``x * x``."""
    c = np.sqrt(2.0 / np.pi).astype(np.float32)
    return x * (c + (0.044715 * c) * square)


def _gelu(x: Array, f: Functions) -> tuple[Array, Array]:
    # The tanh form of jax.nn.gelu, by tanh(u) = 2 * sigmoid(2 u) - 1.
    c = np.sqrt(2.0 / np.pi).astype(np.float32)
    square = x * x
    gate = f.sigmoid_of_double(gelu_gate(x, square))
    out = x * gate
    slope = gate + (out - out * gate) * (2.0 * c + (0.26829 * c) * square)
    return out, slope


def _silu(x: Array, f: Functions) -> tuple[Array, Array]:
    gate = f.sigmoid_of_double(0.5 * x)
    out = x * gate
    return out, gate + out * (1.0 - gate)


def _tanh(x: Array, f: Functions) -> tuple[Array, Array]:
    out = f.tanh(x)
    return out, 1.0 - out * out


def _relu(x: Array, f: Functions) -> tuple[Array, Array]:
    return jnp.maximum(x, 0.0), jnp.where(x > 0.0, 1.0, 0.0)


def _identity(x: Array, f: Functions) -> tuple[Array, Array]:
    return x, jnp.ones_like(x)


ACTIVATIONS: dict[str, Callable[[Array, Functions], tuple[Array, Array]]] = {
    "gelu": _gelu,
    "relu": _relu,
    "silu": _silu,
    "tanh": _tanh,
    "identity": _identity,
}
"""Value and derivative by name, float32."""


def activate(
    blueprints: tuple[Blueprint, ...], kind: Array, x: Array, functions: Functions
) -> tuple[Array, Array]:
    """Value and derivative of the activation that a blueprint has.

    Computes all activations that the blueprints use and selects: XLA 0.11 fails to
    compile a branch within a loop that it pipelines.

    Args:
      blueprints: what may grow.
      kind: index into ``blueprints``: a scalar, or one entry for each column of ``x``.
      x: what enters the activation.
      functions: what the activations are made of.
    """
    dense = [b for b in blueprints if isinstance(b, Dense)]
    used = [b.activation for b in dense if b.expansion > 0]
    # A blueprint without a hidden layer may take any: its units are 0.
    distinct = list(dict.fromkeys(used)) or ["identity"]
    if len(distinct) == 1:
        return ACTIVATIONS[distinct[0]](x, functions)
    index = jnp.full_like(kind, 0)
    for i, b in enumerate(dense):
        if b.activation in distinct:
            index = jnp.where(kind == i, distinct.index(b.activation), index)
    out = ACTIVATIONS[distinct[0]](x, functions)
    for i, name in enumerate(distinct[1:], start=1):
        other = ACTIVATIONS[name](x, functions)
        chosen = jnp.broadcast_to(index == i, x.shape)
        out = (
            jnp.where(chosen, other[0], out[0]),
            jnp.where(chosen, other[1], out[1]),
        )
    return out
