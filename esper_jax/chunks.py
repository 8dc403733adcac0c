"""`ChunkLayout`: how a layer's features are cut into chunks, one per seed."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

__all__ = ["ChunkLayout"]


@dataclasses.dataclass(frozen=True)
class ChunkLayout:
    """Cuts ``features`` into ``num_seeds`` chunks, in order and without gaps.

    The first ``features mod num_seeds`` chunks are one feature wider than the others.
    Hashable, so it can be a static argument of a jitted function.

    Args:
      features: width of the layer's output, at least 1.
      num_seeds: number of chunks, from 1 to ``features``.

    Raises:
      TypeError: if an argument is not an integer.
      ValueError: if an argument is out of range.
    """

    features: int
    num_seeds: int

    def __post_init__(self) -> None:
        for name in ("features", "num_seeds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            object.__setattr__(self, name, int(value))
        if self.features < 1:
            raise ValueError(f"features must be at least 1, got {self.features}")
        if not 1 <= self.num_seeds <= self.features:
            raise ValueError(
                f"num_seeds must be from 1 to the number of features "
                f"({self.features}), since a chunk holds at least one feature; "
                f"got {self.num_seeds}"
            )

    @property
    def even(self) -> bool:
        """Whether all chunks have the same width."""
        return self.features % self.num_seeds == 0

    @property
    def width(self) -> int:
        """Width of the widest chunk, ``C``."""
        return -(-self.features // self.num_seeds)

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """Width of each chunk: int32[S]."""
        base, wider = divmod(self.features, self.num_seeds)
        return (base + (np.arange(self.num_seeds) < wider)).astype(np.int32)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """First feature of each chunk: int32[S]."""
        return (np.cumsum(self.sizes) - self.sizes).astype(np.int32)

    @functools.cached_property
    def owners(self) -> np.ndarray:
        """The seed that watches each feature: int32[F]."""
        return np.repeat(np.arange(self.num_seeds, dtype=np.int32), self.sizes)

    def columns(self, seeds: Int[Array, "*K"]) -> Int[Array, "*K C"]:
        """Feature indices of each seed's chunk.

        A seed of -1 and the last column of a narrow chunk have no feature. Their index
        is ``features``, which is out of bounds: a gather in mode ``fill`` reads 0
        there, and a scatter in mode ``drop`` writes nothing.
        """
        offset = jnp.arange(self.width, dtype=jnp.int32)
        offset = offset.reshape((1,) * seeds.ndim + (self.width,))
        seed = jnp.maximum(seeds, 0)[..., None]
        columns = jnp.asarray(self.starts)[seed] + offset
        inside = (seeds[..., None] >= 0) & (offset < jnp.asarray(self.sizes)[seed])
        return jnp.where(inside, columns, self.features)

    def gather(
        self, y: Shaped[Array, "*B F"], seeds: Int[Array, " K"]
    ) -> Shaped[Array, "*B K C"]:
        """Chunks of the given seeds, padded with 0. A seed of -1 gets zeros."""
        if self.even:
            index = jnp.where(seeds < 0, self.num_seeds, seeds)
            return self.split(y).at[..., index, :].get(mode="fill", fill_value=0)
        return y.at[..., self.columns(seeds)].get(mode="fill", fill_value=0)

    def scatter(
        self,
        y: Shaped[Array, "*B F"],
        seeds: Int[Array, " K"],
        chunks: Shaped[Array, "*B K C"],
    ) -> Shaped[Array, "*B F"]:
        """``y`` with the given seeds' chunks replaced. A seed of -1 changes nothing."""
        if self.even:
            index = jnp.where(seeds < 0, self.num_seeds, seeds)
            return self.merge(self.split(y).at[..., index, :].set(chunks, mode="drop"))
        return y.at[..., self.columns(seeds)].set(chunks, mode="drop")

    def split(self, y: Shaped[Array, "*B F"]) -> Shaped[Array, "*B S C"]:
        """All chunks. Those narrower than ``width`` are padded with 0."""
        if self.even:
            return y.reshape(*y.shape[:-1], self.num_seeds, self.width)
        return self.gather(y, jnp.arange(self.num_seeds))

    def merge(self, chunks: Shaped[Array, "*B S C"]) -> Shaped[Array, "*B F"]:
        """Inverse of `split`."""
        if self.even:
            return chunks.reshape(*chunks.shape[:-2], self.features)
        flat = chunks.reshape(*chunks.shape[:-2], self.num_seeds * self.width)
        position = self.owners * self.width + (
            np.arange(self.features) - self.starts[self.owners]
        )
        return flat[..., position]
