"""What paired runs say: effects with intervals, corrected p-values, and in words."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from esper_jax.rollout.ab import anytime, paired
from esper_jax.rollout.ab.design import Design, as_t_test, least_pairs, pairs_for

__all__ = ["Finding", "Pair", "advised", "findings", "is_decided", "table"]


class Pair(NamedTuple):
    """What two runs with the same seed gave."""

    seed: int
    a: Mapping[str, float]
    """Metrics by name; NaN for what is not finite. Empty if the run failed."""
    b: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What the pairs say of one metric. Means and interval are of finite pairs alone.

    None stands for what cannot be told.

    Args:
      metric: its name.
      verdict: ``B is higher``, ``B is lower``, ``no difference shown``, or ``not
        judged``.
      why: for the last.
      pairs: in which both runs have a finite value.
      lost: pairs in which one or both have none: by A alone, by B alone, by both.
      a: mean of A.
      b: mean of B.
      difference: mean of B less A.
      interval: of the difference, with the error of the design; for this metric alone.
      spread: standard deviation of the differences.
      t_p: p-value of the paired t-test; of a fixed number of pairs only.
      wilcoxon_p: of Wilcoxon's signed-rank test; likewise.
      p: what is judged by: the larger of both, or that of the sequential test.
      adjusted_p: by Holm, over all metrics that any run has.
      detectable: difference that as many pairs find with the design's power, if the
        spread is the true one; of a fixed number of pairs only. See `advised`.
      pairs_for_this: pairs that a difference like the one seen takes; likewise.
    """

    metric: str
    verdict: str = "not judged"
    why: str | None = None
    pairs: int = 0
    lost: tuple[int, int, int] = (0, 0, 0)
    a: float | None = None
    b: float | None = None
    difference: float | None = None
    interval: tuple[float | None, float | None] | None = None
    spread: float | None = None
    t_p: float | None = None
    wilcoxon_p: float | None = None
    p: float | None = None
    adjusted_p: float | None = None
    detectable: float | None = None
    pairs_for_this: int | None = None


def findings(design: Design, pairs: Sequence[Pair]) -> list[Finding]:
    """Judges all metrics together.

    A metric is judged if every pair has finite values of it: to leave out the runs that
    failed would flatter the arm that fails. Of a metric that no run of either arm has
    (no accuracy, say) nothing is judged, and it counts for no correction.

    With a fixed number of pairs the paired t-test and Wilcoxon's signed-rank test must
    both reject, so few pairs of a coarse metric, for which the t-test is too bold,
    raise no more alarms than they may.

    Args:
      design: of the test.
      pairs: in the order in which they ran.
    """
    found = [_measured(design, name, pairs) for name in design.metrics]
    # One that is not judged for its failures counts for the correction all the same.
    family = [i for i, f in enumerate(found) if f.lost[2] < len(pairs)]
    p_values = [1.0 if (p := found[i].p) is None else p for i in family]
    for i, p in zip(family, paired.holm(np.array(p_values)).tolist(), strict=True):
        if found[i].p is not None:
            found[i] = dataclasses.replace(
                found[i], adjusted_p=p, verdict=_verdict(found[i], p, design.alpha)
            )
    return found


def is_decided(design: Design, pairs: Sequence[Pair]) -> bool:
    """Whether a sequential test may stop: its first metric differs, by all rules."""
    if not design.sequential or len(pairs) < 2:
        return False
    first = findings(design, pairs)[0]
    return first.adjusted_p is not None and first.adjusted_p <= design.alpha


def _verdict(finding: Finding, p: float, alpha: float) -> str:
    if p > alpha or not finding.difference:
        return "no difference shown"
    return "B is higher" if finding.difference > 0 else "B is lower"


def _measured(design: Design, name: str, pairs: Sequence[Pair]) -> Finding:
    """One metric, before the correction."""
    values = np.array(
        [[arm.get(name, math.nan) for arm in (pair.a, pair.b)] for pair in pairs]
    ).reshape(-1, 2)
    fine = np.isfinite(values)
    whole = fine.all(axis=1)
    lost = tuple(
        int(n)
        for n in (
            (~fine[:, 0] & fine[:, 1]).sum(),
            (fine[:, 0] & ~fine[:, 1]).sum(),
            (~fine.any(axis=1)).sum(),
        )
    )
    assert len(lost) == 3
    number = int(whole.sum())
    finding = Finding(metric=name, pairs=number, lost=lost, why=_why(pairs, lost))
    if number < 2:
        return finding
    a, b = values[whole].T
    seen = _seen(design, b - a)
    if finding.why:  # told, and not judged
        seen = {k: v for k, v in seen.items() if k not in ("p", "t_p", "wilcoxon_p")}
    return dataclasses.replace(finding, a=float(a.mean()), b=float(b.mean()), **seen)


