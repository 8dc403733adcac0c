"""What happened to seeds, and why, in words."""

import dataclasses
import operator
import re
from collections.abc import Mapping
from typing import assert_never

import numpy as np

from esper_jax.growth.reports import By, LayerReport, SeedMoves
from esper_jax.lifecycle.rules import Gate, LifecycleConfig, gates
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import LEGAL, Outcome, Stage
from esper_jax.policy.memory import Reason

__all__ = [
    "Event",
    "drain",
    "explain",
    "folds",
    "format_number",
    "rules_that_refused",
    "why",
]

_ASKED = {
    By.POLICY: "",
    By.OUTSIDE: ", asked from outside",
    By.OVERRULING: ", asked from outside, where the policy asked for something else",
}
"""What an event says of who asked."""

_WORDS = {
    operator.le: "at most",
    operator.lt: "below",
    operator.ge: "at least",
    operator.gt: "above",
}
"""How a gate compares."""


def why(reason: int) -> str:
    """A `Reason` of the policy, in words; -1 is none."""
    if int(reason) == -1:
        return "the policy gives no reason"
    match Reason(int(reason)):
        case Reason.GERMINATED:
            return "a seed germinates"
        case Reason.DISABLED:
            return "nothing germinates: the controller is not enabled, or not heard"
        case Reason.TARGET_MET:
            return "nothing germinates: the target accuracy is met"
        case Reason.NOT_YET:
            return "nothing germinates: it is not time yet"
        case Reason.BUSY:
            return "nothing germinates: max_training seeds wait or train"
        case Reason.EMBARGOED:
            return "nothing germinates: every chunk lives or is under an embargo"
        case Reason.FULL:
            return "nothing germinates: a seed lives in every chunk"
        case Reason.NO_SLOT:
            return "nothing germinates: no dormant chunk's layer has a free slot"
        case Reason.UNMEASURED:
            return (
                "nothing germinates: what places are chosen by is not measured "
                "(where='round_robin' or 'random' needs no measurement)"
            )
        case Reason.BUDGET_SPENT:
            return "nothing germinates: the budget of parameters is spent"
        case Reason.SETTLED:
            return (
                "nothing germinates any more: what slots are free can be given back "
                "(growth.shrink(model); a run does so by itself)"
            )
        case Reason.FELL_BACK:
            return (
                "the learned policy said something that is not finite: from now on the "
                "heuristic decides"
            )
        case other:
            assert_never(other)  # the type checker finds a reason without words


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
      source: `Stage` that the seed was in.
      target: code of the `Stage` requested; may be one that no stage has.
      outcome: `Outcome` of the request.
      measured: what the rules read: signals by name, ``epochs_in_stage`` and
        ``error_count``. What is missing or NaN was not measured.
      config: the minima and thresholds in force.

    Returns:
      One line, such as ``seed 17 stays in EVALUATING: performance_delta -0.003 is not
      above 0``.
    """
    source = Stage(source)
    match Outcome(outcome):
        case Outcome.OK:
            verdicts = _verdicts(source, target, measured, config)
            passed = f" ({verdicts})" if verdicts else ""
            return f"seed {seed}: {source.name} -> {Stage(target).name}{passed}"
        case Outcome.NONE:
            reason = "nothing was requested"
        case Outcome.ILLEGAL:
            reason = _illegal(source, target)
        case Outcome.TOO_EARLY:
            epochs = format_number(measured.get("epochs_in_stage", np.nan))
            least = config.min_epochs[source]
            reason = f"epochs_in_stage {epochs} is not at least {least}"
        case Outcome.GATE:
            reason = _verdicts(source, target, measured, config)
        case Outcome.NO_CAPACITY:
            reason = "no slot is free"
        case Outcome.BATCH:
            reason = "another request of its batch was refused"
        case other:
            assert_never(other)
    return f"seed {seed} stays in {source.name}: {reason}"


_REFUSED = re.compile(
    r"(\w+) (?:was not measured|\S+ is not "
    rf"((?:{'|'.join(_WORDS.values())}) \S+?))(?:,|$)"
)
"""A gate that failed, as `_verdict` says it."""


def rules_that_refused(text: str) -> list[str]:
    """The rules by which a refusal was, read from what `explain` said of it.

    The words quote the thresholds of that time, which a run may have changed since.

    Returns:
      Such as ``stability_score at least 0.8``, or ``worth measured``.
    """
    return [
        f"{metric} {bound or 'measured'}" for metric, bound in _REFUSED.findall(text)
    ]


def _illegal(source: Stage, target: int) -> str:
    if target not in list(Stage):
        return f"there is no stage {target}"
    legal = " or ".join(stage.name for stage in LEGAL[source])
    others = f"only {legal} can" if legal else "nothing can"
    return f"{Stage(target).name} cannot follow {source.name}, {others}"


def _verdicts(
    source: Stage, target: int, measured: Mapping[str, float], config: LifecycleConfig
) -> str:
    """The gates that decided: those that failed, or those that passed if it did."""
    guarded = {(int(a), int(b)): v for (a, b), v in gates(config).items()}
    rule, tests = guarded.get((int(source), int(target)), ("all", []))
    results = [_passes(gate, measured) for gate in tests]
    passed = all(results) if rule == "all" else any(results)
    return ", ".join(
        _verdict(gate, measured)
        for gate, result in zip(tests, results, strict=True)
        if result == passed
    )


def _passes(gate: Gate, measured: Mapping[str, float]) -> bool:
    # In float32, as the device compares.
    value = np.float32(measured.get(gate.metric, np.nan))
    return bool(gate.compare(value, np.float32(gate.threshold)))


def _verdict(gate: Gate, measured: Mapping[str, float]) -> str:
    value = measured.get(gate.metric, np.nan)
    if np.isnan(value):
        return f"{gate.metric} was not measured"
    verb = "is" if _passes(gate, measured) else "is not"
    threshold = format_number(gate.threshold)
    text = format_number(value)
    if text == threshold and np.float32(value) != np.float32(gate.threshold):
        text = str(np.float32(value))  # all digits, to show that they differ
    return f"{gate.metric} {text} {verb} {_WORDS[gate.compare]} {threshold}"


def format_number(value: float) -> str:
    """Four significant digits; six from 10,000 on."""
    return f"{float(value):.4g}" if abs(value) < 1e4 else f"{float(value):.6g}"


@dataclasses.dataclass(frozen=True)
class Event:
    """A request and what became of it."""

    seed: int
    source: Stage
    target: int
    """The `Stage` requested; a plain number if no stage has that code."""
    outcome: Outcome
    slot: int
    """Slot that the seed owned before or owns after; -1 for none."""
    measured: dict[str, float]
    """What the rules for this transition read; NaN was not measured."""
    text: str
    """What `explain` says of it, and whether it was asked from outside."""
    by: By = By.POLICY
    """Who asked."""

    @property
    def plain(self) -> str:
        """What `explain` says of it, and no more."""
        return self.text.removesuffix(_ASKED[self.by])

    def __str__(self) -> str:
        return self.text


def drain(moves: SeedMoves, signals: Signals, config: LifecycleConfig) -> list[Event]:
    """What was requested of one layer's seeds in a tick, and what became of it.

    Args:
      moves: what the tick or the rollback did to the seeds.
      signals: what the gates read, of shape (S,) or ().
      config: the minima and thresholds in force.

    Returns:
      One `Event` for each seed with a request, in the order of the seeds.
    """
    outcome = np.asarray(moves.outcome)
    asked = np.flatnonzero(outcome != Outcome.NONE).tolist()
    if not asked:  # as after most ticks
        return []
    columns = {
        field.name: np.broadcast_to(getattr(signals, field.name), outcome.shape)
        for field in dataclasses.fields(signals)
    }
    columns |= {
        "epochs_in_stage": np.asarray(moves.epochs),
        "error_count": np.asarray(moves.errors),
    }
    reads = {
        (int(a), int(b)): {gate.metric: gate.field for gate in tests}
        for (a, b), (_, tests) in gates(config).items()
    }
    found, askers = [], getattr(moves, "by", None)
    for seed in asked:
        before, wish = int(moves.source[seed]), int(moves.target[seed])
        names = {"epochs_in_stage": "epochs_in_stage", **reads.get((before, wish), {})}
        measured = {m: float(columns[field][seed]) for m, field in names.items()}
        by = By.POLICY if askers is None else By(askers[seed])
        said = explain(seed, before, wish, outcome[seed], measured, config)
        found.append(
            Event(
                seed=seed,
                source=Stage(before),
                target=Stage(wish) if wish in list(Stage) else wish,
                outcome=Outcome(outcome[seed]),
                slot=int(moves.slot[seed]),
                measured=measured,
                text=said + _ASKED[by],
                by=by,
            )
        )
    return found


def folds(layer: LayerReport) -> list[Event]:
    """The fossils of a layer that became part of its weights in a tick."""
    which = () if layer.folded is None else np.flatnonzero(layer.folded).tolist()
    return [
        Event(
            seed=seed,
            source=Stage.FOSSILIZED,
            target=Stage.DORMANT,
            outcome=Outcome.OK,
            slot=int(layer.slot[seed]),
            measured={},
            text=f"seed {seed}: folded into the layer's weights, its slot is free",
        )
        for seed in which
    ]
