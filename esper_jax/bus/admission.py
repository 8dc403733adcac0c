"""Which commands join a tick, as arrays; and what became of them, in words.

Pure functions. Commands of one layer keep their order: if one has to wait for the next
tick, all later ones of its layers wait too.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from esper_jax.bus.messages import (
    Acknowledged,
    Batch,
    Command,
    Decided,
    Germinate,
    Layer,
    Message,
    Move,
    Part,
    SeedCommand,
    SetStrategy,
    StopAndSave,
)
from esper_jax.growth.outside import Outside, nothing_asked
from esper_jax.growth.reports import TickReport
from esper_jax.lifecycle.grafting import Strategy
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.stages import NO_REQUEST, Outcome, Stage
from esper_jax.monitor.words import drain

__all__ = [
    "MOST_PARTS",
    "Admitted",
    "Waiting",
    "admit",
    "apart",
    "parts_of",
    "verdicts",
    "wrong",
]

MOST_PARTS = 10_000
"""Requests that wait, beyond which no more are taken in before a tick."""


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A command that waits for its tick."""

    id: str
    command: Command


class Admitted(NamedTuple):
    """What joins a tick."""

    outside: Outside
    now: list[Waiting]
    later: list[Waiting]


def parts_of(command: Message) -> Sequence[SeedCommand]:
    """What a command asks of seeds, one by one."""
    if isinstance(command, Batch | Decided):
        return command.commands
    return [command] if isinstance(command, SeedCommand) else []


def apart(commands: Sequence[Waiting]) -> tuple[list[Waiting], list[Waiting]]:
    """Commands that end the run, and the others."""
    stops = [one for one in commands if isinstance(one.command, StopAndSave)]
    return stops, [one for one in commands if not isinstance(one.command, StopAndSave)]


def wrong(command: Command, layers: Mapping[str, Layer]) -> str:
    """Why a command can never be carried out in this run; empty if it can."""
    asked: set[tuple[str, int, bool]] = set()
    for number, part in enumerate(parts_of(command)):
        said = _wrong_part(part, layers)
        key = part.layer, part.seed, isinstance(part, SetStrategy)
        if not said and key in asked:
            said = f"seed {part.seed} of {part.layer} is asked twice in one batch"
        asked.add(key)
        if said:
            several = isinstance(command, Batch | Decided)
            return f"commands[{number}]: {said}" if several else said
    return ""


def _wrong_part(part: SeedCommand, layers: Mapping[str, Layer]) -> str:
    layer = layers.get(part.layer)
    if layer is None:
        return _unknown("layer", "layer", part.layer, layers)
    if part.seed >= layer.num_seeds:
        return (
            f"seed: {part.layer} has seeds 0 to {layer.num_seeds - 1}, got "
            f"{part.seed if part.seed < 10**9 else 'a larger number'}"
        )
    stages, strategies = Stage.__members__, [s.name.lower() for s in Strategy]
    if isinstance(part, Move) and part.stage not in stages:
        return _unknown("stage", "stage", part.stage, stages)
    kind = getattr(part, "blueprint", None)
    if kind is not None and kind not in layer.blueprints:
        what = f"blueprint in {part.layer}"
        return _unknown("blueprint", what, kind, layer.blueprints)
    strategy = getattr(part, "strategy", None)
    if strategy is not None and strategy.lower() not in strategies:
        return _unknown("strategy", "grafting strategy", strategy, strategies)
    return ""


def _unknown(field: str, what: str, got: str, known: Iterable[str]) -> str:
    names = list(known)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return (
        f"{field}: there is no {what} {got!r:.100}; expected one of "
        f"{', '.join(names[:20])}{more}"
    )


def admit(
    waiting: Sequence[Waiting], layers: Mapping[str, Layer], germination: bool
) -> Admitted:
    """The commands that join a tick, and those that wait for the next.

    A seed can be asked one thing at a tick, and one atomic batch can be decided.

    Args:
      waiting: commands for seeds, in the order of their arrival; none is `wrong`.
      layers: by name.
      germination: whether the policy may let something germinate.
    """
    num_seeds = {name: layer.num_seeds for name, layer in layers.items()}
    outside = nothing_asked(num_seeds, germination)
    now: list[Waiting] = []
    later: list[Waiting] = []
    held: set[str] = set()
    taken: set[tuple[str, int]] = set()
    batched = False
    for place, one in enumerate(waiting):
        if len(held) == len(layers):
            later += waiting[place:]
            break
        parts = parts_of(one.command)
        atomic = isinstance(one.command, Batch) and one.command.atomic
        names = {part.layer for part in parts}
        seeds = {(part.layer, part.seed) for part in parts}
        if names & held or seeds & taken or (atomic and batched):
            held |= names
            later.append(one)
            continue
        taken |= seeds
        batched |= atomic
        for part in parts:
            _ask(outside, part, layers[part.layer], atomic)
        now.append(one)
    return Admitted(outside, now, later)


