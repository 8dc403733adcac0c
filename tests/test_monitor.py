"""The monitor: what its series say, and writers that fail, hang or are slow."""

import dataclasses
import json
import logging
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reports import report, rollback, seeds, wait_for

from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import Outcome, Stage
from esper_jax.monitor import SERIES, JsonLines, Monitor, Prometheus
from esper_jax.monitor.series import MOST_LAYERS, OTHERS, Meter
from esper_jax.train.faults import Fault

ROOT = Path(__file__).parents[1]
D, T, G, F = Stage.DORMANT, Stage.TRAINING, Stage.GRAFTING, Stage.FOSSILIZED


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def clock(*times):
    return iter(times).__next__


def test_the_series_say_what_a_report_says():
    meter = Meter(clock(10.0, 14.0))
    meter.tick(report(1, {"a": [D, D], "b": [F]}))
    first = seeds(
        [G, T, D],
        alpha=[0.25, 0.0, 0.0],
        source=[T, T, D],
        target=[G, G, Stage.GERMINATED],
        outcome=[Outcome.OK, Outcome.GATE, Outcome.NO_CAPACITY],
        epochs=[9, 7, 5],
        signals=Signals.unmeasured(
            worth=np.float32([0.5, np.nan, 1.0]), drift=np.float32(0.125)
        ),
    ).replace(errors=np.uint8([200, 100, 50]))
    second = seeds([F], alpha=1.0, epochs=30, signals=Signals.unmeasured(drift=0.625))
    values = meter.tick(report(2, {"a": first, "b": second}, loss=np.nan))
    assert set(values) == {s.name for s in SERIES} - {"esper_monitor_lost_total"}
    assert values["esper_ticks_total"] == {"": 2}
    assert values["esper_steps_total"] == {"": 16}
    assert values["esper_train_loss"] == {"": 0.75}
    assert np.isnan(values["esper_held_out_loss"][""])
    assert values["esper_held_out_accuracy"] == {"": 0.625}
    assert values["esper_step_seconds"] == {"": 0.5}  # 4 seconds, 8 steps
    assert abs(values["esper_last_tick_timestamp_seconds"][""] - time.time()) < 60
    stages = {"GRAFTING": 1, "TRAINING": 1, "DORMANT": 1, "FOSSILIZED": 1}
    assert values["esper_seeds"] == {s.name: stages.get(s.name, 0) for s in Stage}
    # The seed that has just come to GRAFTING is there for no tick yet.
    stay = values["esper_longest_stay_ticks"]
    assert (stay["TRAINING"], stay["GRAFTING"]) == (7, 0)
    assert not {"DORMANT", "FOSSILIZED"} & set(stay)
    assert values["esper_blended_seeds"] == {"": 1.25}
    assert values["esper_layer_living_seeds"] == {"a": 2, "b": 1}
    assert values["esper_layer_blended_seeds"] == {"a": 0.25, "b": 1}
    # Of four seeds, drift is measured for all.
    assert values["esper_signal_mean"] == {"worth": 0.75, "drift": 0.25}
    assert values["esper_seed_error_steps"] == {"": 300}  # not those of the dormant
    counted = {k: v for k, v in values["esper_transitions_total"].items() if v}
    assert counted == {"GRAFTING": 1}
    refused = {"ILLEGAL": 0, "TOO_EARLY": 0, "GATE": 1, "NO_CAPACITY": 1, "BATCH": 0}
    assert values["esper_refusals_total"] == refused
    assert values["esper_nonfinite_ticks_total"] == {"": 1}
    after = meter.rollback(rollback(1, Fault.JUMP))
    assert after["esper_rollbacks_total"]["JUMP"] == 1
    assert sum(after["esper_rollbacks_total"].values()) == 1
    assert after["esper_transitions_total"]["ROLLED_BACK"] == 1
    assert after["esper_seeds"] == values["esper_seeds"]
    assert values["esper_rollbacks_total"]["JUMP"] == 0  # a record does not change


def test_a_report_on_a_device_is_fetched():
    kept = Kept()
    with Monitor([kept]) as monitor:
        monitor.write(jax.tree.map(jnp.asarray, report(1, {"a": [D, T]})))
    seeds = kept.records[0].values["esper_seeds"]
    assert (seeds["DORMANT"], seeds["TRAINING"]) == (1, 1)


def test_without_writers_there_is_nothing_to_do():
    with Monitor([]) as monitor:
        assert monitor.write(report(1, {"a": [D]})) == []
        monitor.write_rollback(rollback(1))
    assert not monitor.lost


