"""The seeds of layers as notebooks and terminals show them."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from esper_jax.lifecycle.looks import LOOKS
from esper_jax.lifecycle.stages import LIVING, Stage
from esper_jax.lifecycle.state import SeedState, coefficients
from esper_jax.markup import name, number, table, text

__all__ = ["LayerSeeds", "html_of", "seeds_in", "words_of"]

MOST_LAYERS, MOST_CHUNKS, MOST_SEEDS = 100, 64, 40
"""Layers that are shown; chunks of a layer that are drawn; living seeds that are listed
of a layer."""


class LayerSeeds(NamedTuple):
    """The seeds of one layer, by number."""

    layer: str
    stage: np.ndarray
    alpha: np.ndarray
    worth: np.ndarray
    """NaN is not measured."""
    blueprint: np.ndarray
    names: tuple[str, ...] = ()
    """Of the blueprints, by id; empty if they are not known."""

    @property
    def living(self) -> list[int]:
        """Seeds that own a slot."""
        return np.flatnonzero(LIVING[self.stage]).tolist()

    @property
    def counts(self) -> str:
        """How many seeds are in each stage."""
        found = Counter(self.stage.tolist())
        return ", ".join(f"{number(found[s])} {s.name}" for s in Stage if found[s])

    def grown(self, seed: int) -> str:
        """The blueprint of a living seed: its name, or its id."""
        kind = int(self.blueprint[seed])
        known = 0 <= kind < len(self.names)
        return self.names[kind] if known else f"blueprint {kind}"


def seeds_in(layer: str, state: SeedState, names: Sequence[str]) -> list[LayerSeeds]:
    """The seeds of a layer, or of each layer of a stack.

    Args:
      layer: its name.
      state: of its seeds; leading axes are those of a stack.
      names: of its blueprints, by id.

    Returns:
      One entry a layer; none if the state holds no values, as inside of `jax.jit`.
    """
    arrays = state.stage, state.worth, state.blueprint
    if not all(isinstance(x, np.ndarray | jax.Array) for x in arrays) or any(
        isinstance(x, jax.core.Tracer) for x in arrays
    ):
        return []
    stage, worth, kind = map(np.asarray, arrays)
    alpha = np.asarray(coefficients(state)[0])
    return [
        LayerSeeds(
            layer=f"{layer}[{','.join(map(str, index))}]" if index else layer,
            stage=stage[index],
            alpha=alpha[index],
            worth=worth[index],
            blueprint=kind[index],
            names=tuple(names),
        )
        for index in np.ndindex(stage.shape[:-1])
    ]


def words_of(layers: Sequence[LayerSeeds]) -> str:
    """The seeds as plain lines: a layer, and below it each living seed."""
    lines = []
    for layer in layers[:MOST_LAYERS]:
        lines.append(f"{layer.layer or 'layer'}: {layer.counts}")
        for seed, stage, grown, alpha, worth in _living(layer):
            lines.append(
                f"  seed {seed}: {stage.name}, {grown}, alpha {alpha}, worth {worth}"
            )
    if len(layers) > MOST_LAYERS:
        lines.append(f"and {len(layers) - MOST_LAYERS} more layers")
    return "\n".join(lines) or "no seeds whose values are known"


def html_of(layers: Sequence[LayerSeeds], head: str = "") -> str:
    """The seeds as HTML: chunks by stage, and a table of the living ones.

    It has no script and no style beyond its own elements, so that it stays what it is
    in any notebook, light or dark.

    Args:
      layers: to show.
      head: HTML that stands above them.
    """
    shown = "".join(map(_layer, layers[:MOST_LAYERS]))
    more = len(layers) - MOST_LAYERS
    rest = f"<p>and {more} more layers</p>" if more > 0 else ""
    empty = "" if layers else "<p>no seeds whose values are known</p>"
    style = "font:13px/1.5 system-ui,sans-serif;color:inherit"
    return f'<div class="esper-jax" style="{style}">{head}{shown}{rest}{empty}</div>'


def _living(layer: LayerSeeds) -> list[tuple[int, Stage, str, str, str]]:
    """Number, stage, blueprint, alpha and worth of the first living seeds."""
    return [
        (
            seed,
            Stage(layer.stage[seed]),
            layer.grown(seed),
            number(float(layer.alpha[seed])),
            _worth(Stage(layer.stage[seed]), float(layer.worth[seed])),
        )
        for seed in layer.living[:MOST_SEEDS]
    ]


def _worth(stage: Stage, worth: float) -> str:
    if stage == Stage.FOSSILIZED and not np.isfinite(worth):
        return "judged when it was kept: mean_worth in that tick's report"
    return number(worth if np.isfinite(worth) else None)


def _layer(layer: LayerSeeds) -> str:
    drawn = "".join(map(_chunk, layer.stage[:MOST_CHUNKS], range(MOST_CHUNKS)))
    more = len(layer.stage) - MOST_CHUNKS
    rest = f" and {number(more)} more" if more > 0 else ""
    listed = ""
    if layer.living:
        left_out = len(layer.living) - MOST_SEEDS
        listed = table(
            f"living seeds{f', the first {MOST_SEEDS}' * (left_out > 0)}",
            ["seed", "stage", "blueprint", "alpha", "worth"],
            (
                [number(seed), _chip(stage, stage.name), text(grown), alpha, worth]
                for seed, stage, grown, alpha, worth in _living(layer)
            ),
        )
    title = f"<b>{name(layer.layer)}</b> " if layer.layer else ""
    return (
        f'<div style="margin:.5em 0">{title}{layer.counts}'
        f'<div style="margin:.2em 0">{drawn}{rest}</div>{listed}</div>'
    )


def _chunk(stage: int, seed: int) -> str:
    look = Stage(stage)
    return _chip(look, LOOKS[look].sign, f"seed {seed}: {look.name}")


def _chip(stage: Stage, words: str, title: str = "") -> str:
    look = LOOKS[stage]
    style = (
        f"display:inline-block;min-width:1.6em;padding:0 .3em;margin:0 1px 2px 0;"
        f"border:1px solid #8a9099;border-radius:3px;text-align:center;"
        f"background:{look.colour};color:{look.ink}"
    )
    told = f' title="{text(title)}" role="img" aria-label="{text(title)}"'
    return f'<span style="{style}"{told * bool(title)}>{words}</span>'
