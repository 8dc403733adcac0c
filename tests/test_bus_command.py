"""``esper-jax bus``, as a user meets it."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import tyro
from redis_server import Server, needs_redis
from reports import report, rollback, seeds

from esper_jax.bus import RunEnded, Service, TransportError, decode, encode
from esper_jax.bus.connect import connect
from esper_jax.bus.messages import Layer
from esper_jax.commands import COMMANDS
from esper_jax.run.config import ConfigError
from esper_jax.run.folder import RunError

ROOT = pathlib.Path(__file__).parents[1]
LAYERS = {"layers/0": Layer(4, ("residual_mlp",)), "layers/1": Layer(2, ("glu",))}


def bus(*words: str) -> int:
    """``esper-jax bus ...``; returns the exit status."""
    command = tyro.extras.subcommand_cli_from_dict(dict(COMMANDS), args=["bus", *words])
    return command.act()


class Running:
    """A run that ticks by itself, in a thread: nothing is trained, all is refused."""

    def __init__(self, url: str) -> None:
        self.service = Service(LAYERS, connect(url, "abcdef"), patience=10)
        self.service.started(0, 0)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        tick = 0
        while not self._ends.is_set():
            tick += 1
            outside = self.service.asked(tick)
            stages = {n: refused(c.target) for n, c in outside.commands.items()}
            self.service.ticked(report(tick, stages))
            if self.service.stop_asked:
                self.service.stopped()
            time.sleep(0.02)
        self.service.ended(tick, 8 * tick, "its last tick is done")
        self.service.close()

    def end(self) -> None:
        self._ends.set()
        self._thread.join()


def refused(target: Any) -> Any:
    """What the tick did: each seed was asked in vain, for no slot is free."""
    asked = [int(t) for t in target]
    outcome = [0 if t < 0 else 5 for t in asked]
    return seeds(
        [0] * len(asked), source=[0] * len(asked), target=asked, outcome=outcome
    )


@pytest.fixture
def running(tmp_path: pathlib.Path) -> Iterator[str]:
    url = f"file:{tmp_path / 'bus'}"
    run = Running(url)
    yield url
    run.end()


def test_send_waits_for_the_answer_and_exits_with_what_became_of_it(
    running: str, capsys: Any, tmp_path: pathlib.Path
) -> None:
    assert bus("send", running, "disable") == 0
    out = capsys.readouterr().out
    assert out.startswith("OK: what the policy asks to germinate is not heard from ")
    seed = ["--layer", "layers/0", "--seed", "3"]
    assert bus("send", running, "germinate", *seed) == 1
    err = capsys.readouterr().err
    assert err.startswith(
        "NO_CAPACITY: seed 3 stays in DORMANT: no slot is free (tick "
    )
    assert bus("send", running, "move", *seed, "--stage", "culledd") == 1
    assert capsys.readouterr().err.startswith(
        "INVALID: stage: there is no stage 'CULLEDD'; expected one of DORMANT"
    )
    assert bus("send", running, "set-strategy", *seed, "--strategy", "momentum") == 0
    assert "its strategy is MOMENTUM now" in capsys.readouterr().out
    file = tmp_path / "batch.json"
    kinds = [{"kind": "Germinate", "layer": "layers/1", "seed": n} for n in (0, 1)]
    file.write_text(json.dumps(kinds))
    assert bus("send", running, "batch", str(file)) == 1
    assert "so all of the batch is refused" in capsys.readouterr().err
    for _ in range(2):  # carried out once, and answered each time
        assert bus("send", running, "--id", "again", "enable") == 0
        capsys.readouterr()
    assert bus("send", running, "stop") == 0
    assert capsys.readouterr().out.startswith("OK: the run ended after tick ")
    lines = (tmp_path / "bus" / "out.jsonl").read_bytes().splitlines()
    assert all(decode(line) for line in lines)


def test_what_cannot_be_sent_is_one_line(tmp_path: pathlib.Path, capsys: Any) -> None:
    nobody = tmp_path / "nobody"
    nobody.mkdir()
    with pytest.raises(
        RunError, match=r"no answer within 0.05 seconds: .*--id a1 before"
    ):
        bus("send", f"file:{nobody}", "--wait", "0.05", "--id", "a1", "stop")
    assert bus("send", f"file:{nobody}", "--wait", "0", "--id", "a2", "stop") == 0
    assert capsys.readouterr().out == "sent: a2\n"
    sent = (nobody / "in.jsonl").read_bytes().splitlines()
    assert [decode(line).id for line in sent] == ["a1", "a2"]
    large = tmp_path / "large.json"
    kind = {"kind": "Germinate", "layer": "l" * 200, "blueprint": "b" * 200}
    large.write_text(json.dumps([kind | {"seed": n} for n in range(5000)]))
    for words, error, said in [
        (["watch", "http://u:secret@h"], ConfigError, "--serve, redis://HOST"),
        (["watch", f"file:{nobody}x"], RunError, "the bus: there is no folder"),
        (["send", "redis://:secret@127.0.0.1:1", "stop"], RunError, "Error 111 conn"),
        (["replay", f"{nobody}"], RunError, "holds no run"),
        (
            ["send", f"file:{nobody}", "batch", f"{nobody}/no"],
            ConfigError,
            "batch .*/no: expected a JSON list of commands .No such file",
        ),
        (
            ["send", f"file:{nobody}", "germinate", "--layer", "", "--seed", "1"],
            ConfigError,
            "--layer: Expected `str` of length >= 1",
        ),
        (
            ["send", f"file:{nobody}", "--id", "x" * 201, "stop"],
            ConfigError,
            "--id: expected 1 to 200 characters, got 201",
        ),
        (
            ["send", f"file:{nobody}", "batch", f"{large}"],
            ConfigError,
            "the command has .* bytes: expected at most 1048576; send it in parts",
        ),
    ]:
        with pytest.raises(error, match=said) as caught:
            bus(*words)
        assert "secret" not in str(caught.value)


class Broken:
    """A connection that breaks, or a run that ends, while an answer is waited for."""

    def __init__(self, says: Any) -> None:
        self.says = says

    def send(self, data: bytes) -> None:
        pass

    def receive(self, patience: float) -> list[bytes]:
        if isinstance(self.says, Exception):
            raise self.says
        return [encode(self.says, "test")]

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("says", "said"),
    [
        (TransportError("Connection closed by server."), "Connection closed by server"),
        (RunEnded(tick=9, step=9, reason="done"), r"the run ended meanwhile \(done\)"),
    ],
)
def test_who_does_not_know_what_became_of_a_command_is_told_its_id(
    says: Any, said: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("esper_jax.bus.connect.client", lambda *_: Broken(says))
    with pytest.raises(RunError, match=f"{said}.*with --id a7 before its name"):
        bus("send", "file:x", "--id", "a7", "stop")


def test_watch_prints_lines_and_ends_with_the_run(
    tmp_path: pathlib.Path, capsys: Any
) -> None:
    url = f"file:{tmp_path / 'bus'}"
    service = Service(LAYERS, connect(url, "abcdef"))
    service.started(0, 0)
    service.ticked(report(1, {"layers/0": [0, 2, 2, 7], "layers/1": [0, 0]}))
    service.undone(rollback(1))
    service.ended(1, 8, "a command stopped it\x1b[2J")
    service.close()
    assert bus("watch", url) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "the run begins after tick 0"
    assert (
        "tick 1, step 8: train loss 0.75, held-out loss 1.5, accuracy 0.625; "
        "3 dormant, 2 training, 1 fossil"
    ) in lines
    assert any(line.startswith("rollback 1, from tick 3 to 2: ") for line in lines)
    assert lines[-1] == "the run ends: a command stopped it?[2J"  # no control codes
    assert bus("watch", url, "--json") == 0
    raw = capsys.readouterr().out.encode().splitlines()
    assert raw == (tmp_path / "bus" / "out.jsonl").read_bytes().splitlines()


@needs_redis
@pytest.mark.skipif(shutil.which("tmux") is None, reason="there is no tmux")
def test_watch_draws_a_table_in_a_terminal(tmp_path: pathlib.Path) -> None:
    server = Server(tmp_path).start()
    run = Running(server.url)
    tmux = ["tmux", "-L", f"esper-{os.getpid()}", "-f", "/dev/null"]
    command = (
        f"{sys.executable} -m esper_jax bus watch {server.url}; echo status $?; cat"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def screen() -> str:
        return subprocess.run(
            [*tmux, "capture-pane", "-p"], capture_output=True, text=True, check=True
        ).stdout

    def shows(*words: str) -> str:
        until = time.monotonic() + 60
        while not all(word in (seen := screen()) for word in words):
            assert time.monotonic() < until, seen
            time.sleep(0.05)
        return seen

    size = ["-x", "80", "-y", "24"]
    subprocess.run(
        [*tmux, "new-session", "-d", *size, command], env=environment, check=True
    )
    try:
        seen = shows("layer ", "layers/0  4 dormant", "layers/1  2 dormant")
        assert "train loss 0.75" in seen
        server.kill()
        shows("the connection is lost (")
        server.start()
        shows("the connection is there again")
        run.end()
        seen = shows("the run ends: its last tick is done", "status 0")
        assert all(len(line) <= 80 for line in seen.splitlines())
    finally:
        run.end()
        subprocess.run([*tmux, "kill-server"], check=False)
        server.kill()
