"""What passes over the bus: reports of a run, commands to it, and acknowledgements.

Each message is a frozen msgspec struct. msgspec checks types, names the field that is
wrong, passes over fields that it does not know, and brings no other packages.
"""

from typing import Annotated

import msgspec

__all__ = [
    "COMMANDS",
    "MESSAGES",
    "VERSION",
    "Acknowledged",
    "Batch",
    "CapacityChanged",
    "Column",
    "Command",
    "Decided",
    "Enable",
    "Germinate",
    "Layer",
    "LayerHealth",
    "LayerSeen",
    "Message",
    "Move",
    "Part",
    "RolledBack",
    "RunEnded",
    "RunStarted",
    "SeedCommand",
    "SeedMoved",
    "SetStrategy",
    "StopAndSave",
    "TickReported",
    "TickSeen",
]

VERSION = 1
"""Of all messages; stands in their type."""

Seed = Annotated[int, msgspec.Meta(ge=0)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag=str):
    """What every message is."""


class Layer(msgspec.Struct, frozen=True):
    """What must be known of a layer to ask something of its seeds."""

    num_seeds: int
    blueprints: tuple[str, ...]
    """Names, by id."""


class Column(msgspec.Struct, frozen=True, kw_only=True):
    """An array."""

    dtype: str
    """As numpy writes it, with the order of bytes: ``<f4``."""
    shape: list[int]
    data: bytes
    """Row by row; base64 on the wire."""


class TickReported(Message, frozen=True, kw_only=True):
    """A tick of the run. What is not finite or was not measured is None."""

    tick: int
    step: int
    train_loss: float | None
    loss: float | None
    """On held-out data."""
    accuracy: float | None
    """On the same data."""
    seeds: dict[str, int]
    """Number of seeds in each stage, over all layers."""
    reason: str
    """Why the policy let something germinate or not, in words."""


class SeedMoved(Message, frozen=True, kw_only=True):
    """A request for a seed and what became of it, as ``events.jsonl`` has it."""

    tick: int
    layer: str
    seed: int
    source: str = msgspec.field(name="from")
    """The stage before."""
    to: str
    """The stage requested."""
    outcome: str
    """OK, or the rule that refused."""
    measured: dict[str, float | None]
    """What that rule read."""
    by: str
    """POLICY, OUTSIDE, OVERRULING (the policy asked for something else) or GOVERNOR."""
    text: str


class CapacityChanged(Message, frozen=True, kw_only=True):
    """A layer has another number of slots, as it gave some back."""

    tick: int
    """After which."""
    layer: str
    before: int
    after: int
    text: str


class LayerHealth(Message, frozen=True, kw_only=True):
    """Each seed of a layer after a tick; one number a seed."""

    tick: int
    layer: str
    stage: list[int]
    """Code of the stage."""
    health: list[float | None]
    alpha: list[float | None]
    worth: list[float | None]


class LayerSeen(Message, frozen=True, kw_only=True):
    """What a policy reads of a layer, for a remote one. Told before its `TickSeen`."""

    tick: int
    layer: str
    blueprints: list[str]
    """Names, by id."""
    costs: Column
    """Parameters of each blueprint on each chunk."""
    aims: list[bool]
    """Which blueprints start in the gradient's direction."""
    seeds: dict[str, Column]
    """`SeedState` after the tick, by field, as in ``graft.alpha``."""
    signals: dict[str, Column]
    """`Signals` of the tick, by field."""


class TickSeen(Message, frozen=True, kw_only=True):
    """All layers of a tick are told; a remote policy may decide."""

    tick: int
    rollbacks: int
    """Of the governor so far."""
    ticks: int
    """For how many ticks after this one a decision may silence the run's own policy."""
    layers: int
    """How many `LayerSeen` were told of this tick."""
    measured: list[str]
    """Which of the signals that cost a pass over the host are measured."""
    gates: str
    """`LifecycleConfig` as JSON, in which a number may be ``Infinity``."""


