"""Reports of ticks, and rollbacks, as values of one's choice."""

import time

import numpy as np

from esper_jax.growth.reports import LayerReport, SeedMoves, TickReport
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import Outcome, Stage
from esper_jax.train.faults import Fault
from esper_jax.train.retreat import Rollback


def moves(source, target=None, outcome=None, epochs=0):
    """Of seeds in the stages ``source``; the others are one a seed, or none asked."""
    source = np.array(source, np.int8)
    nothing = np.full(source.shape, -1, np.int8)
    return {
        "outcome": np.zeros_like(source) if outcome is None else np.array(outcome),
        "source": source,
        "target": nothing if target is None else np.array(target, np.int8),
        "slot": nothing,
        "epochs": np.broadcast_to(np.uint16(epochs), source.shape),
        "errors": np.zeros(source.shape, np.uint8),
    }


def seeds(stages, alpha=0.0, signals=None, **more):
    """A layer whose seeds are in these stages after the tick."""
    stage = np.array(stages, np.int8)
    columns = moves(**({"source": stages} | more))
    return LayerReport(
        **columns,
        stage=stage,
        alpha=np.broadcast_to(np.float32(alpha), stage.shape),
        blueprint=np.zeros(stage.shape, np.int8),
        signals=signals or Signals.unmeasured(),
    )


def report(tick, layers, loss=1.5, train_loss=0.75, accuracy=0.625):
    """Of a tick after ``8 * tick`` steps; layers are stages or reports."""
    made = {n: x if hasattr(x, "stage") else seeds(x) for n, x in layers.items()}
    return TickReport(
        tick=np.int32(tick),
        step=np.int32(8 * tick),
        train_loss=np.float32(train_loss),
        loss=np.float32(loss),
        accuracy=np.float32(accuracy),
        reason=np.int8(0),
        replicas_agree=np.True_,
        layers=made,
    )


def rollback(number, fault=Fault.TRAIN_LOSS):
    """Of a layer whose one seed was in TRAINING."""
    back = moves([Stage.TRAINING], [Stage.ROLLED_BACK], [Outcome.OK])
    return Rollback(
        number=number,
        failed_tick=3,
        tick=2,
        fault=fault,
        reason="the loss is nan",
        layers={"layers/0": SeedMoves(**back)},
    )


def wait_for(what):
    """Waits until ``what()`` is true, and fails if it is not in ten seconds."""
    until = time.monotonic() + 10
    while not what():
        assert time.monotonic() < until
        time.sleep(0.001)