def test_what_is_not_measured_is_left_out():
    values = Meter().tick(report(1, {"a": [D]}, accuracy=np.nan))
    assert values["esper_held_out_accuracy"] == {}
    assert values["esper_step_seconds"] == {}
    assert values["esper_signal_mean"] == {}
    assert Meter().tick(report(1, {}))["esper_blended_seeds"] == {"": 0}


@pytest.mark.parametrize(("layers", "each"), [(1, 100_000), (400, 100)])
def test_the_number_of_series_is_bounded(layers, each):
    living = [T] + [D] * (each - 1)
    measured = {field.name: np.ones(each) for field in dataclasses.fields(Signals)}
    all_of_them = {
        f"layer/{i}": seeds(
            living,
            signals=Signals(**measured),
        )
        for i in range(layers)
    }
    meter = Meter()
    meter.tick(report(1, all_of_them))
    values = meter.tick(report(2, all_of_them))
    # One value each, by stage, passing stage, layer, signal, new stage, rule and fault.
    most = 10 + 11 + 6 + 2 * (MOST_LAYERS + 1) + (len(measured) - 2) + 11 + 5 + 6
    assert sum(map(len, values.values())) == most - (2 * MOST_LAYERS) * (layers == 1)
    page = (ROOT / "docs" / "monitoring.md").read_text()
    assert f"at most {most} values" in page
    by_layer = values["esper_layer_living_seeds"]
    assert sum(by_layer.values()) == layers
    assert by_layer.get(OTHERS, 0) == max(0, layers - MOST_LAYERS)


def test_names_are_those_of_prometheus():
    for series in SERIES:
        assert series.name.startswith("esper_")
        if series.unit == "seconds":
            assert series.name.endswith("_seconds")
        # Reserved for the parts of histograms and summaries.
        assert not series.name.endswith(("_sum", "_count", "_bucket", "_info"))


def test_the_table_of_the_docs_is_that_of_the_code():
    page = (ROOT / "docs" / "monitoring.md").read_text()
    rows = [
        f"| `{s.name}` | {s.kind} | {f'`{s.label}`' if s.label else ''} | {s.unit} | "
        f"{s.meaning} |".replace("|  |", "| |")
        for s in SERIES
    ]
    listed = [line for line in page.splitlines() if line.startswith("| `esper_")]
    assert listed == rows


class Kept:
    """Keeps what it is given."""

    def __init__(self):
        self.records, self.closed, self.thread = [], 0, None

    def write(self, record):
        self.thread = threading.current_thread()
        self.records.append(record)

    def close(self):
        self.closed += 1


class Raises(Kept):
    def write(self, record):
        if record.tick != 2:
            raise self.error

    def close(self):
        raise RuntimeError("cannot close either\nas was to be expected")


class Hangs(Kept):
    """Waits for ever in ``write``, or in ``close``: until the test is over."""

    over = threading.Event()

    def __init__(self, where):
        super().__init__()
        self.where, self.entered = where, threading.Event()

    def write(self, record):
        super().write(record)
        self.hang("write")

    def close(self):
        self.hang("close")
        super().close()

    def hang(self, where):
        if self.where == where:
            self.entered.set()
            self.over.wait()


def test_a_writer_gets_each_tick_and_rollback_in_a_thread_of_its_own():
    kept = Kept()
    germinates = seeds(
        [Stage.GERMINATED], source=[D], target=[Stage.GERMINATED], outcome=[Outcome.OK]
    )
    refused = seeds(
        [D], target=[Stage.GERMINATED], outcome=[Outcome.NO_CAPACITY], source=[D]
    )
    with Monitor([kept]) as monitor:
        [told] = monitor.write(report(1, {"a": germinates}))
        assert monitor.write(report(2, {"a": refused}))
        assert monitor.write(report(3, {"a": refused})) == []  # it repeats
        monitor.write_rollback(rollback(1))
        assert monitor.write(report(4, {"a": refused}), ["mine"]) == ["mine"]
    assert told["text"] == "seed 0: DORMANT -> GERMINATED"
    assert [r.tick for r in kept.records] == [1, 2, 3, 3, 4]
    assert [r.step for r in kept.records] == [8, 16, 24, 24, 32]
    assert [len(r.events) for r in kept.records] == [1, 1, 0, 2, 1]
    back = kept.records[3]
    assert back.events[0]["fault"] == "TRAIN_LOSS"
    assert back.events[1]["text"].endswith("(governor: the loss is nan)")
    assert back.values["esper_rollbacks_total"]["TRAIN_LOSS"] == 1
    assert back.values["esper_monitor_lost_total"] == {"Kept": 0}
    assert kept.closed == 1
    assert kept.thread.daemon
    assert kept.thread is not threading.main_thread()
    assert monitor.lost == {}
    monitor.close()  # once more is nothing
    assert kept.closed == 1
    with pytest.raises(ValueError, match="the monitor is closed"):
        monitor.write(report(5, {}))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SystemExit])
