"""How each seed of a layer stands, for people."""

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from esper_jax.lifecycle.grafting import Strategy
from esper_jax.lifecycle.stages import LIVING, Stage
from esper_jax.lifecycle.state import SeedState, coefficients, transitions
from esper_jax.monitor.words import number

__all__ = ["SeedView", "SeedViews"]


@dataclasses.dataclass(frozen=True)
class SeedView:
    """How one seed stands; prints as a few lines."""

    seed: int
    stage: Stage
    parent_stage: Stage
    slot: int | None
    """The slot that it owns."""
    blueprint: str | None
    """What grows in its slot, by name, or by number where no names were given."""
    strategy: Strategy
    epochs: int
    alpha: float
    """How much its blueprint counts in the output."""
    health: float
    worth: float
    errors: int
    history: tuple[tuple[Stage, Stage], ...]
    """The last transitions as ``(source, target)``, newest first."""

    def __str__(self) -> str:
        place = "no slot" if self.slot is None else f"slot {self.slot}"
        lines = [
            f"seed {self.seed}: {self.stage.name} for {self.epochs} epochs, {place}",
            f"  blueprint {self.blueprint or 'none'}, strategy {self.strategy.name}, "
            f"alpha {number(self.alpha)}",
            f"  health {_measured(self.health)}, worth {_measured(self.worth)}, "
            f"errors {self.errors}",
        ]
        past = [f"{a.name} -> {b.name}" for a, b in self.history]
        lines.append(f"  last transitions: {', '.join(past) or 'none'}")
        return "\n".join(lines)


def _measured(value: float) -> str:
    return "not measured" if np.isnan(value) else number(value)


class SeedViews(Sequence[SeedView]):
    """The seeds of one layer one by one: ``SeedViews(state)[17]``.

    Copies the state to the host once, when it is made, and shows that moment.

    Args:
      state: the seeds of one layer.
      blueprints: names of the layer's blueprints, by id.

    Raises:
      ValueError: if the state is of several layers at once.
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

    def __getitem__(self, seed: Any) -> Any:
        if isinstance(seed, slice):
            return [self[i] for i in range(*seed.indices(len(self)))]
        number = operator.index(seed)
        if not -len(self) <= number < len(self):
            raise IndexError(
                f"there is no seed {number}; the layer has seeds 0 to {len(self) - 1}"
            )
        return self._view(number % len(self))

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
            blueprint=self._name(int(state.blueprint[seed]))
            if LIVING[state.stage[seed]]
            else None,
            strategy=Strategy(state.strategy[seed]),
            epochs=int(state.epochs_in_stage[seed]),
            alpha=float(self._alpha[seed]),
            health=float(state.health[seed]),
            worth=float(state.worth[seed]),
            errors=int(state.error_count[seed]),
            history=tuple(transitions(state, seed)),
        )

    def _name(self, blueprint: int) -> str:
        known = 0 <= blueprint < len(self._blueprints)
        return self._blueprints[blueprint] if known else str(blueprint)