def _why(pairs: Sequence[Pair], lost: tuple[int, ...]) -> str | None:
    """Why a metric is not judged, if it is not."""
    a, b, both = lost
    if not pairs:
        return "there are no pairs: run at least 2"
    if both == len(pairs):
        return "no run has a finite value of it: name another with --metric"
    if a or b or both:
        return (
            f"not finite in {a + both} runs of A and {b + both} of B (each alone: {a} "
            f"and {b}; p {paired.sign_p(a, b):.3g} that both lose as many). Without "
            "those pairs the means favour the arm that fails: mend it, or judge the "
            "failures"
        )
    if len(pairs) < 2:
        return "one pair has no spread: run at least 2"
    return None


def _seen(design: Design, differences: np.ndarray) -> dict[str, Any]:
    """Interval and p-values of differences, by their names in `Finding`."""
    test = paired.t_test(differences, design.alpha)
    mean, spread = float(test.mean), float(test.spread)
    found: dict[str, Any] = {"difference": mean, "spread": spread}
    if design.sequential:
        ends = anytime.interval(differences, design.alpha, design.effect)
        low, high = (x if math.isfinite(x) else None for x in ends)
        found["p"] = anytime.p_value(differences, design.effect)
    else:
        low, high = float(test.low), float(test.high)
        found["t_p"] = float(test.p)
        found["wilcoxon_p"] = paired.wilcoxon_p(differences)
        found["p"] = max(found["t_p"], found["wilcoxon_p"])
    return found | {"interval": (low, high)}


def advised(design: Design, finding: Finding) -> Finding:
    """A finding with what as many pairs can find, and what one like it takes."""
    spread, mean = finding.spread, finding.difference
    if not spread or mean is None:
        return finding
    detectable = pairs = None
    if not design.sequential and finding.pairs >= least_pairs(design.strict):
        number = as_t_test(finding.pairs)
        detectable = spread * paired.detectable(number, design.power, design.strict)
    if abs(mean) / spread > 1e-3:
        pairs = pairs_for(abs(mean) / spread, design.power, design.strict, False)
    return dataclasses.replace(finding, detectable=detectable, pairs_for_this=pairs)


def table(design: Design, found: Sequence[Finding]) -> list[str]:
    """The findings as lines: a table, and a sentence for each metric."""
    level = f"{100 * (1 - design.alpha):g}% interval"
    tests = ["p"] if design.sequential else ["t p", "Wilcoxon p"]
    heads = ["metric", "A", "B", "B - A", level, *tests, "p (Holm)"]
    rows = [heads]
    for f in found:
        each = (f.p,) if design.sequential else (f.t_p, f.wilcoxon_p)
        rows.append(
            [
                f.metric,
                _number(f.a),
                _number(f.b),
                _number(f.difference, sign=True),
                _interval(f),
                *map(_p, each),
                _p(f.adjusted_p),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return [line.rstrip() for line in lines] + ["", *(_words(design, f) for f in found)]


def _words(design: Design, f: Finding) -> str:
    """One metric in a sentence, which never says more than its interval."""
    if f.adjusted_p is None:
        return f"{f.metric}: not judged; {f.why}"
    if f.verdict != "no difference shown":
        by = _number(f.difference, sign=True)
        return f"{f.metric}: {f.verdict}: {by}, {_interval(f)} (p {_p(f.adjusted_p)})"
    if not f.spread and not f.difference:
        return f"{f.metric}: no difference shown: every pair is a tie"
    more = f"{f.metric}: no difference shown; B - A lies in {_interval(f)}"
    if f.pairs < least_pairs(design.strict):
        more += f". {f.pairs} pairs are too few to tell any difference from chance"
    if f.detectable is not None:
        more += (
            f". With this spread, {f.pairs} pairs find {_number(f.detectable)} with a "
            f"power of {design.power:g}"
        )
    if f.pairs_for_this is not None:
        more += f"; a true difference like this takes {f.pairs_for_this} pairs" + (
            " that were fixed beforehand" if design.sequential else ""
        )
    return more


def _number(value: float | None, sign: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:+.4g}" if sign else f"{value:.4g}"


def _interval(f: Finding) -> str:
    if f.interval is None:
        return "-"
    low, high = f.interval
    ends = (
        "-inf" if low is None else f"{low:.4g}",
        "inf" if high is None else f"{high:.4g}",
    )
    return f"[{', '.join(ends)}]"


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "<0.0001" if value < 1e-4 else f"{value:.4f}"
