"""The governor: faults injected into real small runs, and what becomes of them."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

from esper_jax import run
from esper_jax.hosts import MLP
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.stages import Outcome, Stage
from esper_jax.lifecycle.state import transitions
from esper_jax.run import run as programs_of_runs
from esper_jax.run.config import load_config
from esper_jax.train.faults import Fault, GovernorConfig, inspect
from esper_jax.train.governor import Governor
from esper_jax.train.loop import fit
from esper_jax.train.program import build
from esper_jax.train.retreat import TrainingStopped
from esper_jax.trees import state_hash

LAYERS = ("layers/0", "layers/1")
# Nothing moves by itself within these short runs.
GATES = LifecycleConfig(min_epochs=(0, 500, 500, 500, 500, 500, 500, 0, 3, 0, 3))
CLASSES = 3
BATCH, STEPS = 16, 4


def make_data(rows, seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, rows).astype(np.int32)
    x = rng.normal(size=(rows, 6)) + 3.0 * np.eye(6)[y]
    return x.astype(np.float32), y


TRAIN, HELD_OUT = make_data(BATCH * STEPS, 1), make_data(32, 2)


@pytest.fixture(scope="module")
def program():
    model = MLP(6, (8, 10), CLASSES, num_seeds=4, capacity=4, rngs=nnx.Rngs(0))
    return build(
        model, optax.adam(1e-2), optax.adam(1e-3), lifecycle_config=GATES, eval_batch=32
    )


def start(program):
    """A state with a seed in each of several stages in each layer."""
    state = program.init(jax.random.key(0))
    seeds = {}
    stages = (Stage.GRAFTING, Stage.GERMINATED, Stage.FOSSILIZED, Stage.FINE_TUNING)
    for name, layer in state.seeds.items():
        seeds[name] = dataclasses.replace(
            layer,
            stage=jnp.asarray(stages, jnp.int8),
            slot_of_seed=jnp.arange(4, dtype=jnp.int32),
            seed_of_slot=jnp.arange(4, dtype=jnp.int32),
        )
    return dataclasses.replace(state, seeds=seeds)


def stepped(program, state):
    """One step later, by the function that `fit` calls, too."""
    order = jnp.arange(len(TRAIN[0]), dtype=jnp.int32)
    return program.step_from(state, jax.tree.map(jnp.asarray, TRAIN), order, BATCH)


class Faulty:
    """A program that breaks at one step of its own count, once or from there on."""

    def __init__(self, program, break_it, at, forever=False):
        self.calls, self.at, self.forever = 0, at, forever
        self.break_it, self.step_from = break_it, program.step_from
        self.program = program._replace(step_from=self)

    def __call__(self, state, data, order, batch_size):
        self.calls += 1
        if self.calls == self.at or (self.forever and self.calls > self.at):
            state, data = self.break_it(state, data)
        return self.step_from(state, data, order, batch_size)


def nan_batch(state, data):
    return state, (data[0].at[:].set(jnp.nan), data[1])


def infinite_batch(state, data):
    return state, (data[0].at[:, 0].set(jnp.inf), data[1])


def nan_blueprint(state, data):
    bank = state.banks["layers/1"]
    bank = dataclasses.replace(bank, w1=bank.w1.at[1, 0, 0].set(jnp.nan))
    return dataclasses.replace(state, banks={**state.banks, "layers/1": bank}), data


def nan_moment(state, data):
    """One moment of the host's optimizer."""
    adam = state.opt_state[0]
    mu = dict(adam.mu)
    mu["readout/bias"] = mu["readout/bias"].at[0].set(jnp.nan)
    opt_state = (adam._replace(mu=mu), *state.opt_state[1:])
    return dataclasses.replace(state, opt_state=opt_state), data


def nan_blueprint_moment(state, data):
    """One moment of a blueprint that is frozen: nothing shows it yet."""
    adam, *others = state.bank_opt["layers/0"]
    nu = dataclasses.replace(adam.nu, b2=adam.nu.b2.at[2, 0].set(jnp.nan))
    bank_opt = {**state.bank_opt, "layers/0": (adam._replace(nu=nu), *others)}
    return dataclasses.replace(state, bank_opt=bank_opt), data


def blow_up(state, data):
    params = jax.tree.map(lambda p: p * 20.0, state.params)
    return dataclasses.replace(state, params=params), data


