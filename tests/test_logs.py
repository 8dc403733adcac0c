"""The files that a run writes while it trains: ticks, events and rollbacks."""

import errno
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from esper_jax.growth.reports import LayerReport, SeedMoves, TickReport
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import NO_REQUEST, Outcome, Stage
from esper_jax.run.folder import RunError, RunFolder, write_json
from esper_jax.run.logs import EventLog, Metrics, read_history
from esper_jax.train.faults import Fault
from esper_jax.train.retreat import Rollback

CONFIG = LifecycleConfig()
REFUSED = (Stage.DORMANT, Stage.GERMINATED, Outcome.NO_CAPACITY)
GERMINATES = (Stage.DORMANT, Stage.GERMINATED, Outcome.OK)
IDLE = (Stage.DORMANT, NO_REQUEST, Outcome.NONE)


def moves(*seeds):
    source, target, outcome = np.array(seeds).T
    zero = np.zeros(len(seeds), int)
    return {
        "source": source,
        "target": target,
        "outcome": outcome,
        "slot": zero - 1,
        "epochs": (zero + 3).astype(np.uint16),
        "errors": zero.astype(np.uint8),
    }


def report(tick, *seeds, loss=1.5):
    layers = {}
    if seeds:
        layers["layers/0"] = LayerReport(
            **moves(*seeds),
            stage=np.zeros(len(seeds), int),
            alpha=np.zeros(len(seeds)),
            blueprint=np.zeros(len(seeds), int),
            signals=Signals.unmeasured(),
        )
    return TickReport(
        tick=np.int32(tick),
        step=np.int32(8 * tick),
        train_loss=np.float32(2),
        loss=np.float32(loss),
        accuracy=np.float32(0.5),
        replicas_agree=np.True_,
        reason=np.int8(0),
        layers=layers,
    )


def rollback(number, tick):
    seeds = moves((Stage.TRAINING, Stage.ROLLED_BACK, Outcome.OK), IDLE)
    return Rollback(
        number=number,
        failed_tick=tick + 1,
        tick=tick,
        fault=Fault.TRAIN_LOSS,
        reason="the loss is nan",
        layers={"layers/0": SeedMoves(**seeds)},
    )


def lines(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def event_log(folder, keep_until=0, rollbacks=0, sealed=None):
    history = read_history(folder, keep_until, rollbacks, sealed)
    return EventLog(folder, CONFIG, history)


def metrics_of(folder, keep_until=0):
    return Metrics(folder, read_history(folder, keep_until, 0))


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


def test_metrics_are_cut_where_a_run_goes_on(folder):
    metrics = metrics_of(folder)
    for tick, loss in ((1, np.nan), (2, 1.25), (3, np.inf)):
        metrics.add(report(tick, loss=loss))
    assert [line["loss"] for line in lines(folder.ticks)] == [None, 1.25, None]
    with folder.ticks.open("a") as file:
        file.write('{"tick": 4, "lo')  # as if it had been killed here
    metrics_of(folder, 2)
    assert lines(folder.ticks) == [
        {"tick": 1, "train_loss": 2.0, "loss": None, "accuracy": 0.5},
        {"tick": 2, "train_loss": 2.0, "loss": 1.25, "accuracy": 0.5},
    ]


def test_a_refusal_that_repeats_is_written_once(folder):
    log = event_log(folder)
    [first] = log.add(report(1, REFUSED, IDLE))
    assert first == {
        "tick": 1,
        "layer": "layers/0",
        "seed": 0,
        "slot": -1,
        "from": "DORMANT",
        "to": "GERMINATED",
        "outcome": "NO_CAPACITY",
        "measured": {"epochs_in_stage": 3.0},
        "text": "seed 0 stays in DORMANT: no slot is free",
    }
    # The same of another seed is new; after another event the same is new again.
    again = [
        log.add(report(2, REFUSED, REFUSED)),
        log.add(report(3, GERMINATES, REFUSED)),
        log.add(report(4, GERMINATES, REFUSED)),
        log.add(report(5, REFUSED, IDLE)),
        log.add(report(6, REFUSED, IDLE)),
    ]
    assert [[e["seed"] for e in new] for new in again] == [[1], [0], [0], [0], []]
    assert lines(folder.events) == log.events == [first, *itertools.chain(*again)]
    assert not folder.rollbacks.exists()


def test_a_log_that_goes_on_knows_what_was_said(folder):
    log = event_log(folder)
    log.add(report(1, REFUSED))
    log.add(report(2, GERMINATES))
    log = event_log(folder, 1)
    assert [e["outcome"] for e in lines(folder.events)] == ["NO_CAPACITY"]
    assert not log.add(report(2, REFUSED))


def test_rollbacks_are_kept_and_cut(folder):
    log = event_log(folder)
    log.add(report(1, REFUSED, REFUSED))
    told = [log.add_rollback(rollback(number, tick=1)) for number in (1, 2)]
    assert told[0] == [
        "rollback 1, from tick 2 to 1: the loss is nan",
        "tick 1: layers/0 seed 0: TRAINING -> ROLLED_BACK (governor: the loss is nan)",
    ]
    # Seed 0 was moved since its refusal, seed 1 was not.
    assert [e["seed"] for e in log.add(report(2, REFUSED, REFUSED))] == [0]
    assert [r["number"] for r in lines(folder.rollbacks)] == [1, 2]
    assert lines(folder.rollbacks)[0]["fault"] == "TRAIN_LOSS"
    log = event_log(folder, 1, 1)
    assert [r["number"] for r in lines(folder.rollbacks)] == [1]
    assert [e.get("rollback") for e in lines(folder.events)] == [None, None, 1]
    assert log.events == lines(folder.events)


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("events", b"not json", "Expecting value"),
        ("events", b"", "Expecting value"),
        ("events", b"[]", "it is no JSON object"),
        ("events", b"null", "it is no JSON object"),
        ("events", b"{}", "it has no tick of type int"),
        ("events", b'{"tick": "x", "layer": "a"}', "it has no tick of type int"),
        ("ticks", b'{"tick": NaN}', "it has no tick of type int"),
        ("ticks", b'{"tick": true}', "it has no tick of type int"),
        ("ticks", b"[" * 100_000 + b"]" * 100_000, "too deeply nested"),
        ("ticks", b'{"tick": ' + b"9" * 5000 + b"}", "digits"),
        ("rollbacks", b'{"tick": 1}', "it has no number of type int"),
    ],
)
def test_a_line_that_is_damaged_is_named(folder, name, line, said):
    path = getattr(folder, name)
    good = b'{"tick": 1, "number": 1, "layer": "", "seed": 0, "from": "", "to": "", '
    path.write_bytes(good + b'"outcome": "OK"}\n' + line + b"\n")
    before = path.read_bytes()
    with pytest.raises(RunError, match=rf"{name}.jsonl is damaged in line 2: .*{said}"):
        event_log(folder, 1)
    assert path.read_bytes() == before


