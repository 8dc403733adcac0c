"""All seeds at a glance: a character each, or for some of them together."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from rich.text import Text

from esper_jax.growth.reports import LayerReport
from esper_jax.lifecycle.stages import NUM_STAGES, Stage

__all__ = ["PLAIN_SHADES", "SHADES", "STYLES", "counts", "lattice", "legend"]

SHADES = "·░▒▓█"
"""A dormant seed, and others by how much they count: not, less than half, more, all."""

PLAIN_SHADES = ".ox%#"
"""The same in ASCII."""

STYLES = {
    Stage.DORMANT: "dim",
    Stage.GERMINATED: "magenta",
    Stage.TRAINING: "yellow",
    Stage.GRAFTING: "cyan",
    Stage.STABILIZATION: "bright_cyan",
    Stage.EVALUATING: "blue",
    Stage.FINE_TUNING: "bright_blue",
    Stage.FOSSILIZED: "green",
    Stage.CULLED: "red",
    Stage.CANCELLED: "red",
    Stage.ROLLED_BACK: "bright_red",
}
"""Colours of the stages."""

_NAME = 20
"""Characters of a layer's name, at most; its end tells layers apart."""


def counts(layers: Mapping[str, LayerReport]) -> list[tuple[Stage, int]]:
    """Stages that occur, and how many seeds are in each."""
    stages = [np.ravel(layer.stage) for layer in layers.values()]
    codes = np.concatenate(stages) if stages else np.zeros(0, np.int8)
    present, number = np.unique(codes, return_counts=True)
    return [(Stage(s), int(n)) for s, n in zip(present, number, strict=True)]


def legend(layers: Mapping[str, LayerReport], each: int, width: int) -> list[Text]:
    """How many seeds are in each stage, in the stage's colour.

    Args:
      layers: by name.
      each: seeds that share a character of the lattice, at most.
      width: characters of a line.
    """
    parts = [Text(f"{s.name} {n}", style=STYLES[s]) for s, n in counts(layers)]
    if each > 1:
        parts.append(Text(f"up to {each} seeds a character", style="dim"))
    lines = [Text()]
    for part in parts:
        if lines[-1] and len(lines[-1]) + 2 + len(part) > width:
            lines.append(Text())
        lines[-1].append(Text("  ") if lines[-1] else Text()).append(part)
    return lines


def lattice(
    layers: Mapping[str, LayerReport], width: int, height: int, shades: str = SHADES
) -> tuple[list[Text], int]:
    """Lines with a character for each seed, in its stage's colour.

    Where seeds are too many, neighbours of a layer share a character: the stage that
    most of them are in, dormant ones aside, and the mean of their alphas. Where layers
    are too many, the last line is of those that are left.

    Args:
      layers: by name.
      width: characters of a line.
      height: lines, at most; at least 1.
      shades: a dormant seed, and four levels of alpha.

    Returns:
      The lines, and how many seeds share a character, at most.
    """
    rows: list[tuple[str, list[LayerReport]]] = [(n, [x]) for n, x in layers.items()]
    if len(rows) > height:
        rest = [layer for _, of in rows[height - 1 :] for layer in of]
        rows = [*rows[: height - 1], (f"{len(rest)} more layers", rest)]
    name_width = 1 + min(_NAME, max((len(name) for name, _ in rows), default=0))
    cells = max(1, width - name_width)
    deep = max(1, height // max(1, len(rows)))
    lines, most = [], 1
    for name, of in rows:
        stage, alpha = _columns(of)
        each = max(1, math.ceil(stage.size / (cells * deep)))
        most = max(most, each)
        shown = _shared(stage, alpha, each)
        for first in range(0, len(shown), cells):
            line = Text(("" if first else _short(name)).ljust(name_width))
            for code, level in shown[first : first + cells]:
                line.append(shades[level], style=STYLES[Stage(code)])
            lines.append(line)
    return lines, most


def _short(name: str) -> str:
    return name if len(name) <= _NAME else "~" + name[1 - _NAME :]


def _columns(
    layers: Sequence[LayerReport],
) -> tuple[Int[np.ndarray, " S"], Float[np.ndarray, " S"]]:
    """Stage and alpha of all seeds."""
    stage, alpha = (
        np.concatenate([np.ravel(getattr(layer, field)) for layer in layers])
        for field in ("stage", "alpha")
    )
    return stage, alpha


def _shared(stage: Any, alpha: Any, each: int) -> list[tuple[int, int]]:
    """Stage and level of shade of characters that ``each`` seeds share."""
    cell = np.arange(stage.size) // each
    number = math.ceil(stage.size / each)
    held = np.zeros((number, NUM_STAGES), np.int64)
    np.add.at(held, (cell, stage), 1)
    held[:, Stage.DORMANT] = 0
    awake = held.sum(axis=1)
    total = np.bincount(cell, np.where(stage == Stage.DORMANT, 0, alpha), number)
    mean = total / np.maximum(awake, 1)
    # Where all are dormant, the first of equal counts is that of DORMANT.
    level = np.where(awake > 0, 1 + (mean > 0) + (mean >= 0.5) + (mean >= 1), 0)
    return list(zip(held.argmax(axis=1).tolist(), level.tolist(), strict=True))
