"""Writers in a run: chosen by its config, and never in its way."""

import dataclasses
import gzip
import io
import json
import re
import socket
import subprocess
import sys
import threading
import types
import urllib.request
from pathlib import Path

import jax
import pytest
from reports import rollback
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from esper_jax.monitor import SERIES
from esper_jax.run import monitoring, run
from esper_jax.run.config import ConfigError, load_config, parse_config, to_dict
from esper_jax.run.folder import RunFolder, read_lines
from esper_jax.run.run import evaluate_run, train_run

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "configs" / "smoke.toml"
ALL = '["jsonl", "tensorboard", "prometheus"]'


def config(ticks, *overrides):
    return load_config(SMOKE, [f"train.ticks={ticks}", *overrides])


def quiet():
    return Console(file=io.StringIO(), width=80)


@pytest.fixture(scope="module", autouse=True)
def one_program():
    """All runs here train one program, compiled once."""
    build, made = run.build_run, {}

    def build_run(config, data, axis_name=None):
        table = dict(to_dict(config), train=0, monitor=0, checkpoint=0)
        key = repr(table)
        if key not in made:
            made[key] = build(config, data)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "build_run", build_run)
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without writers."""
    out = tmp_path_factory.mktemp("plain") / "run"
    return out, train_run(config(6, "monitor.writers=[]"), out, console=quiet())


def test_a_run_with_all_writers_is_the_same_run(plain, tmp_path, monkeypatch):
    out, scraped = tmp_path / "run", []
    console = quiet()
    add = run.Monitor.write

    def scraping(self, report, events):
        told = re.search(r"metrics are at (\S+)", console.file.getvalue())
        with urllib.request.urlopen(told[1], timeout=10) as answer:
            scraped.append(answer.read().decode())
        return add(self, report, events)

    monkeypatch.setattr(run.Monitor, "write", scraping)
    chosen = config(4, f"monitor.writers={ALL}", "monitor.port=0")
    train_run(chosen, out, console=console)
    # It goes on with other writers than it began with.
    monkeypatch.undo()
    chosen = config(6, 'monitor.writers=["tensorboard", "jsonl"]')
    summary = train_run(chosen, out, resume=True, console=quiet())
    assert summary == plain[1]
    assert not (plain[0] / "metrics.jsonl").exists()
    assert "esper_ticks_total" in scraped[-1]
    folder = RunFolder(out)
    lines = read_lines(folder.metrics, {"tick": int, "step": int})
    assert [line["tick"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {s.name for s in SERIES} <= set(lines[-1])
    ticks = read_lines(folder.ticks)
    names = {"loss": "esper_held_out_loss", "accuracy": "esper_held_out_accuracy"}
    for ours, theirs in names.items():
        assert [line[theirs] for line in lines] == [tick[ours] for tick in ticks]
    assert [e for line in lines for e in line["events"]] == read_lines(folder.events)
    board = EventAccumulator(str(folder.tensorboard)).Reload()
    told = [(e.step, e.value) for e in board.Scalars("esper_ticks_total")]
    assert told == [(8 * tick, tick) for tick in range(1, 7)]
    changed = json.loads(folder.config.read_text())["monitor"]["writers"]
    assert changed == ["tensorboard", "jsonl"]
    assert not json.loads(folder.record.read_text())["changes"]


class Hostile:
    """Raises at first, then waits for ever: until the test is over."""

    over = threading.Event()

    def write(self, record):
        if record.tick > 2:
            self.over.wait()
        raise OSError(28, "No space left on device")

    def close(self):
        pass


def test_a_hostile_writer_changes_nothing_but_the_account(
    plain, tmp_path, monkeypatch, caplog
):
    opened, made = monitoring._opened, []

    def hostile(name, *more):
        made.append(Hostile() if name == "jsonl" else opened(name, *more))
        return made[-1]

    monkeypatch.setattr(monitoring, "_opened", hostile)
    monkeypatch.setattr(monitoring, "PATIENCE", 0.2)
    chosen = config(6, 'monitor.writers=["jsonl", "tensorboard"]')
    summary = train_run(chosen, tmp_path / "run", console=quiet())
    lost = summary.pop("monitor_lost")
    assert summary == plain[1]
    error = "OSError: [Errno 28] No space left on device"
    assert lost == {"Hostile": {"records": 6, "given": 6, "error": error}}
    written = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert written["monitor_lost"] == lost
    Hostile.over.set()
    told = [m for m in caplog.messages if "Hostile" in m]
    assert told == [
        f"the writer Hostile lost 6 of 6 records ({error}); training was not affected"
    ]


def test_a_rollback_right_after_a_resume_stands_where_the_run_went_on(tmp_path):
    session = types.SimpleNamespace(
        config=config(2), folder=RunFolder(tmp_path), program=types.SimpleNamespace()
    )
    session.program.gates = session.config.lifecycle
    monitor, _ = monitoring.open_monitor(session, types.SimpleNamespace(step=16))
    with monitor:
        monitor.write_rollback(rollback(1))
    [line] = map(json.loads, session.folder.metrics.read_text().splitlines())
    assert (line["tick"], line["step"]) == (2, 16)


def test_a_writer_that_cannot_begin_is_named(tmp_path):
    out = tmp_path / "run"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        chosen = config(2, 'monitor.writers=["prometheus"]', f"monitor.port={port}")
        with pytest.raises(ConfigError, match=rf"monitor.port.*{port}.*in use"):
            train_run(chosen, out, console=quiet())
    chosen = config(2, 'monitor.writers=["prometheus"]', "monitor.address=10.255.1.2")
    with pytest.raises(ConfigError, match=r"monitor.*10.255.1.2.*annot assign"):
        train_run(chosen, out, console=quiet())
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "module", "install"),
    [
        ("tensorboard", "tensorboardX", r"esper-jax\[tensorboard\]"),
        ("prometheus", "prometheus_client", r"esper-jax\[prometheus\]"),
        ("wandb", "wandb", "wandb"),
    ],
)
def test_an_extra_that_is_missing_is_named_before_anything_is_written(
    name, module, install, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, module, None)
    chosen = config(2, f'monitor.writers=["{name}"]')
    with pytest.raises(ConfigError, match=rf"{name}' needs {module}.*'{install}'"):
        train_run(chosen, tmp_path / "run", console=quiet())
    assert not list(tmp_path.iterdir())


def test_a_run_can_be_read_where_its_writers_are_not_installed(
    plain, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    subprocess.run(["cp", "-r", plain[0], out], check=True)
    table = json.loads((out / "config.json").read_text())
    table["monitor"]["writers"] = ["tensorboard"]
    (out / "config.json").write_text(json.dumps(table))
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert evaluate_run(out)["step"] == 48


def test_a_config_from_before_there_were_writers_is_that_of_today():
    fixture = ROOT / "tests" / "fixtures" / "run_v0.1_smoke" / "config.json"
    old = parse_config(json.loads(fixture.read_text()))
    assert "monitor" not in json.loads(fixture.read_text())
    assert old.monitor.writers == ("jsonl",)
    assert dataclasses.replace(old, monitor=old.monitor) == old


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ('writers=["jsonl", "csv"]', r"writers\[1\] must be one of jsonl, tens.*'csv'"),
        ('writers=["jsonl", "jsonl"]', r"writers\[1\] must not repeat.*'jsonl'"),
        ("writers=jsonl", r"writers: expected a list of str, got 'jsonl'"),
        ("port=65536", r"port must be from 1 to 65535, or 0 .*got 65536"),
        ("port=-1", r"port must be from 1 to 65535.*got -1"),
        ("address=", r"address must be a name without spaces around it, got ''"),
        ("project=' x'", r"project must be a name without spaces.*got ' x'"),
        ("prot=1", r"prot: unknown key; expected one of writers, port, address"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(override, said):
    with pytest.raises(ConfigError, match=rf"^monitor\.{said}"):
        config(2, f"monitor.{override}")


def steps_of(folder):
    """The steps that a trace holds, as Perfetto reads it."""
    [path] = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return {int(e["args"]["step_num"]) for e in events if e.get("name") == "step"}


def test_a_profile_holds_the_steps_that_were_asked_for(plain, tmp_path):
    out = tmp_path / "run"
    chosen = config(6, "monitor.writers=[]")
    summary = train_run(chosen, out, profile=10, console=quiet())
    assert summary == plain[1]  # the same state, and nothing was compiled again
    assert steps_of(out / "profile") == {*range(10)}
    [trace] = (out / "profile").rglob("*.xplane.pb")
    content = trace.read_bytes()
    for scope in (b"esper/blend", b"esper/banks", b"esper/lifecycle"):
        assert scope in content


def test_a_profile_that_does_not_come_about_is_told_of(tmp_path, caplog, monkeypatch):
    train_run(config(1), tmp_path / "short", profile=3, console=quiet())
    assert "--profile: 0 of 3 steps were recorded" in caplog.text
    assert not (tmp_path / "short" / "profile").exists()
    caplog.clear()
    jax.profiler.start_trace(tmp_path / "mine")  # a program may have only one
    summary = train_run(config(2), tmp_path / "taken", profile=3, console=quiet())
    jax.profiler.stop_trace()
    assert "--profile: nothing is recorded: " in caplog.text
    assert summary["recompiles"] == 0
    with pytest.raises(ConfigError, match="--profile: expected at least 1 step, got -"):
        train_run(config(2), tmp_path / "none", profile=-1, console=quiet())
    assert not (tmp_path / "none").exists()
