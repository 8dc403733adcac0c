"""What happened to seeds, in words."""

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from esper_jax.lifecycle.rules import Gate, LifecycleConfig, gates
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import LEGAL, Outcome, Stage
from esper_jax.policy.memory import Reason

__all__ = ["Event", "drain", "explain", "number", "why"]

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
            f"epochs_in_stage {number(epochs)} is not at least "
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
    threshold = number(gate.threshold)
    text = number(value)
    if text == threshold and np.float32(value) != np.float32(gate.threshold):
        text = str(np.float32(value))
    return f"{gate.metric} {text} {verb} {_WORDS[gate.compare]} {threshold}"


def number(value: float) -> str:
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
        (int(a), int(b)): {gate.metric: gate.field for gate in tests}
        for (a, b), (_, tests) in gates(config).items()
    }
    found = []
    for seed in np.flatnonzero(outcome != Outcome.NONE).tolist():
        before, wish = int(source[seed]), int(target[seed])
        names = {"epochs_in_stage": "epochs_in_stage", **reads.get((before, wish), {})}
        measured = {m: float(columns[field][seed]) for m, field in names.items()}
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
