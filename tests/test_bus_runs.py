"""Runs on disk that are steered from outside: record, replay, resume, files."""

import contextlib
import json
import pathlib
import shutil
import socket
import threading
import time
from typing import Any

import pytest
from rich.console import Console

from esper_jax.bus import (
    Acknowledged,
    Batch,
    Decided,
    Enable,
    Germinate,
    LayerSeen,
    Move,
    RunEnded,
    RunStarted,
    SetStrategy,
    StopAndSave,
    TickReported,
    TickSeen,
    decode,
    encode,
    read_record,
)
from esper_jax.bus.socket_client import SOCKET, ServedClient
from esper_jax.bus.transport import TransportError
from esper_jax.run import run
from esper_jax.run.config import ConfigError, load_config
from esper_jax.run.folder import RunError, RunFolder, read_lines
from esper_jax.run.run import StoppedByCommand, train_run

SMOKE = pathlib.Path(__file__).parents[1] / "configs" / "smoke.toml"
L = "layers/0"
QUIET = Console(quiet=True)


def config(**more: Any) -> Any:
    keys = {"train.ticks": 12, "checkpoint.every": 4, "monitor.writers": "[]"} | more
    return load_config(SMOKE, [f"{key}={value}" for key, value in keys.items()])


def trained(out: pathlib.Path, **options: Any) -> dict[str, Any]:
    return train_run(config(), out, console=QUIET, **options)


SCRIPT = [
    (2, "a", Germinate(layer=L, seed=1, strategy="momentum")),
    (3, "b", Move(layer=L, seed=0, stage="FOSSILIZED")),
    (4, "c", SetStrategy(layer=L, seed=2, strategy="drift_controlled")),
    (5, "d", Enable(on=False)),
    (
        6,
        "e",
        Batch(
            commands=[
                Move(layer=L, seed=1, stage="CANCELLED"),
                Germinate(layer=L, seed=3),
            ]
        ),
    ),
    (7, "f", Batch(commands=[Germinate(layer=L, seed=2), Germinate(layer=L, seed=3)])),
    (9, "g", StopAndSave()),
    (11, "h", Germinate(layer=L, seed=0)),
]


