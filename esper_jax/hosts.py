"""Host models for the command line: ordinary networks whose layers can grow."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from esper_jax.blueprints import ACTIVATIONS
from esper_jax.layers.chunked import ChunkedLayer

__all__ = ["MLP", "CharMLP", "ConvNet"]


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
                    _Activated(nnx.Linear(a, b, rngs=rngs), ACTIVATIONS[activation]),
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


class ConvNet(nnx.Module):
    """A convolutional network over one axis; each layer, its activation included, can
    grow, at every position alike.

    Ends with a mean over the positions and a linear readout.

    Args:
      channels: of each layer.
      outputs: width of the output.
      kernel: samples that a layer sees.
      strides: of each layer.
      num_seeds: seeds of each layer, over its channels.
      activation: a key of `ACTIVATIONS`.
      rngs: key ``params`` draws the parameters.
      **options: of the layers' `SeedBed`.
    """

    def __init__(
        self,
        channels: Sequence[int],
        outputs: int,
        *,
        num_seeds: int,
        kernel: int = 5,
        strides: Sequence[int] | None = None,
        activation: str = "relu",
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        widths = [1, *channels]
        steps = [1] * len(channels) if strides is None else strides
        self.layers = nnx.List(
            [
                ChunkedLayer(
                    _Activated(
                        _Conv(a, b, kernel, step, rngs),
                        ACTIVATIONS[activation],
                    ),
                    num_seeds,
                    features=b,
                    rngs=rngs,
                    **options,
                )
                for (a, b), step in zip(itertools.pairwise(widths), steps, strict=True)
            ]
        )
        self.readout = nnx.Linear(widths[-1], outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B N"]:
        """Logits of signals of ``D`` samples."""
        x = x[..., None]
        for layer in self.layers:
            x = layer(x)
        return self.readout(jnp.mean(x, axis=-2))


class CharMLP(nnx.Module):
    """An `MLP` over embedded characters (Bengio et al., JMLR 3, 2003).

    Args:
      characters: how many there are.
      window: characters that it reads.
      embedding: width of each one's embedding.
      hidden: width of each hidden layer.
      rngs: key ``params`` draws the parameters.
      **options: of the `MLP`.
    """

    def __init__(
        self,
        characters: int,
        window: int,
        embedding: int,
        hidden: Sequence[int],
        *,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        self.embed = nnx.Embed(characters, embedding, rngs=rngs)
        self.mlp = MLP(window * embedding, hidden, characters, rngs=rngs, **options)

    def __call__(self, x: Int[Array, "B T"]) -> Float[Array, "B N"]:
        """Logits of the next character."""
        embedded = self.embed(x)
        return self.mlp(embedded.reshape(*x.shape[:-1], -1))


class _Conv(nnx.Module):
    """A convolution over one axis, zero-padded, as one matrix product.

    So that it stays a matrix product under `jax.vmap` over models, where the built-in
    one becomes a convolution with as many groups as there are models.
    """

    def __init__(
        self, inputs: int, outputs: int, size: int, stride: int, rngs: nnx.Rngs
    ) -> None:
        self.linear = nnx.Linear(size * inputs, outputs, rngs=rngs)
        self.size = size
        self.stride = stride

    def __call__(self, x: Float[Array, "B L I"]) -> Float[Array, "B M O"]:
        length = x.shape[-2]
        before = (self.size - 1) // 2
        padded = jnp.pad(x, ((0, 0), (before, self.size - 1 - before), (0, 0)))
        seen = [padded[:, i : i + length : self.stride] for i in range(self.size)]
        return self.linear(jnp.concatenate(seen, axis=-1))


class _Activated(nnx.Module):
    """A layer and its activation, so that the seeds see what is passed on."""

    def __init__(
        self, linear: nnx.Module, activation: Callable[[Array], Array]
    ) -> None:
        self.linear = linear
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        return self.activation(self.linear(x))
