"""The built-in blueprints that write the whole layer.

To add one, write a function here that returns an `Adapter`, and register it.
"""

from typing import Literal

from esper_jax.blueprints.kinds import Adapter, whole_number
from esper_jax.blueprints.registry import register

__all__ = ["group", "lora", "neurons"]


def group(*, hidden: int = 8, activation: str = "gelu") -> Adapter:
    """``W2 act(W1 y + b1) + b2`` of the layer's output ``y``: an adapter beside it.

    In form the adapter of arXiv:1902.00751, with the layer's output as the residual.
    """
    return Adapter(name="group", hidden=hidden, activation=activation, bias=True)


def neurons(*, hidden: int = 8, activation: str = "gelu") -> Adapter:
    """``W2 act(W1 x + b1) + b2`` of the layer's input ``x``: further hidden units."""
    return Adapter(
        name="neurons", hidden=hidden, reads="input", activation=activation, bias=True
    )


def lora(
    *,
    rank: int = 4,
    scaling: float = 1.0,
    start: Literal["random", "gradient"] = "random",
) -> Adapter:
    """``scaling * B A x`` of the layer's input ``x`` (LoRA, arXiv:2106.09685).

    The matrices of `low_rank` act on the output of a chunk; these on the whole kernel.
    With ``start="gradient"``, `A` begins as left singular vectors of its gradient.
    """
    hidden = whole_number("rank", rank)
    return Adapter(
        name="lora", hidden=hidden, reads="input", scaling=scaling, start=start
    )


for _make in (group, neurons, lora):
    register(_make.__name__, _make)