@pytest.fixture(scope="module", autouse=True)
def _one_program() -> Any:
    """All runs here have one program, which is built and compiled once."""
    made = run._built(config(), None, run.build_run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_built", lambda config, devices, build: made)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Any:
    return tmp_path_factory.mktemp("steered")


@pytest.fixture(scope="module")
def script(folder: Any) -> Any:
    path = folder / "script.jsonl"
    lines = [
        {"tick": tick, "id": id, "command": json.loads(encode(c, "", id))["data"]}
        for tick, id, c in SCRIPT
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def steered(folder: Any, script: Any) -> Any:
    """A run that carries out the script, and its summary."""
    return folder / "steered", trained(folder / "steered", replay=script)


@pytest.fixture(scope="module")
def plain(folder: Any) -> Any:
    return trained(folder / "plain")


def test_the_record_says_when_what_was_done(steered: Any) -> None:
    out, _ = steered
    done = {d.id: d for d in read_record(RunFolder(out).commands)}
    assert list(done) == ["a", "b", "c", "d", "e", "f", "h"]  # nothing stops a replay
    assert {id: d.tick for id, d in done.items()} == {
        id: tick for tick, id, _ in SCRIPT if id != "g"
    }
    outcomes = {id: d.answer.outcome for id, d in done.items()}
    assert outcomes == {
        "a": "OK",
        "b": "ILLEGAL",
        "c": "OK",
        "d": "OK",
        "e": "OK",
        "f": "ILLEGAL",
        "h": done["h"].answer.outcome,
    }
    events = read_lines(RunFolder(out).events)
    told = {e["command"]: e for e in events if "command" in e}
    assert told.keys() == done.keys()
    assert told["a"]["text"] == "seed 1: DORMANT -> GERMINATED, asked from outside"
    assert told["c"]["text"] == (
        "command SetStrategy: seed 2: its strategy is DRIFT_CONTROLLED now"
    )
    assert told["d"]["text"].startswith("command Enable: what the policy asks to germ")


def test_the_same_commands_at_the_same_ticks_give_the_same_state(
    steered: Any, plain: Any, folder: Any
) -> None:
    out, summary = steered
    again = trained(folder / "again", replay=RunFolder(out).commands)
    assert again["state_hash"] == summary["state_hash"] != plain["state_hash"]
    texts = [[e["text"] for e in s["events"]] for s in (summary, again)]
    assert texts[0] == texts[1]


def test_a_run_that_goes_back_to_a_checkpoint_carries_them_out_again(
    steered: Any, folder: Any
) -> None:
    """Without a bus: what was acknowledged stays done."""
    out, summary = steered
    copy = shutil.copytree(out, folder / "resumed")
    steps = sorted((copy / "checkpoints").iterdir(), key=lambda path: int(path.name))
    assert len(steps) == 3
    for step in steps[1:]:
        shutil.rmtree(step)
    (copy / "summary.json").unlink()
    record = RunFolder(copy).commands
    before = record.read_bytes()
    with record.open("ab") as file:
        file.write(b'{"tick": 12, "id": "half')
    again = trained(copy, resume=True)
    assert again["state_hash"] == summary["state_hash"]
    assert record.read_bytes() == before  # each command stands there once
    texts = [[e["text"] for e in s["events"]] for s in (summary, again)]
    assert texts[0] == texts[1]


def test_a_bus_that_is_silent_changes_nothing(plain: Any, folder: Any) -> None:
    bus = folder / "silent"
    summary = trained(folder / "on_the_bus", bus=f"file:{bus}")
    assert summary["state_hash"] == plain["state_hash"]
    said = [decode(line) for line in (bus / "out.jsonl").read_bytes().splitlines()]
    kinds = [type(e.message).__name__ for e in said]
    assert (kinds[0], kinds.count("TickReported")) == ("RunStarted", 12)
    assert {e.source.split("/")[0] for e in said} == {"esper_jax"}
    [end] = [e.message for e in said if isinstance(e.message, RunEnded)]
    assert (end.tick, end.reason) == (12, "its last tick is done")
    assert len({e.id for e in said}) == len(said)
    assert not (folder / "on_the_bus" / "commands.jsonl").exists()
    assert not (folder / "on_the_bus" / "bus.unsent.jsonl").exists()


def answers(bus: pathlib.Path) -> list[Any]:
    said = [decode(line) for line in (bus / "out.jsonl").read_bytes().splitlines()]
    return [e.message for e in said if isinstance(e.message, Acknowledged)]


def test_a_command_stops_the_run_saved_and_it_goes_on(plain: Any, folder: Any) -> None:
    bus, out = folder / "stops", folder / "stopped"
    bus.mkdir()
    sent = bus / "in.jsonl"
    stop = encode(StopAndSave(), "test", "stop")
    wrong = encode(Germinate(layer="layer", seed=0), "test", "wrong")
    sent.write_bytes(b"no message\n" + wrong + b"\n" + stop + b"\n" + stop + b"\n")
    with pytest.raises(StoppedByCommand, match=r"after tick 1; --resume --out"):
        trained(out, bus=f"file:{bus}")
    told = {a.command: a for a in answers(bus)}
    assert told.keys() == {"stop", "wrong"}
    assert len(answers(bus)) == 2
    assert told["wrong"].reason.startswith("layer: there is no layer 'layer'")
    assert (bus / "in.settled").read_text() == f"{sent.stat().st_size}\n"
    [dead] = (bus / "dead.jsonl").read_bytes().splitlines()
    assert json.loads(dead)["begins"] == "no message"
    # It is known when it comes again, and what was answered is not read again.
    summary = trained(out, resume=True, bus=f"file:{bus}")
    assert summary["state_hash"] == plain["state_hash"]
    assert len(answers(bus)) == 2
    said = [decode(line) for line in (bus / "out.jsonl").read_bytes().splitlines()]
    starts = [e.message.tick for e in said if isinstance(e.message, RunStarted)]
    assert starts == [0, told["stop"].tick]
    ticks = [e.message.tick for e in said if isinstance(e.message, TickReported)]
    assert ticks == [*range(1, 13)]


def test_a_run_serves_who_comes_over_a_socket(plain: Any, folder: Any) -> None:
    out, said = folder / "served", []

    def guest() -> None:
        until = time.monotonic() + 60
        while not (out / SOCKET).exists():
            assert time.monotonic() < until
            time.sleep(0.001)
        reader = ServedClient(out, last=None)
        reader.send(encode(StopAndSave(), "test", "stop"))
        with contextlib.suppress(TransportError):
            while True:
                said.extend(reader.receive(30))

    for again in (False, True):
        if again:
            said.clear()
            left = socket.socket(socket.AF_UNIX)  # as a run that was killed leaves it
            left.bind(str(out / SOCKET))
            left.close()
            assert (
                trained(out, resume=True, serve=True)["state_hash"]
                == (plain["state_hash"])
            )
        else:
            thread = threading.Thread(target=guest)
            thread.start()
            with pytest.raises(StoppedByCommand):
                trained(out, serve=True)
            thread.join()
            kinds = [type(decode(line).message) for line in said]
            assert (kinds[0], kinds[-1]) == (RunStarted, RunEnded)
            [answer] = [
                m
                for m in (decode(line).message for line in said)
                if isinstance(m, Acknowledged)
            ]
            assert (answer.command, answer.outcome) == ("stop", "OK")
        assert not (out / SOCKET).exists()
        assert not RunFolder(out).spill.exists()


def test_what_cannot_be_replayed_is_refused_before_anything_is_written(
    folder: Any, script: Any
) -> None:
    out = folder / "refused"
    bad = folder / "bad.jsonl"
    for text, said in [
        (None, "it is not there"),
        ("", "it holds none"),
        ("{}\n", r"bad.jsonl, line 1: expected a command .*\(no 'tick'\)"),
        ('{"tick": -1, "id": "a", "command": {}}\n', "whole numbers"),
        (
            '{"tick": 1, "id": "a", "command": {"kind": "Fly"}}\n',
            "there is no command 'Fly'",
        ),
    ]:
        bad.unlink(missing_ok=True)
        if text is not None:
            bad.write_text(text)
        with pytest.raises(ConfigError, match=said):
            trained(out, replay=bad)
        assert not out.exists()
    with pytest.raises(ConfigError, match="--bus: expected redis://HOST"):
        trained(out, bus="http://user:secret@host/0")
    with pytest.raises(ConfigError, match="--bus: expected") as caught:
        trained(out, bus="amqp://user:secret@host/0")
    assert "secret" not in str(caught.value)
    assert not out.exists()


def test_a_replay_that_was_killed_goes_on(
    steered: Any, script: Any, folder: Any
) -> None:
    """Also with the commands that were still to come."""
    out = folder / "killed"
    stop = folder / "stop.jsonl"
    lines = script.read_text().splitlines()
    stop.write_text("".join(line + "\n" for line in lines if '"g"' not in line))
    bus = folder / "killer"
    bus.mkdir()
    (bus / "in.jsonl").write_bytes(encode(StopAndSave(), "test", "kill") + b"\n")
    with pytest.raises(StoppedByCommand):
        trained(out, replay=stop, bus=f"file:{bus}")
    stop.unlink()
    assert trained(out, resume=True)["state_hash"] == steered[1]["state_hash"]
    twice = folder / "twice.jsonl"
    twice.write_text("\n".join([*lines, lines[0], ""]))
    with pytest.raises(ConfigError, match=r"an id of its own .*'a' stands 2 times"):
        trained(folder / "refused", replay=twice)
    assert not (folder / "refused").exists()


def test_the_end_is_told_whatever_it_is(folder: Any, monkeypatch: Any) -> None:
    bus, out = folder / "fails", folder / "failed"

    def full(*args: Any) -> None:
        raise RunError("no space is left")

    with monkeypatch.context() as patch:
        patch.setattr(run.Session, "save", full)
        with pytest.raises(RunError, match="no space"):
            trained(out, bus=f"file:{bus}")
    said = [decode(line) for line in (bus / "out.jsonl").read_bytes().splitlines()]
    assert said[-1].message == RunEnded(
        tick=4, step=said[-1].message.step, reason="it failed: RunError"
    )
    assert said[-1].message.step == 4 * 8


def test_a_stop_at_the_last_tick_stops_nothing(plain: Any, folder: Any) -> None:
    bus, out = folder / "late", folder / "late_run"
    original = run._Reporter._write

    def write(self: Any, report: Any, *rest: Any) -> None:
        original(self, report, *rest)
        if int(report.tick) == 11:
            data = encode(StopAndSave(), "test", "stop")
            (bus / "in.jsonl").write_bytes(data + b"\n")
            until = time.monotonic() + 20
            while self._steering._service._inbox._queue.empty():
                assert time.monotonic() < until
                time.sleep(0.005)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run._Reporter, "_write", write)
        assert trained(out, bus=f"file:{bus}")["state_hash"] == plain["state_hash"]
    [answer] = answers(bus)
    assert (answer.command, answer.tick, answer.outcome) == ("stop", 12, "OK")


def test_commands_whose_ticks_do_not_come_are_told_of(folder: Any, caplog: Any) -> None:
    path = folder / "never.jsonl"
    command = {"kind": "Enable", "on": False}
    never = [{"tick": 99}, {"tick": 3, "rollbacks": 1}]
    lines = [{**at, "id": f"n{n}", "command": command} for n, at in enumerate(never)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trained(folder / "never", replay=path)
    [said] = [
        r.getMessage() for r in caplog.records if "did not come" in r.getMessage()
    ]
    assert said == (
        "2 commands were to be carried out at ticks that did not come (n0, n1)"
    )


def test_a_damaged_record_is_named(steered: Any, folder: Any) -> None:
    copy = shutil.copytree(steered[0], folder / "damaged")
    with RunFolder(copy).commands.open("ab") as file:
        file.write(b"{}\n")
    with pytest.raises(RunError, match=r"commands.jsonl, line 8: expected a command"):
        trained(copy, resume=True)


def test_a_run_says_which_policy_decides_and_replays(plain: Any, folder: Any) -> None:
    bus, out = folder / "remote", folder / "remote_run"
    bus.mkdir()
    asks = Decided(seen=0, ticks=9, commands=[Germinate(layer=L, seed=2)])
    (bus / "in.jsonl").write_bytes(encode(asks, "test", "first") + b"\n")
    url = f"file:{bus}"
    with pytest.raises(
        ConfigError, match="--remote: expected --bus URL or --serve with"
    ):
        trained(out, remote=3)
    with pytest.raises(ConfigError, match="--remote: expected at least 1 tick, got 0"):
        trained(out, bus=url, remote=0)
    assert not out.exists()
    summary = trained(out, bus=url, remote=9)
    said = [decode(line) for line in (bus / "out.jsonl").read_bytes().splitlines()]
    kinds = [type(e.message) for e in said]
    assert kinds.count(LayerSeen) == kinds.count(TickSeen) == 12
    events = read_lines(RunFolder(out).events)
    assert [(e["tick"], e["text"]) for e in events if "policy" in e["text"]] == [
        (1, "the remote policy decides"),
        (
            10,
            "its own policy decides, since no decision of the remote one came in time",
        ),
    ]
    again = trained(folder / "remote_again", replay=RunFolder(out).commands)
    assert again["state_hash"] == summary["state_hash"] != plain["state_hash"]
    texts = [[e["text"] for e in s["events"]] for s in (summary, again)]
    assert texts[0] == texts[1]
    # Without bus and remote policy, from the checkpoints of ticks 8 and 4.
    for last in (8, 4):
        steps = sorted((out / "checkpoints").iterdir(), key=lambda p: int(p.name))
        for step in steps[last // 4 :]:
            shutil.rmtree(step)
        (out / "summary.json").unlink()
        resumed = trained(out, resume=True)
        assert resumed["state_hash"] == summary["state_hash"]
        assert [e["text"] for e in resumed["events"]] == texts[0]
