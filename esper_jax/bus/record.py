"""`Record`: which commands joined which tick, and what became of them.

A file of JSON lines that only grows. A line is on the disk before its command is
acknowledged. So a command that comes again is known, also after a resume; and a run
that goes back to a checkpoint, or another that is given the file, carries out the same
commands at the same ticks.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from esper_jax.bus.decisions import Until, silenced
from esper_jax.bus.messages import (
    COMMANDS,
    Acknowledged,
    Command,
    Enable,
    Part,
    StopAndSave,
)
from esper_jax.monitor.writers import append_whole

__all__ = ["Done", "Record", "RecordError", "read_record"]


class RecordError(ValueError):
    """A file that is no record of commands; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Done:
    """A command, the tick that it joined, and what became of it.

    Args:
      command: what was asked.
      tick: that it joined.
      rollbacks: of the governor before that tick, which may come again after one.
      answer: what became of it; holds its id.
    """

    command: Command
    tick: int
    rollbacks: int
    answer: Acknowledged

    @property
    def id(self) -> str:
        """Of the command."""
        return self.answer.command

    @property
    def at(self) -> tuple[int, int]:
        """Rollbacks and tick, in the order of which a run goes on."""
        return self.rollbacks, self.tick


def _line(done: Done) -> dict[str, Any]:
    answer = done.answer
    return {
        "tick": done.tick,
        "rollbacks": done.rollbacks,
        "id": done.id,
        "command": msgspec.to_builtins(done.command),
        "outcome": answer.outcome,
        "reason": answer.reason,
        **({"parts": msgspec.to_builtins(answer.parts)} if answer.parts else {}),
    }


def _done(entry: Any) -> Done:
    """Inverse of `_line`; what became of a command may be missing.

    Raises:
      ValueError, TypeError, KeyError: if it is none.
    """
    tick, id, rollbacks = entry["tick"], entry["id"], entry.get("rollbacks", 0)
    if not all(type(x) is int and x >= 0 for x in (tick, rollbacks)):
        raise ValueError("tick and rollbacks must be whole numbers of at least 0")
    if not isinstance(id, str) or not id:
        raise ValueError("id must be a string that is not empty")
    kind = entry["command"]["kind"]
    if kind not in COMMANDS:
        raise ValueError(f"there is no command {kind!r:.80}")
    answer = Acknowledged(
        command=id,
        outcome=str(entry.get("outcome", "OK")),
        reason=str(entry.get("reason", "")),
        tick=tick,
        parts=msgspec.convert(entry.get("parts", []), list[Part]),
    )
    command = msgspec.convert(entry["command"], COMMANDS[kind])
    return Done(command, tick, rollbacks, answer)


def read_record(path: Path) -> list[Done]:
    """The commands of a file, in its order; none if it is not there.

    Half a line at the end, which a process that was killed may leave, is passed over.

    Raises:
      RecordError: naming the line that is none.
      OSError: if it cannot be read.
    """
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    found = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
        try:
            found.append(_done(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as why:
            said = f"no {why}" if isinstance(why, KeyError) else f"{why!s:.200}"
            raise RecordError(
                f"{path}, line {number}: expected a command with its tick, as in the "
                f"commands.jsonl of a run; got something else ({said}). Mend or remove "
                "that line"
            ) from None
    return found


class Record:
    """The commands that a run has carried out.

    Args:
      path: of the file; None keeps nothing, as in all but one of several processes.
      past: what the file holds.
      replayed: commands of another run, to carry out at the same ticks.
      at: rollbacks and ticks of the state that the run goes on from. Commands of later
        ticks are carried out again then: their effect is not in that state.

    Attributes:
      at: as given.
      answers: what became of each command, by its id.
      due: commands to carry out, by rollbacks and tick.
      germination: whether the policy's germinations are heard in that state.
      silent_until: until when the run's own policy is silent.

    Raises:
      OSError: if the file cannot be read.
    """

    def __init__(
        self,
        path: Path | None = None,
        past: Sequence[Done] = (),
        *,
        replayed: Sequence[Done] = (),
        at: tuple[int, int] = (0, 0),
    ) -> None:
        self._path, self.at = path, at
        self.answers = {done.id: done.answer for done in past}
        self.due: dict[tuple[int, int], list[Done]] = {}
        self.germination = True
        self.silent_until: Until = (0, -1)
        for done in sorted(past, key=lambda done: done.at):
            if done.at <= at:
                self.silent_until = silenced(
                    self.silent_until, [done.command], done.rollbacks
                )
            if isinstance(done.command, Enable) and done.at <= at:
                self.germination = done.command.on
        for done in (*past, *(d for d in replayed if d.id not in self.answers)):
            # A run that was stopped went on later; this one does so at once.
            if done.at > at and not isinstance(done.command, StopAndSave):
                self.due.setdefault(done.at, []).append(done)
        if path is not None and path.exists():
            data = path.read_bytes()
            if not data.endswith(b"\n"):  # a process was killed
                os.truncate(path, data.rfind(b"\n") + 1)

    def add(self, commands: Sequence[Done]) -> None:
        """Adds commands, which are on the disk when it returns.

        Raises:
          OSError: if they cannot be written; then none is.
        """
        if self._path is not None and commands:
            lines = "".join(json.dumps(_line(done)) + "\n" for done in commands)
            made = not self._path.exists()
            with self._path.open("ab", buffering=0) as file:
                append_whole(file, lines.encode())
                os.fsync(file.fileno())
            if made:
                _sync_folder(self._path.parent)
        self.answers |= {done.id: done.answer for done in commands}


def _sync_folder(path: Path) -> None:
    """So that a file which was made in it outlives the power."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
