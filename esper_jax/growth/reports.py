"""What a tick measured and did. A report leaves the device once a tick."""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt

from esper_jax.layers.shown import LayerSeeds, html_of
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import Stage
from esper_jax.lifecycle.state import SeedState
from esper_jax.markup import number, text

__all__ = [
    "By",
    "LayerReport",
    "SeedMoves",
    "TickReport",
    "moves_of",
    "seeds_in_report",
]


class By(enum.IntEnum):
    """Who asked something of a seed."""

    POLICY = 0
    """The policy, or nobody."""
    OUTSIDE = 1
    OVERRULING = 2
    """The outside, where the policy asked for something else."""


@struct.dataclass
class SeedMoves:
    """What was asked of one layer's seeds and what came of it, one entry a seed."""

    outcome: Int[Array, "*S"]
    """`Outcome` of the request."""
    source: Int[Array, "*S"]
    """The stage before."""
    target: Int[Array, "*S"]
    """The stage requested, -1 for none."""
    slot: Int[Array, "*S"]
    """The slot owned before or after, -1 for none."""
    epochs: UInt[Array, "*S"]
    """Epochs in the source stage."""
    errors: UInt[Array, "*S"]
    """Steps with gradients that were not finite, since germination."""


@struct.dataclass
class LayerReport(SeedMoves):
    """What a tick did to the seeds of one layer, one entry a seed."""

    stage: Int[Array, "*S"]
    """The stage after the tick."""
    alpha: Float[Array, "*S"]
    """How much each seed's blueprint counts after the tick."""
    blueprint: Int[Array, "*S"]
    """Id of the blueprint in the seed's slot. Only meaningful while the seed lives."""
    signals: Signals
    folded: Bool[Array, "*S"] | None = None
    """Fossils that became part of the layer's weights at this tick, whose seeds are
    dormant after it; None where none was looked for."""
    by: Int[Array, "*S"] | None = None
    """`By`: who asked. None where nothing can be asked from outside."""
    health: Float[Array, "*S"] | None = None
    """See `SeedState.health`. `tick` always reports it."""

    def with_folded(self, which: Bool[Array, "*S"]) -> Self:
        """The report where some fossils became part of the layer's weights after it.

        Args:
          which: these; their seeds are dormant.
        """
        xp = np if isinstance(self.stage, np.ndarray) else jnp
        dormant = xp.asarray(Stage.DORMANT, self.stage.dtype)
        return dataclasses.replace(
            self,
            stage=xp.where(which, dormant, self.stage),
            alpha=xp.where(which, xp.zeros_like(self.alpha), self.alpha),
            folded=which,
        )


@struct.dataclass
class TickReport:
    """What a tick measured and did."""

    tick: Int[Array, ""]
    step: Int[Array, ""]
    train_loss: Float[Array, ""]
    """Mean over the steps since the last tick; NaN if there were none."""
    loss: Float[Array, ""]
    """On the held-out data that the gates read."""
    accuracy: Float[Array, ""]
    """Score on the same data."""
    reason: Int[Array, ""]
    """`Reason` that the policy gave for germinating or not; -1 if it gave none."""
    replicas_agree: Bool[Array, ""]
    """False if devices were found to have different states. Only looked for in debug
    mode."""
    layers: dict[str, LayerReport]

    def with_folded(self, folded: Mapping[str, Bool[Array, "*S"]]) -> Self:
        """The report where fossils became part of the weights after it.

        Args:
          folded: which seeds, of some layers, as ``fold`` of `GrowthFunctions` returns
            them.

        Raises:
          ValueError: if the report has no such layer.
        """
        unknown = [name for name in folded if name not in self.layers]
        if unknown:
            raise ValueError(
                f"folded: the report has no layer {unknown[0]!r}; its layers are "
                f"{', '.join(map(repr, self.layers))}"
            )
        told = {name: self.layers[name].with_folded(f) for name, f in folded.items()}
        return dataclasses.replace(self, layers={**self.layers, **told})

    def _repr_html_(self) -> str:
        return html_of(seeds_in_report(self), _head(self))


def seeds_in_report(report: Any) -> list[LayerSeeds]:
    """The seeds of a `TickReport` by layer.

    There are none in one that is being traced, or has a leading axis of ticks.
    """
    if _is_traced(report) or np.ndim(report.tick):
        return []
    return [
        LayerSeeds(
            layer=name,
            stage=np.asarray(layer.stage),
            alpha=np.asarray(layer.alpha),
            worth=np.broadcast_to(layer.signals.worth, np.shape(layer.stage)),
            blueprint=np.asarray(layer.blueprint),
        )
        for name, layer in report.layers.items()
    ]


def _is_traced(report: Any) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(report))


def _head(report: Any) -> str:
    """Tick, losses and score as HTML."""
    if _is_traced(report):
        return "<p>a report that is being traced</p>"
    if np.ndim(report.tick):
        return f"<p>reports of {text(np.shape(report.tick))} ticks; take one</p>"
    losses = (
        ("train loss", report.train_loss),
        ("held-out loss", report.loss),
        ("accuracy", report.accuracy),
    )
    told = " · ".join(
        f"{label} {number(float(x) if np.isfinite(x) else None)}" for label, x in losses
    )
    return f"<p><b>tick {int(report.tick)}</b>, step {int(report.step)} · {told}</p>"


def moves_of(
    before: SeedState,
    after: SeedState,
    target: Int[Array, "*S"],
    outcome: Int[Array, "*S"],
) -> dict[str, Array]:
    """The fields of `SeedMoves` for a transition from ``before`` to ``after``."""
    return {
        "outcome": outcome,
        "source": before.stage,
        "target": target,
        "slot": jnp.maximum(before.slot_of_seed, after.slot_of_seed),
        "epochs": before.epochs_in_stage,
        "errors": before.error_count,
    }
