"""A run on disk: train from a config into a folder, resume it, evaluate it.

`RunFolder` lists the files. ``summary.json`` and what ``compare`` asks for appear when
the run ends.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from esper_jax.checkpoint import Retention
from esper_jax.checkpoint.checkpointer import Checkpointer, Restored
from esper_jax.data import Dataset
from esper_jax.growth.reports import TickReport
from esper_jax.growth.state import TrainState
from esper_jax.monitor.live import LiveView
from esper_jax.monitor.monitor import Monitor
from esper_jax.monitor.words import why
from esper_jax.parallel.processes import together
from esper_jax.policy.memory import FELL_BACK, Reason
from esper_jax.run.build import Build, build_run, load_data
from esper_jax.run.config import ConfigError, RunConfig
from esper_jax.run.devices import AXIS, mesh_of, over
from esper_jax.run.folder import RunError, RunFolder, RunStopped, read_config
from esper_jax.run.logs import History
from esper_jax.run.monitoring import check_writers, open_monitor
from esper_jax.run.opening import check_data, check_ticks, examine
from esper_jax.run.own import check_one_step, has_own_loss, is_own
from esper_jax.run.profiling import Profile
from esper_jax.run.record import check_seal, newest_seal, read_record, seal_of
from esper_jax.run.session import Session, Start, begin, restored
from esper_jax.run.steering import Channels, Steering, check_channels, open_steering
from esper_jax.run.steering import StoppedByCommand as StoppedByCommand
from esper_jax.run.summary import conclude, test_result
from esper_jax.train.batches import is_iterable
from esper_jax.train.governor import Governor
from esper_jax.train.loop import fit
from esper_jax.train.program import Program
from esper_jax.train.retreat import Rollback, TrainingStopped
from esper_jax.train.stop import Interrupted, Stop

__all__ = ["evaluate_run", "restore_run", "train_run"]

_log = logging.getLogger(__name__)


def train_run(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    allow_change: Sequence[str] = (),
    devices: int | None = None,
    profile: int = 0,
    bus: str | None = None,
    serve: bool = False,
    replay: Path | None = None,
    remote: int | None = None,
    console: Console | None = None,
    stop: Stop | None = None,
    build: Build | None = None,
) -> dict[str, Any]:
    """Trains into the folder ``out`` and returns what ``summary.json`` holds.

    A signal ends training after the step in hand; the state is saved then.

    Args:
      config: of the run.
      out: folder of the run; must be empty or absent, unless ``resume``.
      resume: go on from the newest sound checkpoint of the run in ``out``. Starts over
        if there is no checkpoint yet, and starts a run if there is none.
        `check_resumable` says what may differ from the run's config. A smaller
        ``growth.capacity`` must hold all living seeds.
      allow_change: keys, or tables of keys, that may differ from the run's config, too.
        Each change is written down as an event.
      devices: of each process, to train on; see `run.devices.mesh_of`.
      profile: steps to record with JAX's profiler; see `run.profiling.Profile`.
      bus: where messages go and commands come from; see `bus.connect`.
      serve: the same over a socket in ``out``, which is on no network; see
        `bus.sockets`.
      replay: commands of another run, to carry out at the same ticks.
      remote: with ``bus`` or ``serve``: let a remote policy decide
        (`bus.RemotePolicy`). The run's own decides again when so many ticks were not
        decided.
      console: where the live view prints; standard output by default.
      stop: signals to end for; SIGINT by default, and only while steps are done.
      build: makes the program, by default `build_run`. A `run.build.SharedPrograms`
        compiles once for runs that differ in seed or length.

    Raises:
      RunError: if ``out`` cannot be used, or, as a `RunStopped`, if the governor
        stopped the run. A stopped run has saved its last good state.
      CheckpointError: if no checkpoint of a run to resume is sound, if one cannot be
        saved, or if another process is training into ``out``.
      ConfigError: if the config does not fit the data or the run to resume. Nothing
        has been written then.
      Interrupted: if a signal ended training, with all that is done saved.
      StoppedByCommand: if a command did, likewise.
    """
    folder = RunFolder(out)
    look = functools.partial(
        examine, folder, config, resume=resume, allowed=allow_change
    )
    if profile < 0:
        raise ConfigError(f"--profile: expected at least 1 step, got {profile}")
    # All processes look before one of them writes.
    together(lambda: look(warn=False), RunError)
    together(lambda: check_writers(config), ConfigError)
    channels = Channels(bus=bus, serve=serve, replay=replay, remote=remote)
    together(lambda: check_channels(channels), ConfigError)
    data, program = together(
        lambda: _built(config, devices, build or build_run), ConfigError
    )
    state = together(lambda: _started(config, program), ConfigError)
    if is_own(config):
        together(lambda: check_one_step(config, program, state, data), ConfigError)
    together(lambda: _make(folder.path), RunError)
    with Checkpointer(folder.checkpoints, retention=_retention(config)) as checkpoints:
        checkpoints.acquire()
        # Once more: another process may have trained into the folder since.
        opening = together(look, RunError)
        start = Start(config, data, program, folder, checkpoints)
        history = History()
        if not opening.fresh:
            state, history = restored(start, opening, state)
        check_ticks(config, state)
        session = begin(start, opening, state, history)
        steering = together(lambda: open_steering(session, state, channels), RunError)
        recorder = Profile(_profiled(config, profile), folder.profile)
        with recorder.recording(session) as recorded, _closing(steering) as dropped:
            state, lost = _train(recorded, state, steering, console, stop)
        lost |= dropped
    return conclude(session, state, lost)


def evaluate_run(out: Path) -> dict[str, Any]:
    """Step, accuracy and loss on test data of the newest sound checkpoint in ``out``.

    Newer checkpoints that are damaged are named in the log.

    Raises:
      RunError: if ``out`` holds no run.
      CheckpointError: if there is no sound checkpoint.
    """
    program, data, found = restore_run(RunFolder(out))
    loss, accuracy = test_result(program, found.state, data)
    return {"step": int(found.state.step), "accuracy": accuracy, "loss": loss}


def restore_run(folder: RunFolder) -> tuple[Program, Dataset, Restored]:
    """Program and data of a run, and its newest sound checkpoint.

    Raises:
      RunError: if the folder holds no run.
      CheckpointError: if there is no sound checkpoint.
    """
    config, record = read_config(folder), read_record(folder)
    newest = newest_seal(folder)
    if newest is not None:
        check_seal(folder, config, record, newest)
    data = load_data(config)
    check_data(config, data)
    program = build_run(config, data)
    like = program.init(jax.random.key(config.seed))
    found = Checkpointer(folder.checkpoints).restore(like)
    check_seal(folder, config, record, seal_of(found.manifest))
    return program, data, found


def _built(
    config: RunConfig, devices: int | None, build: Build
) -> tuple[Dataset, Program]:
    data = load_data(config)
    check_data(config, data)
    mesh = mesh_of(config, data, devices)
    return data, over(build(config, data, AXIS if mesh else None), mesh)


def _started(config: RunConfig, program: Program) -> TrainState:
    try:
        return program.init(jax.random.key(config.seed))
    except ValueError as error:  # by the policy, if a model has no room for it
        raise ConfigError(str(error)) from None


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{out} cannot be written to ({error.strerror}): choose another --out"
        ) from None


def _profiled(config: RunConfig, steps: int) -> int:
    """How many steps to profile."""
    if steps and not config.features.performance_monitoring:
        _log.warning(
            "--profile: no step is recorded, since features.performance_monitoring is "
            "off"
        )
        return 0
    return steps


def _retention(config: RunConfig) -> Retention:
    rules = config.checkpoint
    modes = {"": None, "loss": ("loss", "min"), "accuracy": ("accuracy", "max")}
    return Retention(
        keep_last=rules.keep,
        best=modes[rules.keep_best],
        every=rules.keep_every or None,
        pinned=rules.pinned,
    )


@contextlib.contextmanager
def _closing(steering: Steering | None) -> Iterator[dict[str, Any]]:
    """Closes the bus in the end; what was lost is in the dictionary then."""
    lost: dict[str, Any] = {}
    try:
        yield lost
    except BaseException as error:
        if steering is not None:
            steering.failed(error)
        raise
    finally:
        if steering is not None:
            lost |= steering.close()


def _train(
    session: Session,
    state: TrainState,
    steering: Steering | None,
    console: Console | None,
    stop: Stop | None,
) -> tuple[TrainState, dict[str, Any]]:
    """Trains to the last tick, with live view, logs, checkpoints and governor.

    Returns:
      The state, and what the monitor lost.
    """
    monitor, told = together(lambda: open_monitor(session, state), RunError)
    with monitor:
        state = _trained(session, state, (monitor, told), steering, console, stop)
    return state, monitor.lost


def _trained(
    session: Session,
    state: TrainState,
    monitored: tuple[Monitor, Sequence[str]],
    steering: Steering | None,
    console: Console | None,
    stop: Stop | None,
) -> TrainState:
    config, data = session.config, session.data
    batches = is_iterable(data.train)
    if jax.process_index():  # one of several processes shows it
        console = Console(quiet=True)
    monitor, told = monitored
    view = LiveView(config.train.ticks, console)
    for line in told:
        view.note(line)
    with view:
        reporter = _Reporter(session, view, monitor, steering)
        try:
            state = fit(
                session.program,
                state,
                data.train,
                data.held_out,
                ticks=config.train.ticks,
                batch_size=None if batches else config.train.batch_size,
                steps_per_tick=config.train.steps_per_tick or None,
                seed=config.seed,
                on_tick=reporter.on_tick,
                commands=None if steering is None else steering.commands,
                governor=_governor(session, reporter),
                stop=stop,
            )
        except Interrupted as stopped:
            reporter.save_at_once(stopped.state)
            reporter.ended(stopped.state, "it was stopped by a signal")
            raise
        except TrainingStopped as stopped:
            reporter.ended(stopped.state, f"{stopped}")
            session.save(stopped.state, math.nan, math.nan)
            session.checkpoints.wait()  # the message below claims that it is saved
            raise RunStopped(
                f"{stopped}. The last good state is saved as step "
                f"{int(stopped.state.step)} in {session.checkpoints.directory}; mend "
                "the cause, then go on with --resume. --allow-change KEY lets a key of "
                "the config be another, such as train.learning_rate"
            ) from None
        reporter.ended(state, "its last tick is done")
        return state


class _Reporter:
    """Writes down, shows and saves what `fit` hands over after each tick.

    Remembers which reason for not germinating it has shown, to show each once in a row.
    """

    def __init__(
        self,
        session: Session,
        view: LiveView,
        monitor: Monitor,
        steering: Steering | None,
    ) -> None:
        self._session = session
        self._view = view
        self._monitor = monitor
        self._steering = steering
        self._shown = Reason.NOT_YET
        self._slots = {
            name: int(layer["capacity"])
            for name, layer in session.record.layers.items()
        }
        self._saved = -1  # the last step

    def on_tick(self, state: TrainState, report: TickReport) -> None:
        slots = {name: seeds.capacity for name, seeds in state.seeds.items()}
        fewer = {n: (self._slots[n], k) for n, k in slots.items() if k < self._slots[n]}
        self._slots = slots
        together(lambda: self._write(report, fewer, state), RunError)
        reason = Reason(int(report.reason))
        quiet = Reason.NOT_YET, Reason.GERMINATED, Reason.FELL_BACK  # or told elsewhere
        if reason not in (self._shown, *quiet):
            self._view.note(f"tick {int(report.tick)}: {why(reason)}")
            self._shown = reason
        config = self._session.config
        last = report.tick == config.train.ticks
        if last or int(report.tick) % config.checkpoint.every == 0:
            self._session.save(state, float(report.loss), float(report.accuracy))
            self._saved = int(state.step)
        if self._steering is not None and self._steering.stops:
            self._stop(self._steering, state, bool(last))

    def _stop(self, steering: Steering, state: TrainState, last: bool) -> None:
        """Ends the run as a command has asked, unless it ends by itself.

        Raises:
          StoppedByCommand: when all is saved.
        """
        self.save_at_once(state)
        for line in together(steering.stopped, RunError):
            self._view.note(line)
        if last:
            return
        steering.ended(state, "a command stopped it")
        out = self._session.folder.path
        raise StoppedByCommand(
            f"stopped by a command after tick {int(state.ticks)}; --resume --out {out} "
            f"goes on from step {int(state.step)}"
        )

    def ended(self, state: TrainState, reason: str) -> None:
        """Tells the bus that the run ends."""
        if self._steering is not None:
            self._steering.ended(state, reason)

    def save_at_once(self, state: TrainState) -> None:
        """Saves a state that is not saved yet, and waits for it."""
        if int(state.step) not in (0, self._saved):
            self._session.save(state, math.nan, math.nan)
        self._session.checkpoints.wait()

    def on_rollback(self, rollback: Rollback) -> None:
        add = self._session.log.add_rollback
        for line in together(lambda: add(rollback), RunError):
            self._view.note(line)
        self._monitor.write_rollback(rollback)
        undone = self._steering
        if undone is not None:
            for line in together(lambda: undone.undone(rollback), RunError):
                self._view.note(line)

    def _write(
        self,
        report: TickReport,
        fewer: dict[str, tuple[int, int]],
        state: TrainState,
    ) -> None:
        log, steering = self._session.log, self._steering
        asking = {} if steering is None else steering.asking
        moved = log.add(report, asking)
        events = [*moved, *log.add_slots(int(report.tick), fewer)]
        self._view.update(report, events)
        if steering is not None:
            for line in steering.ticked(report, events, state):
                self._view.note(line)
        if int(report.reason) == Reason.FELL_BACK:
            for line in log.add_policy(int(report.tick), *FELL_BACK):
                self._view.note(line)
        self._session.metrics.add(report)
        self._monitor.write(report, events)


def _governor(session: Session, reporter: _Reporter) -> Governor | None:
    config = session.config
    if not config.governor.enabled:
        return None
    return Governor(
        session.program,
        config.governor,
        num_classes=None if has_own_loss(config) else session.data.num_classes,
        on_rollback=reporter.on_rollback,
    )
