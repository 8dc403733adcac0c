"""Runs the snippets of docs/tutorial.md and draws its pictures from what they did.

python examples/tutorial.py --out docs/pictures
"""

import argparse
import contextlib
import re
import tempfile
from itertools import groupby
from pathlib import Path

import numpy as np

from esper_jax import Stage
from esper_jax.lifecycle.looks import LOOKS

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"


def run() -> dict:
    """What the snippets leave behind, by name."""
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
    return names


def draw_accuracy(path: Path, history: list) -> None:
    """Accuracy by tick, and where seeds were kept."""
    figure, axes = _axes(2.6, len(history))
    ticks = [int(report.tick) for report in history]
    axes.plot(ticks, [float(r.accuracy) for r in history], color="black", linewidth=1.5)
    stages = np.array([r.layers["trunk"].stage for r in history])
    kept = np.argmax(stages == Stage.FOSSILIZED, axis=0)[
        (stages == Stage.FOSSILIZED).any(axis=0)
    ]
    for n, tick in enumerate(sorted(ticks[k] for k in kept)):
        label = "a seed is kept" if n == 0 else None
        axes.axvline(tick, color=LOOKS[Stage.FOSSILIZED].colour, label=label)
    if len(kept):
        axes.legend(loc=(0.3, 0.1), frameon=False)
    axes.set_ylabel("accuracy on held-out data")
    figure.savefig(path)


def draw_lives(path: Path, history: list) -> None:
    """A row of stages for each seed."""
    figure, axes = _axes(2.4, len(history))
    stages = np.array([r.layers["trunk"].stage for r in history])
    for seed, row in enumerate(stages.T):
        at = 0
        for code, span in groupby(row):
            stage, start = Stage(code), at
            at += len([*span])
            if stage == Stage.DORMANT:
                continue
            look = LOOKS[stage]
            bar = (start + 1, at - start)
            axes.broken_barh([bar], (seed - 0.4, 0.8), color=look.colour)
            axes.text(
                start + 1.15, seed, look.sign, color=look.ink, va="center", fontsize=8
            )
    axes.set_yticks(range(stages.shape[1]), [f"seed {n}" for n in range(len(stages.T))])
    axes.invert_yaxis()
    shown = [s for s in Stage if (stages == s).any() and s != Stage.DORMANT]
    signs = " | ".join(f"{LOOKS[s].sign} {s.name}" for s in shown)
    figure.text(0.54, 0.02, signs, ha="center", fontsize=8)
    figure.savefig(path)


def _axes(height: float, ticks: int) -> tuple:
    """A figure of one panel, the same on every machine."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "tutorial"}
    figure = Figure(figsize=(8, height), facecolor="white")
    axes = figure.subplots()
    figure.subplots_adjust(left=0.1, right=0.98, top=0.95, bottom=0.27)
    axes.set_xlim(0, ticks + 1)
    axes.set_xlabel("tick (epoch)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGE.parent / "pictures")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    history = run()["history"]
    draw_accuracy(out / "accuracy.svg", history)
    draw_lives(out / "lives.svg", history)
