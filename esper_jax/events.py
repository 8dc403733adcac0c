"""What happened to seeds, in words, and how each of them stands.

For people: everything here runs on the host, on values that have left the device.
"""

import dataclasses
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from esper_jax.controller import Reason
from esper_jax.grafting import Strategy
from esper_jax.lifecycle import Gate, LifecycleConfig, gates
from esper_jax.signals import Signals
from esper_jax.stages import LEGAL, LIVING, Outcome, Stage
from esper_jax.state import SeedState, coefficients, transitions

__all__ = ["Event", "SeedView", "SeedViews", "drain", "explain", "why"]

_WORDS = {
    operator.le: "at most",
    operator.lt: "below",
    operator.ge: "at least",
    operator.gt: "above",
}


_REASONS = {
    Reason.GERMINATED: "a seed germinates",
    Reason.DISABLED: "nothing germinates: the controller is not enabled",
    Reason.TARGET_MET: "nothing germinates: the target accuracy is met",
    Reason.NOT_YET: "nothing germinates: it is not time yet",
    Reason.BUSY: "nothing germinates: max_training seeds wait or train",
    Reason.EMBARGOED: "nothing germinates: every chunk lives or is under an embargo",
    Reason.FULL: "nothing germinates: a seed lives in every chunk",
    Reason.NO_SLOT: "nothing germinates: no dormant chunk's layer has a free slot",
    Reason.UNMEASURED: "nothing germinates: what places are chosen by is not measured",
    Reason.BUDGET_SPENT: "nothing germinates: the budget of parameters is spent",
}


def why(reason: int) -> str:
    """A `Reason` of the controller, in words."""
    return _REASONS[Reason(int(reason))]


def explain(
    seed: int,
    source: int,
    target: int,
    outcome: int,
    measured: Mapping[str, float],
    config: LifecycleConfig,
) -> str:
    """Which rule decided about a request, and with which numbers.

    Args:
      seed: number of the seed.
      source: `Stage` that it was in.
      target: `Stage` that was requested, or the code of none.
      outcome: the `Outcome` of the request.
      measured: what the rules read: signals by name, ``epochs_in_stage`` and
        ``error_count``. What is not in it was not measured.
      config: the minima and thresholds that were in force.

    Returns:
      One line, such as ``seed 17 stays in EVALUATING: performance_delta -0.003 is not
      above 0``.
    """
    source = Stage(source)
    outcome = Outcome(outcome)
    if outcome == Outcome.NONE:
        return f"seed {seed} stays in {source.name}: nothing was requested"
    if outcome == Outcome.OK:
        passed = [
            _verdict(g, measured) for g in _deciding(source, target, measured, config)
        ]
        why = f" ({', '.join(passed)})" if passed else ""
        return f"seed {seed}: {source.name} -> {Stage(target).name}{why}"
    if outcome == Outcome.ILLEGAL:
        reason = _illegal(source, target)
    elif outcome == Outcome.TOO_EARLY:
        epochs = measured.get("epochs_in_stage", np.nan)
        reason = (
            f"epochs_in_stage {_number(epochs)} is not at least "
            f"{config.min_epochs[source]}"
        )
    elif outcome == Outcome.GATE:
        tests = _deciding(source, target, measured, config)
        reason = ", ".join(_verdict(gate, measured) for gate in tests)
    else:
        reason = "no slot is free"
    return f"seed {seed} stays in {source.name}: {reason}"


def _illegal(source: Stage, target: int) -> str:
    if target not in list(Stage):
        return f"there is no stage {target}"
    legal = " or ".join(stage.name for stage in LEGAL[source])
    others = f"only {legal} can" if legal else "nothing can"
    return f"{Stage(target).name} cannot follow {source.name}, {others}"


