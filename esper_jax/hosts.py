"""Host models for the command line: ordinary networks whose layers can grow."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from esper_jax.blueprints import ACTIVATIONS
from esper_jax.layers import ChunkedLayer

__all__ = ["MLP"]


class MLP(nnx.Module):
    """A multilayer perceptron; each hidden layer, its activation included, can grow.

    Args:
      inputs: width of the input.
      hidden: width of each hidden layer.
      outputs: width of the output.
      num_seeds: seeds of each hidden layer.
      activation: a key of `ACTIVATIONS`.
      rngs: key ``params`` draws the parameters.
      **options: of the layers' `SeedBed`.
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        *,
        num_seeds: int,
        activation: str = "relu",
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        widths = [inputs, *hidden]
        self.layers = nnx.List(
            [
                ChunkedLayer(
                    _Activated(a, b, ACTIVATIONS[activation], rngs),
                    num_seeds,
                    features=b,
                    rngs=rngs,
                    **options,
                )
                for a, b in itertools.pairwise(widths)
            ]
        )
        self.readout = nnx.Linear(widths[-1], outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B N"]:
        """Logits."""
        for layer in self.layers:
            x = layer(x)
        return self.readout(x)


class _Activated(nnx.Module):
    """A linear layer and its activation, so that the seeds see what is passed on."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        activation: Callable[[Array], Array],
        rngs: nnx.Rngs,
    ) -> None:
        self.linear = nnx.Linear(inputs, outputs, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        return self.activation(self.linear(x))
