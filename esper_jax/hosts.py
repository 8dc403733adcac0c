"""Host models for the command line and the benchmarks: networks that can grow."""

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
    """A multilayer perceptron. Each hidden layer can grow.

    Seeds see a layer's output after its activation.

    Args:
      inputs: width of the input.
      hidden: width of each hidden layer.
      outputs: width of the output.
      activation: a key of `ACTIVATIONS`.
      rngs: key ``params`` draws the parameters.
      **options: of each `ChunkedLayer`; ``num_seeds`` must be among them.
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        *,
        activation: str = "relu",
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        widths = [inputs, *hidden]
        act = ACTIVATIONS[activation]
        self.layers = nnx.List(
            [
                ChunkedLayer(
                    _Activated(nnx.Linear(a, b, rngs=rngs), act),
                    features=b,
                    inputs=a,
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
    """A convolutional network over one axis. Each layer can grow.

    Seeds see a layer's output after its activation and do the same at every position.
    The network ends with a mean over the positions and a linear readout.

    Args:
      channels: of each layer.
      outputs: width of the output.
      kernel: how many samples a layer sees at once.
      strides: of each layer; 1 by default.
      activation: a key of `ACTIVATIONS`.
      rngs: key ``params`` draws the parameters.
      **options: of each `ChunkedLayer`; ``num_seeds``, the chunks of the channels, must
        be among them.

    Raises:
      ValueError: if ``strides`` does not hold one stride for each layer.
    """

    def __init__(
        self,
        channels: Sequence[int],
        outputs: int,
        *,
        kernel: int = 5,
        strides: Sequence[int] | None = None,
        activation: str = "relu",
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        widths = [1, *channels]
        steps = [1] * len(channels) if strides is None else strides
        if len(steps) != len(channels):
            raise ValueError(
                f"strides must hold one stride for each of the {len(channels)} layers, "
                f"got {strides}"
            )
        act = ACTIVATIONS[activation]
        self.layers = nnx.List(
            [
                ChunkedLayer(
                    _Activated(_Conv(a, b, kernel, step, rngs), act),
                    features=b,
                    rngs=rngs,
                    **options,
                )
                for (a, b), step in zip(itertools.pairwise(widths), steps, strict=True)
            ]
        )
        self.readout = nnx.Linear(widths[-1], outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B N"]:
        """Logits for signals of ``D`` samples."""
        x = x[..., None]
        for layer in self.layers:
            x = layer(x)
        return self.readout(jnp.mean(x, axis=-2))


class CharMLP(nnx.Module):
    """An `MLP` over embedded characters (Bengio et al., JMLR 3, 2003).

    Args:
      characters: size of the alphabet.
      window: how many characters the model reads.
      embedding: width of a character's embedding.
      hidden: width of each hidden layer.
      rngs: key ``params`` draws the parameters.
      **options: of the `MLP`, ``num_seeds`` among them.
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
    """A zero-padded convolution over one axis, computed as one matrix product.

    Under `jax.vmap` over models this stays a matrix product; `nnx.Conv` would become a
    convolution with one group per model.
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
    """A layer with its activation, so that seeds see what the next layer reads."""

    def __init__(
        self, linear: nnx.Module, activation: Callable[[Array], Array]
    ) -> None:
        self.linear = linear
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        return self.activation(self.linear(x))