def test_a_writer_that_raises_loses_its_records_alone(error, caplog):
    raises, kept, again = Raises(), Kept(), Kept()
    raises.error = error
    with Monitor([raises, kept, again]) as monitor:
        for tick in range(1, 6):
            monitor.write(report(tick, {"a": [D]}))
    name = "SystemExit" if error is SystemExit else "OSError: [Errno 28] No space left"
    lost = monitor.lost.pop("Raises")
    assert (lost["records"], lost["given"]) == (4, 5)
    assert lost["error"].startswith(name)
    assert [len(w.records) for w in (kept, again)] == [5, 5]
    [said] = caplog.messages  # once, at the end
    assert said.startswith(f"the writer Raises lost 4 of 5 records ({name}")
    assert said.endswith("training was not affected")


@pytest.mark.parametrize("where", ["write", "close"])
def test_a_writer_that_hangs_is_not_waited_for(where, caplog):
    hangs, kept = Hangs(where), Kept()
    monitor = Monitor([hangs, kept, Kept()], room=3, patience=0.2)
    began = time.monotonic()
    for tick in range(1, 11):
        monitor.write(report(tick, {"a": [D]}))
        if where == "close" or tick == 1:
            wait_for(lambda n=tick: len(hangs.records) == n)
        wait_for(lambda n=tick: len(kept.records) == n)
    assert time.monotonic() - began < 5
    # One in hand and three that wait: the last six are refused.
    live = kept.records[-1].values["esper_monitor_lost_total"]
    assert live == {"Hangs": 5.0 if where == "write" else 0, "Kept": 0, "Kept-2": 0}
    began = time.monotonic()
    monitor.close()
    assert 0.2 <= time.monotonic() - began < 2
    assert kept.closed == 1
    [said] = caplog.messages
    # What a writer keeps to itself until it closes may be lost, too.
    lost = 10 if where == "write" else 0
    account = {"records": lost, "given": 10, "error": "it did not end in time"}
    assert monitor.lost == {"Hangs": account}
    assert f"Hangs lost {lost} of 10 records (it did not end in time)" in said
    hangs.over.set()
    wait_for(lambda: hangs.closed)
    hangs.over.clear()
    # What it does so late changes the account no more.
    assert monitor.lost == {"Hangs": account}


def test_a_slow_writer_is_given_time_at_the_end(caplog):
    class Slow(Kept):
        def write(self, record):
            time.sleep(0.02)
            super().write(record)

    slow = Slow()
    with Monitor([slow]) as monitor:
        for tick in range(1, 11):
            monitor.write(report(tick, {"a": [D]}))
    assert [r.tick for r in slow.records] == [*range(1, 11)]
    assert not monitor.lost
    assert not caplog.records


