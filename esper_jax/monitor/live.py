"""The live view of a run: a panel on a terminal, plain lines elsewhere."""

import contextlib
import datetime
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from esper_jax.growth.reports import TickReport
from esper_jax.monitor.curves import BLOCKS, PLAIN, Curve
from esper_jax.monitor.lattice import PLAIN_SHADES, SHADES, counts, lattice, legend

__all__ = ["LiveView"]

_MOST_LAYERS = 12
"""Layers that plain lines tell apart."""

_ECHO = 3
"""Columns that stay free. A terminal writes ``^C`` there; in a full line, it would go
on to the next one, and the panel be drawn again below itself."""

_NOTES = 6
"""Lines of what has happened in the panel."""

_REDRAW = 0.25
"""Seconds between two drawings of the panel, at least; one takes some milliseconds."""

_WINDOW = 20
"""Ticks that the speed is the mean over."""


class _Console(Console):
    """Where nobody reads any more, goes on in silence."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class LiveView:
    """Shows progress, speed, curves of the losses and the accuracy, and all seeds.

    Redraws one panel on a terminal, and prints plain lines elsewhere. A context
    manager; call `update` after each tick. Training is worth more than what is said of
    it: if the output cannot be written, the view falls silent. In a loop of one's own:
    ``view.update(report, monitor.write(report))``.

    Args:
      ticks: number of the last tick.
      console: where to print; standard output by default.
      every: without a terminal, print losses and seeds every so many ticks.
      clock: gives seconds; their origin does not matter.
    """

    def __init__(
        self,
        ticks: int,
        console: Console | None = None,
        every: int = 25,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or _Console()
        self._ticks = ticks
        self._every = every
        self._clock = clock
        self._recent: deque[str] = deque(maxlen=_NOTES)
        self._passed: deque[tuple[float, int, int]] = deque(maxlen=_WINDOW + 1)
        self._curves = {name: Curve() for name in _MEASURED}
        self._report: TickReport | None = None
        self._drawn = -_REDRAW
        self._live = (
            Live(console=self.console, auto_refresh=False, get_renderable=self._panel)
            if self.console.is_terminal
            else None
        )

    def __enter__(self) -> "LiveView":
        if self._live is None:
            self._print(_WAITING)
        else:
            with self._showing():
                self._live.start(refresh=True)
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
          events: of the tick, as `EventLog.add` and `Monitor.write` return them.
        """
        self._report = report
        now = self._clock()
        self._passed.append((now, int(report.tick), int(report.step)))
        for name, field in _MEASURED.items():
            self._curves[name].add(getattr(report, field))
        for event in events:
            self.note(f"tick {event['tick']}: {event['layer']} {event['text']}")
        if self._live is not None:
            if now - self._drawn >= _REDRAW:
                self._drawn = now
                with self._showing():
                    self._live.refresh()
        elif report.tick % self._every == 0 or report.tick == self._ticks:
            self._print(_metrics(report, self._ticks))
            for line in _seeds(report):
                self._print(f"  {line}")

    def note(self, line: str) -> None:
        """Shows a line; on a terminal from the next drawing on, among the last six.

        Before the view is entered, and after it is left, it is a line of its own.
        """
        if self._live is None or not self._live.is_started:
            self._print(line)
        else:
            self._recent.append(line)

    def _panel(self) -> Group | Text:
        """What the terminal shows; fits into it, so that nothing scrolls."""
        if self._report is None:
            return Text(_WAITING, style="dim")
        width, height = self.console.size
        width = max(1, width - _ECHO)
        narrow = self.console.options.ascii_only
        marks, shades = (PLAIN, PLAIN_SHADES) if narrow else (BLOCKS, SHADES)
        curves = [
            f"{name:<13}  {getattr(self._report, field):8.4f}  "
            + self._curves[name].line(max(1, width - 26), marks)
            for name, field in _MEASURED.items()
        ]
        layers = self._report.layers
        notes = [Text(line, style="dim") for line in self._recent]
        # Two lines for the legend, and one stays free for the cursor.
        room = max(1, height - 4 - len(curves) - len(notes))
        shown, each = lattice(layers, width, room, shades)
        lines = [
            Text(self._progress(width, "=-" if narrow else "━─")),
            *map(Text, curves),
            *shown,
            *legend(layers, each, width),
            *notes,
        ]
        for line in lines:
            line.truncate(width, overflow="crop" if narrow else "ellipsis")
        return Group(*lines)

    def _progress(self, width: int, marks: str) -> str:
        """Tick, bar, steps per second, and the time that is left."""
        assert self._report is not None
        tick = int(self._report.tick)
        left = f"tick {tick}/{self._ticks}  step {int(self._report.step)}"
        right = self._speed(tick)
        room = max(0, width - len(left) - len(right) - 4)
        done = round(room * min(1.0, tick / self._ticks))
        return f"{left}  {marks[0] * done}{marks[1] * (room - done)}  {right}"

    def _speed(self, tick: int) -> str:
        (began, first, start), (now, _, step) = self._passed[0], self._passed[-1]
        if now <= began or step <= start:
            return ""
        rate = (step - start) / (now - began)
        seconds = (self._ticks - tick) * (now - began) / (tick - first)
        left = datetime.timedelta(seconds=round(seconds))
        return f"{rate:.{0 if rate >= 100 else 1}f} steps/s  {left} left"

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


_WAITING = "compiling the train step and the tick"

_MEASURED = {
    "train loss": "train_loss",
    "held-out loss": "loss",
    "accuracy": "accuracy",
}
"""Fields of a report that are drawn as curves, by what they are called."""


def _metrics(report: TickReport, ticks: int) -> str:
    measured = "  ".join(f"{n} {getattr(report, f):.4f}" for n, f in _MEASURED.items())
    return f"tick {int(report.tick)}/{ticks}  step {int(report.step)}  {measured}"


def _seeds(report: TickReport) -> Iterator[str]:
    """How many seeds are in which stage, by layer unless there are many."""
    parts = {name: {name: layer} for name, layer in report.layers.items()}
    if len(parts) > _MOST_LAYERS:
        parts = {f"{len(parts)} layers": report.layers}
    for name, layers in parts.items():
        yield f"{name}: " + "  ".join(f"{s.name} {n}" for s, n in counts(layers))