def forget(state, data):
    """All logits equal: the loss is ln 3 from here on."""
    params = jax.tree.map(jnp.zeros_like, state.params)
    adam = state.opt_state[0]
    still = (adam._replace(nu=jax.tree.map(lambda v: v + 1e12, adam.nu)),)
    return dataclasses.replace(
        state, params=params, opt_state=(*still, *state.opt_state[1:])
    ), data


CONFIG = GovernorConfig(max_rollbacks=2)
PATIENT = GovernorConfig(max_rollbacks=2, deviations=1e6)


@pytest.mark.parametrize(
    ("break_it", "config", "fault", "reason"),
    [
        (nan_batch, CONFIG, Fault.TRAIN_LOSS, "the train loss is nan"),
        (infinite_batch, CONFIG, Fault.TRAIN_LOSS, "the train loss is"),
        (nan_blueprint, CONFIG, Fault.VALUES, "banks['layers/1'].w1 holds NaN"),
        (nan_moment, CONFIG, Fault.TRAIN_LOSS, "the train loss is nan"),
        (nan_blueprint_moment, CONFIG, Fault.VALUES, "bank_opt['layers/0'][0].nu.b2"),
        (blow_up, CONFIG, Fault.JUMP, "more than 8 deviations"),
        (forget, PATIENT, Fault.CHANCE, "back to chance, ln 3"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_fault_is_undone_and_training_goes_on(
    program, break_it, config, fault, reason
):
    hashes, seen = {}, []

    def on_tick(state, report):
        hashes[int(report.tick)] = state_hash(state)

    def on_rollback(rollback):
        seen.append(rollback)
        # In one call, and bit for bit.
        assert state_hash(governor.restore()) == hashes[rollback.tick]

    faulty = Faulty(program, break_it, at=7 * STEPS + 1)  # first step of tick 8
    governor = Governor(
        faulty.program, config, num_classes=CLASSES, on_rollback=on_rollback
    )
    state = fit(
        faulty.program,
        start(program),
        TRAIN,
        HELD_OUT,
        ticks=10,
        batch_size=BATCH,
        on_tick=on_tick,
        governor=governor,
    )
    [rollback] = seen
    assert rollback.fault == fault
    assert reason in rollback.reason
    assert (rollback.failed_tick, rollback.tick, rollback.number) == (8, 7, 1)
    assert faulty.calls == 11 * STEPS  # ten ticks, and the one that was undone
    assert list(hashes) == list(range(1, 11))
    assert int(state.step) == 10 * STEPS
    assert int(state.governor.rollbacks) == 1
    assert int(state.governor.consecutive) == 0
    loss, _ = program.evaluate(state, HELD_OUT)
    assert float(loss) < 0.9
    for name in LAYERS:
        report, layer = rollback.layers[name], state.seeds[name]
        assert report.target.tolist() == [10, 9, -1, 10]
        assert (report.outcome[[0, 1, 3]] == Outcome.OK).all()
        # The embargo of 3 ticks: from 7 to 10, then DORMANT; CANCELLED has none.
        assert layer.stage.tolist() == [0, 0, 7, 0]
        assert transitions(layer, 0)[1] == (Stage.GRAFTING, Stage.ROLLED_BACK)
        assert transitions(layer, 1)[1] == (Stage.GERMINATED, Stage.CANCELLED)
        assert transitions(layer, 2) == []
        assert layer.seed_of_slot.tolist() == [-1, -1, 2, -1]


def test_a_healthy_run_is_left_alone_and_nothing_recompiles(program):
    def run(ticks, governor):
        return fit(
            program,
            start(program),
            TRAIN,
            HELD_OUT,
            ticks=ticks,
            batch_size=BATCH,
            governor=governor,
        )

    run(1, None)
    compiled = program.recompiles()
    governor = Governor(program, num_classes=CLASSES)
    with_it, without = run(8, governor), run(8, None)
    assert state_hash(governor.restore()) == state_hash(with_it)
    for name in ("params", "opt_state", "banks", "seeds"):
        jax.tree.map(
            np.testing.assert_array_equal,
            getattr(with_it, name),
            getattr(without, name),
        )
    assert int(with_it.governor.rollbacks) == 0
    assert program.recompiles() == compiled


def test_what_is_restored_is_a_copy_of_its_own(program):
    governor = Governor(program)
    with pytest.raises(RuntimeError, match=r"call start\(state\) first"):
        governor.restore()
    state = start(program)
    before = state_hash(state)
    governor.start(state)
    state = stepped(program, state)  # donates what the snapshot was made from
    assert state_hash(state) != before
    again = governor.restore()
    assert state_hash(again) == before
    stepped(program, again)  # donates what was restored
    assert state_hash(governor.restore()) == before


def test_the_rows_are_shuffled_anew_after_a_rollback(program):
    orders = []

    def watch(state, data, order, batch_size):
        orders.append(np.asarray(order).tolist())
        return program.step_from(state, data, order, batch_size)

    faulty = Faulty(program._replace(step_from=watch), nan_batch, at=2)
    governor = Governor(faulty.program)
    state = fit(
        faulty.program,
        start(program),
        TRAIN,
        HELD_OUT,
        ticks=1,
        batch_size=BATCH,
        governor=governor,
    )
    assert len(orders) == 2 * STEPS
    assert sorted(orders[0]) == sorted(orders[-1])
    assert orders[0] != orders[-1]
    key = start(program).rng
    assert not np.array_equal(
        jax.random.key_data(jax.random.split(key)[0]), jax.random.key_data(state.rng)
    )


def test_a_fault_that_stays_stops_the_run_with_the_last_good_state(program):
    x = TRAIN[0].copy()
    x[37, 2] = np.nan
    numbers, hashes = [], {}

    def run(state, ticks, data):
        governor = Governor(
            program, CONFIG, on_rollback=lambda r: numbers.append(r.number)
        )
        return fit(
            program,
            state,
            data,
            HELD_OUT,
            ticks=ticks,
            batch_size=BATCH,
            on_tick=lambda s, r: hashes.update({int(r.tick): s}),
            governor=governor,
        )

    state = run(start(program), 2, TRAIN)
    params = jax.device_get(state.params)
    with pytest.raises(TrainingStopped, match=r"in tick 3: the train loss is nan") as e:
        run(state, 9, (x, TRAIN[1]))
    stop = e.value
    assert "2 rollbacks in a row to tick 2 did not help" in str(stop)
    assert "in 1 rows, the first is row 37: remove them" in str(stop)
    assert numbers == [1, 2, 3]
    assert stop.rollback.number == 3
    jax.tree.map(np.testing.assert_array_equal, stop.state.params, params)
    assert int(stop.state.ticks) == 2
    # It goes on from there once the cause is gone.
    state = run(stop.state, 4, TRAIN)
    assert int(state.ticks) == 4
    assert int(state.governor.rollbacks) == 3


def test_faults_in_a_row_are_counted_apart_from_others(program):
    """Three faults with a good tick between them: within a limit of one in a row."""
    seen = []
    faulty = Faulty(program, nan_batch, at=1)
    calls = {1, 1 + 2 * STEPS, 1 + 4 * STEPS}

    def step(state, data, order, batch_size):
        faulty.at = faulty.calls + 1 if faulty.calls + 1 in calls else 0
        return faulty(state, data, order, batch_size)

    broken = program._replace(step_from=step)
    governor = Governor(
        broken, GovernorConfig(max_rollbacks=1), on_rollback=seen.append
    )
    state = fit(
        broken,
        start(program),
        TRAIN,
        HELD_OUT,
        ticks=4,
        batch_size=BATCH,
        governor=governor,
    )
    assert [r.number for r in seen] == [1, 2, 3]
    assert int(state.ticks) == 4


def test_a_start_that_is_not_finite_is_refused(program):
    state, _ = nan_blueprint(start(program), None)
    with pytest.raises(ValueError, match=r"banks\['layers/1'\].w1 holds NaN"):
        Governor(program).start(state)


@pytest.fixture(scope="module")
def sound(program):
    """A state and a report with round numbers."""
    state, report = program.tick(stepped(program, start(program)), HELD_OUT)
    losses = np.full((16, 2), np.nan, np.float32)
    losses[:6] = [
        [0.50, 0.60],
        [0.52, 0.62],
        [0.48, 0.58],
        [0.50, 0.6],
        [0.53, 0.63],
        [0.47, 0.57],
    ]
    memory = dataclasses.replace(
        state.governor, losses=jnp.asarray(losses), best=jnp.asarray([0.47, 0.57])
    )
    monitor = dataclasses.replace(state.monitor, initial_loss=jnp.float32(1.0))
    return dataclasses.replace(state, governor=memory, monitor=monitor), report


def judge(sound, *, classes=3, config=None, state=None, **measured):
    before, report = sound
    values = {"train_loss": 0.5, "loss": 0.6, "accuracy": 0.9} | measured
    report = dataclasses.replace(
        report, **{name: jnp.float32(value) for name, value in values.items()}
    )
    return inspect(
        state or before, report, config or GovernorConfig(min_deviation=1e-3), classes
    )


def test_a_jump_is_counted_in_robust_deviations(sound):
    # Median 0.5; the deviations are 0, .02, .02, 0, .03, .03, their median 0.02. Eight
    # times 1.4826 times 0.02 is 0.2372.
    assert judge(sound, train_loss=0.737)[0] == Fault.NONE
    assert judge(sound, train_loss=0.738)[0] == Fault.JUMP
    assert judge(sound, loss=0.838)[0] == Fault.JUMP
    assert judge(sound, train_loss=0.1)[0] == Fault.NONE  # down is no jump
    # At least a share of the first held-out loss, here 1: eight times 0.05 is 0.4.
    wide = GovernorConfig(min_deviation=0.05)
    assert judge(sound, train_loss=0.89, config=wide)[0] == Fault.NONE
    assert judge(sound, train_loss=0.91, config=wide)[0] == Fault.JUMP
    late = GovernorConfig(min_ticks=7)
    assert judge(sound, train_loss=9.0, config=late)[0] == Fault.NONE


def test_chance_is_the_logarithm_of_the_classes(sound):
    calm = GovernorConfig(deviations=1e6)
    chance = functools.partial(judge, sound, config=calm, accuracy=0.34)
    assert chance(loss=np.log(3) * 1.04)[0] == Fault.CHANCE
    assert chance(train_loss=np.log(3) * 0.96)[0] == Fault.CHANCE
    assert chance(loss=np.log(3) * 1.06)[0] == Fault.NONE
    assert chance(loss=np.log(3), accuracy=0.6)[0] == Fault.NONE  # it does not guess
    assert chance(loss=np.log(3), classes=None)[0] == Fault.NONE
    state, _ = sound
    never = dataclasses.replace(state.governor, best=jnp.full(2, 0.95 * np.log(3)))
    state = dataclasses.replace(state, governor=never)
    assert chance(loss=np.log(3), state=state)[0] == Fault.NONE  # never been better


def test_what_is_checked_and_what_is_remembered(sound):
    state, report = sound
    fault, memory = judge(sound, train_loss=0.4, loss=0.7)
    assert fault == Fault.NONE
    np.testing.assert_allclose(memory.losses[:2], [[0.4, 0.7], [0.5, 0.6]])
    np.testing.assert_allclose(memory.best, [0.4, 0.57])
    assert judge(sound, loss=np.inf)[0] == Fault.HELD_OUT_LOSS
    assert judge(sound, train_loss=-np.inf)[0] == Fault.TRAIN_LOSS
    layer = report.layers["layers/0"]
    broken = dataclasses.replace(
        layer, signals=dataclasses.replace(layer.signals, grad_norm=jnp.float32(np.inf))
    )
    changed = dataclasses.replace(report, layers={"layers/0": broken})
    assert judge((state, changed))[0] == Fault.GRADIENTS
    params = {**state.params, "readout/bias": jnp.full(3, jnp.inf)}
    infinite = dataclasses.replace(state, params=params)
    assert judge(sound, state=infinite)[0] == Fault.VALUES
    # What lies in a free slot is nobody's.
    layer = state.seeds["layers/1"]
    free = dataclasses.replace(layer, seed_of_slot=layer.seed_of_slot.at[1].set(-1))
    broken, _ = nan_blueprint(state, None)
    assert judge(sound, state=broken)[0] == Fault.VALUES
    freed = dataclasses.replace(broken, seeds={**state.seeds, "layers/1": free})
    assert judge(sound, state=freed)[0] == Fault.NONE


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("deviations", 0.0, "above 0"),
        ("min_deviation", float("inf"), "finite"),
        ("min_ticks", 1, "from 2 to 16"),
        ("min_ticks", 17, "from 2 to 16"),
        ("chance_tolerance", 0.5, "below 0.5"),
        ("max_rollbacks", -1, "at least 0"),
    ],
)
def test_configs_out_of_range(field, value, expected):
    with pytest.raises(ValueError, match=rf"{field} must be .*{expected}.*{value}"):
        GovernorConfig(**{field: value})


def test_the_config_of_a_run_has_a_table(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[governor]\ndeviations = 5\nmax_rollbacks = 1\n")
    config = load_config(path, ["governor.enabled=false"])
    assert config.governor == GovernorConfig(
        deviations=5.0, max_rollbacks=1, enabled=False
    )


SMOKE = Path(__file__).parents[1] / "configs" / "smoke.toml"


def smoke(ticks):
    early = ["controller.patience=1", "controller.threshold=0.9"]
    return load_config(SMOKE, [f"train.ticks={ticks}", "checkpoint.every=4", *early])


@pytest.fixture
def broken_run(monkeypatch):
    """Runs on disk whose batches are NaN where a function of the state says so."""
    original, rule, programs = programs_of_runs.build_run, {}, []

    def build_run(config, data, axis_name=None):
        # The runs of one test differ in their length alone.
        programs[:] = programs or [original(config, data)]
        [program] = programs

        def step_from(state, rows, order, batch_size):
            if rule["when"](int(state.step), int(state.governor.rollbacks)):
                state, rows = nan_batch(state, rows)
            return program.step_from(state, rows, order, batch_size)

        return program._replace(step_from=step_from)

    monkeypatch.setattr(programs_of_runs, "build_run", build_run)
    return rule


@pytest.mark.slow
def test_a_run_on_disk_tells_of_rollbacks_and_resumes(broken_run, tmp_path, capsys):
    # Of 8 steps each, the tenth tick: two after the checkpoint of the eighth.
    broken_run["when"] = lambda step, rollbacks: step == 75 and rollbacks == 0
    whole = run.train_run(smoke(14), tmp_path / "whole")
    [rollback] = whole["rollbacks"]
    assert rollback | {"text": ""} == {
        "number": 1,
        "failed_tick": 10,
        "tick": 9,
        "fault": "TRAIN_LOSS",
        "text": "",
    }
    assert rollback["text"] in capsys.readouterr().out
    events = [e for e in whole["events"] if "rollback" in e]
    assert events
    for event in events:
        assert event["to"] in ("ROLLED_BACK", "CANCELLED")
        assert (event["outcome"], event["tick"]) == ("OK", 9)
        assert "(governor: the train loss is nan)" in event["text"]
    lines = (tmp_path / "whole" / "rollbacks.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == whole["rollbacks"]

    console = Console(quiet=True)
    for stopped_at in (8, 12):  # before and after the fault
        out = tmp_path / str(stopped_at)
        run.train_run(smoke(stopped_at), out, console=console)
        resumed = run.train_run(smoke(14), out, resume=True, console=console)
        for key in ("state_hash", "events", "rollbacks"):
            assert resumed[key] == whole[key], key


def test_a_run_that_cannot_go_on_saves_its_state(broken_run, tmp_path):
    broken_run["when"] = lambda step, rollbacks: step >= 50
    console, out = Console(quiet=True), tmp_path / "run"
    message = r"training stopped in tick 7: .*saved as step 48 in .*go on with --resume"
    with pytest.raises(run.RunStopped, match=message):
        run.train_run(smoke(9), out, console=console)
    assert not (out / "summary.json").exists()
    broken_run["when"] = lambda step, rollbacks: False
    summary = run.train_run(smoke(9), out, resume=True, console=console)
    assert [r["number"] for r in summary["rollbacks"]] == [1, 2, 3, 4]
    assert {r["tick"] for r in summary["rollbacks"]} == {6}
    assert summary["final_loss"] < 2.0


def test_a_frozen_host_has_no_gradient_and_that_is_no_fault():
    model = MLP(6, (8,), CLASSES, num_seeds=2, capacity=2, rngs=nnx.Rngs(0))
    frozen = build(model, optax.adam(1e-2), optax.adam(1e-3), wrt=None)
    reports = []
    state = fit(
        frozen,
        frozen.init(jax.random.key(0)),
        TRAIN,
        HELD_OUT,
        ticks=2,
        batch_size=BATCH,
        governor=Governor(frozen, num_classes=CLASSES),
        on_tick=lambda state, report: reports.append(report),
    )
    assert (int(state.ticks), int(state.governor.rollbacks)) == (2, 0)
    assert [float(r.layers["layers/0"].signals.grad_norm) for r in reports] == [0, 0]
