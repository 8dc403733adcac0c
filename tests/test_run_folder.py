"""What lies in a run's folder is compared with what its checkpoints seal."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from esper_jax.checkpoint import CheckpointError
from esper_jax.checkpoint.checkpointer import Checkpointer
from esper_jax.cli import main
from esper_jax.run import run
from esper_jax.run.changes import check_resumable
from esper_jax.run.config import ConfigError, parse_config
from esper_jax.run.folder import RunError, RunFolder, read_lines
from esper_jax.run.run import evaluate_run, train_run
from esper_jax.train import Stop
from esper_jax.train.batches import DataError

TABLES = {
    "data": {"name": "spirals"},
    "model": {"hidden": [8]},
    "growth": {"num_seeds": 2, "capacity": 2},
    "train": {"ticks": 6, "batch_size": 300},
    "checkpoint": {"every": 3, "keep": 2},
}
TOML = """
[data]
name = "spirals"
[model]
hidden = [8]
[growth]
num_seeds = 2
capacity = 2
[train]
ticks = 6
batch_size = 300
[checkpoint]
every = 3
keep = 2
"""


def config(**train):
    return parse_config({**TABLES, "train": {**TABLES["train"], **train}})


@pytest.fixture(scope="module", autouse=True)
def one_program():
    """Runs of one learning rate share a compiled program."""
    build, made = run.build_run, {}

    def build_run(config, data, axis_name=None):
        key = config.train.learning_rate, config.data
        if key not in made:
            made[key] = build(config, data)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "build_run", build_run)
        yield


def train(out, *, ticks=6, **options):
    rest = {k: options.pop(k) for k in ("learning_rate",) if k in options}
    return train_run(
        config(ticks=ticks, **rest), out, console=Console(quiet=True), **options
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, train(out)


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def contents(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_one_bit_of_the_config_is_found(copy):
    old, new = (f'"name": "spirals",\n    "seed": {seed}' for seed in (0, 1))
    edit(copy / "config.json", old, new)
    before = contents(copy)
    said = r"data.seed = 1, but step 18 was saved with 0.*put 0 back into config.json"
    with pytest.raises(RunError, match=said):
        evaluate_run(copy)
    with pytest.raises(ConfigError, match=r"data.seed: expected 1, as the run"):
        train(copy, ticks=7, resume=True)
    with pytest.raises(RunError, match=said):
        train(copy, ticks=7, resume=True, allow_change=["data.seed"])
    assert contents(copy) == before


def test_checkpoints_of_another_run_are_found(copy, tmp_path):
    other = tmp_path / "other"
    train(other, ticks=7)
    theirs = other / "checkpoints" / "21"
    shutil.copytree(theirs, copy / "checkpoints" / "21")
    before = contents(copy)
    for attempt in (evaluate_run, lambda out: train(out, ticks=9, resume=True)):
        with pytest.raises(RunError, match=r"step 21 in .* was saved by another run"):
            attempt(copy)
    assert contents(copy) == before
    # Of runs that are older than their records, the configs are compared.
    old, new = (f'"learning_rate": {rate}' for rate in (0.001, 0.002))
    edit(other / "config.json", old, new)
    (other / "run.json").unlink()
    with pytest.raises(RunError, match=r"train.learning_rate = 0.002, but step 21"):
        evaluate_run(other)
    # Something else than a run has saved there.
    shutil.rmtree(copy / "checkpoints" / "21")
    with Checkpointer(copy / "checkpoints") as checkpoints:
        checkpoints.save(99, {"x": 1}, config=None)
    with pytest.raises(RunError, match="step 99 was not saved by a run"):
        evaluate_run(copy)


@pytest.mark.parametrize("text", ["[]", "{}x", '{"who": 1}', '{"changes": [1]}'])
def test_a_record_that_is_damaged_is_named(copy, text):
    (copy / "run.json").write_text(text)
    with pytest.raises(RunError, match=r"run.json is damaged"):
        evaluate_run(copy)


def test_a_run_without_a_record_keeps_its_name(copy):
    name = json.loads((copy / "run.json").read_text())["id"]
    (copy / "run.json").unlink()
    train(copy, ticks=7, resume=True)
    assert json.loads((copy / "run.json").read_text())["id"] == name


def test_a_history_with_holes_is_marked(copy, caplog, finished):
    whole = finished[1]
    path = copy / "ticks.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    summary = train(copy, ticks=7, resume=True)
    [said] = summary["incomplete"]
    assert said == "ticks.jsonl holds 2 of the 6 lines that were written up to tick 6"
    assert said in caplog.text
    caplog.clear()
    again = train(copy, ticks=8, resume=True)  # it is not forgotten
    assert again["incomplete"] == summary["incomplete"]
    assert "incomplete" not in caplog.text
    assert "incomplete" not in whole


def test_a_refused_resume_changes_nothing(copy):
    with (copy / "events.jsonl").open("a") as file:
        file.write("{}\n")
    before = contents(copy)
    with pytest.raises(RunError, match=r"events.jsonl is damaged in line"):
        train(copy, ticks=9, resume=True)
    with pytest.raises(ConfigError, match=r"add --allow-change train.learning_rate"):
        train(copy, learning_rate=0.5, resume=True)
    assert contents(copy) == before


def test_a_finished_run_that_goes_on_has_its_summary_all_the_time(copy, finished):
    """One command line serves a scheduler, which may start it once too often."""
    (copy / "summary.json").chmod(0o444)
    before = (copy / "summary.json").stat().st_ino

    class Stopped(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "conclude", lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            train(copy, resume=True)
    assert (copy / "summary.json").stat().st_ino == before
    assert train(copy, resume=True) == finished[1]


def test_what_is_changed_on_purpose_is_an_event(copy):
    change = ["train.learning_rate", "governor"]
    options = {"ticks": 8, "learning_rate": 0.002, "resume": True}
    summary = train(copy, **options, allow_change=change)
    [event] = [e for e in summary["events"] if "change" in e]
    said = "config: train.learning_rate is 0.002 from here on, and was 0.001"
    assert (event["tick"], event["text"]) == (6, said)
    saved = json.loads((copy / "config.json").read_text())
    assert saved["train"]["learning_rate"] == 0.002
    # Steps from before and after are its own, and it need not be said again.
    evaluate_run(copy)
    shutil.rmtree(copy / "checkpoints" / "24")
    evaluate_run(copy)
    again = train(copy, **options)
    assert [e for e in again["events"] if "change" in e] == [event]
    assert again["state_hash"] == summary["state_hash"]


def test_what_may_never_change():
    for name, said in (
        ("model", "start a new run"),
        ("growth.num_seeds", "start a new run"),
        ("train.tics", "there is no such key"),
    ):
        with pytest.raises(ConfigError, match=f"--allow-change {name}: .*{said}"):
            check_resumable(config(), config(), [name])
    assert check_resumable(config(ticks=9), config(), ["growth.capacity"]) == []


def test_other_settings_are_told_of(copy, monkeypatch, caplog):
    from esper_jax.run import opening

    now = opening.settings()
    assert now["jax_enable_x64"] == "False"
    monkeypatch.setattr(opening, "settings", lambda: now | {"jax": "9.9.9"})
    train(copy, ticks=7, resume=True)
    [said] = [r.getMessage() for r in caplog.records if "numbers" in r.getMessage()]
    assert said.startswith("numbers may differ from here on: jax was '")
    assert said.endswith("' and is '9.9.9'")
    record = json.loads((copy / "run.json").read_text())
    assert record["settings"]["jax"] == "9.9.9"
    caplog.clear()
    train(copy, ticks=8, resume=True)
    assert "numbers may differ" not in caplog.text


def test_two_that_start_in_one_folder(tmp_path, monkeypatch):
    """Whether the other still trains or has ended when the slower one comes."""
    out, build = tmp_path / "run", run.build_run

    def meanwhile(config, data, axis_name=None):
        monkeypatch.setattr(run, "build_run", build)
        train(out, ticks=3)
        return build(config, data)

    monkeypatch.setattr(run, "build_run", meanwhile)
    with pytest.raises(RunError, match="is not empty"):
        train(out)
    assert json.loads((out / "config.json").read_text())["train"]["ticks"] == 3
    other = tmp_path / "other"
    with Checkpointer(other / "checkpoints") as first:
        first.acquire()
        with pytest.raises(CheckpointError, match="is being written to"):
            train(other)
    assert [path.name for path in other.iterdir()] == ["checkpoints"]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a command line in an empty folder; returns status, output and errors."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text(TOML)

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["esper-jax", *map(str, arguments)])
        try:
            main()
        except SystemExit as stopped:
            status = stopped.code
        else:
            status = 0
        return status, *capsys.readouterr()

    return command


def test_runs_of_one_second_get_folders_of_their_own(command, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "now")
    for name in ("c-now", "c-now-2"):
        assert command("train", "c.toml")[1].splitlines()[-1] == f"run: runs/{name}"
    refused = command("train", "c.toml", "--set", "train.batch_size=9000")
    assert refused[0] == 2
    assert {path.name for path in Path("runs").iterdir()} == {"c-now", "c-now-2"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_run_when_it_is_saved(number, command, finished, monkeypatch):
    """In the second of the three steps of tick 5, and in the last step of tick 3."""
    if number == signal.SIGINT:
        monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)
    fit = run.fit
    line = ("train", "c.toml", "--out", "r", "--resume")
    for step in (9, 14):

        def signalled(program, *arguments, step=step, **options):
            def step_from(state, *others):
                if int(state.step) == step - 1:
                    signal.raise_signal(number)
                return program.step_from(state, *others)

            return fit(program._replace(step_from=step_from), *arguments, **options)

        monkeypatch.setattr(run, "fit", signalled)
        status, _, errors = command(*line)
        assert status == 128 + number
        said = f"stopped by {number.name}; --resume --out r goes on from step {step}"
        assert errors.splitlines()[-1] == f"esper-jax: {said}"
        assert Checkpointer("r/checkpoints").steps()[-1] == step
    monkeypatch.setattr(run, "fit", fit)
    assert command(*line)[0] == 0
    summary = json.loads(Path("r/summary.json").read_text())
    assert summary["state_hash"] == finished[1]["state_hash"]
    assert len(read_lines(RunFolder(Path("r")).ticks)) == 6


def test_a_run_that_python_starts_is_saved_too(tmp_path, finished):
    out = tmp_path / "run"
    with Stop(signal.SIGUSR1) as stop:
        stop.number = signal.SIGUSR1
        with pytest.raises(KeyboardInterrupt, match="SIGUSR1 after step 0"):
            train(out, stop=stop)
    assert Checkpointer(out / "checkpoints").steps() == []
    assert train(out, resume=True) == finished[1]


def test_errors_in_one_line(command, copy, monkeypatch):
    for error, status, said in (
        (ZeroDivisionError("a\nb"), 70, "not foreseen: ZeroDivisionError: a (--trace"),
        (MemoryError(), 2, "the memory does not hold this"),
        (DataError("data must have labels"), 2, "esper-jax: data must have labels"),
        (OSError(28, "No space left", "x"), 2, "[Errno 28] No space left: 'x'"),
        (BrokenPipeError(), 141, ""),
    ):

        def fail(_, error=error):
            raise error

        monkeypatch.setattr(run, "evaluate_run", fail)
        found, _, errors = command("evaluate", copy)
        assert (found, len(errors.splitlines())) == (status, bool(said))
        assert said in errors
    _, _, errors = command("evaluate", copy, "--traceback")
    assert not errors  # a closed pipe is no error
    monkeypatch.setattr(run, "evaluate_run", lambda _: 1 / 0)
    _, _, errors = command("evaluate", copy, "--traceback")
    assert "Traceback (most recent call last)" in errors
    assert errors.splitlines()[-1].startswith(
        "esper-jax: an error that is not foreseen"
    )


def test_home_is_found_where_the_shell_leaves_it(command, copy, monkeypatch):
    monkeypatch.setenv("HOME", str(copy.parent))
    Path("c.toml").rename(copy.parent / "c.toml")
    line = ("train", "~/c.toml", "--out=~/run", "--resume", "--set", "train.ticks=7")
    status, out, _ = command(*line)
    assert (status, out.splitlines()[-1]) == (0, f"run: {copy}")
    assert command("evaluate", "~/run")[0] == 0
    assert evaluate_run(Path("~/run"))["step"] == 21
    assert not Path("~").exists()
    status, _, errors = command("evaluate", "~nobody-here/run")
    assert status == 2
    assert errors.startswith("esper-jax: ~nobody-here/run: Could not determine home")


def spawn(*arguments, cwd, **environment):
    (cwd / "c.toml").write_text(TOML)
    root = str(Path(__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-m", "esper_jax", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": root, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_no_backend_and_no_reader(tmp_path):
    process = spawn("train", "c.toml", "--out", "g", cwd=tmp_path, JAX_PLATFORMS="foo")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2
    [line] = errors.splitlines()
    assert line.startswith("esper-jax: JAX has no device for JAX_PLATFORMS='foo'")
    # A run goes on when nobody reads its output; a name that is no ASCII is printed.
    line = ("train", "c.toml", "--out", "ü")
    process = spawn(*line, cwd=tmp_path, PYTHONIOENCODING="ascii")
    process.stdout.close()
    with process:
        assert process.stderr.read() == ""
    assert process.returncode == 0
    assert (tmp_path / "ü" / "summary.json").exists()


def test_stopped_while_it_imports(tmp_path):
    process = spawn("train", "c.toml", "--out", "r", cwd=tmp_path)
    maps = Path(f"/proc/{process.pid}/maps")
    while "jaxlib" not in maps.read_text():
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 143
    assert errors == "esper-jax: stopped while starting: nothing has changed\n"
    assert not (tmp_path / "r").exists()
