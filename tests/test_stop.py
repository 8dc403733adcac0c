"""`fit` beside signals and broken data: what is kept, and what is said."""

import logging
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from esper_jax.checkpoint.checkpointer import Checkpointer
from esper_jax.hosts import MLP
from esper_jax.train import Governor, Interrupted, Stop, TrainingStopped, build, fit
from esper_jax.trees import state_hash

CLASSES, BATCH, STEPS = 3, 16, 4


def make_data(rows, seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, rows).astype(np.int32)
    x = rng.normal(size=(rows, 6)) + 3.0 * np.eye(6)[y]
    return x.astype(np.float32), y


TRAIN, HELD_OUT = make_data(BATCH * STEPS, 1), make_data(32, 2)


@pytest.fixture(scope="module")
def program():
    model = MLP(6, (8,), CLASSES, num_seeds=2, capacity=2, rngs=nnx.Rngs(0))
    return build(model, optax.adam(1e-2), optax.adam(1e-3), eval_batch=32)


@pytest.fixture(autouse=True)
def _python_s_own_handler():
    """Even if pytest was started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run(program, state=None, data=TRAIN, held_out=HELD_OUT, ticks=3, **options):
    if state is None:
        state = program.init(jax.random.key(0))
    if isinstance(data, tuple):
        options = {"batch_size": BATCH, **options}
    return fit(program, state, data, held_out, ticks=ticks, **options)


def signalled(program, at, times=1):
    """A program whose steps are counted; SIGINT arrives in one of them."""
    calls = []

    def step_from(state, data, order, batch_size):
        calls.append(int(state.step))
        if len(calls) == at:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return program.step_from(state, data, order, batch_size)

    return program._replace(step_from=step_from), calls


@pytest.mark.parametrize("governed", [False, True])
def test_a_stopped_fit_carries_its_state_and_goes_on_from_it(program, governed):
    def governor():
        return Governor(program, num_classes=CLASSES) if governed else None

    whole = run(program, governor=governor())
    for at, ticks in ((STEPS + 2, 1), (2 * STEPS, 2)):  # in a tick, and at its end
        broken, calls = signalled(program, at)
        said = f"by SIGINT after step {at}"
        with pytest.raises(Interrupted, match=said) as stopped:
            run(broken, governor=governor())
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert calls == list(range(at))  # the step in hand was finished, and no more
        assert stopped.value.number == signal.SIGINT
        state = stopped.value.state
        assert (int(state.step), int(state.ticks)) == (at, ticks)
        assert state_hash(run(program, state, governor=governor())) == state_hash(whole)


def test_a_signal_in_the_last_tick_or_between_batches_is_heard_too(program):
    def on_tick(state, report):
        if report.tick == 2:
            signal.raise_signal(signal.SIGINT)

    batches = [(TRAIN[0][:BATCH], TRAIN[1][:BATCH])] * 2
    for data in (TRAIN, batches):
        with pytest.raises(Interrupted) as stopped:
            run(program, data=data, ticks=2, on_tick=on_tick)
        assert int(stopped.value.state.ticks) == 2

    def two():
        yield batches[0]
        signal.raise_signal(signal.SIGINT)
        yield batches[1]

    with pytest.raises(Interrupted) as stopped:
        run(program, data=two, ticks=2)
    assert (int(stopped.value.state.step), int(stopped.value.state.ticks)) == (2, 0)
    with pytest.raises(Interrupted) as stopped:  # at the end of a tick it is taken
        run(program, data=two, ticks=2, steps_per_tick=2)
    assert (int(stopped.value.state.step), int(stopped.value.state.ticks)) == (2, 1)


def test_a_second_signal_ends_at_once(program):
    broken, calls = signalled(program, at=2, times=2)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(broken)
    assert not isinstance(stopped.value, Interrupted)
    assert calls == [0, 1]
    again = []
    with Stop(signal.SIGINT, signal.SIGHUP, again=again.append) as stop, stop.held():
        signal.raise_signal(signal.SIGHUP)
        assert stop.number == signal.SIGHUP
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert again == [signal.SIGINT]
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    # Outside of `held` the first one raises, and is remembered: what JAX swallows is
    # found by the loop.
    with Stop(signal.SIGTERM) as stop, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM after step 0"):
        run(program, stop=stop)


def test_a_signal_in_a_string_of_python_keeps_its_status(tmp_path):
    """As while a dataclass is made: CPython takes it for an unhandled SIGINT."""
    (tmp_path / "program.py").write_text(
        "import signal, sys\nfrom esper_jax.train import Stop\n"
        "with Stop(signal.SIGTERM):\n"
        "    try:\n        exec('signal.raise_signal(signal.SIGTERM)')\n"
        "    except KeyboardInterrupt:\n        sys.exit(143)\n"
    )
    root = str(Path(__file__).parents[1])
    ended = subprocess.run(
        [sys.executable, "-m", "program"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        timeout=100,
        check=False,
    )
    assert ended.returncode == 143


def test_a_signal_that_a_callback_swallows_prints_nothing(program, monkeypatch):
    class Thing:
        pass

    def signalled(_):
        signal.raise_signal(signal.SIGTERM)

    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    before = sys.unraisablehook
    with Stop(signal.SIGTERM) as stop:
        for callback in (signalled, lambda _: 1 / 0):
            thing = Thing()
            kept = weakref.ref(thing, callback)
            del thing
            assert kept() is None
    assert sys.unraisablehook is before
    assert [raised.exc_type for raised in printed] == [ZeroDivisionError]
    with pytest.raises(Interrupted, match="SIGTERM after step 0"):
        run(program, stop=stop)


def test_hooks_of_saves_outlive_a_stop_and_do_not_pile_up(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    hooks = []
    for step in range(3):
        with Stop(signal.SIGTERM), Checkpointer(tmp_path) as checkpoints:
            checkpoints.save(step, {"x": np.ones(3)})
        hooks.append(sys.unraisablehook)
    assert hooks[0].hushes_orbax
    assert hooks[0] is hooks[1] is hooks[2]


def test_handlers_of_the_program_itself_are_left_alone(program):
    heard = []
    signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    broken, calls = signalled(program, at=2)
    run(broken, ticks=1)
    assert (heard, len(calls)) == ([signal.SIGINT], STEPS)


def test_a_governor_does_not_let_a_broken_state_out(program):
    def step_from(state, data, order, batch_size):
        if int(state.step) == STEPS + 1:
            signal.raise_signal(signal.SIGINT)
            data = (data[0] * jnp.nan, data[1])
        return program.step_from(state, data, order, batch_size)

    broken = program._replace(step_from=step_from)
    kept = {}

    def keep(state, report):
        kept.update(hash=state_hash(state))

    with pytest.raises(Interrupted) as stopped:
        run(broken, governor=Governor(program), on_tick=keep)
    assert state_hash(stopped.value.state) == kept["hash"]


def changed(data, row, value):
    x, y = data
    x = x.astype(np.float64)
    x[row, 2] = value
    return x, y


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize(
    ("data", "held_out", "said"),
    [
        (
            changed(TRAIN, 37, np.nan),
            HELD_OUT,
            [
                "the train loss is nan",
                "params",
                "training data holds NaN or infinity in 1 rows, the first is row 37",
            ],
        ),
        (changed(TRAIN, 5, 1e300), HELD_OUT, ["the train loss", "row 5"]),
        (
            TRAIN,
            changed(HELD_OUT, 9, np.inf),
            ["tick 1: the held-out loss is", "held-out data holds NaN", "is row 9"],
        ),
        (
            TRAIN,
            [changed(HELD_OUT, 9, np.nan)],
            ["the held-out loss is nan", "held-out data holds NaN", "in some batches"],
        ),
    ],
)
def test_a_loss_that_is_not_finite_is_told_once(program, data, held_out, said, caplog):
    with caplog.at_level(logging.WARNING, logger="esper_jax"):
        state = run(program, data=data, held_out=held_out)
    assert int(state.ticks) == 3
    [record] = caplog.records
    for words in (*said, "governor=Governor(program)"):
        assert words in record.getMessage()


def test_a_governor_names_the_rows_of_held_out_data(program):
    with pytest.raises(TrainingStopped, match=r"held-out data holds NaN.*is row 9"):
        run(program, held_out=changed(HELD_OUT, 9, np.nan), governor=Governor(program))
