"""The command line: wrong input, and what it says when it is interrupted."""

import dataclasses
import json
import signal
import sys
from pathlib import Path

import pytest

from esper_jax.cli import main
from esper_jax.commands.canary import Start, _seconds
from esper_jax.commands.comparing import Ab
from esper_jax.data import DATASETS
from esper_jax.rollout import Plan
from esper_jax.rollout.ab import Design
from esper_jax.run.config import load_config, to_dict

SMOKE = Path(__file__).parents[1] / "configs" / "smoke.toml"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command line in an empty folder; returns exit status and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["esper-jax", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.toml"], "none.toml: cannot be read"),
        (["train", "{smoke}", "--set", "train.tics=3"], "train.tics: unknown key"),
        (["train", "{smoke}", "--set", "train.ticks=x"], "train.ticks: expected int"),
        (["train", "{smoke}", "--set", "growth.capacity=0"], "growth.capacity must be"),
        (["train", "{smoke}", "--set", "train.batch_size=5000"], "train.batch_size"),
        (["train", "{smoke}", "--set", "train.ticks"], "--set expects key=value"),
        (["train", "{smoke}", "--resume"], "--resume: expected --out"),
        (
            ["train", "{smoke}", "--set", "train.tics=3", "--set", "seed=1"],
            "train.tics: unknown key",
        ),
        (["train", "{smoke}", "--out", "{smoke}"], "smoke.toml is no folder"),
        (["train", "{smoke}", "--out", "{smoke}/x"], "smoke.toml/x cannot be written"),
        (["train", "{smoke}", "--allow-change", "seed"], "--allow-change: expected"),
        (["train", "{smoke}", "--set", "train.ticks=" + "9" * 4301], "train.ticks: ex"),
        (["train", "{smoke}", "--set", "train.ticks=" + "[" * 1000], "train.ticks: ex"),
        (
            ["train", "{smoke}", "--set", f"train.weight_decay=1{'0' * 400}"],
            "of 1329 b",
        ),
        (["train", "{smoke}", "--set", "checkpoint.every=3000000000"], "below 2**31"),
        (["train", "{smoke}", "--set", "train.ticks=300000000"], "steps are counted"),
        (["train", "{smoke}", "--set", "model.hidden=[1000000000]"], "GiB to train"),
        (
            ["train", "{smoke}", "--set", f"model.hidden=[1{'0' * 20}]"],
            "model.hidden[0]",
        ),
        (["train", "{deep}"], "deep.toml: is nested too deeply"),
        (["train"], "CONFIG"),
        (["train", "{smoke}", "--quick"], "--quick"),
        (["evaluate", "nowhere"], "nowhere holds no run"),
        (["evaluate"], "DIR"),
        (["checkpoint", "list", "nowhere"], "nowhere holds no checkpoint"),
        (["checkpoint", "verify", "nowhere"], "nowhere holds no checkpoint"),
        (["checkpoint", "mend", "nowhere"], "mend"),
        (["grow"], "grow"),
        ([], "train"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(
    arguments, message, run, tmp_path, tmp_path_factory
):
    deep = tmp_path_factory.mktemp("config") / "deep.toml"
    deep.write_text("seed = " + "[" * 2000 + "]" * 2000)
    code, errors = run(*(a.format(smoke=SMOKE, deep=deep) for a in arguments))
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_in_use_is_left_alone(run, tmp_path):
    note = tmp_path / "out" / "note.txt"
    note.parent.mkdir()
    note.write_text("mine")
    code, errors = run("train", SMOKE, "--out", "out")
    assert code == 2
    assert "out is not empty: choose another --out, or --resume the run" in errors
    assert [p.name for p in note.parent.iterdir()] == ["note.txt"]


@pytest.fixture
def interrupted(monkeypatch):
    """SIGINT arrives while the data are loaded."""

    def load(seed):
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the signal did not interrupt the command")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setitem(DATASETS, "digits", load)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupted")
@pytest.mark.parametrize(
    ("arguments", "files", "said"),
    [
        (
            ["train", SMOKE, "--out", "r"],
            [],
            "stopped by SIGINT; the run had not begun, and there is nothing to resume",
        ),
        (
            ["train", SMOKE, "--out", "r", "--resume"],
            ["config.json"],
            "stopped by SIGINT; nothing was saved yet, and --resume --out r begins "
            "again",
        ),
        (
            ["train", SMOKE, "--out", "r", "--resume"],
            ["config.json", "checkpoints/80/x", "checkpoints/160/x"],
            "stopped by SIGINT; --resume --out r goes on from step 160",
        ),
        (["evaluate", "r"], ["config.json"], "stopped by SIGINT"),
    ],
)
def test_what_is_said_when_interrupted_is_true(arguments, files, said, run, tmp_path):
    for file in files:
        path = tmp_path / "r" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(to_dict(load_config(SMOKE))))
    assert run(*arguments) == (130, f"esper-jax: {said}\n")


@pytest.mark.parametrize(
    ("command", "what", "names"),
    [
        (Start, Plan, {f.name for f in dataclasses.fields(Plan)}),
        (Ab, Design, {"alpha", "power", "effect", "sequential"}),
    ],
)
def test_options_have_the_defaults_of_what_they_make(command, what, names):
    """They stand there twice, since commands import late what they need."""
    options, fields = (
        {f.name: f.default for f in dataclasses.fields(of)} for of in (command, what)
    )
    if "watch" in names:
        options["watch"] = _seconds("watch", options["watch"])
    assert {n: options[n] for n in names} == {n: fields[n] for n in names}
