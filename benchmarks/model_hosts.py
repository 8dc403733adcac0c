"""Whole models that `benchmarks/model.py` times: a GPT, a ViT and an MLP."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

__all__ = ["GPT", "MLP", "Size", "ViT"]


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of a transformer.

    Args:
      blocks: number of blocks.
      width: of the residual stream.
      heads: of attention.
      length: tokens of a sequence, or patches of an image.
      vocabulary: number of tokens, or of classes.
      dtype: of the computation; parameters are float32.
      scanned: whether the blocks are one stack under `nnx.scan`.
    """

    blocks: int = 12
    width: int = 768
    heads: int = 12
    length: int = 512
    vocabulary: int = 50304
    dtype: str = "bfloat16"
    scanned: bool = False


class Block(nnx.Module):
    """Attention and a feed-forward network four times as wide, both residual."""

    def __init__(self, size: Size, causal: bool, rngs: nnx.Rngs) -> None:
        dtype, width = jnp.dtype(size.dtype), size.width

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, dtype=dtype, rngs=rngs)

        self.norm1 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.qkv = linear(width, 3 * width)
        self.proj = linear(width, width)
        self.norm2 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.up = linear(width, 4 * width)
        self.down = linear(4 * width, width)
        self.heads, self.causal = size.heads, causal

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        shape = (batch, length, 3, self.heads, width // self.heads)
        q, k, v = jnp.moveaxis(self.qkv(self.norm1(x)).reshape(shape), 2, 0)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(mixed.reshape(batch, length, width))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class Trunk(nnx.Module):
    """The blocks, one after the other or as a stack."""

    def __init__(self, size: Size, causal: bool, rngs: nnx.Rngs) -> None:
        self.scanned = size.scanned
        if not size.scanned:
            self.blocks = nnx.List(
                [Block(size, causal, rngs) for _ in range(size.blocks)]
            )
            return

        @nnx.split_rngs(splits=size.blocks)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(size, causal, rngs)

        self.blocks = stack(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.scanned:
            for block in self.blocks:
                x = block(x)
            return x

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x: jax.Array, block: Block) -> jax.Array:
            return block(x)

        return through(x, self.blocks)


class GPT(nnx.Module):
    """A decoder as GPT-2 small: tokens to logits, with tied embeddings."""

    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        dtype = jnp.dtype(size.dtype)
        self.tokens = nnx.Embed(size.vocabulary, size.width, dtype=dtype, rngs=rngs)
        self.places = nnx.Embed(size.length, size.width, dtype=dtype, rngs=rngs)
        self.trunk = Trunk(size, True, rngs)
        self.norm = nnx.LayerNorm(size.width, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        places = self.places(jnp.arange(tokens.shape[1]))
        return self.tokens.attend(self.norm(self.trunk(self.tokens(tokens) + places)))


class ViT(nnx.Module):
    """A vision transformer over flat patches ``(B, length, patch)``."""

    def __init__(self, size: Size, patch: int, rngs: nnx.Rngs) -> None:
        dtype = jnp.dtype(size.dtype)
        self.embed = nnx.Linear(patch, size.width, dtype=dtype, rngs=rngs)
        self.trunk = Trunk(size, False, rngs)
        self.norm = nnx.LayerNorm(size.width, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(size.width, size.vocabulary, dtype=dtype, rngs=rngs)

    def __call__(self, patches: jax.Array) -> jax.Array:
        return self.head(self.norm(self.trunk(self.embed(patches))).mean(1))


class MLP(nnx.Module):
    """Two hidden layers."""

    def __init__(self, inputs: int, width: int, classes: int, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(inputs, width, rngs=rngs)
        self.down = nnx.Linear(width, width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.down(nnx.relu(self.up(x)))))
