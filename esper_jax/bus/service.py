"""`Service`: a run's end of the bus. Commands come in, reports go out.

    bus = Local()
    with Service(layers_of(growth), bus) as service:
        report = growth.tick(model, evaluate, commands=service.asked(tick))
        service.ticked(report)

It is called between steps, from one thread, and waits for no transport.
"""

import atexit
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from esper_jax.bus.admission import (
    MOST_PARTS,
    Admitted,
    Waiting,
    admit,
    apart,
    parts_of,
    verdicts,
    wrong,
)
from esper_jax.bus.decisions import not_wanted, sifted, silenced
from esper_jax.bus.envelope import MessageError, encode
from esper_jax.bus.inbox import Inbox
from esper_jax.bus.messages import (
    Acknowledged,
    Command,
    Decided,
    Enable,
    Layer,
    Message,
    RunEnded,
    RunStarted,
    SetStrategy,
)
from esper_jax.bus.outbox import Letter, Outbox, letters
from esper_jax.bus.record import Done, Record
from esper_jax.bus.seen import Lent, layers_of, lent, seen_told
from esper_jax.bus.telling import events_told, rollback_told, tick_told
from esper_jax.bus.transport import Delivery, Transport, buried
from esper_jax.growth.outside import Outside
from esper_jax.growth.reports import TickReport
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.state import SeedState
from esper_jax.monitor.news import News, rollback_entry, slot_entries
from esper_jax.train.retreat import Rollback

__all__ = ["Service", "layers_of"]