def test_a_full_disk_takes_whole_lines_or_nothing(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    caplog.set_level(logging.WARNING)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    monitor = Monitor([JsonLines(path)])
    try:
        monitor.write(report(1, {"a": [D]}))
        wait_for(lambda: path.stat().st_size)
        # Room for half a line: the system writes as much and says so.
        room = path.stat().st_size * 3 // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        monitor.write(report(2, {"a": [D]}))
        wait_for(lambda: monitor.lost)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monitor.write(report(3, {"a": [D]}))  # there is room again
    monitor.close()
    assert [line["tick"] for line in lines_of(path)] == [
        1,
        3,
    ]
    assert monitor.lost["JsonLines"]["records"] == 1
    assert "No space left on device" in caplog.text


def test_a_run_that_goes_on_writes_its_lines_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for first, after in ((1, None), (3, 16)):  # from the third tick on, once more
        with Monitor([JsonLines(path, after)]) as monitor:
            for tick in range(first, 5):
                monitor.write(report(tick, {"a": [D]}, loss=np.inf))
        if first == 1:
            with path.open("a") as file:
                file.write('{"tick": 5, "st')  # as if it had been killed here
    lines = lines_of(path)
    assert [line["tick"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["esper_held_out_loss"] is None  # JSON has no infinity
    assert lines[0]["esper_seeds"] == {"DORMANT": 1}
    assert lines[0]["esper_rollbacks_total"] == {}
    assert lines[0]["esper_layer_living_seeds"] == {"a": 0}
    assert lines[0]["esper_blended_seeds"] == 0
    with path.open("a") as file:
        file.write('{"tick": 5, "st')
    with Monitor([JsonLines(path)]) as monitor:  # nothing is cut
        monitor.write(report(6, {"a": [D]}))
    *_, half, last = path.read_text().splitlines()
    assert (half, json.loads(last)["tick"]) == ('{"tick": 5, "st', 6)


def test_json_lines_go_into_what_is_no_plain_file(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    for after in (None, 8):  # nothing can be taken out of a pipe
        with Monitor([JsonLines(path, after)]) as monitor:
            monitor.write(report(1, {"a": [D]}))
        assert json.loads(os.read(reader, 1 << 16))["tick"] == 1
    os.close(reader)
    with Monitor([JsonLines("/dev/full", after=8)]) as monitor:
        monitor.write(report(1, {"a": [D]}))
    assert "No space left on device" in monitor.lost["JsonLines"]["error"]


def test_what_is_no_report_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Monitor() as monitor:
        with pytest.raises(TypeError, match=r"what Growth.tick returns.*got float"):
            monitor.write(0.5)
        several = report(1, {"a": [D]}).replace(tick=np.arange(3))
        with pytest.raises(ValueError, match=r"of one tick, got one of shape \(3,\)"):
            monitor.write(several)
        monitor.write(report(1, {"a": [D]}))
    assert len(Path("metrics.jsonl").read_text().splitlines()) == 1  # the default
    with pytest.raises(
        ValueError, match="room must be an int of at least 1 record, got 0"
    ):
        Monitor([], room=0)
    with pytest.raises(ValueError, match="after must be an int of at least 0 steps"):
        Monitor([], after=-8)
    with pytest.raises(ValueError, match=r"patience must be seconds from 0.*got nan"):
        Monitor([], patience=float("nan"))
    for wrong in ({"room": "8"}, {"room": 1.5}, {"patience": "1"}, {"after": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            Monitor([], **wrong)
    with pytest.raises(ValueError, match="port must be a number where no registry"):
        Prometheus(port=None)


@pytest.mark.parametrize(
    ("writers", "said"),
    [
        (Kept(), " must be a list of writers, got Kept; put a single one into a list"),
        ("metrics.jsonl", " must be a list of writers, got str"),
        (
            [Kept(), print],
            r"\[1\] must be an object with write.*<built-in function pri",
        ),
        ([JsonLines], r"\[0\] must be an object with .*JsonLines\(path\); got <class"),
    ],
)
def test_what_is_no_writer_is_refused(writers, said):
    before = threading.active_count()
    with pytest.raises(TypeError, match=f"writers{said}"):
        Monitor(writers)
    assert threading.active_count() == before


def test_a_rollback_before_the_first_tick_is_a_record():
    kept = Kept()
    with Monitor([kept], after=16) as monitor:
        monitor.write_rollback(rollback(1))
    [record] = kept.records
    assert (record.tick, record.step) == (2, 16)  # where the run went on
    assert record.values["esper_rollbacks_total"]["TRAIN_LOSS"] == 1
    assert "esper_train_loss" not in record.values


def test_a_forked_child_leaves_the_threads_alone(monkeypatch):
    monitor = Monitor([Kept()])
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    monitor.close()  # as `atexit` would in the child: neither waits nor counts
    monkeypatch.undo()
    monitor.write(report(1, {"a": [D]}))
    monitor.close()
    assert not monitor.lost


PROGRAM = """
import sys, threading
sys.path.insert(0, {tests!r})
from reports import report
from test_monitor import Hangs
from esper_jax.monitor import JsonLines, Monitor

monitor = Monitor([JsonLines({path!r}), Hangs("write")], patience=0.5)
for tick in range(1, 21):
    monitor.write(report(tick, {{"a": [0]}}))
{end}
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)"])
def test_who_forgets_to_close_loses_nothing_and_is_not_held_up(end, tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = PROGRAM.format(tests=str(ROOT / "tests"), path=str(path), end=end)
    ended = subprocess.run(
        [sys.executable, "-c", text],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == (3 if end else 0), ended.stderr
    assert len(path.read_text().splitlines()) == 20
    assert ended.stderr.splitlines() == [
        "the writer Hangs lost 20 of 20 records (it did not end in time); training "
        "was not affected"
    ]
