"""`Monitor`: hands what each tick says to writers, and never waits for them.

Each writer has a thread and a bounded queue. A record that finds the queue full, or
that the writer fails at, is counted as lost; training goes on.
"""

import atexit
import logging
import numbers
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import jax
import numpy as np

from esper_jax.growth.reports import TickReport
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.monitor.news import News, rollback_entry
from esper_jax.monitor.protocol import Record, Writer
from esper_jax.monitor.series import Meter, Values
from esper_jax.monitor.writers import JsonLines
from esper_jax.train.retreat import Rollback

__all__ = ["Monitor"]

_log = logging.getLogger(__name__)


def _check_whole(name: str, value: Any, least: int, unit: str) -> None:
    """Refuses what is no whole number of at least ``least``."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or int(value) < least:
        raise ValueError(
            f"{name} must be an int of at least {least} {unit}, got {value!r}"
        )


class Monitor:
    """Hands reports to writers; a context manager.

        with Monitor() as monitor:
            for step in ...:
                train_step(...)
                if step % 100 == 99:
                    monitor.write(growth.tick(model, evaluate))

    With `fit`: ``on_tick=lambda state, report: monitor.write(report)``, and
    ``Governor(program, on_rollback=monitor.write_rollback)``. Call it from one thread,
    in one of several processes.

    Args:
      writers: where records go; by default `JsonLines` into ``metrics.jsonl``.
      lifecycle_config: what growth was made with, whose numbers the words of events
        quote; None for the defaults.
      room: records that wait for each writer, at most.
      patience: seconds that `close` waits for all writers together.
      after: the step that the run goes on from, where a rollback before the first
        report stands.

    Raises:
      TypeError: if ``writers`` are none.
      ValueError: if ``room`` is no whole number of at least 1, ``patience`` is not a
        number of seconds, or ``after`` is no step.
    """

    def __init__(
        self,
        writers: Sequence[Writer] | None = None,
        *,
        lifecycle_config: LifecycleConfig | None = None,
        room: int = 64,
        patience: float = 5.0,
        after: int = 0,
    ) -> None:
        _check_whole("room", room, 1, "record")
        _check_whole("after", after, 0, "steps")
        known = isinstance(patience, numbers.Real)
        if not known or not 0 <= patience <= threading.TIMEOUT_MAX:
            raise ValueError(
                f"patience must be seconds from 0 to {threading.TIMEOUT_MAX:.0f}, got "
                f"{patience!r}"
            )
        if writers is None:
            writers = [JsonLines("metrics.jsonl")]
        _check_writers(writers)
        self._patience = patience
        self._news = News(lifecycle_config or LifecycleConfig())
        self._meter = Meter()
        self._after = after
        self._at: tuple[int, int] | None = None  # tick and step of the last report
        self._open = True
        self._process = os.getpid()
        self._lanes = [_Lane(n, w, room) for n, w in _named(writers)]
        atexit.register(self.close)  # whoever forgets it loses nothing

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def lost(self) -> dict[str, dict[str, Any]]:
        """What was lost so far, for each writer that lost something or failed.

        ``records`` lost of how many it was ``given``, and the first ``error``, None
        where it only was too slow. After `close`, what was not written by then is lost.
        """
        accounts = {lane.name: lane.account() for lane in self._lanes}
        return {n: a for n, a in accounts.items() if a["records"] or a["error"]}

    def write(
        self,
        report: TickReport,
        events: Sequence[Mapping[str, Any]] | None = None,
    ) -> Sequence[Mapping[str, Any]]:
        """Hands on what a tick says. Waits for no writer.

        Args:
          report: of the tick, as `Growth.tick` returns it and `fit` hands it over. One
            that is on a device is fetched, which waits for it.
          events: of the tick, if they are known already; by default the report's.

        Returns:
          The events that are new.

        Raises:
          TypeError: if ``report`` is none.
          ValueError: if it is of several ticks, or the monitor is closed.
        """
        if not isinstance(report, TickReport):
            raise TypeError(
                "report must be what Growth.tick returns, or what fit hands to "
                f"on_tick; got {type(report).__name__}"
            )
        if np.ndim(report.tick):
            raise ValueError(
                "report must be of one tick, got one of shape "
                f"{np.shape(report.tick)}: write them one by one"
            )
        self._check_open()
        if isinstance(report.tick, jax.Array):
            report = jax.device_get(report)
        if events is None:
            events = self._news.tick(report)
        self._at = int(report.tick), int(report.step)
        if self._lanes:
            self._hand_out(self._meter.tick(report), events)
        return events

    def write_rollback(self, rollback: Rollback) -> None:
        """Hands on that a governor undid a tick; its ``on_rollback`` may be this.

        Raises:
          ValueError: if the monitor is closed.
        """
        self._check_open()
        self._at = self._at or (rollback.tick, self._after)
        events = [rollback_entry(rollback), *self._news.rollback(rollback)]
        self._hand_out(self._meter.rollback(rollback), events)

    def close(self) -> None:
        """Lets the writers finish, and logs once what was lost.

        Waits no longer than ``patience``. Further calls do nothing.
        """
        if not self._open or os.getpid() != self._process:
            return  # a forked child has none of the threads
        self._open = False
        atexit.unregister(self.close)
        for lane in self._lanes:
            lane.end()
        until = time.monotonic() + self._patience
        for lane in self._lanes:
            lane.ended.wait(max(0.0, until - time.monotonic()))
        for lane in self._lanes:
            if said := lane.settle():
                _log.warning("%s", said)

    def _check_open(self) -> None:
        if not self._open:
            raise ValueError("the monitor is closed: make a new one")

    def _hand_out(self, values: Values, events: Sequence[Mapping[str, Any]]) -> None:
        assert self._at is not None
        lost = {lane.name: float(lane.lost) for lane in self._lanes}
        values = {**values, "esper_monitor_lost_total": lost}
        record = Record(*self._at, time.time(), values, events)
        for lane in self._lanes:
            lane.put(record)


class _Lane:
    """One writer, its queue, and the thread that calls it.

    The thread is a daemon: the interpreter does not wait for a writer that hangs.

    Attributes:
      ended: set when the writer is closed and the thread is at its end.
    """

    def __init__(self, name: str, writer: Writer, room: int) -> None:
        self.name = name
        self.ended = threading.Event()
        self._writer = writer
        self._room = room
        # Has no limit of its own, so that the end always finds room.
        self._queue: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        # Each number is counted in one thread alone.
        self._given = self._refused = 0
        self._written = self._failed = 0
        self._error: str | None = None
        self._account: tuple[int, str | None] | None = None
        threading.Thread(
            target=self._run, name=f"esper-jax-{name}", daemon=True
        ).start()

    @property
    def lost(self) -> int:
        """Records that are lost for certain."""
        return self._account[0] if self._account else self._refused + self._failed

    def account(self) -> dict[str, Any]:
        """What became of the records, as JSON."""
        error = self._account[1] if self._account else self._error
        return {"records": self.lost, "given": self._given, "error": error}

    def put(self, record: Record) -> None:
        """Takes a record, or counts it as lost."""
        self._given += 1
        if self._queue.qsize() < self._room:
            self._queue.put(record)
        else:
            self._refused += 1

    def end(self) -> None:
        """Lets the writer close after what it was given."""
        self._queue.put(None)

    def settle(self) -> str:
        """Closes the account; says what is wrong, or nothing."""
        lost, error = self._given - self._written, self._error
        if not self.ended.is_set():
            error = error or "it did not end in time"
        self._account = lost, error
        if not (lost or error):
            return ""
        return (
            f"the writer {self.name} lost {lost} of {self._given} records "
            f"({error or 'it was too slow'}); training was not affected"
        )

    def _run(self) -> None:
        while (record := self._queue.get()) is not None:
            try:
                self._writer.write(record)
                self._written += 1
            except BaseException as error:  # whatever it is, it ends no training
                self._failed += 1
                self._note(error)
        try:
            self._writer.close()
        except BaseException as error:
            self._note(error)
        self.ended.set()

    def _note(self, error: BaseException) -> None:
        if self._error is None:
            first = (str(error).splitlines() or [""])[0][:200]
            self._error = f"{type(error).__name__}: {first}".removesuffix(": ")


def _check_writers(writers: Any) -> None:
    """Refuses what would only fail in a thread, where nobody sees it."""
    if not isinstance(writers, Sequence) or isinstance(writers, str | bytes):
        raise TypeError(
            f"writers must be a list of writers, got {type(writers).__name__}; put a "
            "single one into a list"
        )
    for number, writer in enumerate(writers):
        for name in ("write", "close"):
            if isinstance(writer, type) or not callable(getattr(writer, name, None)):
                raise TypeError(
                    f"writers[{number}] must be an object with write(record) and "
                    f"close(), such as JsonLines(path); got {writer!r:.80}"
                )


def _named(writers: Sequence[Writer]) -> Iterator[tuple[str, Writer]]:
    """Each writer with the name of its class, numbered where there are several."""
    seen: Counter[str] = Counter()
    for writer in writers:
        name = type(writer).__name__
        seen[name] += 1
        yield f"{name}-{seen[name]}" if seen[name] > 1 else name, writer
