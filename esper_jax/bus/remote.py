"""`RemotePolicy`: a policy in another program than the run that it decides for.

The run tells what a policy reads (`Service.lend`, ``esper-jax train --remote TICKS``).
Its decision joins the next tick, or the next after that where it comes later.
"""

import bisect
import itertools
import logging
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import jax
import msgspec
import numpy as np

from esper_jax.bus.connect import Client
from esper_jax.bus.envelope import MOST_BYTES, MessageError, decode, encode, new_id
from esper_jax.bus.messages import (
    Decided,
    Germinate,
    LayerSeen,
    Message,
    Move,
    RunEnded,
    RunStarted,
    SetStrategy,
    TickSeen,
)
from esper_jax.bus.seen import Sight, gates_in, sight_of
from esper_jax.bus.transport import TransportError
from esper_jax.groups import Groups
from esper_jax.lifecycle.commands import Commands
from esper_jax.lifecycle.grafting import Strategy
from esper_jax.lifecycle.stages import NO_REQUEST, Stage
from esper_jax.policy.interface import (
    LayerShape,
    Policy,
    PolicyFactory,
    Setting,
    made,
)

__all__ = ["RemotePolicy", "requests_of"]

_log = logging.getLogger(__name__)

_MOST = 10_000
"""Requests of a decision; what is left is asked again at the next tick."""

_ENVELOPE = 4096
"""Bytes of a command beside its requests, at most."""

_REMEMBERED = 64
"""Ticks of before to which a rollback may lead."""


class RemotePolicy:
    """Decides for a run, which is heard and told by the bus alone.

        bus = client("redis://localhost")
        RemotePolicy(heuristic(ControllerConfig()), bus).run()

    It compiles at the first tick. Ticks whose messages were lost are passed over.

    Args:
      policy: a `Policy`, or a function that makes one.
      client: this program's end of the bus; see `bus.connect.client`.
      seed: of the policy's random choices.

    Attributes:
      ended: whether the run has ended, for good or for now.
      decided: the last tick that it has decided by; None before the first.
    """

    def __init__(
        self, policy: Policy | PolicyFactory, client: Client, seed: int = 0
    ) -> None:
        self.ended = False
        self.decided: int | None = None
        self._given, self._client = policy, client
        self._unsent: Decided | None = None
        self._key = jax.random.key(seed)
        self._layers: dict[str, LayerSeen] = {}
        self._fixed: Any = None  # what the policy was made for
        self._policy: Policy | None = None
        self._decide: Any = None
        self._memories: deque[tuple[int, Any]] = deque(maxlen=_REMEMBERED)

    def run(self) -> None:
        """Decides until the run ends. A connection that breaks is tried again.

        Raises:
          ValueError: if the policy reads what the run does not measure.
        """
        broken = False
        while not self.ended:
            try:
                self.step(1.0)
            except TransportError as error:
                if not broken:
                    _log.warning("the bus cannot be reached (%s); trying again", error)
                broken = True
                time.sleep(1.0)
            else:
                broken = False

    def step(self, patience: float = 1.0) -> int | None:
        """Reads what has come, and sends a decision by the newest tick.

        Args:
          patience: seconds to wait for messages.

        Returns:
          The tick that was decided by; None if no whole tick has come.

        Raises:
          ValueError: if the policy reads what the run does not measure.
          TransportError: if the bus cannot be reached.
        """
        newest = self._unsent
        for data in self._client.receive(patience):
            try:
                newest = self._see(decode(data).message) or newest
            except MessageError as error:
                _log.warning("a message cannot be used: %s", error)
        if newest is None:
            return None
        self._unsent = newest  # its memory has gone on
        self._client.send(encode(newest, "esper_jax/remote", new_id()))
        self._unsent = None
        self.decided = newest.seen
        return newest.seen

    def _see(self, message: Message) -> Decided | None:
        match message:
            case RunStarted():
                self.ended = False
            case RunEnded():
                self.ended = True
            case LayerSeen():
                self._layers[message.layer] = message
            case TickSeen():
                seen = {
                    name: layer
                    for name, layer in self._layers.items()
                    if layer.tick == message.tick
                }
                self._layers = {}
                if len(seen) == message.layers:
                    return self._decided(message, seen)
        return None

    def _decided(self, tick: TickSeen, layers: Mapping[str, LayerSeen]) -> Decided:
        sights = {name: sight_of(layer) for name, layer in layers.items()}
        policy = self._made(tick, sights)
        groups = Groups.alone(tuple(sights))
        seeds = {name: sight.seeds for name, sight in sights.items()}
        signals = {name: sight.signals for name, sight in sights.items()}
        while self._memories and self._memories[-1][0] >= tick.tick:
            self._memories.pop()  # that tick was undone
        memory = (
            self._memories[-1][1]
            if self._memories
            else policy.init({n: s.shape for n, s in sights.items()}, self._key)
        )
        if policy.stacked:
            asked, memory = self._decide(
                groups.stack(seeds), groups.stack(signals), memory
            )
            asked = groups.split(asked)
        else:
            asked, memory = self._decide(seeds, signals, memory)
        self._memories.append((tick.tick, memory))
        requests = [
            request
            for name, commands in jax.device_get(asked).items()
            for request in requests_of(name, commands, layers[name].blueprints)
        ]
        decided = Decided(
            seen=tick.tick, rollbacks=tick.rollbacks, ticks=tick.ticks, commands=[]
        )
        return msgspec.structs.replace(decided, commands=_first(requests))

    def _made(self, tick: TickSeen, sights: Mapping[str, Sight]) -> Policy:
        """The policy for the run; made anew, with its memory, if a shape changes."""
        fixed = tick.gates, {n: _fixed(sight.shape) for n, sight in sights.items()}
        if self._policy is None or fixed != self._fixed:
            setting = Setting(
                layers={name: sight.shape for name, sight in sights.items()},
                gates=gates_in(tick),
                groups=Groups.alone(tuple(sights)),
            )
            policy = made(self._given, setting)
            lacks = sorted((policy.reads or frozenset()) - set(tick.measured))
            if lacks:
                raise ValueError(
                    f"policy reads {', '.join(lacks)}, which the run does not measure "
                    "since its own policy does not read it; give the run a policy "
                    "that does"
                )
            self._policy, self._fixed = policy, fixed
            self._decide = jax.jit(policy.decide)
        return self._policy


