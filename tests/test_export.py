"""``esper-jax export``: what a run has grown, in forms that others read."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from esper_jax.cli import main
from esper_jax.lifecycle.stages import Stage
from esper_jax.run.config import load_config
from esper_jax.run.folder import RunFolder
from esper_jax.run.run import evaluate_run, restore_run, train_run

SMOKE = Path(__file__).parents[1] / "configs" / "smoke.toml"
QUICK = [
    "train.ticks=14",
    "checkpoint.every=14",
    "controller.patience=1",
    "controller.threshold=0.9",
    "controller.keep_tolerance=1e6",
    "lifecycle.reconstruction_threshold=1e9",
    "lifecycle.min_stability=-1e9",
    "lifecycle.min_improvement=-1e9",
    "lifecycle.min_final_stability=-1e9",
    "lifecycle.cull_delta=-1e9",
    "lifecycle.grafting.ramp_duration=1",
    *(f"lifecycle.min_epochs.{s}=1" for s in ("TRAINING", "GRAFTING", "STABILIZATION")),
    *(f"lifecycle.min_epochs.{s}=1" for s in ("EVALUATING", "FINE_TUNING")),
]


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A run with fossils, and the model that it ended with."""
    folder = tmp_path_factory.mktemp("runs") / "grown"
    train_run(load_config(SMOKE, QUICK), folder)
    program, data, found = restore_run(RunFolder(folder))
    stages = [np.asarray(seeds.stage) for seeds in found.state.seeds.values()]
    assert any((stage == Stage.FOSSILIZED).any() for stage in stages)
    model = program.model(found.state)
    model.eval()
    return folder, model, data.test[0]


@pytest.fixture
def export(monkeypatch, capsys):
    """Runs the command; returns exit status, what it said last, and errors."""

    def run(*arguments):
        arguments = ["esper-jax", "export", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", arguments)
        status = 0
        try:
            main()
        except SystemExit as stopped:
            status = stopped.code
        out, errors = capsys.readouterr()
        return status, (json.loads(out.splitlines()[-1]) if out else None), errors

    return run


def test_safetensors(grown, export, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    load = pytest.importorskip("safetensors.numpy").load_file
    folder, model, x = grown
    before = sorted(p.name for p in folder.iterdir())
    status, said, _ = export(folder, "--format", "safetensors", "--parts", "counting")
    assert status == 0
    path = folder.with_name("grown.safetensors")
    assert said["path"] == str(path)
    assert said["step"] == evaluate_run(folder)["step"]
    arrays = load(path)
    assert said["parameters"] == sum(a.size for a in arrays.values())
    host = sum(np.size(p) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    summary = json.loads((folder / "summary.json").read_text())
    assert host == summary["host_params"]
    assert said["parameters"] == host + summary["grown_params"]
    assert sorted(p.name for p in folder.iterdir()) == before

    # By hand, in numpy, from what the file says alone.
    y = np.maximum(
        x @ arrays["layers.0.base.linear.kernel"] + arrays["layers.0.base.linear.bias"],
        0,
    )
    with safetensors.safe_open(path, "numpy") as file:
        described = file.metadata()
    out = y.copy()
    assert described
    for name, text in described.items():
        group = json.loads(text)
        w1, b1, w2, b2 = (
            arrays[f"{name}.params.{leaf}"] for leaf in ("w1", "b1", "w2", "b2")
        )
        for i, start in enumerate(group["starts"]):
            chunk = slice(start, start + group["width"])
            hidden = np.asarray(jax.nn.gelu(y[:, chunk] @ w1[i] + b1[i]))
            out[:, chunk] += group["alpha"][i] * (hidden @ w2[i] + b2[i])
    logits = out @ arrays["readout.kernel"] + arrays["readout.bias"]
    np.testing.assert_allclose(logits, model(x), rtol=1e-4, atol=1e-4)
    assert np.abs(out - y).max() > 1e-3


def test_stablehlo_runs_in_a_process_without_esper_jax(grown, export, tmp_path):
    pytest.importorskip("flatbuffers", reason="jax.export writes with it")
    folder, model, x = grown
    target = tmp_path / "new" / "model.bin"
    arguments = ["--format", "stablehlo", "--out", target, "--parts", "counting"]
    status, said, _ = export(folder, *arguments)
    assert status == 0
    assert said["path"] == str(target)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", model(x))
    code = """
import sys; sys.modules["esper_jax"] = None
import jax, jax.export, numpy as np
model = jax.export.deserialize(bytearray(open("new/model.bin", "rb").read()))
assert model.platforms == ("cpu", "cuda", "tpu")
x, want = np.load("x.npy"), np.load("y.npy")
for rows in (1, 7, len(x)):
    error = np.abs(model.call(x[:rows]) - want[:rows]).max()
    assert error <= 1e-5 * np.abs(want).max(), error
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_orbax(grown, export, tmp_path):
    folder, model, _ = grown
    target = tmp_path / "model"
    status, said, _ = export(folder, "--format", "orbax", "--out", target)
    assert status == 0
    with ocp.StandardCheckpointer() as checkpointer:
        back = checkpointer.restore(target)
    assert said["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(back))
    want = np.asarray(model.readout.kernel[...])
    np.testing.assert_array_equal(back["readout"]["kernel"], want)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_exists_is_refused(grown, export, tmp_path):
    folder, _, _ = grown
    target = tmp_path / "mine"
    target.write_text("mine")
    status, _, errors = export(folder, "--format", "orbax", "--out", target)
    assert status == 2
    assert errors == (
        f"esper-jax: {target} exists: choose another --out, or remove it\n"
    )
    assert target.read_text() == "mine"


def test_a_missing_package_is_named(grown, export, tmp_path, monkeypatch):
    folder, _, _ = grown
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    target = tmp_path / "x"
    status, _, errors = export(folder, "--format", "safetensors", "--out", target)
    assert status == 2
    assert errors == (
        "esper-jax: --format safetensors needs the package safetensors, which is not "
        "installed: pip install 'esper-jax[export]'\n"
    )
    assert not target.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--format", "orbax"], "nowhere holds no run"),
        (["nowhere"], "--format"),
        (["nowhere", "--format", "onnx"], "onnx"),
        (["nowhere", "--format", "orbax", "--parts", "all"], "all"),
        (["--format", "orbax"], "DIR"),
    ],
)
def test_wrong_input_is_refused(arguments, message, export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, errors = export(*arguments)
    assert status == 2
    assert message in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_refused(grown, export, tmp_path):
    folder, _, _ = grown
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "model"
    status, _, errors = export(folder, "--format", "orbax", "--out", target)
    assert status == 2
    assert errors.startswith(f"esper-jax: {target} cannot be written (")
    assert errors.count("\n") == 1
