"""What the page is made of, read so that nothing odd in it can break the page."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Measured", "Records", "finite", "items", "measured", "whole"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records:
    """What a run wrote down.

    Args:
      name: of the run.
      config: as ``config.json`` holds it.
      settings: versions, devices and options that it ran under; empty for old runs.
      changes: of the config on the way.
      layers: what can grow, by name; empty for old runs.
      ticks: lines of ``ticks.jsonl``.
      events: lines of ``events.jsonl``.
      rollbacks: lines of ``rollbacks.jsonl``.
      summary: of a run that has ended; empty for others.
    """

    name: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    changes: Sequence[Mapping[str, Any]] = ()
    layers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ticks: Sequence[Mapping[str, Any]] = ()
    events: Sequence[Mapping[str, Any]] = ()
    rollbacks: Sequence[Mapping[str, Any]] = ()
    summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def last_tick(self) -> int:
        """The last tick that anything tells of; 1 at least."""
        told = (entry["tick"] for entry in (*self.ticks, *self.events))
        return max(1, *told, 1)


class Measured(NamedTuple):
    """What a tick measured of a seed."""

    tick: int
    alpha: float | None
    """After the tick."""
    worth: float | None
    blueprint: int | None
    """Its id."""
    parameters: int | None


def finite(value: Any) -> float | None:
    """A number that is one and finite; None for all else."""
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if usable and math.isfinite(value) else None
    except OverflowError:
        return None


def whole(value: Any) -> int | None:
    """An integer; None for all else."""
    found = finite(value)
    return None if found is None or not found.is_integer() else int(found)


def items(value: Any) -> Mapping[str, Any]:
    """A table; an empty one for all else."""
    return value if isinstance(value, Mapping) else {}


def measured(records: Records) -> dict[tuple[str, int], list[Measured]]:
    """What ticks measured of seeds, by layer and seed, oldest first."""
    found: dict[tuple[str, int], list[Measured]] = {}
    for tick in records.ticks:
        for layer, columns in items(tick.get("seeds")).items():
            for row in _rows(items(columns)):
                seed = whole(row["seed"])
                if seed is None:
                    continue
                entry = Measured(
                    tick["tick"],
                    finite(row["alpha"]),
                    finite(row["worth"]),
                    whole(row["blueprint"]),
                    whole(row["parameters"]),
                )
                found.setdefault((layer, seed), []).append(entry)
    for entries in found.values():
        entries.sort(key=lambda entry: entry.tick)
    return found


def _rows(columns: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a table of columns; what a column lacks is None."""
    names = ("seed", "alpha", "worth", "blueprint", "parameters")
    lists = {n: columns[n] for n in names if isinstance(columns.get(n), list)}
    for place in range(len(lists.get("seed", ()))):
        yield {
            n: lists[n][place] if place < len(lists.get(n, ())) else None for n in names
        }
