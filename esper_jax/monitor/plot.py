"""A picture of a run: accuracy over time, with what happened to the seeds on it.

Needs matplotlib, the extra ``plot``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["accuracy"]

_MARKS = {
    "GERMINATED": ("o", "tab:olive", "germinates"),
    "GRAFTING": ("^", "tab:blue", "is grafted"),
    "FOSSILIZED": ("*", "tab:green", "is kept"),
    "CULLED": ("x", "tab:red", "is culled"),
    "ROLLED_BACK": ("x", "tab:red", "is culled"),
}


def accuracy(
    path: Path,
    ticks: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    static: Mapping[str, Any] | None = None,
) -> None:
    """Draws held-out accuracy over the ticks into an image file.

    Args:
      path: of the image; its suffix names the kind.
      ticks: each with ``tick`` and ``accuracy`` (None where it was not measured).
      events: those of `run.EventLog`; the accepted ones are marked.
      static: the twin, with ``history``, ``parameters`` and ``accuracy``, if any.
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    when = [t["tick"] for t in ticks]
    measured = [float("nan") if t["accuracy"] is None else t["accuracy"] for t in ticks]
    height = dict(zip(when, measured, strict=True))
    axes.plot(when, measured, color="black", linewidth=1.2, label="grown")
    if static is not None:
        history = static["history"]
        axes.plot(
            range(1, len(history) + 1),
            history,
            color="tab:orange",
            linewidth=1.2,
            label=f"static, {static['parameters']} parameters",
        )
    labelled: set[str] = set()
    for stage, (mark, colour, label) in _MARKS.items():
        at = [
            e["tick"]
            for e in events
            if e["to"] == stage and e["outcome"] == "OK" and e["tick"] in height
        ]
        if at:
            places = sorted(set(at))
            axes.scatter(
                places,
                [height[tick] for tick in places],
                marker=mark,
                s=130 if mark == "*" else 60,
                color=colour,
                zorder=3,
                label=None if label in labelled else f"a seed {label}",
            )
            for tick in places:
                if at.count(tick) > 1:
                    axes.annotate(
                        f"{at.count(tick)}",
                        (tick, height[tick]),
                        textcoords="offset points",
                        xytext=(6, 6),
                        color=colour,
                    )
            labelled.add(label)
    axes.set_xlabel("tick (epoch)")
    axes.set_ylabel("accuracy on held-out data")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
