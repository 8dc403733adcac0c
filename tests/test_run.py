"""Runs on disk and the command line, as a user meets them."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from esper_jax.checkpoint import CheckpointError
from esper_jax.checkpoint.checkpointer import Checkpointer
from esper_jax.cli import main
from esper_jax.data import DATASETS
from esper_jax.lifecycle.stages import Stage
from esper_jax.run import build_run, run
from esper_jax.run.config import ConfigError, load_config, parse_config
from esper_jax.run.folder import RunError, RunFolder, read_lines
from esper_jax.run.run import evaluate_run, train_run
from esper_jax.train.loop import fit
from esper_jax.trees import is_key

CONFIGS = Path(__file__).parents[1] / "configs"
COMMAND = [sys.executable, "-m", "esper_jax"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(CONFIGS.parent)}


INTERRUPTIBLE = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("esper_jax", run_name="__main__")
"""
KEPT = ("FOSSILIZED", "OK")


def esper(*arguments, cwd):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def smoke(**train):
    overrides = [f"train.{name}={value}" for name, value in train.items()]
    return load_config(CONFIGS / "smoke.toml", overrides)


@pytest.fixture(scope="module", autouse=True)
def one_program():
    """Runs in this process that differ in their length share a compiled program."""
    build, made = run.build_run, {}

    def build_run(config, data, axis_name=None):
        assert axis_name is None
        train = dataclasses.replace(config.train, ticks=1)
        key = repr(dataclasses.replace(config, train=train))
        if key not in made:
            made[key] = build(config, data)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "build_run", build_run)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The smoke run, from the command line."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    result = esper("train", CONFIGS / "smoke.toml", "--out", folder, cwd=folder.parent)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_smoke_run(finished):
    folder, result = finished
    assert len(list((folder / "checkpoints").iterdir())) >= 3
    assert "DORMANT" in result.stdout
    assert "\x1b" not in result.stdout  # plain lines where there is no terminal
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["final_accuracy"] > 0.9
    assert summary["recompiles"] == 0
    assert summary["host_params"] == 64 * 16 + 16 + 16 * 10 + 10
    kept = [e for e in summary["events"] if (e["to"], e["outcome"]) == KEPT]
    # A residual MLP on a chunk of 4: 4 to 8 hidden units and back, with biases.
    assert summary["grown_params"] == len(kept) * (4 * 8 + 8 + 8 * 4 + 4) > 0
    assert len(summary["state_hash"]) == 64
    keys = {"tick", "layer", "seed", "slot", "from", "to", "outcome"}
    assert summary["events"]
    for event in summary["events"]:
        assert keys <= set(event)
        assert {event["from"], event["to"]} <= set(Stage.__members__)
    judged = [e for e in summary["events"] if e["to"] == "FINE_TUNING"]
    assert {"performance_delta", "stability_score"} <= set(judged[0]["measured"])
    assert judged[0]["text"] in result.stdout
    lines = (folder / "events.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == summary["events"]


def test_evaluate_ends_with_one_json_object(finished, monkeypatch, capsys):
    folder, _ = finished
    monkeypatch.setattr(sys, "argv", ["esper-jax", "evaluate", str(folder)])
    main()
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    summary = json.loads((folder / "summary.json").read_text())
    assert measured == {
        "step": 320,
        "accuracy": summary["final_accuracy"],
        "loss": summary["final_loss"],
    }


def test_a_resumed_run_ends_like_one_that_was_not_stopped(finished, tmp_path):
    folder, _ = finished
    console = Console(quiet=True)
    out = tmp_path / "run"
    train_run(smoke(ticks=20), out, console=console)
    with pytest.raises(RunError, match="is not empty"):
        train_run(smoke(), out, console=console)
    with pytest.raises(ConfigError, match=r"train.batch_size: expected 128.*got 64"):
        train_run(smoke(batch_size=64), out, resume=True, console=console)
    # As if it had been killed while it wrote an event.
    with (out / "events.jsonl").open("a") as file:
        file.write('{"tick": 21, "lay')
    resumed = train_run(smoke(), out, resume=True, console=console)
    whole = json.loads((folder / "summary.json").read_text())
    assert resumed["state_hash"] == whole["state_hash"]
    assert resumed["events"] == whole["events"]
    with pytest.raises(ConfigError, match=r"train.ticks: expected at least 40.*got 20"):
        train_run(smoke(ticks=20), out, resume=True, console=console)
    assert json.loads((out / "config.json").read_text())["train"]["ticks"] == 40
    assert evaluate_run(out)["step"] == 320


@pytest.mark.slow
def test_a_run_goes_on_with_another_capacity(tmp_path, monkeypatch, capsys):
    """As its state would if `grow_capacity` were called on it where it stopped."""
    config, out = CONFIGS / "smoke.toml", tmp_path / "run"
    console = Console(quiet=True)
    train_run(smoke(ticks=20), out, console=console)
    before = state_of(out)
    living = [int(seed) for seed in before.seeds["layers/0"].seed_of_slot if seed >= 0]
    assert living
    larger = ["--resume", "--set", "growth.capacity=4", "train.ticks=25"]
    arguments = ["esper-jax", "train", str(config), "--out", str(out), *larger]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    printed = capsys.readouterr()
    said = "layer layers/0 of step 160 goes on with capacity 4 instead of 2"
    assert printed.err.splitlines() == [f"esper-jax: {said}"]
    assert "recompiles: 0" in printed.out
    assert json.loads((out / "config.json").read_text())["growth"]["capacity"] == 4

    program, data, _ = parts_of(out)
    grown = program.grow_capacity(before, 4)
    order = fit(program, grown, data.train, data.held_out, ticks=25, batch_size=128)
    after = state_of(out)
    assert int(after.step) == 200
    assert after.seeds["layers/0"].capacity == 4
    for name in ("params", "seeds", "monitor", "memory", "banks"):
        for a, b in zip(
            *(jax.tree.leaves(getattr(s, name)) for s in (after, order)), strict=True
        ):
            # Free slots hold what their program drew for them, and count for nothing.
            owned = np.asarray(after.seeds["layers/0"].seed_of_slot) >= 0
            both = (a[owned], b[owned]) if name == "banks" else (a, b)
            if is_key(a):
                both = tuple(jax.random.key_data(key) for key in both)
            np.testing.assert_array_equal(*both, err_msg=name)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params))
    # Anything else of the growth must stay.
    fewer = load_config(config, ["growth.num_seeds=2"])
    with pytest.raises(ConfigError, match=r"growth.num_seeds: expected 4.*got 2"):
        train_run(fewer, out, resume=True, console=console)


