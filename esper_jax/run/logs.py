"""What a run writes down while it trains: events, rollbacks and ticks."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esper_jax.growth.reports import TickReport
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.stages import Outcome
from esper_jax.monitor.news import News, rollback_entry, slot_entries
from esper_jax.monitor.seeds_of_tick import seeds_of_tick
from esper_jax.run.folder import (
    RunError,
    RunFolder,
    append_lines,
    finite_or_none,
    lines_of,
    read_json,
    read_lines,
    sync,
    write_lines,
)
from esper_jax.train.retreat import Rollback

__all__ = ["EventLog", "History", "Journal", "Metrics", "read_history", "read_logs"]


_FIELDS: dict[str, dict[str, type]] = {
    "events": {
        "tick": int,
        "layer": str,
        "seed": int,
        "from": str,
        "to": str,
        "outcome": str,
    },
    "rollbacks": {"number": int, "tick": int},
    "ticks": {"tick": int},
}
"""What each line of a log must hold."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """What the logs of a run hold from before the state that it goes on from.

    Args:
      events: of the seeds, and changes of the config.
      rollbacks: of the governor.
      ticks: losses and accuracy.
      missing: what the logs have lost, in words.
    """

    events: Sequence[dict[str, Any]] = ()
    rollbacks: Sequence[dict[str, Any]] = ()
    ticks: Sequence[dict[str, Any]] = ()
    missing: tuple[str, ...] = ()


def read_logs(
    folder: RunFolder, spare: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """The lines of ``events``, ``rollbacks`` and ``ticks``, as far as they are whole.

    Args:
      folder: of the run.
      spare: whether ``summary.json`` stands in for a file that is gone.

    Raises:
      RunError: if a file is damaged.
    """
    read = {
        name: read_lines(getattr(folder, name), fields)
        for name, fields in _FIELDS.items()
    }
    for name, copy in (_in_summary(folder) if spare else {}).items():
        if not getattr(folder, name).exists() and _are_lines(name, copy):
            read[name] = copy
    return read


def _are_lines(name: str, entries: Sequence[Any]) -> bool:
    """Whether entries are what the lines of a log hold."""
    return all(
        isinstance(entry, dict)
        and all(type(entry.get(k)) is kind for k, kind in _FIELDS[name].items())
        for entry in entries
    )


def read_history(
    folder: RunFolder,
    ticks: int,
    rollbacks: int,
    sealed: Mapping[str, Any] | None = None,
) -> History:
    """Reads the logs, without what came after a state. Changes nothing.

    Lines that a log has lost come from ``summary.json``, if they are there.

    Args:
      folder: of the run.
      ticks: of the state; later ones are left out.
      rollbacks: of the state; later ones, and their events, are left out.
      sealed: what `Journal.seal` gave for each log when the state was saved; empty if
        that was not kept.

    Raises:
      RunError: if a file is damaged.
    """
    read = read_logs(folder)
    kept = {
        "events": [
            e
            for e in read["events"]
            if e["tick"] <= ticks and e.get("rollback", 0) <= rollbacks
        ],
        "rollbacks": [r for r in read["rollbacks"] if r["number"] <= rollbacks],
        "ticks": [t for t in read["ticks"] if t["tick"] <= ticks],
    }
    spare, missing = _in_summary(folder), []
    due = {"rollbacks": rollbacks, "ticks": ticks}
    for name, entries in kept.items():
        if sealed and name in sealed:
            due[name], digest = sealed[name]
            kept[name] = entries = entries[: due[name]]
            copy = spare.get(name, [])[: due[name]]
            whole = Journal.digest_of(entries) == digest
            if not whole and Journal.digest_of(copy) == digest:
                kept[name], whole = copy, True
        else:
            whole = name == "events" or _in_order(name, entries, due[name])
        if not whole:
            some = "other than" if len(entries) == due[name] else f"{len(entries)} of"
            missing.append(
                f"{getattr(folder, name).name} holds {some} the {due[name]} lines that "
                f"were written up to tick {ticks}"
            )
    return History(**kept, missing=tuple(missing))


def _in_summary(folder: RunFolder) -> Mapping[str, Any]:
    """The events and rollbacks of a run that had ended; what is no JSON counts not."""
    try:
        found = read_json(folder.summary)
    except RunError:
        return {}
    named = found if isinstance(found, dict) else {}
    return {k: v for k, v in named.items() if k in _FIELDS and isinstance(v, list)}


def _in_order(name: str, entries: Sequence[Mapping[str, Any]], due: int) -> bool:
    """Whether a log with numbered lines lacks none; for runs that sealed nothing.

    The first runs wrote no ticks.
    """
    key = "tick" if name == "ticks" else "number"
    first = name == "ticks" and not entries
    return first or [entry[key] for entry in entries] == [*range(1, due + 1)]


class Journal:
    """A file of one JSON object a line, which only grows.

    Args:
      path: of the file.
      entries: to begin with; they replace what is in the file.
      empty: whether to make a file for no entries.
    """

    def __init__(
        self, path: Path, entries: Sequence[Mapping[str, Any]], empty: bool = True
    ) -> None:
        self.path = path
        self._count = len(entries)
        self._digest = hashlib.sha256(lines_of(entries).encode())
        if entries or empty or path.exists():
            write_lines(path, entries)

    def append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Adds lines.

        Raises:
          RunError: naming the file, if that fails.
        """
        if entries:
            text = lines_of(entries)
            append_lines(self.path, text)
            self._count += len(entries)
            self._digest.update(text.encode())

    def seal(self) -> list[Any]:
        """Number and SHA-256 of the lines, which are on the disk when it returns."""
        sync(self.path)
        return [self._count, self._digest.hexdigest()]

    @staticmethod
    def digest_of(entries: Sequence[Mapping[str, Any]]) -> str:
        """SHA-256 of lines that were read."""
        return hashlib.sha256(lines_of(entries).encode()).hexdigest()


