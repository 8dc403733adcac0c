"""What the model has become: each layer's chunks, and what has grown in them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from esper_jax.lifecycle.stages import Stage
from esper_jax.markup import number, text
from esper_jax.monitor.page.lives import Seed
from esper_jax.monitor.page.records import Records, items, whole
from esper_jax.monitor.page.tables import blueprint_of
from esper_jax.monitor.page.timeline import looks

__all__ = ["topology"]

WIDTH = 960
MOST_LAYERS, MOST_CELLS, MOST_PARTS = 60, 240, 16
"""Layers that are drawn; chunks of a layer that are drawn one by one; chunks of a layer
below which there is room to draw what grew in them."""


class _Layer(NamedTuple):
    """A layer that can grow, in the end."""

    name: str
    features: int | None
    chunks: int
    sure: bool
    """Whether the number of chunks is recorded."""
    seeds: Mapping[int, Seed]
    """Those that have lived, by number."""

    @property
    def stages(self) -> list[Stage]:
        """Of each chunk's seed."""
        return [
            self.seeds[n].last if n in self.seeds else Stage.DORMANT
            for n in range(self.chunks)
        ]

    @property
    def title(self) -> str:
        """What stands over it."""
        counts = Counter(self.stages)
        told = ", ".join(f"{number(counts[s])} {s.name}" for s in Stage if counts[s])
        width = "" if self.features is None else f"{number(self.features)} features in "
        chunks = f"{'' if self.sure else 'at least '}{number(self.chunks)} chunks"
        return f"{self.name}: {width}{chunks} ({told})"


def topology(records: Records, seeds: Sequence[Seed]) -> str:
    """The layers that can grow, drawn from the input down."""
    layers = _layers(records, seeds)
    if not layers:
        return "<p>These records do not say which layers can grow.</p>"
    chain = _is_chain(records)
    y, parts = 8, []
    if chain:
        parts.append(_word(y + 14, "input"))
        y += 22
    for layer in layers[:MOST_LAYERS]:
        if chain:
            parts.append(_arrow(y))
            y += 22
        drawn, height = _layer(records, layer, y)
        parts.append(drawn)
        y += height + (4 if chain else 14)
    if chain:
        parts += [_arrow(y), _word(y + 36, "output")]
        y += 44
    left_out = len(layers) - MOST_LAYERS
    notes = [] if chain else ["The records do not say how these layers are connected."]
    if left_out > 0:
        notes.append(f"{left_out} more layers are not drawn.")
    label = "Topology in the end. " + ". ".join(x.title for x in layers[:MOST_LAYERS])
    return (
        "".join(f"<p>{note}</p>" for note in notes)
        + '<div class="scroll" tabindex="0" role="group" '
        'aria-label="Topology, may be scrolled sideways">'
        f'<svg class="topology" viewBox="0 0 {WIDTH} {y + 4}" role="img" '
        f'aria-label="{text(label)}">{"".join(parts)}</svg></div>'
    )


def _is_chain(records: Records) -> bool:
    """Whether the model is the built-in perceptron, whose layers follow each other."""
    return not items(records.config.get("model")).get("factory")


def _layers(records: Records, seeds: Sequence[Seed]) -> list[_Layer]:
    growth = items(records.config.get("growth"))
    named = growth.get("layers")
    hidden = items(records.config.get("model")).get("hidden")
    widths: dict[str, Any] = dict.fromkeys(named if isinstance(named, list) else ())
    if _is_chain(records) and isinstance(hidden, list):
        widths = {f"layers/{n}": width for n, width in enumerate(hidden)}
    lived: dict[str, dict[int, Seed]] = {}
    for seed in seeds:
        lived.setdefault(seed.layer, {})[seed.number] = seed
    if records.layers:
        widths = dict.fromkeys(records.layers)
    elif any("[" in layer for layer in lived):  # a name that stands for a whole stack
        widths = {}
    found = []
    for layer in [*widths, *(x for x in lived if x not in widths)]:
        told = items(records.layers.get(layer))
        # A model of one's own that is growable already has numbers of its own.
        of_config = whole(growth.get("num_seeds")) if layer in widths else None
        exact = whole(told.get("num_seeds")) or of_config
        of_layer = lived.get(layer, {})
        least = max((*of_layer, 0)) + 1
        found.append(
            _Layer(
                layer,
                whole(told.get("features")) or whole(widths.get(layer)),
                max(exact or 0, least),
                exact is not None,
                of_layer,
            )
        )
    return found