def parts_of(out):
    config = parse_config(json.loads((out / "config.json").read_text()))
    data = DATASETS[config.data.name](config.data.seed)
    program = build_run(config, data)
    return program, data, program.init(jax.random.key(config.seed))


def state_of(out):
    return Checkpointer(out / "checkpoints").restore(parts_of(out)[2]).state


def start(*arguments, cwd):
    """Starts a command; SIGINT interrupts it even if this process ignores SIGINT."""
    return subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def flip_a_bit_of_the_newest(checkpoints):
    newest = max(checkpoints.steps())
    files = (checkpoints.directory / str(newest)).rglob("d/*")
    path = max(files, key=lambda file: file.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return newest, path.name


@pytest.mark.parametrize("every", [100, 1])
def test_interrupted_and_resumed_a_run_ends_the_same(every, finished, tmp_path):
    folder = RunFolder(tmp_path / "run")
    saving = ["--set", f"checkpoint.every={every}"]
    arguments = ["train", CONFIGS / "smoke.toml", "--out", "run", *saving]
    with start(*arguments, cwd=tmp_path) as process:
        while len(read_lines(folder.ticks)) < 2:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    steps = Checkpointer(folder.checkpoints).steps()
    assert steps[-1] // 8 >= len(read_lines(folder.ticks))  # nothing is lost
    said = f"stopped by SIGINT; --resume --out run goes on from step {steps[-1]}"
    assert errors == f"esper-jax: {said}\n"
    assert not folder.summary.exists()
    resumed = train_run(smoke(), folder.path, resume=True, console=Console(quiet=True))
    whole = json.loads((finished[0] / "summary.json").read_text())
    assert resumed["state_hash"] == whole["state_hash"]
    assert resumed["events"] == whole["events"]


def test_killed_damaged_and_resumed_a_run_ends_the_same(finished, tmp_path):
    folder, _ = finished
    out = tmp_path / "run"
    checkpoints = Checkpointer(out / "checkpoints")
    with start("train", CONFIGS / "smoke.toml", "--out", out, cwd=tmp_path) as run:
        while len(checkpoints.steps()) < 2:
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.01)
        time.sleep(random.random() / 2)
        run.kill()
    newest, file = flip_a_bit_of_the_newest(checkpoints)
    resumed = esper(
        "train", CONFIGS / "smoke.toml", "--resume", "--out", out, cwd=tmp_path
    )
    assert resumed.returncode == 0, resumed.stderr
    first, second = resumed.stderr.splitlines()
    assert f"{newest} is damaged" in first
    assert file in first
    assert f"fell back to step {newest - 80}" in second
    whole = json.loads((folder / "summary.json").read_text())
    summary = json.loads((out / "summary.json").read_text())
    assert summary["state_hash"] == whole["state_hash"]
    assert summary["events"] == whole["events"]
    assert all(checkpoints.verify(n).damage is None for n in checkpoints.steps())


