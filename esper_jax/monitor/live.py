"""The live view of a run: a panel on a terminal, plain lines elsewhere."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
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


class _Console(Console):
    """Where nobody reads any more, goes on in silence."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class LiveView:
    """Shows progress, losses, accuracy, and each layer's seeds counted by stage.

    Redraws one panel on a terminal, and prints plain lines elsewhere. A context
    manager; call `update` after each tick. Training is worth more than what is said of
    it: if the output cannot be written, the view falls silent.

    Args:
      ticks: number of the last tick.
      console: where to print; standard output by default.
      every: without a terminal, print losses and seeds every so many ticks.
    """

    def __init__(
        self, ticks: int, console: Console | None = None, every: int = 25
    ) -> None:
        self.console = console or _Console()
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
            with self._showing():
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
            with self._showing():
                self._live.stop()

    def update(self, report: TickReport, events: Iterable[Mapping[str, Any]]) -> None:
        """Shows a tick.

        Args:
          report: of the tick, with host values.
          events: of the tick, as `EventLog.add` returns them.
        """
        for event in events:
            self.note(f"tick {event['tick']}: {event['layer']} {event['text']}")
        if self._live is not None:
            with self._showing():
                self._redraw(self._live, report)
        elif report.tick % self._every == 0 or report.tick == self._ticks:
            self._print(_metrics(report, self._ticks))
            for name, layer in report.layers.items():
                self._print(f"  {name}: {_plain(layer.stage)}")

    def note(self, line: str) -> None:
        """Shows a line; on a terminal from the next `update` on, among the last six."""
        if self._live is None:
            self._print(line)
        else:
            self._recent = [*self._recent, line][-6:]

    def _redraw(self, live: Live, report: TickReport) -> None:
        self._progress.update(self._task, completed=int(report.tick))
        table = Table("layer", "seeds by stage", box=None, header_style="bold")
        for name, layer in report.layers.items():
            table.add_row(name, _coloured(layer.stage))
        live.update(
            Group(
                self._progress,
                _metrics(report, self._ticks),
                table,
                *(Text(line, style="dim") for line in self._recent),
            )
        )

    def _print(self, line: str) -> None:
        # No wrapping and no colours, because programs read these lines too.
        with self._showing():
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def _showing(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # a terminal that is gone, a disk that is full
            self.console.quiet = True


def _metrics(report: TickReport, ticks: int) -> str:
    return (
        f"tick {int(report.tick)}/{ticks}  step {int(report.step)}  "
        f"train loss {report.train_loss:.4f}  held-out loss {report.loss:.4f}  "
        f"accuracy {report.accuracy:.4f}"
    )


def _counts(stages: Any) -> list[tuple[Stage, int]]:
    """Stages that occur, and how many seeds are in each."""
    present, counts = np.unique(np.asarray(stages), return_counts=True)
    return [(Stage(s), int(n)) for s, n in zip(present, counts, strict=True)]


def _plain(stages: Any) -> str:
    return "  ".join(f"{stage.name} {n}" for stage, n in _counts(stages))


def _coloured(stages: Any) -> str:
    return "  ".join(
        f"[{_STYLES.get(stage, 'magenta')}]{stage.name} {n}[/]"
        for stage, n in _counts(stages)
    )
