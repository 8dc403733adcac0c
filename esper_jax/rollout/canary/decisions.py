"""Whether a candidate advances, is held or is rolled back: pure functions.

`decide` takes the state of a rollout, new observations and the time, and returns the
next state and what to do. Each stage judges by its own observations, so a fault that
shows only under more load is not outweighed by a good past. In a stage

- a value of the candidate that is not finite rolls back at once;
- evidence of harm above ``1 / alpha`` rolls back, unless it is as certain that the harm
  is below the margin;
- the next stage begins when the time is over, when as much was seen that a regression
  would have been found with the wanted power, and when one that large is excluded.

At 100% no baseline is left. There the candidate is compared with values of the baseline
from the stage before, less the margin, as nothing cancels a change of all traffic, and
less what chance may have made of so few of them (Hoeffding). It is done when the time
is over and as much was seen as in the stage before.

`evidence` says why all of this may be looked at as often as one likes.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from esper_jax.rollout.canary.evidence import Evidence, needed
from esper_jax.rollout.canary.observations import ARMS, Batch
from esper_jax.rollout.canary.plan import CanaryError, Plan, in_words
from esper_jax.rollout.canary.watches import Watch, figure, odds, watched

__all__ = ["Action", "State", "begin", "decide", "from_json", "to_json"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """Where a rollout stands.

    Args:
      plan: of it.
      since: when its stage began, in seconds.
      clock: when it was last looked at.
      stage: index into the plan's percents.
      status: ``watching``, ``finished``, ``rolled back`` or ``aborted``.
      seen: observations of each arm in the stage, candidate first.
      before: observations of the candidate in the stage before.
      watches: by trigger.
    """

    plan: Plan
    since: float
    clock: float
    stage: int = 0
    status: str = "watching"
    seen: tuple[int, int] = (0, 0)
    before: int = 0
    watches: Mapping[str, Watch] = dataclasses.field(default_factory=dict)

    @property
    def percent(self) -> int:
        """Of the model ids that have the flag."""
        return self.plan.percents[self.stage]


class Action(NamedTuple):
    """What to do with the flag, and why."""

    kind: str
    """``hold``, ``advance``, ``finish`` or ``roll back``."""
    reason: str
    blind: bool = False
    """Whether a trigger has seen nothing when the stage's time was over."""


def begin(plan: Plan, now: float) -> State:
    """The state at the beginning of the first stage.

    Raises:
      CanaryError: if the time is not finite.
    """
    _check_clock(now, now)
    watches = {name: Watch() for name in plan.yardsticks}
    return State(plan=plan, since=now, clock=now, watches=watches)


def decide(state: State, batch: Batch, now: float) -> tuple[State, Action]:
    """Judges a stage by what was seen of it.

    Args:
      state: before.
      batch: the observations since then.
      now: seconds, on the clock of the state.

    Returns:
      The state after what is to be done, and that.

    Raises:
      CanaryError: if the rollout is over, or the clock ran backwards.
    """
    if state.status != "watching":
        raise CanaryError(
            f"this canary is over ({state.status}): start another in a folder of its "
            "own"
        )
    _check_clock(state.clock, now)
    state = dataclasses.replace(_seen(state, batch), clock=now)
    bad = _broken(state, batch) or _harm(state)
    if bad:
        return dataclasses.replace(state, status="rolled back"), Action(
            "roll back", bad
        )
    waits = _time(state) or _too_little(state) or _not_clear(state)
    late = state.plan.patience is not None and now - state.since >= state.plan.patience
    if waits and late:
        reason = f"not decided after {in_words(now - state.since)}: {waits.reason}"
        return dataclasses.replace(state, status="rolled back"), Action(
            "roll back", reason
        )
    if waits:
        return state, waits
    reason = f"{state.seen[0]} of the candidate's observations, {_figures(state)}"
    if state.stage + 1 == len(state.plan.percents):
        return dataclasses.replace(state, status="finished"), Action("finish", reason)
    return _next_stage(state, now), Action("advance", reason)


def _check_clock(before: float, now: float) -> None:
    if not math.isfinite(now):
        raise CanaryError(f"now: expected seconds, got {now}")
    if now < before:
        raise CanaryError(
            f"the clock ran backwards: it says {now:.3f}, and {before:.3f} was written "
            f"down before. Set the clock right, or wait for {in_words(before - now)}"
        )


