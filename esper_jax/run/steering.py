"""A run's commands from outside: from the bus, from its own record, or replayed."""

import dataclasses
import functools
import importlib.util
import logging
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from esper_jax.growth.outside import Outside
from esper_jax.growth.reports import TickReport
from esper_jax.growth.state import TrainState
from esper_jax.run.config import ConfigError
from esper_jax.run.folder import RunError, read_lines, write_lines
from esper_jax.run.session import Session
from esper_jax.train.retreat import Rollback

__all__ = [
    "Channels",
    "Steering",
    "StoppedByCommand",
    "check_channels",
    "open_steering",
]

_log = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds that the end of a run waits for the bus."""


class StoppedByCommand(RunError):
    """A command has ended the run, which is saved."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Channels:
    """How the outside reaches a run; see `train_run`."""

    bus: str | None = None
    serve: bool = False
    replay: Path | None = None
    remote: int | None = None

    @property
    def open(self) -> bool:
        """Whether something is told, and commands may come."""
        return self.bus is not None or self.serve


def check_channels(channels: Channels) -> None:
    """Refuses a bus or a record that cannot be used. Connects to nothing.

    Raises:
      ConfigError: naming the option.
    """
    bus, replay, remote = channels.bus, channels.replay, channels.remote
    if channels.serve and bus is not None:
        raise ConfigError("--serve: expected without --bus, which serves others, too")
    if channels.serve and not hasattr(socket, "AF_UNIX"):
        raise ConfigError(
            "--serve: expected a system with Unix domain sockets; take --bus "
            "file:FOLDER"
        )
    if remote is not None and not channels.open:
        raise ConfigError("--remote: expected --bus URL or --serve with it")
    if remote is not None and remote < 1:
        raise ConfigError(f"--remote: expected at least 1 tick, got {remote}")
    if not channels.open and replay is None:
        return
    option = "--replay" if not channels.open else "--bus" if bus else "--serve"
    _check_installed(option)
    from esper_jax.bus import RecordError, read_record
    from esper_jax.bus.connect import check_url

    if bus is not None:
        try:
            check_url(bus)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"--bus: {error}") from None
    if replay is not None:
        try:
            if not replay.is_file():
                raise RecordError("expected a file of commands, and it is not there")
            ids = Counter(done.id for done in read_record(replay))
            if not ids:
                raise RecordError("expected a file of commands, and it holds none")
            [(id, times)] = ids.most_common(1)
            if times > 1:
                raise RecordError(
                    f"expected an id of its own for each command; {id!r} stands "
                    f"{times} times"
                )
        except (RecordError, OSError) as error:
            raise ConfigError(f"--replay {replay}: {error}") from None


def _check_installed(option: str) -> None:
    if importlib.util.find_spec("msgspec") is None:
        raise ConfigError(
            f"{option} needs msgspec, which is not installed: pip install "
            "'esper-jax[bus]'"
        )


class Steering:
    """The service of a run, and what it leaves in the run's records.

    Args:
      service: a `bus.Service`, whose package need not be installed.
      session: of the run.
      state: that it goes on from.
    """

    def __init__(self, service: Any, session: Session, state: TrainState) -> None:
        self._service = service
        self._session = session
        self._at = int(state.ticks), int(state.step)
        self._over = False
        self._was_silent = service.silent

    def commands(self, state: TrainState) -> Outside:
        """What joins the next tick; for `fit`."""
        tick, rollbacks = int(state.ticks) + 1, int(state.governor.rollbacks)
        return self._service.asked(tick, rollbacks)

    @property
    def asking(self) -> dict[tuple[str, int], str]:
        """Ids of the commands of this tick, by layer and seed."""
        return self._service.asking()

    def ticked(
        self, report: TickReport, events: Sequence[dict[str, Any]], state: TrainState
    ) -> list[str]:
        """Answers what joined a tick; returns lines that tell of it.

        Raises:
          RunError: if that cannot be written down.
        """
        tick, silent = int(report.tick), self._service.silent
        self._at = tick, int(report.step)
        answer = functools.partial(self._service.ticked, report, events, state.seeds)
        told = self._written(answer)
        if silent != self._was_silent:
            self._was_silent = silent
            names = "its own policy", "the remote policy"
            since = "" if silent else "no decision of the remote one came in time"
            told += self._session.log.add_policy(
                tick, names[not silent], names[silent], since
            )
        return told

    def undone(self, rollback: Rollback) -> list[str]:
        """Refuses what joined a tick that was undone; returns lines that tell of it."""
        return self._written(lambda: self._service.undone(rollback), rollback)

    @property
    def stops(self) -> bool:
        """Whether a command has asked the run to end."""
        return self._service.stop_asked

    def stopped(self) -> list[str]:
        """Answers that command, now that the state is saved."""
        return self._written(self._service.stopped)

    def _written(
        self, answer: Callable[[], list[Any]], rollback: Rollback | None = None
    ) -> list[str]:
        """Lets commands be answered, and writes that down."""
        try:
            done = answer()
        except OSError as error:
            raise RunError(
                f"{self._session.folder.commands} cannot be written: "
                f"{error.strerror}; make room or give permission. What is saved is "
                "sound, and --resume goes on from it"
            ) from None
        # A remote policy that asks for nothing tells so at every tick.
        told = [d for d in done if getattr(d.command, "commands", True)]
        return self._session.log.add_commands(told, rollback)

    def ended(self, state: TrainState, reason: str) -> None:
        """Tells that the run ends."""
        left = self._service.left
        if left and int(state.ticks) >= self._session.config.train.ticks:
            _log.warning(
                "%d commands were to be carried out at ticks that did not come (%s%s)",
                len(left),
                ", ".join(left[:5]),
                ", ..." if len(left) > 5 else "",
            )
        self._over = True
        self._service.ended(int(state.ticks), int(state.step), reason)

    def failed(self, error: BaseException) -> None:
        """Tells that an error has ended the run, unless its end was told."""
        if not self._over:
            self._service.ended(*self._at, f"it failed: {type(error).__name__}")

    def close(self) -> dict[str, dict[str, Any]]:
        """Sends what is left, and logs what was lost.

        Returns:
          What was lost, as `Monitor.lost` has it; empty where nothing was.
        """
        outbox = self._service.outbox
        self._service.close()
        self._tell(outbox)
        if outbox is None or not (self._service.lost or outbox.dropped):
            return {}
        account = outbox.account
        return {"bus": account | {"records": account["records"] + self._service.lost}}

    def _tell(self, outbox: Any) -> None:
        if self._service.lost:
            _log.warning(
                "the bus lost %d events and answers, which could be neither sent (%s) "
                "nor written to %s",
                self._service.lost,
                outbox.error or "there was no time",
                self._session.folder.spill,
            )
        elif outbox is not None and outbox.waiting:
            _log.warning(
                "%d events and answers of the bus could not be sent (%s): %s keeps "
                "them for the next --resume with --bus",
                outbox.waiting,
                outbox.error or "there was no time",
                self._session.folder.spill,
            )
        if outbox is not None and outbox.dropped:
            _log.warning(
                "the bus dropped what %d ticks measured (%s); training was not "
                "affected",
                outbox.dropped,
                outbox.error or "it was too slow",
            )