def _ask(outside: Outside, part: SeedCommand, layer: Layer, atomic: bool) -> None:
    """Writes a request into the arrays, which are the host's own."""
    commands = outside.commands[part.layer]
    columns = {name: np.asarray(x) for name, x in vars(commands).items()}
    if isinstance(part, Germinate):
        columns["target"][part.seed] = Stage.GERMINATED
        blueprint = (
            0 if part.blueprint is None else layer.blueprints.index(part.blueprint)
        )
        columns["blueprint"][part.seed] = blueprint
    elif isinstance(part, Move):
        columns["target"][part.seed] = Stage[part.stage]
    strategy = getattr(part, "strategy", None)
    if strategy is not None:
        columns["strategy"][part.seed] = Strategy[strategy.upper()]
    if atomic:
        np.asarray(outside.atomic[part.layer])[part.seed] = True


def verdicts(
    admitted: Admitted, report: TickReport, config: LifecycleConfig
) -> dict[str, Acknowledged]:
    """What became of the commands of a tick, by id.

    Args:
      admitted: that joined it.
      report: of it, with host values.
      config: minima and gates in force, which the reasons quote.

    Raises:
      ValueError: if the report says nothing of a command.
    """
    told: dict[tuple[str, int], Part] = {}
    for name in {part.layer for one in admitted.now for part in parts_of(one.command)}:
        layer = report.layers[name]
        for event in drain(layer, layer.signals, config):
            part = Part(outcome=event.outcome.name, reason=event.plain)
            told[name, event.seed] = part
    return {
        one.id: _verdict(one, admitted.outside, told, int(report.tick))
        for one in admitted.now
    }


def _verdict(
    one: Waiting,
    outside: Outside,
    told: Mapping[tuple[str, int], Part],
    tick: int,
) -> Acknowledged:
    parts = parts_of(one.command)

    def moves(part: SeedCommand) -> bool:
        column = outside.commands[part.layer].target
        return int(column[part.seed]) != NO_REQUEST

    for part in parts:
        if moves(part) and (part.layer, part.seed) not in told:
            raise ValueError(
                f"report must be of the tick that was given what asked() returned; it "
                f"knows nothing of seed {part.seed} of {part.layer}, of which "
                f"{type(part).__name__} was asked"
            )
    moved = [told[p.layer, p.seed] if moves(p) else None for p in parts]
    refused = [m for m in moved if m is not None and m.outcome != Outcome.OK.name]
    batch = isinstance(one.command, Batch | Decided)
    dropped = batch and getattr(one.command, "atomic", False) and bool(refused)
    found = [
        m if m is not None else _styled(part, dropped)
        for m, part in zip(moved, parts, strict=True)
    ]
    # The rule that refused comes first, and not those that it refused along.
    causes = [
        p for p in found if p.outcome not in (Outcome.OK.name, Outcome.BATCH.name)
    ]
    first = next(iter(causes), None)
    if first is None:
        done = "; ".join(p.reason for p in found[:3]) or _done(one.command)
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        first = Part(outcome=Outcome.OK.name, reason=done + more)
    return Acknowledged(
        command=one.id,
        outcome=first.outcome,
        reason=first.reason + ("; so all of the batch is refused" if dropped else ""),
        tick=tick,
        parts=found if batch else [],
    )


def _styled(part: SeedCommand, dropped: bool) -> Part:
    """What became of a change of strategy that came alone."""
    if dropped:
        return Part(
            outcome=Outcome.BATCH.name,
            reason=f"seed {part.seed} keeps its strategy: another request of its batch "
            "was refused",
        )
    strategy = str(getattr(part, "strategy", "")).upper()
    return Part(
        outcome=Outcome.OK.name,
        reason=f"seed {part.seed}: its strategy is {strategy} now",
    )


def _done(command: Command) -> str:
    """Words for a command that asks nothing of seeds."""
    if hasattr(command, "on"):
        may = "is heard" if command.on else "is not heard"
        return f"what the policy asks to germinate {may} from here on"
    if isinstance(command, Decided):
        return "nothing was asked"
    return "the run ends after this tick, saved"