def _first(requests: list[Any]) -> list[Any]:
    """As many requests as a run reads in one command."""
    sizes = [len(msgspec.json.encode(request)) + 1 for request in requests[:_MOST]]
    ends = list(itertools.accumulate(sizes))
    return requests[: bisect.bisect(ends, MOST_BYTES - _ENVELOPE)]


def _fixed(shape: LayerShape) -> tuple[Any, ...]:
    costs = np.asarray(shape.costs)
    return shape.num_seeds, shape.capacity, costs.tobytes(), shape.aims


def requests_of(
    layer: str, commands: Commands, blueprints: list[str]
) -> list[Germinate | Move | SetStrategy]:
    """What a policy asks of one layer, as commands of the bus.

    Args:
      layer: its name.
      commands: of the policy, with host values.
      blueprints: names of the layer's, by id.
    """
    target, kind, strategy = (
        np.asarray(x) for x in (commands.target, commands.blueprint, commands.strategy)
    )
    found: list[Germinate | Move | SetStrategy] = []
    for seed in map(int, np.flatnonzero((target >= 0) | (strategy >= 0))):
        style = None if strategy[seed] < 0 else Strategy(strategy[seed]).name.lower()
        if target[seed] == Stage.GERMINATED:
            name = None if kind[seed] < 0 else blueprints[kind[seed]]
            found.append(
                Germinate(layer=layer, seed=seed, blueprint=name, strategy=style)
            )
            continue
        if target[seed] != NO_REQUEST:
            found.append(Move(layer=layer, seed=seed, stage=Stage(target[seed]).name))
        if style is not None:
            found.append(SetStrategy(layer=layer, seed=seed, strategy=style))
    return found