def _seen(state: State, batch: Batch) -> State:
    """The state with further observations, as far as they tell something."""
    candidate = int(batch.candidate.sum())
    watches = {
        name: watched(watch, state.plan, state.stage, name, batch)
        for name, watch in state.watches.items()
    }
    baseline = len(batch.candidate) - candidate
    seen = (state.seen[0] + candidate, state.seen[1] + baseline)
    return dataclasses.replace(state, seen=seen, watches=watches)


def _broken(state: State, batch: Batch) -> str:
    """Says that the candidate gave a value that is not finite; empty if not."""
    broken = int((batch.nan & batch.candidate).sum())
    if not broken or state.plan.nan_rate is None:
        return ""
    return f"nan: in {broken} of the candidate's observations a value is not finite"


def _harm(state: State) -> str:
    """Says which trigger shows that the candidate is worse; empty if none does."""
    plan = state.plan
    bound = -math.log(plan.stage_alpha)
    if state.percent == 100:
        bound += math.log(2)  # the other half is the memory's
    for name, watch in state.watches.items():
        known = watch.evidence.log_within() >= -math.log(plan.miss)
        if watch.evidence.log_harm() >= bound and not known:
            return (
                f"{figure(name, watch)}; evidence {odds(watch.evidence.log_harm())} "
                f"to 1 that it is worse, of {odds(bound)} that are needed"
            )
    return ""


def _time(state: State) -> Action | None:
    left = state.since + state.plan.watch - state.clock
    if left <= 0:
        return None
    return Action("hold", f"{in_words(left)} of {in_words(state.plan.watch)} are left")


def _too_little(state: State) -> Action | None:
    """Holds a stage in which a regression could not have been found."""
    missing = _missing(state)
    if missing:
        return Action("hold", missing, blind=True)
    plan = state.plan
    least = plan.sightings(state.stage)
    if state.percent == 100:
        least = max(least, state.before)
    if state.seen[0] < least:
        return Action(
            "hold", f"{state.seen[0]} of {least} observations of the candidate"
        )
    for name, watch in state.watches.items() if state.percent < 100 else ():
        yardstick, evidence = plan.yardsticks[name], watch.evidence
        most = needed(evidence, yardstick, plan.stage_alpha, plan.power)
        if evidence.number < most:
            return Action(
                "hold", f"{name}: {evidence.number} of about {most} comparisons"
            )
    return None


def _missing(state: State) -> str:
    """Says which trigger has seen nothing of an arm; empty if none."""
    arms = ARMS if state.percent < 100 and state.watches else ARMS[:1]
    for arm, seen in zip(arms, state.seen, strict=False):
        if not seen:
            return (
                f"no observation of the {arm} came in this stage: record some with "
                f"arm {arm}, or abort"
            )
    for name, watch in state.watches.items():
        for arm, seen, of in zip(arms, watch.seen, state.seen, strict=False):
            if not seen:
                return (
                    f"the trigger {name} watches nothing: none of {of} observations of "
                    f"the {arm} has {name}. Record it, or abort and start without "
                    "this trigger"
                )
    return ""


def _not_clear(state: State) -> Action | None:
    """Holds a stage until a regression is excluded."""
    if state.percent == 100:
        return None
    for name, watch in state.watches.items():
        if watch.evidence.log_clear() < -math.log(state.plan.miss):
            return Action(
                "hold",
                f"{figure(name, watch)}; evidence "
                f"{odds(watch.evidence.log_clear())} to 1 that it is no regression, "
                f"of {1 / state.plan.miss:.3g} that are needed",
            )
    return None


def _next_stage(state: State, now: float) -> State:
    """The state at the beginning of the next stage."""
    return State(
        plan=state.plan,
        since=now,
        clock=now,
        stage=state.stage + 1,
        before=state.seen[0],
        watches={
            name: Watch(baseline=watch.baseline)
            for name, watch in state.watches.items()
        },
    )


def _figures(state: State) -> str:
    found = [figure(name, watch) for name, watch in state.watches.items()]
    return "; ".join(found) or "none with a NaN"


def to_json(state: State) -> dict[str, Any]:
    """A state as JSON, without its plan."""
    found = dataclasses.asdict(state)
    del found["plan"]
    return found


def from_json(plan: Plan, found: Mapping[str, Any]) -> State:
    """The state of `to_json`, exactly.

    Raises:
      TypeError, KeyError: if it is none.
    """
    watches = {
        name: Watch(
            **{
                **_tuples(watch),
                "evidence": Evidence(**_tuples(watch["evidence"])),
            }
        )
        for name, watch in found["watches"].items()
    }
    return State(plan=plan, **{**_tuples(found), "watches": watches})


def _tuples(table: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
