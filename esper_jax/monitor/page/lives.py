"""The lives of seeds, from the events of a run."""

import dataclasses
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from esper_jax.lifecycle.stages import LIVING, Stage
from esper_jax.monitor.page.records import Measured, Records, measured

__all__ = ["Seed", "Span", "seeds_of", "stage_named"]


@dataclasses.dataclass(frozen=True)
class Span:
    """A stage of a seed from one tick to another."""

    stage: Stage
    start: int
    end: int
    entered: str
    """What the event said with which it began."""
    measured: tuple[Measured, ...]
    """From its first tick to its last, both included."""
    open: bool
    """Whether the records end in it."""

    @property
    def ticks(self) -> int:
        """How many ticks it lasted."""
        return self.end - self.start

    @property
    def alpha(self) -> tuple[tuple[int, float], ...]:
        """How much the seed counts in the output, by tick; empty if not recorded.

        Only while the seed is grafted that is a measurement.
        """
        if self.stage != Stage.GRAFTING:
            counts = Stage.STABILIZATION <= self.stage <= Stage.FOSSILIZED
            return (self.start, float(counts)), (self.end, float(counts))
        return tuple(
            (m.tick, m.alpha)
            for m in self.measured
            if m.alpha is not None and (m.tick < self.end or self.open)
        )

    @property
    def worths(self) -> list[float]:
        """Its worth at each tick in this stage that measured it."""
        # A tick measures a seed before it moves it.
        later = (m for m in self.measured if m.tick > self.start)
        return [m.worth for m in later if m.worth is not None]


@dataclasses.dataclass(frozen=True)
class Seed:
    """A seed that has lived."""

    layer: str
    number: int
    spans: tuple[Span, ...]
    """Oldest first; DORMANT has none."""
    last: Stage
    """The stage in which the records leave it."""
    slot: int | None
    """The last that it owned."""

    @property
    def lives(self) -> bool:
        """Whether it owns a slot in the end."""
        return bool(LIVING[self.last])

    @property
    def life(self) -> tuple[Span, ...]:
        """The spans of its last life."""
        begins = [n for n, s in enumerate(self.spans) if s.stage == Stage.GERMINATED]
        return self.spans[begins[-1] if begins else 0 :]

    @property
    def blueprint(self) -> int | None:
        """Id of what grew in its last life, if that is recorded."""
        return next((m.blueprint for m in self._told if m.blueprint is not None), None)

    @property
    def parameters(self) -> int | None:
        """Of what grew in its last life, if that is recorded."""
        known = (m.parameters for m in self._told if m.parameters is not None)
        return next(known, None)

    @property
    def _told(self) -> list[Measured]:
        """What was measured in its last life, newest first."""
        return [m for span in self.life for m in span.measured][::-1]


def stage_named(name: object) -> Stage | None:
    """The stage of a name; None if no stage has it."""
    return Stage.__members__.get(str(name))


def seeds_of(records: Records) -> list[Seed]:
    """Every seed that has lived, by layer and number."""
    moves: dict[tuple[str, int], list[tuple[int, Stage, str, int]]] = {}
    for event in records.events:
        stage = stage_named(event["to"])
        if event["outcome"] == "OK" and stage is not None and event["seed"] >= 0:
            slot = event.get("slot")
            moves.setdefault((event["layer"], event["seed"]), []).append(
                (
                    event["tick"],
                    stage,
                    str(event.get("text", "")),
                    slot if isinstance(slot, int) else -1,
                )
            )
    known, last = measured(records), records.last_tick
    return [
        _seed(place, moves[place], known.get(place, []), last)
        for place in sorted(moves)
        if any(stage != Stage.DORMANT for _, stage, *_ in moves[place])
    ]


def _seed(
    place: tuple[str, int],
    moves: Sequence[tuple[int, Stage, str, int]],
    known: Sequence[Measured],
    last: int,
) -> Seed:
    ends = [*(tick for tick, *_ in moves[1:]), last]
    at = [m.tick for m in known]
    spans = [
        Span(
            stage,
            tick,
            max(tick, end),
            text,
            tuple(known[bisect_left(at, tick) : bisect_right(at, end)]),
            number == len(moves) - 1,
        )
        for number, ((tick, stage, text, _), end) in enumerate(
            zip(moves, ends, strict=True)
        )
    ]
    slots = [slot for *_, slot in moves if slot >= 0]
    return Seed(
        *place,
        tuple(s for s in spans if s.stage != Stage.DORMANT),
        moves[-1][1],
        slots[-1] if slots else None,
    )
