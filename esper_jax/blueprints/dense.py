"""The built-in form of a blueprint, and the blueprints made of it."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

__all__ = [
    "ACTIVATIONS",
    "Dense",
    "affine",
    "bottleneck",
    "low_rank",
    "noop",
    "residual_mlp",
]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "identity": lambda x: x,
}
"""Activations of the built-in blueprints; each maps 0 to 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """A built-in blueprint: which parts of the common form it uses.

    Args:
      name: its name.
      expansion: hidden width over chunk width; 0 for no hidden layer.
      activation: a key of `ACTIVATIONS`.
      bias: whether ``b1`` and ``b2`` are used.
      scale: whether ``scale`` is used.
    """

    name: str
    expansion: float = 0.0
    activation: str = "identity"
    bias: bool = False
    scale: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {sorted(ACTIVATIONS)}, "
                f"got {self.activation!r}"
            )
        if not (math.isfinite(self.expansion) and self.expansion >= 0):
            raise ValueError(
                f"expansion must be a finite number, at least 0; got {self.expansion}"
            )

    def hidden(self, width: int) -> int:
        """Hidden width over a chunk of ``width`` features."""
        return max(1, round(self.expansion * width)) if self.expansion else 0

    def param_count(
        self, width: int, widest: int | None = None, features: int | None = None
    ) -> int:
        """Number of parameters over a chunk of ``width`` features.

        The hidden layer is as wide as the layer's ``widest`` chunk asks for (default:
        ``width``), in all its chunks.
        """
        h = self.hidden(width if widest is None else widest)
        biases = (h + width) if self.bias else 0
        return 2 * h * width + biases + (width if self.scale else 0)


def residual_mlp(*, expansion: float = 2.0, activation: str = "gelu") -> Dense:
    """``W2 act(W1 y + b1) + b2`` with a hidden layer wider than the chunk."""
    return Dense(
        name="residual_mlp", expansion=expansion, activation=activation, bias=True
    )


def bottleneck(*, reduction: float = 4.0, activation: str = "gelu") -> Dense:
    """``W2 act(W1 y + b1) + b2`` with a hidden layer ``reduction`` times narrower."""
    if not reduction > 0:
        raise ValueError(f"reduction must be above 0, got {reduction}")
    return Dense(
        name="bottleneck", expansion=1 / reduction, activation=activation, bias=True
    )


def low_rank(*, reduction: float = 4.0) -> Dense:
    """``U V y`` of rank ``C / reduction``, at least 1 (LoRA, arXiv:2106.09685)."""
    if not reduction > 0:
        raise ValueError(f"reduction must be above 0, got {reduction}")
    return Dense(name="low_rank", expansion=1 / reduction)


def affine() -> Dense:
    """``scale * y + b2``, feature by feature."""
    return Dense(name="affine", bias=True, scale=True)


def noop() -> Dense:
    """Nothing: a control that costs a slot and changes nothing."""
    return Dense(name="noop")
