"""The whole page."""

import base64
import functools
import hashlib
from collections.abc import Sequence
from importlib import resources

from esper_jax.markup import name, number, text
from esper_jax.monitor.page import panels, tables
from esper_jax.monitor.page.lives import Seed, seeds_of
from esper_jax.monitor.page.records import Records, finite, items, whole
from esper_jax.monitor.page.timeline import legend, style, timeline
from esper_jax.monitor.page.topology import topology
from esper_jax.monitor.page.worth import worth_of_fossils

__all__ = ["MARK", "document", "folded", "page"]

MARK = '<meta name="generator" content="esper-jax report">'
"""By which a file is known to be such a page."""


@functools.cache
def _file(path: str) -> str:
    here = resources.files("esper_jax.monitor.page")
    return here.joinpath(path).read_text(encoding="utf-8")


def page(records: Records) -> str:
    """One page of HTML that tells of a run.

    It loads nothing, and runs no script but its own; without scripts it shows the same,
    but for the tooltips, which are then the browser's.

    Args:
      records: of the run; they may be empty, broken off, or hold anything as text.

    Returns:
      The page.
    """
    seeds = seeds_of(records)
    return document(records.name, _status(records), _sections(records, seeds))


def document(title: str, status: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A page of sections.

    Args:
      title: any text.
      status: what stands below it, as HTML.
      sections: key, title and content of each, as HTML.
    """
    script = _file("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "img-src data:"
    )
    links = "".join(
        f'<li><a href="#{key}">{heading}</a></li>' for key, heading, _ in sections
    )
    body = "\n".join(
        f'<section id="{key}" aria-labelledby="h-{key}"><h2 id="h-{key}">{heading}</h2>'
        f"\n{content}\n</section>"
        for key, heading, content in sections
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{MARK}\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{text(title)}: esper-jax report</title>\n"
        f"<style>\n{_file('page.css')}{style()}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#main">Skip to the report</a>\n'
        f"<header><h1>{name(title)}</h1>{status}</header>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n'
        f'<main id="main">\n{body}\n</main>\n'
        '<div id="tip" role="tooltip" hidden></div>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _sections(records: Records, seeds: Sequence[Seed]) -> list[tuple[str, str, str]]:
    """Key, title and content of each section."""
    last = records.last_tick
    return [
        ("result", "Result", _result(records, seeds)),
        (
            "curves",
            "Accuracy and loss",
            f"{_curves_note(records)}<div class='chart'>{panels.curves(records)}"
            f"{panels.marks(records)}{panels.axis(last)}</div>"
            + folded("The same as a table", panels.ticks_table(records)),
        ),
        (
            "timeline",
            "Timeline",
            f"{_TIMELINE}{legend()}<div class='chart lives'>{timeline(seeds, last)}"
            f"{panels.axis(last)}</div>",
        ),
        (
            "fossils",
            "Fossils",
            _WORTH + tables.fossils(records, worth_of_fossils(records, seeds)),
        ),
        ("refusals", "Refusals", _REFUSALS + tables.refusals(records)),
        ("topology", "Topology in the end", topology(records, seeds)),
        ("events", "Events", folded("All that happened", tables.events(records))),
        ("config", "Config", folded("Every key", tables.config(records))),
        ("versions", "Versions", tables.versions(records)),
    ]


_TIMELINE = (
    "<p>One row for each seed that has lived. The area at the foot of a bar is alpha: "
    "how much the seed counts in the model's output, from 0 to 1. Point at a bar, or "
    "move to it with Tab and the arrow keys; Escape closes what it says. The events "
    "below say the same in words.</p>"
)

_WORTH = (
    "<p>Worth is a counterfactual: the held-out loss with the seed's alpha at 0, less "
    "the loss as it is, so more is better. Ticks of FINE_TUNING measured it, before "
    "the seed was kept, and this is their mean; fossils are not measured again. "
    "The interval is Student's 95% interval of that mean over those ticks, with the "
    "number of ticks reduced for their correlation. All ticks read the same held-out "
    "data, so it does not tell how the worth would vary with other data.</p>"
)

_REFUSALS = (
    "<p>A refusal that repeats tick after tick is recorded, and counted, once. One by "
    "several rules counts for each of them.</p>"
)


def folded(title: str, content: str) -> str:
    """Content that is shown on demand."""
    return f"<details><summary>{title}</summary>{content}</details>"


def _status(records: Records) -> str:
    done = len(records.ticks)
    planned = whole(items(records.config.get("train")).get("ticks"))
    of_all = "" if planned is None else f" of {number(planned)}"
    of = f"{number(done)}{of_all} ticks recorded"
    if records.summary:
        return f'<p class="status">finished, {of}</p>'
    return (
        f'<p class="status"><b>Not finished</b>: {of}. There is no summary, so the run '
        "still trains, was stopped, or was killed.</p>"
    )


def _curves_note(records: Records) -> str:
    known = [finite(tick.get("loss")) for tick in records.ticks]
    broken = known.count(None)
    if not records.ticks:
        return "<p>No tick is recorded.</p>"
    if not broken:
        return ""
    return (
        f"<p>At {number(broken)} of {number(len(known))} ticks the held-out loss was "
        "not finite: the curves have gaps there, marked with “!”.</p>"
    )


def _result(records: Records, seeds: Sequence[Seed]) -> str:
    summary, ticks = records.summary, records.ticks
    newest = ticks[-1] if ticks else {}
    kept = sum(seed.last.name == "FOSSILIZED" for seed in seeds)
    shown = [
        ("test accuracy", summary.get("final_accuracy")),
        ("test loss", summary.get("final_loss")),
        ("held-out accuracy, last tick", newest.get("accuracy")),
        ("held-out loss, last tick", newest.get("loss")),
        ("parameters of the host", summary.get("host_params")),
        ("parameters that grew", summary.get("grown_params")),
        ("seeds that lived", len(seeds)),
        ("seeds that were kept", kept),
        ("rollbacks", len(records.rollbacks)),
        ("recompilations", summary.get("recompiles")),
    ]
    absent = "not known yet" if not summary else "not measured"
    cards = "".join(
        f"<div><dt>{label}</dt><dd>{_or(finite(value), absent)}</dd></div>"
        for label, value in shown
    )
    lost = summary.get("incomplete")
    notes = [f"Incomplete: {x}" for x in lost] if isinstance(lost, list) else []
    said = summary.get("controller")
    notes += [f"What the controller said last: {said}."] if said else []
    notes += [str(r.get("text", "")) for r in records.rollbacks[:20]]
    return f'<dl class="cards">{cards}</dl>' + "".join(
        f"<p>{text(note)}</p>" for note in notes
    )


def _or(value: float | None, absent: str) -> str:
    return f'<span class="absent">{absent}</span>' if value is None else number(value)
