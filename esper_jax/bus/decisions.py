"""Which decisions of a remote policy are heard, and when the run's own is silent.

Pure functions of commands and ticks: a run with the same commands at the same ticks is
silent at the same ticks.
"""

from collections.abc import Iterable, Sequence

from esper_jax.bus.admission import Waiting
from esper_jax.bus.messages import Command, Decided
from esper_jax.bus.seen import Lent

__all__ = ["Until", "not_wanted", "sifted", "silenced"]

Until = tuple[int, int]
"""Rollbacks, and the last tick at which the run's own policy is silent. A rollback ends
that: what it silenced was undone."""


def silenced(until: Until, commands: Iterable[Command], rollbacks: int) -> Until:
    """Until when the run's own policy is silent after some commands have joined."""
    for command in commands:
        if isinstance(command, Decided):
            until = max(until, (rollbacks, command.seen + command.ticks))
    return until


def not_wanted(command: Command, lent: Lent | None) -> str:
    """Why a decision is not taken by this run; empty if it is, or if it is none.

    Args:
      command: that came.
      lent: what a remote policy may decide in; None where none may.
    """
    if not isinstance(command, Decided):
        return ""
    if lent is None:
        return "this run takes no decisions of a remote policy; train with --remote"
    if command.ticks > lent.ticks:
        return (
            f"ticks: expected at most {lent.ticks}, as the run tells in TickSeen, got "
            f"{command.ticks}"
        )
    return ""


def sifted(
    waiting: Sequence[Waiting], due: bool, at: tuple[int, int]
) -> dict[str, str]:
    """Why decisions come too late, by the ids of those that do.

    Args:
      waiting: what could join a tick.
      due: whether a decision is carried out again at it, before all of them.
      at: rollbacks before the tick, and its number.
    """
    rollbacks, tick = at
    decided = [(w.id, w.command) for w in waiting if isinstance(w.command, Decided)]
    why: dict[str, str] = {}
    for id, command in decided:
        if command.rollbacks != rollbacks or command.seen >= tick:
            why[id] = f"tick {command.seen}, by which it was decided, was undone"
        elif command.seen + command.ticks < tick:
            why[id] = (
                f"it was decided by tick {command.seen}, more than {command.ticks} "
                f"before tick {tick}"
            )
    sound = [(command.seen, id) for id, command in decided if id not in why]
    best = None if due or not sound else max(sound)[1]
    for seen, id in sound:
        if id != best:
            why[id] = f"there is a later decision than this by tick {seen}"
    return why
