"""What a call of blend fixes while it is traced, and the arrays that it gets."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from esper_jax.blueprints import Adapter, Blueprint, hidden_width
from esper_jax.chunks import ChunkLayout
from esper_jax.lifecycle.stages import Incubation

__all__ = ["NEAR_ZERO", "Read", "Slots", "Static", "bound", "wide"]

NEAR_ZERO = 1e-6
"""Magnitude under which an activation counts as near zero."""


def wide(x: Array) -> Any:
    """The dtype that ``x`` is computed in: float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def bound(g: Array, y: Array, axis: tuple[int, ...]) -> Array:
    """``rms(g) / rms(y)``, 0 where ``y`` is: how hard ``"bounded"`` pulls corrections.

    A correction ``r`` learns from ``g + rms(g) / rms(y) * r``, the gradient of the loss
    and of a square that stands for what the loss would say to ``r`` if it counted. It
    comes to rest where ``r`` is as large as ``y``.

    Args:
      g: cotangents.
      y: activations, of the same shape.
      axis: what the means are over; these axes are kept.
    """
    squares = (
        jnp.sum(jnp.square(x.astype(wide(x))), axis, keepdims=True) for x in (g, y)
    )
    of_g, of_y = squares
    return jnp.where(of_y > 0, jnp.sqrt(of_g / jnp.where(of_y > 0, of_y, 1)), 0)


class Read(NamedTuple):
    """What a layer's blueprints read."""

    y: Any
    """The layer's output before anything is added to it, (N, F); None if not read."""
    x: Any
    """The layer's input: (N, D), or integer ids (N,); None if not read."""
    hook: Any = None
    """Zeros of `adapters.tap`, (N, M), which get the gradient that ``x`` would have had
    of the adapters; None if ``x`` gets it."""

    bias: Any = None
    """What ``y`` lacks, (F,); None if it has all."""

    def whole(self) -> "Read":
        """The same, with its bias added to ``y``."""
        if self.bias is None or self.y is None:
            return self
        return self._replace(y=self.y + self.bias[None, :], bias=None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """What the lifecycle says of each slot, traced.

    Args:
      alpha: how much the slot counts in the output.
      beta: how much the slot learns.
      blueprint: index of the slot's blueprint in `Static.blueprints`.
      seed_of_slot: seed that owns the slot; -1 if the slot is free.
    """

    alpha: Float[Array, " K"]
    beta: Float[Array, " K"]
    blueprint: Int[Array, " K"]
    seed_of_slot: Int[Array, " K"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static:
    """What is fixed while a call is traced. Hashable.

    Args:
      layout: how the features are cut into chunks.
      blueprints: what may grow.
      incubation: what a slot learns from while its alpha is 0.
      statistics_rows: number of rows to take statistics over, at most; all if None.
      dtype: name of the dtype of ``y``.
      biased: whether the kernels get ``y`` without its bias, and the bias apart.
      config: block sizes and the like, of the backend's own type; None until
        `Backend.prepare` has chosen them.
      interpret: whether kernels run as plain JAX, on any device, to test them.
      adapters: what writes the whole layer, each with its index in ``blueprints``, once
        it is apart (`adapters.split`). No backend computes it.
    """

    layout: ChunkLayout
    blueprints: tuple[Blueprint, ...]
    incubation: Incubation = "task"
    statistics_rows: int | None = None
    dtype: str = "float32"
    biased: bool = False
    config: Any = None
    interpret: bool = False
    adapters: tuple[tuple[int, Adapter], ...] = ()

    @property
    def adapters_alone(self) -> bool:
        """Whether all that may grow writes the whole layer: nothing for a backend."""
        return bool(self.adapters) and len(self.adapters) == len(self.blueprints)

    @property
    def width(self) -> int:
        """``C``, of the widest chunk."""
        return self.layout.width

    @property
    def hidden(self) -> int:
        """``H``, of the widest Dense blueprint."""
        return hidden_width(self.blueprints, self.layout.width)

    def sampled(self, rows: int) -> tuple[int, int]:
        """Number of rows that statistics are taken over, and the stride between them.

        Args:
          rows: rows of the batch.
        """
        if self.statistics_rows is None:
            return rows, 1
        if not self.statistics_rows:
            return 0, 1
        step = max(1, -(-rows // self.statistics_rows))
        return -(-rows // step), step

    def uses(self, field: str) -> bool:
        """Whether any blueprint has this part; all of them must be Dense."""
        return any(getattr(b, field) for b in self.blueprints)

    def of_kind(self, kind: Array, field: str) -> Any:
        """A property of the Dense blueprint with the traced index ``kind``.

        A Python constant where all blueprints agree.
        """
        values = [getattr(b, field) for b in self.blueprints]
        if field == "hidden":
            values = [hidden(self.width) for hidden in values]
        if len(set(values)) == 1:
            return values[0]
        out = jnp.full_like(kind, int(values[0]))
        for i, value in enumerate(values):
            out = jnp.where(kind == i, int(value), out)
        return out != 0 if isinstance(values[0], bool) else out
