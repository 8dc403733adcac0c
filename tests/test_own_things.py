"""Configs that name a model, data and a loss of one's own."""

import json
import os
import shutil
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
from esper_jax.run.build import load_data
from esper_jax.run.config import ConfigError, parse_config, to_dict
from esper_jax.run.devices import mesh_of
from esper_jax.run.folder import RunFolder, read_config, read_lines
from esper_jax.run.run import evaluate_run, train_run

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


@pytest.mark.parametrize(
    ("kind", "steps"), [("loader", 3), ("list", 3), ("list", 0), ("generator", 3)]
)
def test_batches_of_ones_own_resume_where_they_were(kind, steps, tmp_path, caplog):
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


def test_several_devices_come_to_the_same(tmp_path):
    alone = train_run(config(), tmp_path / "one")
    four = train_run(config(), tmp_path / "four", devices=4)
    np.testing.assert_allclose(four["final_loss"], alone["final_loss"], rtol=1e-4)
    assert [e["to"] for e in four["events"]] == [e["to"] for e in alone["events"]]
    assert four["recompiles"] == 0
    # A run may go on with another number.
    longer = config(train={**TRAIN, "ticks": 4})
    assert train_run(longer, tmp_path / "four", resume=True)["recompiles"] == 0


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
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    sides = [side(i, port, tmp_path) for i in (0, 1)]
    try:
        said = [process.communicate(timeout=240) for process in sides]
    finally:
        for process in sides:
            process.kill()
            process.wait()
    assert [process.returncode for process in sides] == [0, 0], said
    assert "recompiles: 0" in said[0][0]
    assert not [x for x in said[1][0].splitlines() if not x.startswith("[Gloo]")]
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
