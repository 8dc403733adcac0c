"""What a run tells, shown on a terminal or in lines."""

import logging
import time
from collections import Counter, deque

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from esper_jax.bus.connect import Client
from esper_jax.bus.envelope import MessageError, decode
from esper_jax.bus.messages import (
    Acknowledged,
    CapacityChanged,
    LayerHealth,
    Message,
    RolledBack,
    RunEnded,
    RunStarted,
    SeedMoved,
    TickReported,
)
from esper_jax.bus.transport import TransportError
from esper_jax.lifecycle.stages import Stage

__all__ = ["LAST", "answer_to", "print_all", "watch"]

_log = logging.getLogger(__name__)

LAST = 64
"""Messages of before that a view begins with."""

_LAYERS, _NOTES = 20, 8
"""Rows of layers, and of what happened, that a table shows."""

_WAIT = 0.25
"""Seconds between drawings."""

_SHORT = {
    Stage.DORMANT: "dormant",
    Stage.GERMINATED: "germinated",
    Stage.TRAINING: "training",
    Stage.GRAFTING: "grafting",
    Stage.STABILIZATION: "stabilizing",
    Stage.EVALUATING: "evaluating",
    Stage.FINE_TUNING: "tuning",
    Stage.FOSSILIZED: "fossil",
    Stage.CULLED: "culled",
    Stage.CANCELLED: "cancelled",
    Stage.ROLLED_BACK: "rolled back",
}


def print_all(client: Client, console: Console | None = None) -> int:
    """Prints messages as they come, until the run ends; returns the exit status.

    A connection that breaks is tried again.
    """
    console, ended, lost = console or Console(), False, False
    while True:
        try:
            came = client.receive(_WAIT)
        except TransportError as error:
            if ended:  # a socket goes with its run
                return 0
            if not lost:
                _log.warning("the connection is lost (%s); trying again", error)
            lost = True
            time.sleep(_WAIT)
            continue
        lost = False
        if ended and not came:
            return 0
        for data in came:
            console.file.write(data.decode(errors="replace") + "\n")
            ended = _ends(data, ended)
        console.file.flush()


def _ends(data: bytes, ended: bool) -> bool:
    """Whether the run has ended, after a further message."""
    try:
        message = decode(data).message
    except MessageError:
        return ended
    return (ended or isinstance(message, RunEnded)) and not isinstance(
        message, RunStarted
    )


def watch(client: Client, console: Console | None = None) -> int:
    """Shows a run until it ends; returns the exit status.

    A connection that breaks is tried again.
    """
    console = console or Console()
    view = _View()
    if not console.is_terminal:
        while not view.ended:
            for line in _seen(client, view):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
        return 0
    with Live(console=console, auto_refresh=False, get_renderable=view.table) as live:
        live.refresh()
        while not view.ended:
            _seen(client, view)
            live.refresh()
    return 0


def _seen(client: Client, view: "_View") -> list[str]:
    """Lets a view see what has come; returns lines that tell of it."""
    try:
        came = client.receive(_WAIT)
    except TransportError as error:
        time.sleep(_WAIT)
        return view.lose(str(error))
    lines = view.lose("")
    for data in came:
        try:
            envelope = decode(data)
        except MessageError as error:
            lines.append(view.note(f"a message that cannot be read: {error}"))
        else:
            line = view.see(envelope.message)
            lines += [line] if line else []
    return lines


def answer_to(client: Client, id: str, patience: float) -> Acknowledged | None:
    """The answer to a command that was sent; None if none comes in some seconds.

    Raises:
      TransportError: if the connection breaks, or the run ends; the command may have
        arrived all the same.
    """
    until = time.monotonic() + patience
    while (left := until - time.monotonic()) > 0:
        for data in client.receive(min(left, 1.0)):
            try:
                message = decode(data).message
            except MessageError:
                continue
            if isinstance(message, Acknowledged) and message.command == id:
                return message
            if isinstance(message, RunEnded):
                raise TransportError(f"the run ended meanwhile ({message.reason})")
    return None