class Metrics:
    """Appends what each tick measured to ``ticks.jsonl``.

    Those are losses and accuracy, and of some seeds what `seeds_of_tick` gives.

    Args:
      folder: of the run.
      history: what to go on from.
    """

    def __init__(self, folder: RunFolder, history: History) -> None:
        self.journal = Journal(folder.ticks, history.ticks)

    def add(self, report: TickReport) -> None:
        """Appends a tick, given its report with host values."""
        line = {
            "tick": int(report.tick),
            "train_loss": finite_or_none(report.train_loss),
            "loss": finite_or_none(report.loss),
            "accuracy": finite_or_none(report.accuracy),
        }
        seeds = seeds_of_tick(report)
        self.journal.append([line | ({"seeds": seeds} if seeds else {})])


class EventLog:
    """Keeps every requested transition and its outcome, in memory and on disk.

    Appends events to ``events.jsonl`` and rollbacks to ``rollbacks.jsonl``. Writes a
    refusal once, even if it repeats tick after tick.

    Args:
      folder: of the run.
      lifecycle: minima and gates in force; the words of the events quote them.
      history: what to go on from.

    Attributes:
      events: as dictionaries, oldest first.
      rollbacks: as dictionaries, oldest first.
      journals: the two files.
    """

    def __init__(
        self, folder: RunFolder, lifecycle: LifecycleConfig, history: History
    ) -> None:
        self.rollbacks = list(history.rollbacks)
        self.events = list(history.events)
        self.journals = {
            "events": Journal(folder.events, self.events),
            "rollbacks": Journal(folder.rollbacks, self.rollbacks, empty=False),
        }
        self._news = News(lifecycle, self.events)

    def add_changes(self, changes: Sequence[Mapping[str, Any]]) -> None:
        """Writes changes of the config, those that are not there yet.

        Args:
          changes: all of the run; see `record.Record`.
        """
        known = {e["change"] for e in self.events if "change" in e}
        self._append(
            [
                {
                    "tick": change["tick"],
                    "layer": "",
                    "seed": -1,
                    "slot": -1,
                    "from": json.dumps(change["from"]),
                    "to": json.dumps(change["to"]),
                    "outcome": Outcome.OK.name,
                    "measured": {},
                    "text": f"config: {change['key']} is {change['to']!r} from here "
                    f"on, and was {change['from']!r}",
                    "change": number,
                }
                for number, change in enumerate(changes, 1)
                if number not in known
            ]
        )

    def add(
        self, report: TickReport, asking: Mapping[tuple[str, int], str] | None = None
    ) -> list[dict[str, Any]]:
        """Writes the new events of a tick, given its report with host values.

        Args:
          report: of the tick.
          asking: ids of the commands from outside, by layer and seed.

        Returns:
          Those events.
        """
        new = self._news.tick(report)
        for event in new:
            id = (asking or {}).get((event["layer"], event["seed"]))
            if id is not None and "by" in event:
                event["command"] = id
        self._append(new)
        return new

    def add_slots(
        self, tick: int, changed: Mapping[str, tuple[int, int]]
    ) -> list[dict[str, Any]]:
        """Writes that layers gave slots back.

        Args:
          tick: after which.
          changed: slots before and after, by layer.

        Returns:
          The events.
        """
        new = slot_entries(tick, changed)
        self._append(new)
        return new

    def add_commands(
        self, commands: Sequence[Any], rollback: Rollback | None = None
    ) -> list[str]:
        """Writes what became of commands, those that no event of a seed tells of.

        Args:
          commands: as `bus.record.Done`.
          rollback: that has undone their tick, if one has.

        Returns:
          Lines that tell of them.
        """
        if not commands:
            return []
        told = {e["command"] for e in self.events if "command" in e}
        back = {} if rollback is None else {"rollback": rollback.number}
        new = [
            {
                "tick": done.tick if rollback is None else rollback.tick,
                "layer": "",
                "seed": -1,
                "slot": -1,
                "from": "command",
                "to": type(done.command).__name__,
                "outcome": done.answer.outcome,
                "measured": {},
                "text": f"command {type(done.command).__name__}: {done.answer.reason}",
                "command": done.id,
                **back,
            }
            for done in commands
            if done.id not in told
        ]
        self._append(new)
        return [f"tick {e['tick']}: {e['text']}" for e in new]

    def add_policy(
        self, tick: int, before: str, after: str, since: str = ""
    ) -> list[str]:
        """Writes that another policy decides from a tick on; returns a line of it.

        Args:
          tick: the first.
          before: what has decided so far.
          after: what decides now.
          since: why, if there is more to say.
        """
        event = {
            "tick": tick,
            "layer": "",
            "seed": -1,
            "slot": -1,
            "from": before,
            "to": after,
            "outcome": Outcome.OK.name,
            "measured": {},
            "text": f"{after} decides{since and f', since {since}'}",
        }
        self._append([event])
        return [f"tick {tick}: {event['text']}"]

    def add_rollback(self, rollback: Rollback) -> list[str]:
        """Writes a rollback and what it did to the seeds.

        Returns:
          Lines that tell of them.
        """
        entry = rollback_entry(rollback)
        self.rollbacks.append(entry)
        self.journals["rollbacks"].append([entry])
        new = self._news.rollback(rollback)
        self._append(new)
        told = (f"tick {e['tick']}: {e['layer']} {e['text']}" for e in new)
        return [entry["text"], *told]

    def _append(self, events: list[dict[str, Any]]) -> None:
        self.journals["events"].append(events)
        self.events += events