def _deciding(
    source: Stage, target: int, measured: Mapping[str, float], config: LifecycleConfig
) -> list[Gate]:
    """The gates that settled it: those that failed, or all if they passed."""
    guarded = {(int(a), int(b)): v for (a, b), v in gates(config).items()}
    rule, tests = guarded.get((int(source), int(target)), ("all", []))
    results = [_passes(gate, measured) for gate in tests]
    passed = all(results) if rule == "all" else any(results)
    return [
        gate for gate, result in zip(tests, results, strict=True) if result == passed
    ]


def _passes(gate: Gate, measured: Mapping[str, float]) -> bool:
    # As on the device, in float32.
    value = np.float32(measured.get(gate.metric, np.nan))
    return bool(gate.compare(value, np.float32(gate.threshold)))


def _verdict(gate: Gate, measured: Mapping[str, float]) -> str:
    value = measured.get(gate.metric, np.nan)
    if np.isnan(value):
        return f"{gate.metric} was not measured"
    verb = "is" if _passes(gate, measured) else "is not"
    threshold = _number(gate.threshold)
    text = _number(value)
    if text == threshold and np.float32(value) != np.float32(gate.threshold):
        text = str(np.float32(value))
    return f"{gate.metric} {text} {verb} {_WORDS[gate.compare]} {threshold}"


def _number(value: float) -> str:
    return f"{float(value):.4g}" if abs(value) < 1e4 else f"{float(value):.6g}"


@dataclasses.dataclass(frozen=True)
class Event:
    """A request and what became of it."""

    seed: int
    source: Stage
    target: int
    """The `Stage` requested; a code that is no stage stays a number."""
    outcome: Outcome
    slot: int
    """The slot that the seed owned before or owns after, -1 for none."""
    measured: dict[str, float]
    """The numbers that the rules for this transition read; NaN was not measured."""
    text: str
    """`explain`'s words."""

    def __str__(self) -> str:
        return self.text


def drain(
    *,
    source: Any,
    target: Any,
    outcome: Any,
    slot: Any,
    epochs: Any,
    errors: Any,
    signals: Signals,
    config: LifecycleConfig,
) -> list[Event]:
    """Everything that was asked of one layer's seeds in a tick, in order of the seeds.

    Args:
      source: int[S], the stage of each seed before.
      target: int[S], the stage requested, -1 for none.
      outcome: int[S], as `lifecycle.step` returned it.
      slot: int[S], the slot owned before or after.
      epochs: int[S], epochs in the source stage when it was decided.
      errors: int[S], error counts when it was decided.
      signals: what the gates read, of shape (S,) or ().
      config: the minima and thresholds that were in force.

    Returns:
      One `Event` for each seed of which something was requested.
    """
    outcome = np.asarray(outcome)
    columns = {
        field.name: np.broadcast_to(getattr(signals, field.name), outcome.shape)
        for field in dataclasses.fields(signals)
    }
    columns |= {
        "epochs_in_stage": np.asarray(epochs),
        "error_count": np.asarray(errors),
    }
    reads = {
        (int(a), int(b)): [gate.metric for gate in tests]
        for (a, b), (_, tests) in gates(config).items()
    }
    found = []
    for seed in np.flatnonzero(outcome != Outcome.NONE).tolist():
        before, wish = int(source[seed]), int(target[seed])
        names = ["epochs_in_stage", *reads.get((before, wish), [])]
        measured = {name: float(columns[name][seed]) for name in names}
        found.append(
            Event(
                seed=seed,
                source=Stage(before),
                target=Stage(wish) if wish in list(Stage) else wish,
                outcome=Outcome(outcome[seed]),
                slot=int(slot[seed]),
                measured=measured,
                text=explain(seed, before, wish, outcome[seed], measured, config),
            )
        )
    return found


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
            f"alpha {_number(self.alpha)}",
            f"  health {_measured(self.health)}, worth {_measured(self.worth)}, "
            f"errors {self.errors}",
        ]
        past = [f"{a.name} -> {b.name}" for a, b in self.history]
        lines.append(f"  last transitions: {', '.join(past) or 'none'}")
        return "\n".join(lines)


def _measured(value: float) -> str:
    return "not measured" if np.isnan(value) else _number(value)


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
