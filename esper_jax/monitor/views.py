"""The state of single seeds, for people."""

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from typing import SupportsIndex, overload

import jax
import numpy as np

from esper_jax.lifecycle.grafting import Strategy
from esper_jax.lifecycle.stages import LIVING, Stage
from esper_jax.lifecycle.state import SeedState, coefficients, transitions
from esper_jax.monitor.words import format_number

__all__ = ["SeedView", "SeedViews"]


@dataclasses.dataclass(frozen=True)
class SeedView:
    """The state of one seed; prints as four lines."""

    seed: int
    stage: Stage
    parent_stage: Stage
    slot: int | None
    """Slot that the seed owns, if any."""
    blueprint: str | None
    """Blueprint in its slot: its name, or its number if no names were given."""
    strategy: Strategy
    epochs: int
    alpha: float
    """How much its blueprint counts in the output, from 0 to 1."""
    health: float
    worth: float
    errors: int
    history: tuple[tuple[Stage, Stage], ...]
    """Last transitions as ``(source, target)``, newest first."""

    def __str__(self) -> str:
        place = "no slot" if self.slot is None else f"slot {self.slot}"
        lines = [
            f"seed {self.seed}: {self.stage.name} for {self.epochs} epochs, {place}",
            f"  blueprint {self.blueprint or 'none'}, strategy {self.strategy.name}, "
            f"alpha {format_number(self.alpha)}",
            f"  health {_measured(self.health)}, worth {_measured(self.worth)}, "
            f"errors {self.errors}",
        ]
        past = [f"{a.name} -> {b.name}" for a, b in self.history]
        lines.append(f"  last transitions: {', '.join(past) or 'none'}")
        return "\n".join(lines)


def _measured(value: float) -> str:
    return "not measured" if np.isnan(value) else format_number(value)


class SeedViews(Sequence[SeedView]):
    """The seeds of one layer as a sequence: ``SeedViews(state)[17]``.

    Copies the state to the host when it is made; later changes do not show.

    Args:
      state: the seeds of one layer.
      blueprints: names of the layer's blueprints, by id.

    Raises:
      ValueError: if the state holds several layers at once.
    """

    def __init__(self, state: SeedState, blueprints: Sequence[str] = ()) -> None:
        if np.ndim(state.stage) != 1:
            raise ValueError(
                "state must be of one layer, with fields of shape (S,); got a stage of "
                f"shape {np.shape(state.stage)}. Index the leading axes first"
            )
        self._state = jax.device_get(state)
        self._alpha = np.asarray(coefficients(state)[0])
        self._blueprints = tuple(blueprints)

    def __len__(self) -> int:
        return self._state.num_seeds

    @overload
    def __getitem__(self, seed: SupportsIndex) -> SeedView: ...

    @overload
    def __getitem__(self, seed: slice) -> list[SeedView]: ...

    def __getitem__(self, seed: SupportsIndex | slice) -> SeedView | list[SeedView]:
        if isinstance(seed, slice):
            return [self._view(i) for i in range(*seed.indices(len(self)))]
        index = operator.index(seed)
        if not -len(self) <= index < len(self):
            raise IndexError(
                f"there is no seed {index}; the layer has seeds 0 to {len(self) - 1}"
            )
        return self._view(index % len(self))

    def __iter__(self) -> Iterator[SeedView]:
        return (self._view(seed) for seed in range(len(self)))

    def _view(self, seed: int) -> SeedView:
        state = self._state
        slot = int(state.slot_of_seed[seed])
        return SeedView(
            seed=seed,
            stage=Stage(state.stage[seed]),
            parent_stage=Stage(state.parent_stage[seed]),
            slot=slot if slot >= 0 else None,
            blueprint=self._blueprint(seed),
            strategy=Strategy(state.strategy[seed]),
            epochs=int(state.epochs_in_stage[seed]),
            alpha=float(self._alpha[seed]),
            health=float(state.health[seed]),
            worth=float(state.worth[seed]),
            errors=int(state.error_count[seed]),
            history=tuple(transitions(state, seed)),
        )

    def _blueprint(self, seed: int) -> str | None:
        if not LIVING[self._state.stage[seed]]:
            return None
        blueprint = int(self._state.blueprint[seed])
        known = 0 <= blueprint < len(self._blueprints)
        return self._blueprints[blueprint] if known else str(blueprint)