@pytest.mark.slow
def test_a_disk_that_is_full_gives_one_clear_error(tmp_path):
    out = tmp_path / "run"
    command = " ".join([*COMMAND, "train", str(CONFIGS / "smoke.toml"), "--out run"])
    result = subprocess.run(
        ["bash", "-c", f"ulimit -f 12; exec {command}"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    # The monitor's file may be full first. That stops nothing, and is told in the end.
    lost = "esper-jax: the writer JsonLines lost"
    said = [line for line in result.stderr.splitlines() if "esper-jax" in line]
    [error] = [line for line in said if not line.startswith(lost)]
    assert f"step 80 could not be saved in {out}/checkpoints: File too large" in error
    assert "Traceback" not in result.stderr
    assert not list((out / "checkpoints").iterdir())


@pytest.mark.slow
def test_killed_again_and_again(finished, tmp_path):
    """From the interpreter's start to the last save, wherever the kills fall."""
    folder, _ = finished
    out = tmp_path / "run"
    kills = 0
    began = time.monotonic()
    esper("train", CONFIGS / "smoke.toml", "--out", tmp_path / "timed", cwd=tmp_path)
    whole_run = time.monotonic() - began
    while not (out / "summary.json").exists():
        resume = ["--resume"] if (out / "config.json").exists() else []
        if not resume:
            shutil.rmtree(out, ignore_errors=True)
        arguments = ["train", CONFIGS / "smoke.toml", *resume, "--out", out]
        with start(*arguments, cwd=tmp_path) as run:
            try:
                patience = random.uniform(0, whole_run) if kills < 8 else 300
                _, errors = run.communicate(timeout=patience)
                assert run.returncode == 0, errors
            except subprocess.TimeoutExpired:
                run.kill()
                kills += 1
    whole = json.loads((folder / "summary.json").read_text())
    summary = json.loads((out / "summary.json").read_text())
    assert kills
    assert summary["state_hash"] == whole["state_hash"]
    assert summary["events"] == whole["events"]


def test_evaluate_falls_back_and_says_so(finished, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    checkpoints = Checkpointer(folder / "checkpoints")
    _, file = flip_a_bit_of_the_newest(checkpoints)
    monkeypatch.setattr(sys, "argv", ["esper-jax", "evaluate", str(folder)])
    main()
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["step"] == 240
    assert file in said.err
    assert "fell back to step 240" in said.err
    for step in checkpoints.steps():
        (checkpoints.directory / str(step) / "manifest.json").unlink()
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(f"step {step}: manifest.json is missing" in error for step in (80, 320))


def test_a_run_in_progress_is_left_alone(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    before = (folder / "events.jsonl").read_bytes()
    with Checkpointer(folder / "checkpoints") as other:
        other.acquire()
        with pytest.raises(CheckpointError, match="is being written to"):
            train_run(smoke(ticks=50), folder, resume=True)
    assert (folder / "events.jsonl").read_bytes() == before
    assert json.loads((folder / "config.json").read_text())["train"]["ticks"] == 40


def test_a_run_stopped_before_its_first_checkpoint_begins_again(tmp_path, caplog):
    console = Console(quiet=True)
    out = tmp_path / "run"
    whole = train_run(smoke(ticks=2), out, resume=True, console=console)
    assert "holds no run yet: starts one" in caplog.text
    # As it is when it was killed before it had saved anything.
    (out / "summary.json").unlink()
    shutil.rmtree(out / "checkpoints")
    (out / "checkpoints").mkdir()
    again = train_run(smoke(ticks=2), out, resume=True, console=console)
    assert again == whole
    # As it is when its checkpoints are not mounted.
    before = files_of(out)
    for path in (out / "checkpoints").iterdir():
        shutil.rmtree(path)
    with pytest.raises(RunError, match=r"a run of 2 ticks, but no checkpoint is in"):
        train_run(smoke(ticks=2), out, resume=True, console=console)
    (out / "summary.json").unlink()
    (out / "checkpoints").rmdir()
    with pytest.raises(RunError, match=r"mount it or put it back"):
        train_run(smoke(ticks=2), out, resume=True, console=console)
    before.pop("summary.json")
    assert {k: v for k, v in before.items() if "/" not in k} == files_of(out)
    # As it is when it was killed before it was a run.
    for name in ("config.json", "events.jsonl", "ticks.jsonl", "metrics.jsonl"):
        (out / name).unlink()
    (out / "config.tmp").write_text("{")
    assert train_run(smoke(ticks=2), out, resume=True, console=console) == whole
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "note.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty and holds no run"):
        train_run(smoke(ticks=2), tmp_path / "other", resume=True, console=console)


def files_of(folder):
    """Contents by path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_run_without_a_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        evaluate_run(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(RunError, match=r"config.json: config: expected a table"):
        evaluate_run(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(RunError, match="is damaged"):
        evaluate_run(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match="is damaged"):
        evaluate_run(tmp_path)