class RolledBack(Message, frozen=True, kw_only=True):
    """The governor undid a tick."""

    number: int
    """Counted from 1 since the beginning of the run."""
    failed_tick: int
    tick: int
    """The tick that training went back to."""
    fault: str
    text: str


class RunStarted(Message, frozen=True, kw_only=True):
    """A run begins, or goes on. What was said of later ticks will be said again."""

    tick: int
    step: int
    layers: dict[str, Layer]
    """What can grow, by name."""


class RunEnded(Message, frozen=True, kw_only=True):
    """A run ends, for good or for now."""

    tick: int
    step: int
    reason: str
    """In words."""


class Command(Message, frozen=True, kw_only=True):
    """What may be asked of a run."""


class SeedCommand(Command, frozen=True, kw_only=True):
    """What may be asked of a seed."""

    layer: Name
    seed: Seed


class Germinate(SeedCommand, frozen=True, kw_only=True):
    """Asks a dormant seed to germinate."""

    blueprint: Name | None = None
    """One of the layer's; by default the first."""
    strategy: Name | None = None
    """Grafting strategy; by default what the seed has."""


class Move(SeedCommand, frozen=True, kw_only=True):
    """Asks a seed to go to another stage."""

    stage: Name


class SetStrategy(SeedCommand, frozen=True, kw_only=True):
    """Gives a seed another grafting strategy."""

    strategy: Name


class Enable(Command, frozen=True, kw_only=True):
    """Whether what the policy asks to germinate is heard, until the next such command.

    Living seeds go on, and `Germinate` is heard all the same.
    """

    on: bool


class StopAndSave(Command, frozen=True, kw_only=True):
    """Ends the run after the tick, with its state saved."""


class Batch(Command, frozen=True, kw_only=True):
    """Several commands for seeds, at one tick."""

    commands: Annotated[
        list[Germinate | Move | SetStrategy],
        msgspec.Meta(min_length=1, max_length=10_000),
    ]
    atomic: bool = True
    """Whether all are refused if one is."""


class Decided(Command, frozen=True, kw_only=True):
    """What a remote policy asks by what one tick measured, which may be nothing.

    It is taken only by a run that wants a remote policy. The run's own policy is silent
    until some ticks after ``seen``. Each request stands for itself.
    """

    seen: Seed
    """The tick."""
    rollbacks: Seed = 0
    """As that tick's `TickSeen` has it."""
    ticks: Annotated[int, msgspec.Meta(ge=1)]
    """For how many ticks after it the run's own policy is silent."""
    commands: Annotated[
        list[Germinate | Move | SetStrategy], msgspec.Meta(max_length=10_000)
    ] = []


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one command of a `Batch`."""

    outcome: str
    reason: str


class Acknowledged(Message, frozen=True, kw_only=True):
    """What became of a command. Sent once for each, after its effect."""

    command: str
    """Id of the command."""
    outcome: str
    """OK; ILLEGAL, TOO_EARLY, GATE, NO_CAPACITY or BATCH as the lifecycle refuses;
    INVALID for what can never be carried out here; UNDONE where the governor undid the
    tick."""
    reason: str
    """In words."""
    tick: int | None
    """The tick that it joined; None where it joined none."""
    parts: list[Part] = []
    """Of a batch or a decision, in its order."""


COMMANDS: dict[str, type[Command]] = {
    kind.__name__: kind
    for kind in (Germinate, Move, SetStrategy, Enable, StopAndSave, Batch, Decided)
}
"""By name."""

MESSAGES: dict[str, type[Message]] = {
    kind.__name__: kind
    for kind in (
        TickReported,
        SeedMoved,
        CapacityChanged,
        LayerHealth,
        LayerSeen,
        TickSeen,
        RolledBack,
        RunStarted,
        RunEnded,
        Acknowledged,
    )
} | dict(COMMANDS)
"""By name."""
