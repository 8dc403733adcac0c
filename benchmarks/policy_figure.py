"""The figure of `policy.py`: when, where and what a learned policy lets be born."""

import json
from pathlib import Path

import numpy as np

__all__ = ["draw"]

KINDS = ("residual_mlp", "context", "low_rank")


def draw(out: Path) -> None:
    """Draws ``births.png`` from ``results.json``: a panel for each task, middle budget.

    Bars are births a run at each tick, by blueprint; the second layer's are hatched.
    Ticks after the last birth of any task are left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    told = json.loads((out / "results.json").read_text())
    rows = [row for row in told["cells"] if row["budget"] == 0.5]
    last = max(np.flatnonzero(np.sum(r["births"], axis=(1, 2)))[-1] for r in rows)
    columns = 5
    height = -(-len(rows) // columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(13, 2.0 * height), squeeze=False, sharey=True
    )
    for axis in axes.flat[len(rows) :]:
        axis.axis("off")
    for axis, row in zip(axes.flat, rows, strict=False):
        births = np.asarray(row["births"])[: last + 2]
        base = np.zeros(len(births))
        for layer in range(births.shape[1]):
            for kind, name in enumerate(KINDS):
                axis.bar(
                    1 + np.arange(len(births)),
                    births[:, layer, kind],
                    bottom=base,
                    color=f"C{kind}",
                    hatch="//" * layer,
                    edgecolor="white",
                    linewidth=0.3,
                    label=f"{name}, layer {layer}",
                )
                base += births[:, layer, kind]
        cell = row["cell"]
        axis.set_title(f"{cell['name']} ({cell['host']})", fontsize=9)
    named = axes[0, 0].get_legend_handles_labels()
    figure.legend(*named, loc="lower right", fontsize=9)
    axes[0, 0].set_ylabel("births a run")
    axes[-1, 0].set_xlabel("tick")
    figure.tight_layout()
    figure.savefig(out / "births.png", dpi=110)
    print(out / "births.png")
