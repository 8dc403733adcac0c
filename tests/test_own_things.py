"""Configs that name a model, data and a loss of one's own."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from esper_jax.checkpoint.checkpointer import Checkpointer
from esper_jax.cli import main
from esper_jax.run import devices
from esper_jax.run import run as run_module
from esper_jax.run.build import load_data
from esper_jax.run.config import ConfigError, parse_config, to_dict
from esper_jax.run.devices import mesh_of
from esper_jax.run.export import export_run
from esper_jax.run.folder import RunError, RunFolder, read_config, read_lines
from esper_jax.run.run import evaluate_run, train_run
from esper_jax.train import Interrupted, Stop

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
GROWTH = {"layers": ["a"], "num_seeds": 2, "capacity": 2}
POLICY = {"when": "period", "period": 1}
TRAIN = {"ticks": 3, "batch_size": 16, "loss": "own_module:loss"}


def config(**tables):
    return parse_config(
        {
            "model": {"factory": "own_module:model", "width": 8},
            "data": {"factory": "own_module:arrays"},
            "growth": GROWTH,
            "controller": POLICY,
            "train": TRAIN,
            **tables,
        }
    )


def batches(kind, ticks, **train):
    train = {"ticks": ticks, "objective": "own_module:objective", **train}
    return config(
        data={"factory": "own_module:batches", "kind": kind},
        train=train,
        checkpoint={"every": 1},
    )


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a command line in a user's folder; returns status, output and errors."""
    shutil.copy(HERE / "own_module.py", tmp_path / "mine_only_here.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["esper-jax", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as stopped:
            status = stopped.code
        return status, *capsys.readouterr()

    yield run
    sys.modules.pop("mine_only_here", None)


def test_a_run_of_ones_own_from_the_command_line(command, tmp_path):
    text = """
[model]
factory = "mine_only_here:growable"
width = 8
[data]
factory = "mine_only_here:arrays"
[train]
ticks = 2
loss = "mine_only_here:loss"
"""
    (tmp_path / "c.toml").write_text(text)
    status, out, errors = command("train", "c.toml", "--out", "run")
    assert (status, errors) == (0, "")
    assert "recompiles: 0" in out
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    status, out, _ = command("evaluate", "run")
    assert json.loads(out)["accuracy"] == summary["final_accuracy"]
    more = ("--resume", "--out", "run", "--set", "train.ticks=3")
    assert command("train", "c.toml", *more)[0] == 0
    assert (
        command("train", "c.toml", "--out", "whole", "--set", "train.ticks=3")[0] == 0
    )
    hashes = [
        json.loads((tmp_path / run / "summary.json").read_text())["state_hash"]
        for run in ("run", "whole")
    ]
    assert hashes[0] == hashes[1]
    status, out, _ = command("export", "run", "--format", "stablehlo")
    exported = jax.export.deserialize(Path(json.loads(out)["path"]).read_bytes())
    assert exported.call(np.zeros((3, 4), np.float32)).shape == (3, 2)
    # The options are part of what a run is.
    status, _, errors = command("train", "c.toml", *more, "--set", "model.width=16")
    assert status == 2
    assert "model.width: expected 8" in errors


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"model": {"factory": "own_module"}}, r'model.factory must be "package.modu'),
        ({"model": {"factory": 3}}, r"model.factory: expected .*, got 3"),
        ({"model": {"factory": "nowhere_at_all:f"}}, r"model.factory: cannot import"),
        ({"model": {"factory": "own_module:nothing"}}, "has no 'nothing'"),
        ({"model": {"factory": "own_module:X"}}, "model.factory: expected a function"),
        (
            {"model": {"factory": "own_module:model", "widht": 8}},
            r"own_module:model\(width, rngs\) cannot be called with widht, rngs",
        ),
        (
            {"model": {"factory": "own_module:breaks"}},
            r"model.factory: KeyError: \"this is the user's\" \(.*own_module.py:\d+\)",
        ),
        ({"model": {"factory": "own_module:no_model"}}, "to return a Flax NNX module"),
        ({"growth": {}}, "growth.layers: expected the paths .* it has a, norm, out"),
        ({"growth": {**GROWTH, "layers": ["b"]}}, "growth: .* there is no layer 'b'"),
        (
            {
                "model": {"factory": "own_module:growable", "width": 8},
                "growth": {"num_seeds": 8},
            },
            "growth: the model of own_module:growable says itself what grows",
        ),
        ({"data": {"factory": "own_module:two_parts"}}, r"got tuple of 2"),
        (
            {"train": {**TRAIN, "loss": "own_module:one_argument"}},
            r"train.loss: own_module:one_argument\(logits\) cannot be called with 2",
        ),
        (
            {"train": {**TRAIN, "loss": "own_module:wrong_shape"}},
            r"model.factory, data.factory, train.loss: one step with a batch of train "
            r"failed \(tuple of float32\[16, 4\], int32\[16\]\): ValueError: loss must",
        ),
        (
            {"train": {**TRAIN, "loss": "", "objective": "own_module:objective"}},
            "train.objective: one step .* failed",
        ),
        ({"train": {**TRAIN, "objective": "a:b"}}, "must not both be given"),
        ({"train": {**TRAIN, "steps_per_tick": 3}}, "train.steps_per_tick: expected 0"),
        ({"train": {**TRAIN, "batch_size": 65}}, "train.batch_size: expected at most"),
        (
            {
                "data": {"factory": "own_module:arrays", "label": 2},
                "train": {**TRAIN, "loss": ""},
            },
            "data.factory: test must have labels from 0 to 1, .* is 2 in row 63",
        ),
        ({"model": {}, "growth": {}}, "the built-in perceptron needs data.factory"),
        ({"model": {}}, "growth.layers is for a model of your own"),
        ({"compare": {"static": True}}, "compare.static is for the built-in model"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(
    tables, words, tmp_path
):
    with pytest.raises(ConfigError, match=words):
        train_run(config(**tables), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_configs_of_ones_own_survive_a_round_trip(tmp_path):
    own = config()
    assert parse_config(json.loads(json.dumps(to_dict(own)))) == own
    assert to_dict(own)["model"] == {"factory": "own_module:model", "width": 8}
    assert "factory" not in to_dict(parse_config({}))["model"]


@pytest.fixture(scope="module")
def programs():
    """What `one_program` has compiled."""
    return {}


@pytest.fixture
def one_program(monkeypatch, programs):
    """Runs of one model share a compiled program; gives a place to put a signal."""
    build, fit, made, signals = run_module.build_run, run_module.fit, programs, []

    def build_run(config, data, axis_name=None):
        tables = to_dict(config)
        parts = [
            tables[name] for name in ("model", "growth", "lifecycle", "controller")
        ]
        train = config.train
        key = json.dumps([*parts, train.objective, train.loss, axis_name])
        if key not in made:
            made[key] = build(config, data, axis_name)
        return made[key]

    def fitted(program, *arguments, **options):
        def step(state, batch):
            if signals and int(state.step) == signals[0] - 1:
                signal.raise_signal(signal.SIGUSR1)
            return program.step(state, batch)

        return fit(program._replace(step=step), *arguments, **options)

    monkeypatch.setattr(run_module, "build_run", build_run)
    monkeypatch.setattr(run_module, "fit", fitted)
    return signals


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("loader", 3),
        pytest.param("list", 3, marks=pytest.mark.slow),
        pytest.param("list", 0, marks=pytest.mark.slow),
        ("generator", 3),
    ],
)
def test_batches_of_ones_own_resume_where_they_were(
    kind, steps, one_program, tmp_path, caplog
):
    def run(folder, ticks, **options):
        own = batches(kind, ticks, steps_per_tick=steps)
        return train_run(own, tmp_path / folder, **options)

    whole = run("whole", 3)
    assert whole["recompiles"] == 0
    run("parts", 2)
    caplog.clear()
    parts = run("parts", 3, resume=True)
    same = parts["state_hash"] == whole["state_hash"]
    said = [r.message for r in caplog.records if "position" in r.message]
    assert (same, bool(said)) == (kind != "generator", kind == "generator")
    assert evaluate_run(tmp_path / "parts")["loss"] == parts["final_loss"]