class _View:
    """What is known of a run from its messages.

    Attributes:
      ended: whether the run has ended.
    """

    def __init__(self) -> None:
        self.ended = False
        self._tick: TickReported | None = None
        self._health: dict[str, LayerHealth] = {}
        self._recent: deque[str] = deque(maxlen=_NOTES)
        self._lost = ""

    def see(self, message: Message) -> str:
        """Takes a message; returns a line that tells of it, or nothing."""
        match message:
            case TickReported():
                self._tick = message
                return _tick_line(message)
            case LayerHealth():
                self._health[message.layer] = message
                return ""
            case SeedMoved() | CapacityChanged():
                return self.note(f"tick {message.tick}: {message.layer} {message.text}")
            case RolledBack():
                return self.note(message.text)
            case Acknowledged():
                said = f"{message.command[:12]} {message.outcome}: {message.reason}"
                return self.note(f"command {said}")
            case RunStarted():
                self.ended = False
                return self.note(f"the run begins after tick {message.tick}")
            case RunEnded():
                self.ended = True
                return self.note(f"the run ends: {message.reason}")
        return ""

    def note(self, line: str) -> str:
        """Keeps a line among the recent; returns it, fit for a terminal."""
        clean = "".join(c if c.isprintable() else "?" for c in line)
        self._recent.append(clean)
        return clean

    def lose(self, why: str) -> list[str]:
        """Says once that the connection is lost, or (nothing) is there again."""
        before, self._lost = self._lost, why
        if why and not before:
            return [self.note(f"the connection is lost ({why}); trying again")]
        return (
            [self.note("the connection is there again")] if before and not why else []
        )

    def table(self) -> RenderableType:
        """All of it."""
        head = (
            "waiting for the next tick"
            if self._tick is None
            else _tick_line(self._tick)
        )
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("layer", "seeds", "health", "alpha", "best worth"):
            right = column not in ("layer", "seeds")
            table.add_column(column, justify="right" if right else "left")
        for name in sorted(self._health, key=_in_order)[:_LAYERS]:
            table.add_row(Text(name), *map(Text, _cells(self._health[name])))
        more = len(self._health) - _LAYERS
        rest = [Text(f"and {more} more layers")] if more > 0 else []
        why = [] if self._tick is None else [Text(self._tick.reason, style="dim")]
        notes = [Text(line, overflow="ellipsis", no_wrap=True) for line in self._recent]
        return Group(Text(head), *why, table, *rest, *notes)


def _in_order(name: str) -> list[tuple[int, str]]:
    """Puts ``layers/10`` behind ``layers/9``."""
    return [(len(part) if part.isdigit() else 0, part) for part in name.split("/")]


def _tick_line(tick: TickReported) -> str:
    alive = [f"{n} {_stage(stage)}" for stage, n in tick.seeds.items() if n]
    return (
        f"tick {tick.tick}, step {tick.step}: train loss {_number(tick.train_loss)}, "
        f"held-out loss {_number(tick.loss)}, accuracy {_number(tick.accuracy)}; "
        f"{', '.join(alive)}"
    )


def _cells(layer: LayerHealth) -> list[str]:
    """Seeds by stage, mean health, sum of alpha, and the largest worth."""
    counts = Counter(layer.stage)
    seeds = [f"{counts[stage]} {_SHORT[stage]}" for stage in Stage if counts[stage]]
    health = [x for x in layer.health if x is not None]
    worth = [x for x in layer.worth if x is not None]
    return [
        ", ".join(seeds),
        _number(sum(health) / len(health) if health else None),
        _number(sum(x for x in layer.alpha if x is not None)),
        _number(max(worth, default=None)),
    ]


def _stage(name: str) -> str:
    stage = Stage.__members__.get(name)
    return name if stage is None else _SHORT[stage]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
