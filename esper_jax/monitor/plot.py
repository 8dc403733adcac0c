"""A picture of a run: accuracy over time, and below it what happened to the seeds.

Needs matplotlib, which the extra ``plot`` installs.
"""

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

__all__ = ["accuracy"]

_MARKS = {
    "germinate": ("o", "tab:olive", ("GERMINATED",)),
    "are grafted": ("^", "tab:blue", ("GRAFTING",)),
    "are kept": ("*", "tab:green", ("FOSSILIZED",)),
    "are culled": ("x", "tab:red", ("CULLED", "ROLLED_BACK")),
}
"""Label of each row of marks: marker, colour, and the stages that seeds enter."""


def accuracy(
    path: Path,
    ticks: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    static: Mapping[str, Any] | None = None,
    note: str = "",
) -> None:
    """Draws held-out accuracy over the ticks into an image file.

    Args:
      path: of the image; the suffix chooses the format.
      ticks: each with ``tick`` and ``accuracy``, which is None if not measured.
      events: as `EventLog.events` holds them; transitions that happened are marked.
      static: the static twin, if there is one, with ``history`` (accuracy after each
        tick) and ``parameters``.
      note: what is wrong with the records; stands above the curves.
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    _draw_accuracy(axes, ticks, static)
    if note:
        axes.set_title(f"incomplete: {note}", color="tab:red", fontsize="small")
    _draw_events(strip, {t["tick"] for t in ticks}, events, axes)
    strip.set_xlabel("tick (epoch)")
    figure.savefig(path, dpi=120)


def _draw_accuracy(
    axes: Any, ticks: Sequence[Mapping[str, Any]], static: Mapping[str, Any] | None
) -> None:
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


def _draw_events(
    strip: Any, shown: Set[int], events: Sequence[Mapping[str, Any]], axes: Any
) -> None:
    """A row of marks for each kind of event, and lines through the curves above.

    Args:
      strip: axes of the marks.
      shown: the ticks that the curves cover; events at others are left out.
      events: of the run.
      axes: of the curves.
    """
    for row, (mark, colour, stages) in enumerate(_MARKS.values()):
        count = Counter(
            e["tick"]
            for e in events
            if e["to"] in stages and e["outcome"] == "OK" and e["tick"] in shown
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