class Service:
    """Takes commands, and tells what a run does; a context manager.

    Args:
      layers: that can grow, by name; see `layers_of`.
      transport: None for a run that only carries out again what is due.
      source: who the run is; stands in every message.
      lifecycle_config: what growth was made with, whose numbers reasons quote.
      record: of the commands that were carried out; by default nothing is known of them
        after the process ends.
      spill: file for messages that wait when there is no room; None for memory.
      patience: seconds that `close` waits for the transport.

    Attributes:
      stop_asked: whether a `StopAndSave` has come: save, call `stopped`, and end.
      lost: events and acknowledgements that were lost when it was closed.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        transport: Transport | None = None,
        *,
        source: str = "esper_jax",
        lifecycle_config: LifecycleConfig | None = None,
        record: Record | None = None,
        spill: Path | None = None,
        patience: float = 5.0,
    ) -> None:
        self.stop_asked = False
        self.lost = 0
        self._layers, self._source = dict(layers), source
        self._config = lifecycle_config or LifecycleConfig()
        self._transport, self._patience = transport, patience
        self._news = News(self._config)
        self._record = record or Record()
        self._germination = self._record.germination
        self._silent_until = self._record.silent_until
        self._lent: Lent | None = None
        self._replayed = set(self.left) - self._record.answers.keys()
        self._waiting: list[Waiting] = []
        self._controls: list[Waiting] = []  # what asks nothing of seeds
        self._admitted: Admitted | None = None
        self._stops: list[Waiting] = []
        # Of the deliveries of each command that is not answered yet.
        self._tokens: dict[str, tuple[str, ...]] = {}
        self._at = self._record.at  # rollbacks and tick
        self._inbox = Inbox()
        self._outbox = None if transport is None else Outbox(transport, spill)
        if transport is not None and self._outbox is not None:
            transport.listen(self._inbox.put, self._outbox.answered)
            atexit.register(self.close)  # whoever forgets it loses nothing

    def __enter__(self) -> "Service":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def outbox(self) -> Outbox | None:
        """What waits to be sent; None without a transport."""
        return self._outbox

    @property
    def left(self) -> list[str]:
        """Ids of commands that are still to be carried out again."""
        return [done.id for of in self._record.due.values() for done in of]

    def lend(self, model: Any, ticks: int) -> None:
        """Lets a remote policy decide; see `bus.remote`. `ticked` needs seeds then.

        Args:
          model: a `Growth`, or the `Program` of `build`.
          ticks: for how many ticks after the one that a decision has seen the model's
            own policy is silent. After that, it decides again.

        Raises:
          ValueError: if they are fewer than one.
        """
        self._lent = lent(model, ticks)

    def share(self) -> None:
        """Lets all processes of a program hear what comes to process 0.

        Each has a service then and calls all of its methods alike; that of process 0
        alone has a transport. Call it before the first `asked`.
        """
        self._inbox.shared = True

    @property
    def silent(self) -> bool:
        """Whether the run's own policy is silent at the tick last given by `asked`."""
        rollbacks, until = self._silent_until
        return rollbacks == self._at[0] and self._at[1] <= until

    def started(self, tick: int, step: int) -> None:
        """Tells that the run begins or goes on, at a tick and a step."""
        self._at = (self._at[0], tick)
        self._post(RunStarted(tick=tick, step=step, layers=self._layers))

    def asked(self, tick: int | None = None, rollbacks: int | None = None) -> Outside:
        """What is asked from outside at the next tick, of all layers.

        If neither `ticked` nor `undone` was called since the last time, that tick did
        not come about, and its commands join this one.

        Args:
          tick: its number; by default one more than that of the last.
          rollbacks: of the governor so far; by default those that `undone` told.
        """
        tick = self._at[1] + 1 if tick is None else tick
        rollbacks = self._at[0] if rollbacks is None else rollbacks
        self._at = rollbacks, tick
        if self._admitted is not None:
            self._requeue(self._admitted.now)
        self._take()
        due = [Waiting(d.id, d.command) for d in self._record.due.pop(self._at, ())]
        self._sift(any(isinstance(d.command, Decided) for d in due))
        controls = [*(d for d in due if not parts_of(d.command)), *self._controls]
        due = [d for d in due if parts_of(d.command)]
        for one in controls:
            if isinstance(one.command, Enable):
                self._germination = one.command.on
        admitted = admit([*due, *self._waiting], self._layers, self._germination)
        self._waiting, self._controls = admitted.later, []
        now = [*controls, *admitted.now]
        asked = (one.command for one in now)
        self._silent_until = silenced(self._silent_until, asked, rollbacks)
        np.asarray(admitted.outside.policy)[...] = not self.silent  # the host's own
        self._admitted = admitted._replace(now=now)
        return admitted.outside

    def asking(self) -> dict[tuple[str, int], str]:
        """Ids of the commands that ask for a move at this tick, by layer and seed."""
        joined = [] if self._admitted is None else self._admitted.now
        return {
            (part.layer, part.seed): one.id
            for one in joined
            for part in parts_of(one.command)
            if not isinstance(part, SetStrategy)
        }

    def ticked(
        self,
        report: TickReport,
        events: Sequence[Mapping[str, Any]] | None = None,
        seeds: Mapping[str, SeedState] | None = None,
    ) -> list[Done]:
        """Tells what a tick did, and answers the commands that joined it.

        Args:
          report: of the tick, with host values.
          events: of the tick, if they are known already; by default the report's.
          seeds: after the tick, by layer; what a remote policy reads.

        Returns:
          The commands that joined the tick, and what became of them.

        Raises:
          ValueError: if the report is not of the tick that was given what `asked`
            returned, or `lend` was called and there are no seeds.
          OSError: if the record cannot be written.
        """
        read = self._read(report, seeds)
        events = self._news.tick(report) if events is None else events
        self._at = (self._at[0], int(report.tick))
        place = self._place()
        if self._outbox is not None:
            told = itertools.chain(tick_told(report), read)
            name = f"tick-{place}"
            # Made in the thread that sends.
            self._outbox.tell(lambda: letters("telemetry", told, self._source, name))
        self._post(*events_told(events), name=f"moved-{place}")
        admitted, self._admitted = self._admitted, None
        if admitted is None:
            return []
        stops, now = apart(admitted.now)
        self._stops += stops
        self.stop_asked = bool(self._stops)
        answers = verdicts(admitted._replace(now=now), report, self._config)
        return self._answered(now, answers)

    def shrunk(self, changed: Mapping[str, tuple[int, int]]) -> None:
        """Tells that layers gave slots back, after the tick that was told last.

        Args:
          changed: slots before and after, by layer, as `growth.shrink` returns them.
        """
        told = events_told(slot_entries(self._at[1], changed))
        self._post(*told, name=f"slots-{self._place()}")

    def undone(self, rollback: Rollback) -> list[Done]:
        """Tells that the governor undid the tick, and refuses what joined it.

        It is not asked again: it may be what broke training. `Enable` stays as it is,
        and `StopAndSave` waits for the next tick.

        Returns:
          The commands that joined the tick, and what became of them.

        Raises:
          OSError: if the record cannot be written.
        """
        told = rollback_told(rollback_entry(rollback))
        moves = list(events_told(self._news.rollback(rollback)))
        self._post(told, *moves, name=f"rollback-{rollback.number}")
        admitted, self._admitted = self._admitted, None
        stops, now = apart([] if admitted is None else admitted.now)
        self._requeue(stops)
        why = f"the governor undid tick {rollback.failed_tick}: {rollback.reason}"
        done = self._answered(now, {one.id: self._undone(one, why) for one in now})
        self._at = rollback.number, rollback.tick
        return done

    def stopped(self) -> list[Done]:
        """Answers `StopAndSave`: what was asked for is saved.

        Returns:
          These commands.

        Raises:
          OSError: if the record cannot be written.
        """
        stops, self._stops = self._stops, []
        said = f"the run ended after tick {self._at[1]}, saved"
        answers = {one.id: self._answer(one.id, "OK", said) for one in stops}
        return self._answered(stops, answers)

    def ended(self, tick: int, step: int, reason: str) -> None:
        """Tells that the run ends, and why, in words."""
        self._post(RunEnded(tick=tick, step=step, reason=reason))

    def close(self) -> None:
        """Sends what is left, for as long as the patience lasts. Then does nothing."""
        atexit.unregister(self.close)
        outbox, self._outbox = self._outbox, None
        if outbox is not None and self._transport is not None:
            self.lost = outbox.close(self._patience)
            self._transport.close()

    def _place(self) -> str:
        """Rollbacks and tick, as they stand in the ids of messages."""
        return f"{self._at[0]}-{self._at[1]}"

    def _requeue(self, commands: Sequence[Waiting]) -> None:
        """Puts commands first that have joined a tick which did not come about."""
        seeds = [one for one in commands if parts_of(one.command)]
        controls = [one for one in commands if not parts_of(one.command)]
        self._waiting = [*seeds, *self._waiting]
        self._controls = [*controls, *self._controls]

    def _take(self) -> None:
        """Reads the commands that have come."""
        waiting = sum(len(parts_of(one.command)) for one in self._waiting)
        came = self._inbox.take(MOST_PARTS - waiting)
        for delivery, error in came.unreadable:
            self._bury(delivery, error)
        for delivery, envelope in came.commands:
            tokens = delivery.tokens
            command, known = envelope.message, self._record.answers.get(envelope.id)
            assert isinstance(command, Command)
            if envelope.id in self._tokens:  # came twice: answered once
                self._tokens[envelope.id] += tokens
            elif envelope.id in self._replayed:  # answered when its tick comes
                self._tokens[envelope.id] = tokens
            elif known is not None:
                self._tokens[envelope.id] = tokens
                self._acknowledge(known)
            else:
                self._tokens[envelope.id] = tokens
                self._queue(Waiting(envelope.id, command))

    def _queue(self, one: Waiting) -> None:
        said = not_wanted(one.command, self._lent) or wrong(one.command, self._layers)
        if said:
            self._acknowledge(self._answer(one.id, "INVALID", said, joined=False))
        elif parts_of(one.command):
            self._waiting.append(one)
        else:
            self._controls.append(one)

    def _sift(self, due: bool) -> None:
        """Refuses decisions that come too late."""
        late = sifted([*self._waiting, *self._controls], due, self._at)
        for id, why in late.items():
            self._acknowledge(self._answer(id, "INVALID", why, joined=False))
        self._waiting = [one for one in self._waiting if one.id not in late]
        self._controls = [one for one in self._controls if one.id not in late]

    def _bury(self, delivery: Delivery, error: MessageError) -> None:
        """Puts aside what cannot be read, and answers it if it has an id."""
        self._send(Letter("dead", buried(delivery, str(error)), delivery.tokens))
        known = {*self._tokens, *self._record.answers, *self._replayed}
        if error.id is not None and error.id not in known:
            answer = self._answer(error.id, "INVALID", str(error), joined=False)
            self._acknowledge(answer)

    def _answer(
        self, id: str, outcome: str, reason: str, joined: bool = True
    ) -> Acknowledged:
        tick = self._at[1] if joined else None
        return Acknowledged(command=id, outcome=outcome, reason=reason, tick=tick)

    def _undone(self, one: Waiting, why: str) -> Acknowledged:
        if isinstance(one.command, Enable):
            return self._answer(one.id, "OK", f"it holds, though {why}")
        return self._answer(one.id, "UNDONE", why)

    def _answered(
        self, joined: Sequence[Waiting], answers: Mapping[str, Acknowledged]
    ) -> list[Done]:
        """Writes down what became of commands, and then tells it.

        Commands that were carried out again had their answer before.
        """
        rollbacks, tick = self._at
        new = [one for one in joined if one.id not in self._record.answers]
        done = [Done(one.command, tick, rollbacks, answers[one.id]) for one in new]
        self._record.add(done)
        for one in new:
            self._acknowledge(answers[one.id])
        return [Done(one.command, tick, rollbacks, answers[one.id]) for one in joined]

    def _acknowledge(self, answer: Acknowledged) -> None:
        tokens = self._tokens.pop(answer.command, ())
        # The id of the answer follows from the command's: whoever gets it twice knows.
        data = encode(answer, self._source, f"ack-{answer.command}")
        self._send(Letter("acks", data, tokens))

    def _post(self, *messages: Message, name: str = "") -> None:
        """Sends events. Their ids follow from their place in the run.

        Args:
          *messages: to send.
          name: what their ids begin with; by default they are new.
        """
        self._send(*letters("events", messages, self._source, name))

    def _send(self, *letters: Letter) -> None:
        if self._outbox is not None:
            self._outbox.post(*letters)

    def _read(
        self, report: TickReport, seeds: Mapping[str, SeedState] | None
    ) -> Iterable[Message]:
        """What a remote policy reads; made when it is sent."""
        if self._lent is None or self._outbox is None:
            return ()
        if seeds is None:
            raise ValueError(
                "seeds: expected those of each layer after the tick, such as "
                "state.seeds, since a remote policy may decide; got None"
            )
        # Copied now: the next step may reuse their memory.
        return seen_told(self._lent, report, jax.device_get(dict(seeds)), self._at[0])
