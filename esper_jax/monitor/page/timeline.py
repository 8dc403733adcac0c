"""The timeline: which seed was in which stage when, and how much it counted."""

from collections.abc import Sequence
from itertools import groupby

from esper_jax.lifecycle.looks import LOOKS
from esper_jax.lifecycle.stages import Stage
from esper_jax.markup import name, number, text
from esper_jax.monitor.page.axes import across
from esper_jax.monitor.page.lives import Seed, Span

__all__ = ["legend", "looks", "style", "timeline"]

MOST_SEEDS = 800
"""Rows that are drawn."""


def looks(stage: Stage) -> str:
    """The class of the page's style that a stage is drawn with."""
    return f"s-{stage.name.lower()}"


def style() -> str:
    """The style of the stages' classes."""
    return "".join(
        f".{looks(stage)} {{ --c: {look.colour}; --on: {look.ink}; }}\n"
        for stage, look in LOOKS.items()
    )


def legend() -> str:
    """Colour, short sign and name of each stage, for all who read a timeline."""
    shown = [stage for stage in Stage if stage != Stage.DORMANT]
    entries = "".join(
        f'<li><span class="swatch {looks(s)}" aria-hidden="true">{LOOKS[s].sign}'
        f"</span> {s.name}</li>"
        for s in shown
    )
    return f'<ul class="legend">{entries}</ul>'


def timeline(seeds: Sequence[Seed], last: int) -> str:
    """A row for each seed that has lived, by layer.

    Where there are too many, those that live in the end and those that moved last.

    Args:
      seeds: by layer and number.
      last: the last tick.
    """
    if not seeds:
        return "<p>No seed has germinated in these records.</p>"
    newest = sorted(seeds, key=lambda s: (s.lives, s.spans[-1].start), reverse=True)
    chosen = {(s.layer, s.number) for s in newest[:MOST_SEEDS]}
    shown = [s for s in seeds if (s.layer, s.number) in chosen]
    left_out = len(seeds) - len(shown)
    note = (
        f"<p>{number(left_out)} of {number(len(seeds))} seeds that have lived are not "
        "drawn: those that live in the end and those that moved last are.</p>"
        if left_out
        else ""
    )
    rows = "".join(
        f'<h3 class="layer">{name(layer)}</h3>'
        + "".join(_row(seed, last) for seed in of_layer)
        for layer, of_layer in groupby(shown, key=lambda s: s.layer)
    )
    return f'{note}<div class="tips" data-tips="Stages of each seed">{rows}</div>'


def _row(seed: Seed, last: int) -> str:
    bars = "".join(_bar(seed, span, last) for span in seed.spans)
    return (
        '<div class="lane row seed" role="group" '
        f'aria-label="{text(f"{seed.layer} seed {seed.number}")}">'
        f'<span class="label">seed {seed.number}</span>'
        f'<div class="plot life">{bars}</div></div>'
    )


def _bar(seed: Seed, span: Span, last: int) -> str:
    left = across(span.start, last)
    width = round(across(span.end, last) - left, 3)
    words = span.stage.name
    if width * 8 < 7 * len(words) + 8:  # of a page about 800 pixels wide
        words = LOOKS[span.stage].sign if width * 8 >= 12 else ""
    return (
        f'<span class="tip bar {looks(span.stage)}" role="img" '
        f'style="left:{left}%;width:{width}%" title="{text(_told(seed, span))}">'
        f"{words}{_alpha(span)}</span>"
    )


def _told(seed: Seed, span: Span) -> str:
    """What the tooltip says of a bar."""
    until = "the end of the records" if span.open else f"tick {span.end}"
    lines = [
        f"{seed.layer} seed {seed.number}: {span.stage.name}",
        f"tick {span.start} to {until} ({span.ticks} tick{'s' * (span.ticks != 1)})",
        f"alpha {_alpha_words(span)}",
    ]
    worths = span.worths
    if worths:
        mean = sum(worths) / len(worths)
        lines.append(f"mean worth {number(mean)}, measured at {len(worths)} ticks")
    if span.entered:
        lines.append(span.entered)
    return "\n".join(lines)


def _alpha_words(span: Span) -> str:
    known = [alpha for _, alpha in span.alpha]
    if not known:
        return "not recorded"
    if len(set(known)) == 1:
        return number(known[0])
    return f"from {number(known[0])} to {number(known[-1])}"


def _alpha(span: Span) -> str:
    """How much a seed on the way counts, as an area at the foot of its bar.

    Of seeds that count fully, the page's style draws it.
    """
    if span.stage != Stage.GRAFTING or not span.alpha:
        return ""
    every, length = -(-len(span.alpha) // 100), max(1, span.ticks)
    # Steps, since it changes at ticks alone.
    steps = "".join(
        f"H{100 * (tick - span.start) / length:.4g}V{10 * (1 - alpha):.4g}"
        for tick, alpha in span.alpha[::every]
    )
    return (
        '<svg class="alpha" viewBox="0 0 100 10" preserveAspectRatio="none" '
        f'aria-hidden="true"><path d="M0 10{steps}H100V10z"/></svg>'
    )
