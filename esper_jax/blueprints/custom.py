"""The built-in blueprints that are not of the common form: gated, or reading more.

To add one, write a function here that returns a `Custom`, and register it.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from esper_jax.blueprints.kinds import ACTIVATIONS, Custom
from esper_jax.blueprints.registry import register

__all__ = ["context", "context_glu", "glu"]


@dataclasses.dataclass(frozen=True)
class _Init:
    """Fresh parameters of one hidden layer, gated or not."""

    expansion: float
    gated: bool

    def __call__(
        self, key: Any, width: int, features: int | None = None
    ) -> dict[str, Array]:
        inputs = width if features is None else features
        hidden = max(1, round(self.expansion * width))
        keys = jax.random.split(key)
        scale = 1 / math.sqrt(inputs)
        params = {
            "w1": scale * jax.random.normal(keys[0], (inputs, hidden), jnp.float32),
            "b1": jnp.zeros(hidden, jnp.float32),
            "w2": jnp.zeros((hidden, width), jnp.float32),
            "b2": jnp.zeros(width, jnp.float32),
        }
        if self.gated:
            gate = jax.random.normal(keys[1], (inputs, hidden), jnp.float32)
            params |= {"v": scale * gate, "c": jnp.zeros(hidden, jnp.float32)}
        return params


@dataclasses.dataclass(frozen=True)
class _Apply:
    """The correction of one hidden layer, gated or not."""

    activation: str
    gated: bool

    def __call__(self, params: dict[str, Array], y: Array) -> Array:
        hidden = ACTIVATIONS[self.activation](_linear(y, params["w1"], params["b1"]))
        if self.gated:
            hidden = hidden * _linear(y, params["v"], params["c"])
        return _linear(hidden, params["w2"], params["b2"])


def _linear(x: Array, weight: Array, bias: Array) -> Array:
    y = x @ weight
    return y + jnp.broadcast_to(bias, y.shape)


def _hidden_layer(
    name: str,
    expansion: float,
    activation: str,
    gated: bool,
    reads: Literal["chunk", "layer"],
) -> Custom:
    """One hidden layer. Equal arguments give an equal blueprint, which pickles."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}"
        )
    if not (math.isfinite(expansion) and expansion > 0):
        raise ValueError(f"expansion must be a finite number above 0, got {expansion}")
    return Custom(
        name=name,
        init=_Init(expansion, gated),
        apply=_Apply(activation, gated),
        reads=reads,
    )


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
