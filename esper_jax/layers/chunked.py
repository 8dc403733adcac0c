"""`ChunkedLayer`: a Flax NNX module that lets any layer grow."""

import numbers
from collections.abc import Callable
from typing import Any

from flax import nnx

from esper_jax.layers.bed import SeedBed

__all__ = ["ChunkedLayer"]


class ChunkedLayer(nnx.Module):
    """A layer that can grow.

    While all seeds are dormant or in TRAINING, output and gradients are bit-identical
    to the base layer's.

    Args:
      base: any callable module whose output has its features on the last axis. You can
        read and set its attributes through the layer: ``layer.kernel = ...`` sets the
        kernel of the base, also in a subclass. The layer's own attributes are ``base``,
        ``bed`` and ``enabled``.
      num_seeds: number of chunks that the features are cut into, one seed each.
      features: width of the output; by default read from the base layer
        (``out_features``, ``features`` or ``num_features``).
      enabled: if False, a call runs the base layer alone.
      rngs: its key ``params`` draws the first bank.
      **options: further arguments of `SeedBed`.

    Raises:
      TypeError: if ``features`` is not given and the base layer does not tell it.
      ValueError: if an argument does not fit, which the message names; by a call, if
        the base layer's output has another width.
    """

    def __init__(
        self,
        base: Callable[..., Any],
        num_seeds: int,
        *,
        features: int | None = None,
        enabled: bool = True,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        if features is None:
            features = _output_features(base)
        self.base = base
        self.enabled = enabled
        self.bed = SeedBed(features, num_seeds, rngs=rngs, **options)

    def __getattr__(self, name: str) -> Any:
        # Python calls this only for attributes that the layer itself lacks.
        if name.startswith("_") or name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Writes go where reads look: an attribute that only the base has is set there.
        own = name in ("base", "bed", "enabled") or name in vars(self)
        own = own or name.startswith("_") or hasattr(type(self), name)
        base = vars(self).get("base")
        if own or base is None or not hasattr(base, name):
            super().__setattr__(name, value)
        else:
            setattr(base, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output on the same arguments, with the seeds blended in."""
        y = self.base(*args, **kwargs)
        if not self.enabled:
            return y
        features = self.bed.layout.features
        if not hasattr(y, "shape") or y.ndim < 1 or y.shape[-1] != features:
            raise ValueError(
                f"base must return an array with {features} features on its last axis; "
                f"{type(self.base).__name__} returned "
                f"{getattr(y, 'shape', type(y).__name__)}. Pass the true width "
                "as features= to ChunkedLayer"
            )
        return self.bed(y)


def _output_features(base: Any) -> int:
    for name in ("out_features", "features", "num_features"):
        value = getattr(base, name, None)
        if isinstance(value, tuple) and value:
            value = value[-1]
        if isinstance(value, numbers.Integral):
            return int(value)
    raise TypeError(
        f"features must be given: {type(base).__name__} has none of out_features, "
        "features, num_features that tells the width of its output"
    )