@pytest.mark.parametrize(("kind", "steps"), [("loader", 3), ("list", 3), ("list", 0)])
def test_a_signal_among_ones_own_batches(kind, steps, one_program, tmp_path):
    """The position that is saved is that of the step, in a tick and at its end."""
    own = batches(kind, 3, steps_per_tick=steps)
    whole = train_run(own, tmp_path / "whole")
    per_tick = steps or 8
    for at in (per_tick + 2, 2 * per_tick, 2 * per_tick + 1):
        one_program[:] = [at]
        with Stop(signal.SIGUSR1) as stop, pytest.raises(Interrupted) as stopped:
            train_run(own, tmp_path / "parts", resume=True, stop=stop)
        state = stopped.value.state
        assert int(state.step) == at
        saved = Checkpointer(tmp_path / "parts/checkpoints").steps()
        assert saved[-1] == at
    one_program.clear()
    parts = train_run(own, tmp_path / "parts", resume=True)
    assert parts == whole


def test_what_is_sealed_and_changed_on_purpose(one_program, tmp_path, caplog):
    out = tmp_path / "run"
    train_run(batches("loader", 2, steps_per_tick=3), out)
    text = RunFolder(out).config.read_text()
    # Another config than the checkpoints': found before the user's code is called.
    assert '"kind": "loader"' in text
    RunFolder(out).config.write_text(text.replace('"loader"', '"nothing"'))
    said = "data.kind = 'nothing', but step 6 was saved with 'loader'"
    for attempt in (evaluate_run, lambda out: export_run(out, "orbax")):
        with pytest.raises(RunError, match=said):
            attempt(out)
    RunFolder(out).config.write_text(text)
    longer = batches("list", 3, steps_per_tick=3)
    with pytest.raises(ConfigError, match=r"data.kind: .*--allow-change data.kind"):
        train_run(longer, out, resume=True)
    for name in ("model.width", "growth.layers", "model"):
        with pytest.raises(ConfigError, match=f"{name}: .*start a new run"):
            train_run(longer, out, resume=True, allow_change=[name])
    # Data that cannot go to the old position begin anew, and it is told.
    assert not caplog.records
    summary = train_run(longer, out, resume=True, allow_change=["data.kind"])
    [record] = caplog.records
    assert "cannot go to the position that was saved: they begin anew" in record.message
    [change] = [e for e in summary["events"] if "change" in e]
    assert (change["tick"], change["from"], change["to"]) == (2, '"loader"', '"list"')
    evaluate_run(out)
    # A key that is gone is a change, too.
    gone = config(**{**to_dict(longer), "data": {"factory": "own_module:lists"}})
    gone = dataclasses.replace(gone, train=dataclasses.replace(gone.train, ticks=4))
    allowed = ["data.kind", "data.factory"]
    assert train_run(gone, out, resume=True, allow_change=allowed)["final_loss"]


