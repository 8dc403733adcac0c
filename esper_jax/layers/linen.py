"""`ChunkedLayer` for Flax Linen."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
from flax import nnx

from esper_jax.layers.bed import SeedBed

__all__ = ["ChunkedLayer"]


class ChunkedLayer(nn.Module):
    """A Linen layer that can grow; the counterpart of `esper_jax.layers.ChunkedLayer`.

    The base layer's parameters stay in their own collections, under ``base``. The seeds
    add three collections: ``bank`` (parameters of the blueprints; optimize it with
    `optim.per_slot`), ``seeds`` and ``probe``. Make ``seeds`` mutable to collect
    statistics. The first call fixes the width of the output.

    Attributes:
      base: any Linen layer whose output has its features on the last axis.
      num_seeds: number of chunks that the features are cut into, one seed each.
      options: further arguments of `SeedBed` by name.
      enabled: if False, a call runs the base layer alone.
    """

    base: nn.Module
    num_seeds: int
    options: Mapping[str, Any] | None = None
    enabled: bool = True

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output on the same arguments, with the seeds blended in."""
        y = self.base(*args, **kwargs)
        if not self.enabled:
            return y
        options = dict(self.options or {})
        if not self.is_initializing() and not self.is_mutable_collection("seeds"):
            options["deterministic"] = True
        bed = nnx.bridge.to_linen(
            SeedBed,
            features=y.shape[-1],
            num_seeds=self.num_seeds,
            name="bed",
            **options,
        )
        return bed(y)