def test_a_file_that_is_none_or_no_text_is_named(folder):
    folder.ticks.write_bytes(b'{"tick": 1}\n\xff\xfe\n')
    with pytest.raises(RunError, match=r"ticks.jsonl is damaged"):
        event_log(folder)
    folder.ticks.unlink()
    os.mkfifo(folder.ticks)  # would be read from without end
    with pytest.raises(RunError, match=r"ticks.jsonl must be a file"):
        event_log(folder)
    folder.ticks.unlink()
    folder.ticks.symlink_to("ticks.jsonl")
    with pytest.raises(RunError, match=r"ticks.jsonl cannot be read: Too many levels"):
        event_log(folder)


def halve(path):
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[: len(whole) // 2]))


def blank_the_end(path):  # what a power loss leaves on some file systems
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2].ljust(len(whole), b"\0"))


def drop_one(path):
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[:1] + whole[2:]))


def change_a_digit(path):
    path.write_bytes(path.read_bytes().replace(b"2.0", b"2.5").replace(b"3.0", b"3.5"))


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    "harm", [halve, blank_the_end, drop_one, change_a_digit, remove]
)
def test_lines_that_are_lost_are_told_of(folder, harm):
    log, metrics = event_log(folder), metrics_of(folder)
    for tick in range(1, 5):
        log.add(report(tick, GERMINATES, REFUSED if tick % 2 else IDLE))
        metrics.add(report(tick))
    log.add_rollback(rollback(1, tick=4))
    log.add_rollback(rollback(2, tick=4))
    journals = {**log.journals, "ticks": metrics.journal}
    seals = {name: journal.seal() for name, journal in journals.items()}
    log.add(report(5, REFUSED))  # after the checkpoint
    metrics.add(report(5))
    history = read_history(folder, 4, 2, seals)
    assert history.missing == ()
    assert len(history.events) == seals["events"][0] == len(log.events) - 1
    # Without seals, as of version 0.2, what has numbers is counted.
    assert read_history(folder, 4, 2).missing == ()
    counted = set() if harm is change_a_digit else {"ticks", "rollbacks"}
    for name, journal in journals.items():
        whole = journal.path.read_bytes()
        if name == "rollbacks" and harm is change_a_digit:
            continue  # it holds no such digit
        harm(journal.path)
        [said] = read_history(folder, 4, 2, seals).missing
        assert said.startswith(f"{name}.jsonl holds ")
        assert f"the {seals[name][0]} lines that were written up to tick 4" in said
        old = read_history(folder, 4, 2).missing
        gone = harm is remove and name == "ticks"  # the first runs wrote none
        assert len(old) == (name in counted and not gone)
        told = {"events": log.events}.get(name, log.rollbacks)
        write_json(folder.summary, {name: told})
        found = read_history(folder, 4, 2, seals)
        assert len(found.missing) == (name == "ticks")  # no summary holds those
        assert len(getattr(found, name)) == seals[name][0] or name == "ticks"
        folder.summary.unlink()
        journal.path.write_bytes(whole)
    # A file that was written twice holds all that there was.
    folder.events.write_bytes(folder.events.read_bytes() * 2)
    assert read_history(folder, 4, 2, seals).missing == ()


def test_changes_of_the_config_are_events_once(folder):
    log = event_log(folder)
    log.add(report(1, REFUSED))
    change = {"key": "train.learning_rate", "from": 1e30, "to": 0.01, "tick": 1}
    log.add_changes([change])
    said = "config: train.learning_rate is 0.01 from here on, and was 1e+30"
    assert log.events[-1]["text"] == said
    log = event_log(folder, 1)
    log.add_changes([change, {**change, "tick": 2}])
    assert [e.get("change") for e in lines(folder.events)] == [None, 1, 2]


def test_a_file_that_cannot_be_written_is_named(folder, monkeypatch):
    log, metrics = event_log(folder), metrics_of(folder)
    metrics.add(report(1))

    def full(self, *arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = folder.ticks.read_bytes()
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(RunError, match=r"ticks.jsonl cannot be written: No space left"):
        metrics.add(report(2))
    with pytest.raises(RunError, match=r"rollbacks.jsonl cannot be written: No space"):
        log.add_rollback(rollback(1, tick=1))
    with pytest.raises(RunError, match=r"config.json cannot be written: No space"):
        write_json(folder.config, {})
    monkeypatch.undo()
    assert folder.ticks.read_bytes() == before
    left = {path.name for path in folder.path.iterdir()}
    assert left == {"events.jsonl", "ticks.jsonl"}