def open_steering(
    session: Session, state: TrainState, channels: Channels
) -> Steering | None:
    """The service of a run that goes on from a state; None if nothing is asked.

    Commands that its record holds from after the state are carried out again at their
    ticks, whether or not there is a bus.

    Raises:
      RunError: if the record of commands is damaged, or the bus cannot be opened.
      ConfigError: if what is replayed does not fit the run.
    """
    folder, replay = session.folder, channels.replay
    if replay is None and folder.replayed.exists():  # it was killed on the way
        replay = folder.replayed
    if not channels.open and replay is None and not folder.commands.exists():
        return None
    _check_installed(f"{folder.commands.name} of {folder.path}")
    from esper_jax.bus import Record, RecordError, Service, layers_of, read_record

    first = not jax.process_index()
    at = int(state.governor.rollbacks), int(state.ticks)
    layers = layers_of(session.program)
    source = f"esper_jax/{session.record.id}"
    try:
        past = read_record(folder.commands)
        replayed = [] if replay is None else read_record(replay)
        _check_fits(replay, replayed, layers)
        if channels.replay is not None and first:
            write_lines(folder.replayed, read_lines(channels.replay))
        record = Record(
            folder.commands if first else None, past, replayed=replayed, at=at
        )
    except RecordError as error:
        raise RunError(str(error)) from None
    again = sum(done.at > at for done in past)
    if again:
        _log.warning(
            "%d commands that came after tick %d are carried out again at their ticks",
            again,
            at[1],
        )
    service = Service(
        layers,
        _transport(session, channels) if first and channels.open else None,
        source=source,
        lifecycle_config=session.program.gates,
        record=record,
        # What waits there is for another bus, which may be away; a socket never is.
        spill=None if channels.serve else folder.spill,
        patience=PATIENCE,
    )
    if channels.open and jax.process_count() > 1:
        service.share()
    if channels.remote is not None:
        service.lend(session.program, channels.remote)
    service.started(int(state.ticks), int(state.step))
    return Steering(service, session, state)


def _check_fits(replay: Path | None, replayed: Sequence[Any], layers: Any) -> None:
    from esper_jax.bus.admission import wrong

    for number, done in enumerate(replayed, 1):
        said = wrong(done.command, layers)
        if said:
            raise ConfigError(f"--replay {replay}, command {number}: {said}")


def _transport(session: Session, channels: Channels) -> Any:
    from esper_jax.bus.connect import connect, shown
    from esper_jax.bus.socket_client import SOCKET
    from esper_jax.bus.sockets import Served

    bus, folder = channels.bus, session.folder.path
    if bus is None:
        try:
            return Served(folder, session.record.id)
        except OSError as error:
            raise RunError(
                f"--serve: there cannot be a socket at {folder / SOCKET}: "
                f"{error.strerror or error}; take --bus file:FOLDER"
            ) from None
    try:
        return connect(bus, session.record.id)
    except (ValueError, OSError) as error:
        raise RunError(f"--bus {shown(bus)}: {error}") from None