def _layer(records: Records, layer: _Layer, y: int) -> tuple[str, int]:
    """A layer as SVG, and how high it is."""
    top, height = y + 20, 30
    head = f'<text class="title" x="0" y="{y + 12}">{text(layer.title)}</text>'
    if layer.chunks > MOST_CELLS:
        return head + _shares(layer, top, height), 20 + height
    width = WIDTH / layer.chunks
    cells = "".join(
        _cell(records, layer, n, stage, (n * width, top, width, height))
        for n, stage in enumerate(layer.stages)
    )
    grown = {n: s for n, s in layer.seeds.items() if s.lives}
    if not grown or layer.chunks > MOST_PARTS:
        return head + cells, 20 + height
    boxes = "".join(
        _part(records, seed, (n * width, top + height, width))
        for n, seed in grown.items()
    )
    return head + cells + boxes, 20 + height + 56


_Box = tuple[float, float, float, float]


def _cell(records: Records, layer: _Layer, n: int, stage: Stage, box: _Box) -> str:
    x, y, width, height = box
    seed = layer.seeds.get(n)
    grown = f", {blueprint_of(records, seed)}" if seed and seed.lives else ""
    label = ""
    if width >= 26:
        words = f"{n} {stage.name}" if width >= 9 * len(stage.name) + 24 else str(n)
        label = (
            f'<text class="on {looks(stage)}" x="{x + width / 2:.1f}" y="{y + 20}">'
            f"{words}</text>"
        )
    gap = 1.5 if width > 8 else 0.25
    return (
        f"<g><title>{text(f'seed {n}: {stage.name}{grown}')}</title>"
        f'<rect class="cell {looks(stage)}" x="{x + gap:.1f}" y="{y}" '
        f'width="{max(width - 2 * gap, 0.5):.1f}" height="{height}" rx="3"/>{label}</g>'
    )


def _part(records: Records, seed: Seed, box: tuple[float, float, float]) -> str:
    """What has grown in a chunk, hanging from it."""
    x, y, width = box
    middle, name = x + width / 2, blueprint_of(records, seed)
    room = max(3, int((width - 12) / 7.2))
    words = name if len(name) <= room else name[: room - 1] + "…"
    count = seed.parameters
    cost = "" if count is None else f"{number(count)} par."
    return (
        f"<g><title>{text(f'{name} {cost}')}</title>"
        f'<path class="link" d="M{middle:.1f} {y}v12"/>'
        f'<rect class="part {looks(seed.last)}" x="{x + 4:.1f}" y="{y + 12}" '
        f'width="{width - 8:.1f}" height="40" rx="5"/>'
        f'<text class="in" x="{middle:.1f}" y="{y + 29}">{text(words)}</text>'
        f'<text class="in dim" x="{middle:.1f}" y="{y + 45}">'
        f"{cost if len(cost) <= room else ''}</text></g>"
    )


def _shares(layer: _Layer, y: int, height: int) -> str:
    """Many chunks as shares of one strip, by stage."""
    counts, x, parts = Counter(layer.stages), 0.0, []
    for stage in sorted(counts, reverse=True):
        # A few among thousands are to be seen, too.
        width = max(3.0, (WIDTH - 33) * counts[stage] / layer.chunks)
        parts.append(
            f"<g><title>{number(counts[stage])} {stage.name}</title>"
            f'<rect class="cell {looks(stage)}" x="{x:.1f}" y="{y}" '
            f'width="{width:.1f}" height="{height}"/></g>'
        )
        x += width
    return "".join(parts)


def _word(y: float, word: str) -> str:
    return f'<text class="in" x="{WIDTH / 2}" y="{y}">{word}</text>'


def _arrow(y: float) -> str:
    x = WIDTH / 2
    return f'<path class="link" d="M{x} {y}v16m-4 -5l4 5l4 -5"/>'
