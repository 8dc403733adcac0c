"""The files that a run writes while it trains: ticks, events and rollbacks."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from esper_jax.growth.reports import LayerReport, SeedMoves, TickReport
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import NO_REQUEST, Outcome, Stage
from esper_jax.run.folder import RunError, RunFolder
from esper_jax.run.logs import EventLog, Metrics
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


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


def test_metrics_are_cut_where_a_run_goes_on(folder):
    metrics = Metrics(folder, keep_until=0)
    for tick, loss in ((1, np.nan), (2, 1.25), (3, np.inf)):
        metrics.add(report(tick, loss=loss))
    assert [line["loss"] for line in lines(folder.ticks)] == [None, 1.25, None]
    with folder.ticks.open("a") as file:
        file.write('{"tick": 4, "lo')  # as if it had been killed here
    Metrics(folder, keep_until=2)
    assert lines(folder.ticks) == [
        {"tick": 1, "train_loss": 2.0, "loss": None, "accuracy": 0.5},
        {"tick": 2, "train_loss": 2.0, "loss": 1.25, "accuracy": 0.5},
    ]


def test_a_refusal_that_repeats_is_written_once(folder):
    log = EventLog(folder, CONFIG, keep_until=0)
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
    log = EventLog(folder, CONFIG, keep_until=0)
    log.add(report(1, REFUSED))
    log.add(report(2, GERMINATES))
    log = EventLog(folder, CONFIG, keep_until=1)
    assert [e["outcome"] for e in lines(folder.events)] == ["NO_CAPACITY"]
    assert not log.add(report(2, REFUSED))


def test_rollbacks_are_kept_and_cut(folder):
    log = EventLog(folder, CONFIG, keep_until=0)
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
    log = EventLog(folder, CONFIG, keep_until=1, rollbacks=1)
    assert [r["number"] for r in lines(folder.rollbacks)] == [1]
    assert [e.get("rollback") for e in lines(folder.events)] == [None, None, 1]
    assert log.events == lines(folder.events)


def test_a_file_that_is_damaged_is_named(folder):
    folder.events.write_text('{"tick": 1}\nnot json\n')
    with pytest.raises(RunError, match=r"events.jsonl is damaged.*mend or remove it"):
        EventLog(folder, CONFIG, keep_until=1)
