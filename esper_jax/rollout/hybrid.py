"""`HybridLayer`: the plain and the chunked layer behind one call, chosen by a flag."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from esper_jax.layers.chunked import ChunkedLayer
from esper_jax.layers.output import Output

__all__ = ["Comparison", "HybridLayer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The plain and the chunked layer on one input.

    Args:
      difference: largest absolute difference of their outputs.
      plain_seconds: median time of a call of the plain layer.
      chunked_seconds: the same of the chunked layer.
    """

    difference: float
    plain_seconds: float
    chunked_seconds: float

    def __str__(self) -> str:
        return (
            f"largest difference {self.difference:.3g}; plain "
            f"{self.plain_seconds * 1e6:.1f} us, chunked "
            f"{self.chunked_seconds * 1e6:.1f} us, "
            f"{self.chunked_seconds / self.plain_seconds:.2f} times as long"
        )


class HybridLayer(ChunkedLayer):
    """A `ChunkedLayer` that the flag ``chunked_layers`` turns into its base, and back.

    While it is plain, a call is the base's alone, to the bit. Seeds and bank stay in
    the model's state, whose structure is the same both ways: a checkpoint of one is
    restored by the other. They neither count nor learn then, and a tick would judge
    them by that: to keep seeds that are not fossils, do not tick, or use
    `policy_under`.

    ``layer.enabled`` says which it is, and may be set. ``model.set_attributes(
    HybridLayer, enabled=False)`` sets all of a model. It is no array, so a compiled
    step compiles once for each of the two, and pays nothing else.

    Args:
      base: as for `ChunkedLayer`.
      num_seeds: as for `ChunkedLayer`.
      model_id: what the flag is asked for; None for a model without an id.
      features: as for `ChunkedLayer`.
      output: as for `ChunkedLayer`.
      rngs: as for `ChunkedLayer`.
      **options: further arguments of `SeedBed`.

    Raises:
      ImportError: if openfeature-sdk is not installed.
      FlagError: if the flag cannot be read.
      TypeError, ValueError: as by `ChunkedLayer`.
    """

    def __init__(
        self,
        base: Callable[..., Any],
        num_seeds: int,
        *,
        model_id: str | None,
        features: int | None = None,
        output: Output = None,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        super().__init__(
            base,
            num_seeds,
            features=features,
            output=output,
            enabled=_is_on(model_id),
            rngs=rngs,
            **options,
        )

    def choose(self, model_id: str | None) -> bool:
        """Asks the flag again, between steps; returns whether the layer is chunked.

        Raises:
          FlagError: if the flag cannot be read.
        """
        self.enabled = _is_on(model_id)
        return self.enabled

    def compare(self, *args: Any, repeats: int = 20, **kwargs: Any) -> Comparison:
        """Calls the layer both ways, compiled, and changes nothing of it.

        The calls take turns, so that a machine that slows down slows both. A call is
        the forward pass in the layer's present mode, up to `jax.block_until_ready`.

        Args:
          *args: of the call.
          repeats: timed calls of each, after one that compiles.
          **kwargs: of the call.

        Raises:
          ValueError: if ``repeats`` is below 1, or this is traced.
        """
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise ValueError(f"repeats must be an int of at least 1, got {repeats!r}")
        leaves = jax.tree.leaves((args, kwargs, nnx.state(self)))
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            raise ValueError(
                "compare measures time, so it must be called outside of jit and other "
                "transforms, with arrays"
            )
        calls = [_compiled(self, enabled, args, kwargs) for enabled in (False, True)]
        plain, chunked = (jax.tree.leaves(call()) for call in calls)
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats):
            for call, taken in zip(calls, times, strict=True):
                begun = time.perf_counter()
                jax.block_until_ready(call())
                taken.append(time.perf_counter() - begun)
        return Comparison(
            difference=max(map(_difference, plain, chunked), default=0.0),
            plain_seconds=statistics.median(times[0]),
            chunked_seconds=statistics.median(times[1]),
        )


def _is_on(model_id: str | None) -> bool:
    # Imported late: OpenFeature belongs to an extra.
    from esper_jax.rollout.provider import flag_for

    return flag_for("chunked_layers", model_id, True)


def _compiled(
    layer: HybridLayer, enabled: bool, args: Any, kwargs: Any
) -> Callable[[], Any]:
    """A compiled call of a copy of the layer, which returns the output.

    What the call writes into variables is computed, too, and dropped.
    """
    copy = nnx.clone(layer)
    copy.enabled = enabled
    structure, state = nnx.split(copy)

    @jax.jit
    def call(state: Any, args: Any, kwargs: Any) -> Any:
        model = nnx.merge(structure, state)
        return model(*args, **kwargs), nnx.state(model)

    return lambda: call(state, args, kwargs)[0]


def _difference(plain: Any, chunked: Any) -> float:
    """The largest absolute difference of two arrays; NaN if one alone has a NaN."""
    a, b = np.asarray(plain, np.float64), np.asarray(chunked, np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    return float(np.max(apart, initial=0.0))
