"""The built-in blueprints that are not of the common form: gated, or reading more.

To add one, write a function here that returns a `Custom`, and register it.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from esper_jax.blueprints.kinds import ACTIVATIONS, Custom
from esper_jax.blueprints.registry import register

__all__ = ["context", "context_glu", "glu"]


@functools.cache
def _hidden_layer(
    name: str,
    expansion: float,
    activation: str,
    gated: bool,
    reads: Literal["chunk", "layer"],
) -> Custom:
    """One hidden layer, gated or not.

    Cached, so that equal arguments give an equal blueprint, as static arguments of
    jitted functions must be.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}"
        )
    if not (math.isfinite(expansion) and expansion > 0):
        raise ValueError(f"expansion must be a finite number above 0, got {expansion}")

    def init(key: Any, width: int, features: int | None = None) -> dict[str, Array]:
        inputs = width if features is None else features
        hidden = max(1, round(expansion * width))
        keys = jax.random.split(key)
        scale = 1 / math.sqrt(inputs)
        params = {
            "w1": scale * jax.random.normal(keys[0], (inputs, hidden), jnp.float32),
            "b1": jnp.zeros(hidden, jnp.float32),
            "w2": jnp.zeros((hidden, width), jnp.float32),
            "b2": jnp.zeros(width, jnp.float32),
        }
        if gated:
            gate = jax.random.normal(keys[1], (inputs, hidden), jnp.float32)
            params |= {"v": scale * gate, "c": jnp.zeros(hidden, jnp.float32)}
        return params

    def apply(params: dict[str, Array], y: Array) -> Array:
        hidden = ACTIVATIONS[activation](y @ params["w1"] + params["b1"])
        if gated:
            hidden = hidden * (y @ params["v"] + params["c"])
        return hidden @ params["w2"] + params["b2"]

    return Custom(name=name, init=init, apply=apply, reads=reads)


def glu(*, expansion: float = 2.0, activation: str = "silu") -> Custom:
    """``W2 (act(W1 y + b1) * (V y + c)) + b2``, a gated unit (arXiv:2002.05202)."""
    return _hidden_layer("glu", expansion, activation, True, "chunk")


def context(*, expansion: float = 2.0, activation: str = "gelu") -> Custom:
    """``W2 act(W1 x + b1) + b2`` of the whole layer's output ``x``.

    Args:
      expansion: hidden width over the width of the chunk that it writes.
      activation: a key of `ACTIVATIONS`.
    """
    return _hidden_layer("context", expansion, activation, False, "layer")


def context_glu(*, expansion: float = 2.0, activation: str = "silu") -> Custom:
    """`glu` of the whole layer's output: reads all, writes its chunk."""
    return _hidden_layer("context_glu", expansion, activation, True, "layer")


for _make in (glu, context, context_glu):
    register(_make.__name__, _make)
