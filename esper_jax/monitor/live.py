"""The live view of a run: a panel on a terminal, plain lines elsewhere."""

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from esper_jax.growth.reports import TickReport
from esper_jax.lifecycle.stages import Stage

__all__ = ["LiveView"]

_STYLES = {
    Stage.DORMANT: "dim",
    Stage.TRAINING: "yellow",
    Stage.GRAFTING: "cyan",
    Stage.FOSSILIZED: "green",
    Stage.CULLED: "red",
    Stage.ROLLED_BACK: "red",
}


class LiveView:
    """Shows progress, loss, accuracy, and one line of seeds by stage per layer.

    A context manager; `update` is called after each tick.

    Args:
      ticks: at which the run ends.
      console: where to print; standard output by default.
      every: ticks between two plain lines where the output is no terminal.
    """

    def __init__(
        self, ticks: int, console: Console | None = None, every: int = 25
    ) -> None:
        self.console = console or Console()
        self._ticks = ticks
        self._every = every
        self._recent: list[str] = []
        self._progress = Progress(
            "tick", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        )
        self._task = self._progress.add_task("", total=ticks)
        self._live = (
            Live(console=self.console, refresh_per_second=8)
            if self.console.is_terminal
            else None
        )

    def __enter__(self) -> "LiveView":
        waiting = "compiling the train step and the tick"
        if self._live is None:
            self._print(waiting)
        else:
            self._live.update(Text(waiting, style="dim"))
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, report: TickReport, events: Iterable[Mapping[str, Any]]) -> None:
        """Shows a tick: ``report`` with host values, and the events of this tick."""
        lines = [f"tick {e['tick']}: {e['layer']} {e['text']}" for e in events]
        if self._live is None:
            for line in lines:
                self._print(line)
            if report.tick % self._every == 0 or report.tick == self._ticks:
                self._print(_metrics(report, self._ticks))
                for name, layer in report.layers.items():
                    self._print(f"  {name}: {_plain(layer.stage)}")
            return
        self._recent = (self._recent + lines)[-6:]
        self._progress.update(self._task, completed=int(report.tick))
        table = Table("layer", "seeds by stage", box=None, header_style="bold")
        for name, layer in report.layers.items():
            table.add_row(name, _coloured(layer.stage))
        self._live.update(
            Group(
                self._progress,
                _metrics(report, self._ticks),
                table,
                *(Text(line, style="dim") for line in self._recent),
            )
        )

    def note(self, line: str) -> None:
        """Shows a line that belongs to no tick's report."""
        if self._live is None:
            self._print(line)
        else:
            self._recent = [*self._recent, line][-6:]

    def _print(self, line: str) -> None:
        # Not wrapped or coloured: these lines are read by programs too.
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _metrics(report: TickReport, ticks: int) -> str:
    return (
        f"tick {int(report.tick)}/{ticks}  step {int(report.step)}  "
        f"train loss {report.train_loss:.4f}  held-out loss {report.loss:.4f}  "
        f"accuracy {report.accuracy:.4f}"
    )


def _counts(stages: Any) -> list[tuple[Stage, int]]:
    present, counts = np.unique(np.asarray(stages), return_counts=True)
    return [(Stage(s), int(n)) for s, n in zip(present, counts, strict=True)]


def _plain(stages: Any) -> str:
    return "  ".join(f"{stage.name} {n}" for stage, n in _counts(stages))


def _coloured(stages: Any) -> str:
    return "  ".join(
        f"[{_STYLES.get(stage, 'magenta')}]{stage.name} {n}[/]"
        for stage, n in _counts(stages)
    )
