"""A picture of a run: accuracy over time, and below it what happened to the seeds.

Needs matplotlib, the extra ``plot``.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["accuracy"]

_MARKS = {
    "germinate": ("o", "tab:olive", ("GERMINATED",)),
    "are grafted": ("^", "tab:blue", ("GRAFTING",)),
    "are kept": ("*", "tab:green", ("FOSSILIZED",)),
    "are culled": ("x", "tab:red", ("CULLED", "ROLLED_BACK")),
}
"""What seeds do: marker, colour, and the stages that they come to."""


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

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    when = [t["tick"] for t in ticks]
    measured = [float("nan") if t["accuracy"] is None else t["accuracy"] for t in ticks]
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
    axes.set_ylabel("accuracy on held-out data")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    for row, (mark, colour, stages) in enumerate(_MARKS.values()):
        count = Counter(
            e["tick"]
            for e in events
            if e["to"] in stages and e["outcome"] == "OK" and e["tick"] in when
        )
        strip.scatter(list(count), [row] * len(count), marker=mark, color=colour)
        for tick, seeds in count.items():
            axes.axvline(tick, color=colour, alpha=0.25, linewidth=1)
            if seeds > 1:
                strip.annotate(
                    f"{seeds}",
                    (tick, row),
                    textcoords="offset points",
                    xytext=(5, -3),
                    fontsize="x-small",
                )
    strip.set_yticks(range(len(_MARKS)), [f"seeds {label}" for label in _MARKS])
    strip.set_ylim(len(_MARKS) - 0.5, -0.5)
    strip.set_xlabel("tick (epoch)")
    figure.savefig(path, dpi=120)
