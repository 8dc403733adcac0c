"""The built-in blueprints of the common form.

To add one, write a function here that returns a `Dense`, and register it.
"""

from esper_jax.blueprints.kinds import Dense
from esper_jax.blueprints.registry import register

__all__ = ["affine", "bottleneck", "low_rank", "noop", "residual_mlp"]


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


for _make in (residual_mlp, bottleneck, low_rank, affine, noop):
    register(_make.__name__, _make)
