"""Where a canary stands, in lines for a terminal."""

from esper_jax.rollout.canary.canary import Report
from esper_jax.rollout.canary.decisions import State
from esper_jax.rollout.canary.evidence import needed
from esper_jax.rollout.canary.plan import in_words
from esper_jax.rollout.canary.watches import Watch, figure, odds

__all__ = ["lines_of"]


def lines_of(found: Report, now: float) -> list[str]:
    """Where a canary stands.

    Args:
      found: of its journal.
      now: seconds since 1970.
    """
    state, plan = found.state, found.state.plan
    stages = ", ".join(map(str, plan.percents))
    told = ", ".join(f"{k} {v}" for k, v in found.where.items() if k != "flag")
    lines = [
        f"{found.flag} ({told}): {state.status}, {found.percent}%"
        + ("" if found.turned else " (not turned yet: esper-jax canary resume)"),
        f"  stage {state.stage + 1} of {len(plan.percents)} ({stages}%), for "
        f"{in_words(max(now - state.since, 0))} of {in_words(plan.watch)} at least"
        if state.status == "watching"
        else f"  it came to {state.percent}% of {stages}%",
        f"  observations: {state.seen[0]} of the candidate, {state.seen[1]} of the "
        f"baseline, in {found.observations}",
    ]
    lines += [_line(state, name, watch) for name, watch in state.watches.items()]
    return [*lines, f"  last: {found.action}: {found.reason}"]


def _line(state: State, name: str, watch: Watch) -> str:
    """What a trigger has seen."""
    evidence, plan = watch.evidence, state.plan
    if not evidence.number:
        return f"  {name}: nothing compared yet"
    said = f"  {figure(name, watch)}; harm {odds(evidence.log_harm())}"
    said += f" of {1 / plan.stage_alpha:.3g}"
    if state.percent == 100:
        return said
    most = needed(evidence, plan.yardsticks[name], plan.stage_alpha, plan.power)
    return (
        f"{said}, clear {odds(evidence.log_clear())} of {1 / plan.miss:.3g}, "
        f"{evidence.number} of about {most} comparisons"
    )
