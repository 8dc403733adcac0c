"""The tables of the page: fossils, refusals, config, versions, events."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from esper_jax.blueprints import operations
from esper_jax.markup import name, number, table, text
from esper_jax.monitor.page.axes import Scale, scale_of
from esper_jax.monitor.page.lives import Seed
from esper_jax.monitor.page.records import Records, items
from esper_jax.monitor.page.worth import Worth
from esper_jax.monitor.words import rules_that_refused

__all__ = [
    "blueprint_of",
    "config",
    "events",
    "fossils",
    "keys",
    "refusals",
    "versions",
]

FEW_FOSSILS, MOST_FOSSILS, MOST_EVENTS = 20, 500, 2000
"""Fossils that stand open to the eye; rows of the tables of fossils and events."""

_OUTCOMES = {
    "ILLEGAL": "the transition is not legal",
    "TOO_EARLY": "too few epochs in the stage",
    "GATE": "a gate",
    "NO_CAPACITY": "no slot is free",
    "BATCH": "another request of its batch was refused",
    "UNDONE": "the governor undid the tick",
}


def blueprint_of(records: Records, seed: Seed) -> str:
    """The name of what grew in a seed, or what is known of it."""
    layer = items(records.layers.get(seed.layer))
    names = layer.get("blueprints") or items(records.config.get("growth")).get(
        "blueprints"
    )
    if not isinstance(names, list | tuple):
        return "not recorded"
    if len(names) == 1:
        return str(names[0])
    known = seed.blueprint is not None and 0 <= seed.blueprint < len(names)
    return str(names[seed.blueprint or 0]) if known else "not recorded"


def fossils(records: Records, worths: Sequence[Worth]) -> str:
    """What each fossil is worth and costs, the most worth first."""
    if not worths:
        return "<p>No seed was kept in these records.</p>"
    lowest = float("-inf")
    ranked = sorted(worths, key=lambda w: lowest if w.mean is None else -w.mean)
    ranked.sort(key=lambda w: w.mean is None)
    shown = ranked[:MOST_FOSSILS]
    ends = [v for w in shown for v in (w.low, w.high, w.mean) if v is not None]
    scale = scale_of([*ends, 0.0])
    head = [
        "seed",
        "blueprint",
        "kept at tick",
        "worth (held-out loss without it, less the loss as it is)",
        "95% interval",
        '<span class="sr">drawn</span>',
        "ticks measured",
        "parameters",
        "operations a row",
    ]
    caption = "Fossils" + (
        f": the {len(shown)} worth most of {number(len(worths))}"
        if len(shown) < len(worths)
        else ""
    )
    rows = [_fossil(records, w, scale) for w in shown]
    right = (2, 3, 4, 6, 7, 8)
    first = table(caption, head, rows[:FEW_FOSSILS], numeric=right)
    if len(rows) <= FEW_FOSSILS:
        return first
    rest = table("Further fossils", head, rows[FEW_FOSSILS:], numeric=right)
    return f"{first}<details><summary>More</summary>{rest}</details>"


def _fossil(records: Records, worth: Worth, scale: Scale) -> list[str]:
    seed, parameters = worth.seed, worth.seed.parameters
    interval = "not recorded" if worth.ticks == 0 else "one tick alone"
    if worth.mean is None:
        interval = "not measured"
    if worth.low is not None:
        interval = f"{number(worth.low)} to {number(worth.high)}"
    return [
        f"{name(seed.layer)} seed {seed.number}",
        text(blueprint_of(records, seed)),
        number(worth.kept),
        number(worth.mean),
        interval,
        _whisker(worth, scale),
        number(worth.ticks) if worth.ticks else "not recorded",
        "not recorded" if parameters is None else number(parameters),
        "not recorded" if parameters is None else number(operations(parameters)),
    ]


def _whisker(worth: Worth, scale: Scale) -> str:
    """The mean as a dot, its interval as a line, nothing (0) as an upright line."""
    if worth.mean is None:
        return ""
    zero, dot = (f"{100 * scale.place(v):.2f}%" for v in (0.0, worth.mean))
    line = ""
    if worth.low is not None and worth.high is not None:
        ends = (f"{100 * scale.place(v):.2f}%" for v in (worth.low, worth.high))
        line = '<line class="held" x1="{}" x2="{}" y1="8" y2="8"/>'.format(*ends)
    return (
        '<svg class="whisker" width="120" height="16" aria-hidden="true">'
        f'<line class="zero" x1="{zero}" x2="{zero}" y1="0" y2="16"/>{line}'
        f'<circle cx="{dot}" cy="8" r="3.5"/></svg>'
    )


def refusals(records: Records) -> str:
    """How often which rule refused which transition, the most frequent first."""
    counts = Counter(
        (f"{event['from']} → {event['to']}", rule)
        for event in records.events
        for rule in _rules(event)
    )
    if not counts:
        return "<p>No request was refused in these records.</p>"
    most = max(counts.values())
    rows = (
        [
            text(rule),
            text(move),
            number(count),
            f'<span class="share" style="width:{100 * count / most:.1f}%"></span>',
        ]
        for (move, rule), count in counts.most_common()
    )
    head = ["rule", "transition", "refusals", '<span class="sr">drawn</span>']
    return table("Refusals by rule", head, rows, numeric=(2,))


def _rules(event: Mapping[str, Any]) -> Iterator[str]:
    outcome = event["outcome"]
    if outcome in ("OK", "NONE"):
        return
    told = rules_that_refused(str(event.get("text", "")))
    yield from told or [_OUTCOMES.get(outcome, outcome)]


def config(records: Records) -> str:
    """Every key of the config, and what was changed on the way."""
    changes = [
        [
            number(c["tick"]),
            f"<code>{text(c['key'])}</code>",
            f"<code>{text(c['from'])}</code>",
            f"<code>{text(c['to'])}</code>",
        ]
        for c in records.changes
    ]
    told = (
        table("Changed on the way", ["after tick", "key", "from", "to"], changes)
        if changes
        else ""
    )
    return told + keys("Config", records.config)


def keys(caption: str, entries: Mapping[str, Any]) -> str:
    """Every key of nested tables, and its value."""
    rows = ([text(k), f"<code>{text(v)}</code>"] for k, v in _flat(entries))
    return table(caption, ["key", "value"], rows)


def _flat(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def versions(records: Records) -> str:
    """Versions, options and devices that the run was last trained under."""
    if not records.settings:
        return "<p>Not recorded: this run is of version 0.2 or before.</p>"
    rows = (
        [text(k), f"<code>{text(v)}</code>"] for k, v in records.settings.items() if v
    )
    return table("Versions, options and devices", ["what", "value"], rows)


def events(records: Records) -> str:
    """What happened, in words; the newest where there is too much."""
    shown = records.events[-MOST_EVENTS:]
    left_out = len(records.events) - len(shown)
    caption = "Events" + (f", without the first {number(left_out)}" * (left_out > 0))
    rows = (
        [
            number(e["tick"]),
            name(e["layer"]),
            text(e.get("text", "")),
            text(e["outcome"]),
        ]
        for e in shown
    )
    return table(caption, ["tick", "layer", "what", "outcome"], rows, numeric=(0,))
