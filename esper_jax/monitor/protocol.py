"""What passes between a monitor and its writers."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from esper_jax.monitor.series import Values

__all__ = ["Record", "Writer"]


@dataclasses.dataclass(frozen=True)
class Record:
    """What writers are given after a tick or a rollback. Read it, do not change it."""

    tick: int
    step: int
    time: float
    """Seconds since 1970."""
    values: Values
    """By the names of `SERIES`."""
    events: Sequence[Mapping[str, Any]]
    """What is new, as ``events.jsonl`` and ``rollbacks.jsonl`` have it; ``text`` says
    it in words."""

    def flat(self) -> Iterator[tuple[str, float]]:
        """Each value with one name: ``NAME``, or ``NAME/LABEL``."""
        for name, of in self.values.items():
            for label, value in of.items():
                yield f"{name}/{label}" if label else name, value


class Writer(Protocol):
    """Where records go. Both methods are called in a thread of the writer's own."""

    def write(self, record: Record) -> None:
        """Writes a record. What it raises counts the record as lost."""

    def close(self) -> None:
        """Writes what is left, and lets go of files and ports."""
