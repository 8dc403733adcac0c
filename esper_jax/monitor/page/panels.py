"""Accuracy and losses over the ticks, and what happened to the seeds meanwhile."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from esper_jax.markup import number, table, text
from esper_jax.monitor.page.axes import (
    HEIGHT,
    WIDTH,
    Scale,
    across,
    curve,
    scale_of,
    steps,
)
from esper_jax.monitor.page.records import Records, finite, items

__all__ = ["Curve", "axis", "curves", "marks", "panel", "ticks_table"]

MOST_MARKS = 160
"""Marks in a row; what lies closer together shares one."""

MOST_ROWS = 400
"""Rows of the table of ticks."""

_KINDS = {
    "germinated": ("●", ("GERMINATED",)),
    "grafted": ("▲", ("GRAFTING",)),
    "kept": ("★", ("FOSSILIZED",)),
    "removed": ("✕", ("CULLED", "CANCELLED", "ROLLED_BACK")),
}
"""Label of each row of marks: its sign, and the stages that seeds enter."""

Points = list[tuple[int, float | None]]


class Curve(NamedTuple):
    """A curve of a panel."""

    label: str
    style: str
    points: Points


def curves(records: Records) -> str:
    """The panels of accuracy and losses, which share the axis of ticks."""
    twin = items(records.summary.get("static"))
    history = twin.get("history")
    static = [
        (n, finite(value))
        for n, value in enumerate(history if isinstance(history, list) else [], 1)
    ]
    accuracy = [Curve("held-out data", "held", _points(records, "accuracy"))]
    if static:
        label = f"static network, {number(finite(twin.get('parameters')))} parameters"
        accuracy.append(Curve(label, "static", static))
    losses = [
        Curve("held-out data", "held", _points(records, "loss")),
        Curve("training data", "train", _points(records, "train_loss")),
    ]
    lines = _lines(records)
    return panel("Accuracy", accuracy, records.last_tick, lines) + panel(
        "Loss", losses, records.last_tick, lines
    )


def _points(records: Records, key: str) -> Points:
    return [(tick["tick"], finite(tick.get(key))) for tick in records.ticks]


def _lines(records: Records) -> str:
    """Upright lines where seeds were kept, and where the run went back."""
    last = records.last_tick
    kept = {
        e["tick"]
        for e in records.events
        if e["to"] == "FOSSILIZED" and e["outcome"] == "OK"
    }
    back = {r["tick"] for r in records.rollbacks}
    if len(kept) > MOST_MARKS:
        kept = set()
    return "".join(
        f'<path class="{style}" d="M{WIDTH * across(tick, last) / 100:g} 0V{HEIGHT}"/>'
        for style, ticks in (("kept", kept), ("back", back))
        for tick in sorted(ticks)[:MOST_MARKS]
    )


def panel(
    title: str,
    drawn: Sequence[Curve],
    last: int,
    lines: str = "",
    unit: str = "tick",
) -> str:
    """A panel: scale at the left, curves at the right, keys above.

    Args:
      title: of the panel.
      drawn: the curves, the one that matters most first.
      last: where the axis ends.
      lines: further marks, as SVG.
      unit: of the axis.
    """
    values = [v for c in drawn for _, v in c.points if v is not None]
    scale = scale_of(values)
    marked = [(100 * (1 - scale.place(v)), words) for v, words in scale.marks()]
    grid = "".join(f'<path class="grid" d="M0 {y:.2f}H{WIDTH}"/>' for y, _ in marked)
    scaled = "".join(
        f'<span style="top:{y:.2f}%">{text(words)}</span>' for y, words in marked
    )
    told = "; ".join(f"{c.label}: {_in_words(c.points, unit)}" for c in drawn)
    keys = "".join(_key(c) for c in drawn if any(v is not None for _, v in c.points))
    empty = "" if values else '<p class="empty">not measured</p>'
    log = " (logarithmic scale)" if scale.log else ""
    return (
        f'<figure class="panel"><figcaption><b>{title}</b>{log} {keys}</figcaption>'
        f'<div class="lane"><div class="scale" aria-hidden="true">{scaled}</div>'
        f'<div class="plot">{empty}<svg viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'preserveAspectRatio="none" role="img" '
        f'aria-label="{text(f"{title} by {unit}{log}. {told}")}">'
        f"{grid}{lines}{_curves(drawn, scale, last)}</svg>"
        f"{_gaps(drawn, last, unit)}</div></div></figure>"
    )


def _curves(drawn: Sequence[Curve], scale: Scale, last: int) -> str:
    return "".join(curve(c.points, scale, last, c.style) for c in reversed(drawn))


def _key(drawn: Curve) -> str:
    return (
        '<span class="key"><svg width="26" height="8" aria-hidden="true">'
        f'<path class="{drawn.style}" d="M0 4H26"/></svg> {text(drawn.label)}</span>'
    )


def _gaps(drawn: Sequence[Curve], last: int, unit: str) -> str:
    """A mark at the bottom wherever there is no finite value, as far as they fit."""
    points = drawn[0].points
    missing = [tick for tick, value in points if value is None]
    if len(missing) == len(points):  # the panel says so
        return ""
    return "".join(
        f'<span class="gap" style="left:{left}%" title="{text(said)}">!</span>'
        for left, said in _shared(
            [(t, f"{unit} {t}: not finite, or not measured") for t in missing], last
        )
    )


def _in_words(points: Points, unit: str) -> str:
    """A curve for those who do not see it."""
    known = [(t, v) for t, v in points if v is not None]
    if not known:
        return "not measured"
    (first, at_first), (last, at_last) = known[0], known[-1]
    least, most = (f(v for _, v in known) for f in (min, max))
    missing = len(points) - len(known)
    return (
        f"{number(at_first)} at {unit} {first}, {number(at_last)} at {unit} {last}, "
        f"from {number(least)} to {number(most)}"
        + (f", {missing} {unit}s not finite or not measured" if missing else "")
    )


def axis(last: int, unit: str = "tick") -> str:
    """The axis below the panels."""
    whole = [step for step in steps(0, last, 10) if step.is_integer()]
    words = "".join(
        f'<span style="left:{across(step, last)}%">{number(step)}</span>'
        for step in whole
    )
    return (
        f'<div class="lane axis" aria-hidden="true"><span class="label">{unit}</span>'
        f'<div class="plot">{words}</div></div>'
    )


def marks(records: Records) -> str:
    """Rows of marks: when seeds germinated, were grafted, were kept or removed."""
    last = records.last_tick
    rows = []
    for label, (sign, stages) in _KINDS.items():
        happened = [
            (e["tick"], f"tick {e['tick']}: {_who(e)}")
            for e in records.events
            if e["to"] in stages and e["outcome"] == "OK"
        ]
        rows.append(_row(label, sign, f"k-{label}", happened, last))
    others = [(r["tick"], f"tick {r['tick']}: {_said(r)}") for r in records.rollbacks]
    if others:
        rows.append(_row("rollbacks", "↺", "k-rollback", others, last))
    changes = [
        (e["tick"], f"tick {e['tick']}: {_said(e)}")
        for e in records.events
        if "change" in e
    ]
    if changes:
        rows.append(_row("config changed", "◆", "k-change", changes, last))
    return f'<div class="tips" data-tips="Events">{"".join(rows)}</div>'


def _who(event: Mapping[str, Any]) -> str:
    return f"{event['layer']} {_said(event)}"


def _said(entry: Mapping[str, Any]) -> str:
    return str(entry.get("text", ""))


def _row(
    label: str, sign: str, style: str, happened: Sequence[tuple[int, str]], last: int
) -> str:
    drawn = "".join(
        f'<span class="tip mark {style}" style="left:{left}%" role="img" '
        f'title="{text(said)}">{sign}</span>'
        for left, said in _shared(happened, last)
    )
    return (
        f'<div class="lane row" role="group" aria-label="{text(label)}">'
        f'<span class="label">{text(label)} <b>{number(len(happened))}</b></span>'
        f'<div class="plot strip">{drawn}</div></div>'
    )


def _shared(
    happened: Sequence[tuple[int, str]], last: int
) -> Iterator[tuple[float, str]]:
    """Places of marks and their words; what lies close together shares a mark."""
    by_place: dict[int, list[tuple[int, str]]] = {}
    for tick, said in happened:
        by_place.setdefault(round(MOST_MARKS * across(tick, last) / 100), []).append(
            (tick, said)
        )
    for _, near in sorted(by_place.items()):
        more = len(near) - 4
        lines = [said for _, said in near[:4]] + ([f"and {more} more"] * (more > 0))
        yield across(near[0][0], last), "\n".join(lines)


def ticks_table(records: Records) -> str:
    """The curves as a table."""
    every = -(-len(records.ticks) // MOST_ROWS) or 1
    shown = [
        t
        for n, t in enumerate(records.ticks, 1)
        if n % every == 0 or n == len(records.ticks)
    ]
    rows = (
        [
            number(t["tick"]),
            *(number(finite(t.get(k))) for k in ("accuracy", "loss", "train_loss")),
        ]
        for t in shown
    )
    caption = "Ticks" + (f", one in {every}" if every > 1 else "")
    head = ["tick", "accuracy (held-out)", "loss (held-out)", "loss (training)"]
    return table(caption, head, rows, numeric=range(4))