def test_the_example_of_ones_own_things_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = ["esper-jax", "train", "own_things.toml", "--out", str(tmp_path / "r")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--set", "train.ticks=30"])
    main()
    out = capsys.readouterr().out
    assert "FINE_TUNING -> FOSSILIZED" in out
    assert "recompiles: 0" in out
    sys.modules.pop("own_things", None)


def test_devices_divide_the_rows_or_are_refused(monkeypatch, caplog):
    def count(asked, **train):
        own = config(train={**TRAIN, **train})
        mesh = mesh_of(own, load_data(own), asked)
        return mesh.size if mesh else 1

    assert count(None) == 1  # CPUs share their cores
    assert [count(n) for n in (1, 2, 4)] == [1, 2, 4]
    with pytest.raises(ConfigError, match=r"--devices: expected from 1 to 4, .* got 5"):
        count(5)
    with pytest.raises(
        ConfigError, match=r"3 devices must divide .*held_out \(64\).*train.batch_size"
    ):
        count(3)

    class Gpu:
        platform = "gpu"

        def __init__(self, device):
            self.id, self.process_index = device.id, device.process_index

    gpus = [Gpu(device) for device in jax.local_devices()]
    monkeypatch.setattr(devices.jax, "local_devices", lambda: gpus)
    assert count(None) == 4
    assert not caplog.records
    assert count(None, batch_size=10) == 2
    assert "trains on 2 of 4 devices: more do not divide train.batch" in caplog.text


def test_several_devices_come_to_the_same(one_program, tmp_path, caplog):
    alone = train_run(config(), tmp_path / "one")
    four = train_run(config(), tmp_path / "four", devices=4)
    np.testing.assert_allclose(four["final_loss"], alone["final_loss"], rtol=1e-4)
    assert [e["to"] for e in four["events"]] == [e["to"] for e in alone["events"]]
    assert four["recompiles"] == 0
    # A run may go on with another number, which is written down and told.
    record = RunFolder(tmp_path / "four").record
    assert json.loads(record.read_text())["settings"]["devices"] == "4"
    longer = config(train={**TRAIN, "ticks": 4})
    assert train_run(longer, tmp_path / "four", resume=True)["recompiles"] == 0
    assert json.loads(record.read_text())["settings"]["devices"] == "1"
    assert "may differ from here on: devices was '4' and is '1'" in caplog.text


def both(folder, *more):
    """Statuses, outputs and errors of two processes that train ``c.toml``."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    sides = [side(i, port, folder, *more) for i in (0, 1)]
    try:
        said = [process.communicate(timeout=240) for process in sides]
    finally:
        for process in sides:
            process.kill()
            process.wait()
    return [process.returncode for process in sides], *zip(*said, strict=True)


def side(index, port, folder, *more):
    flags = os.environ["XLA_FLAGS"].replace("device_count=4", "device_count=1")
    address = ("--coordinator", f"localhost:{port}", "--num-processes", "2")
    command = [sys.executable, "-m", "esper_jax", "train", "c.toml", "--distributed"]
    return subprocess.Popen(
        [*command, *address, "--process-id", str(index), *more],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_train_as_one_and_one_of_them_writes(tmp_path):
    shutil.copy(HERE / "own_module.py", tmp_path)
    (tmp_path / "c.toml").write_text(
        f"""
[model]
factory = "own_module:model"
width = 8
[data]
factory = "own_module:arrays"
[growth]
layers = ["a"]
num_seeds = 2
capacity = 2
[controller]
when = "period"
period = 1
[train]
ticks = {TRAIN["ticks"]}
batch_size = {TRAIN["batch_size"]}
loss = "own_module:loss"
"""
    )
    statuses, out, errors = both(tmp_path)
    assert statuses == [0, 0], errors
    assert "recompiles: 0" in out[0]
    assert not [x for x in out[1].splitlines() if not x.startswith("[Gloo]")]
    [run] = (tmp_path / "runs").iterdir()
    folder = RunFolder(run)
    alone = train_run(read_config(folder), tmp_path / "alone")
    summary = json.loads(folder.summary.read_text())
    np.testing.assert_allclose(summary["final_loss"], alone["final_loss"], rtol=1e-4)
    assert [e["to"] for e in summary["events"]] == [e["to"] for e in alone["events"]]
    assert [tick["tick"] for tick in read_lines(folder.ticks)] == [1, 2, 3]
    assert len(read_lines(folder.events)) == len(summary["events"])
    assert Checkpointer(folder.checkpoints).steps() == [12]
    assert evaluate_run(run)["loss"] == pytest.approx(summary["final_loss"], rel=1e-5)


@pytest.mark.slow
def test_two_processes_stop_and_fail_together(tmp_path):
    shutil.copy(HERE / "own_module.py", tmp_path)
    (tmp_path / "c.toml").write_text(
        """
[model]
factory = "own_module:model"
width = 8
[data]
factory = "own_module:batches"
kind = "loader"
stop = 5
full = 0
[growth]
layers = ["a"]
num_seeds = 2
capacity = 2
[controller]
when = "period"
period = 1
[train]
ticks = 4
steps_per_tick = 3
objective = "own_module:objective"
"""
    )
    run = ("--out", "run", "--resume")
    # SIGTERM comes to process 1 alone, in the second of the three steps of tick 2.
    statuses, _, errors = both(tmp_path, *run)
    assert statuses == [143, 143], errors
    said = "esper-jax: stopped by SIGTERM; --resume --out run goes on from step 6"
    assert [error.splitlines()[-1] for error in errors] == [said] * 2
    assert "starts one" in errors[0]
    assert "starts one" not in errors[1]
    folder = RunFolder(tmp_path / "run")
    assert len(read_lines(folder.ticks)) == 2
    # Process 0 cannot write a log at the end of tick 3; the other does not wait for it.
    changed = ("--set", "data.stop=0", "data.full=8")
    allowed = ("--allow-change", "data.stop", "--allow-change", "data.full")
    statuses, _, errors = both(tmp_path, *run, *changed, *allowed)
    assert statuses == [2, 2], errors
    assert "ticks.jsonl cannot be written: Is a directory" in errors[0]
    assert "process 0: run/ticks.jsonl cannot be written" in errors[1]
    folder.ticks.rmdir()
    changes = {e["text"] for e in read_lines(folder.events) if "change" in e}
    assert len(changes) == 2
    # One process goes on with what they have left, on the batches that are due.
    tables = to_dict(read_config(folder))
    own = parse_config({**tables, "data": {**tables["data"], "full": 0}})
    parts = train_run(own, folder.path, resume=True, allow_change=["data.full"])
    whole = train_run(own, tmp_path / "whole")
    assert parts["incomplete"] == [
        "ticks.jsonl holds 0 of the 2 lines that were written up to tick 2"
    ]
    np.testing.assert_allclose(parts["final_loss"], whole["final_loss"], rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--process-id", "0"], "expected with --distributed"),
        (["--distributed", "--process-id", "0"], "together, or none of them"),
    ],
)
def test_half_of_an_address_is_refused(arguments, words, command):
    status, _, errors = command("train", "c.toml", *arguments)
    assert status == 2
    assert words in errors
