"""The bus of a run of two processes: what comes to the first is heard by both."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
from typing import Any

import pytest
from test_own_things import HERE, TRAIN, both

from esper_jax.bus import (
    Acknowledged,
    Enable,
    Germinate,
    Move,
    RunEnded,
    SetStrategy,
    StopAndSave,
    TickReported,
    decode,
    encode,
    read_record,
)
from esper_jax.bus import inbox as inboxes
from esper_jax.bus.inbox import Inbox
from esper_jax.bus.transport import Delivery
from esper_jax.checkpoint import Checkpointer
from esper_jax.run.folder import RunFolder, read_lines

CONFIG = f"""
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


def said(bus: pathlib.Path, kind: Any) -> list[Any]:
    told = [
        decode(line).message for line in (bus / "out.jsonl").read_bytes().splitlines()
    ]
    return [message for message in told if isinstance(message, kind)]


def send(bus: pathlib.Path, *commands: Any) -> None:
    with (bus / "in.jsonl").open("ab") as file:
        for number, command in enumerate(commands):
            id = f"{type(command).__name__}{number}"
            file.write(encode(command, "test", id) + b"\n")


PROGRAM = """
import json, pathlib, sys
from esper_jax.run.devices import join
port, index = sys.argv[1:3]
join(f"localhost:{port}", 2, int(index))
import jax
from esper_jax.bus import Service
from esper_jax.bus.lines import Lines
from esper_jax.bus.messages import Layer
transport = Lines(pathlib.Path("bus")) if index == "0" else None
heard = []
with Service({"a": Layer(2, ("b",))}, transport) as service:
    service.share()
    for tick in (1, 2):
        asked = service.asked(tick)
        heard.append([asked.commands["a"].target.tolist(), bool(asked.germination)])
print(json.dumps(heard))
"""


def test_two_services_hear_what_comes_to_the_first(tmp_path: pathlib.Path) -> None:
    (tmp_path / "bus").mkdir()
    (tmp_path / "bus" / "in.jsonl").write_bytes(b"no message\n")
    move = Move(layer="a", seed=1, stage="CULLED")
    send(tmp_path / "bus", Enable(on=False), move, move, StopAndSave())
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    flags = os.environ["XLA_FLAGS"].replace("device_count=4", "device_count=1")
    sides = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, port, str(index)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(HERE.parent), "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    found = [side.communicate(timeout=120)[0].splitlines()[-1] for side in sides]
    # No tick comes about here: the second Move waits behind the first.
    assert found[0] == found[1] == "[[[-1, 8], false], [[-1, 8], false]]"


@pytest.mark.slow
def test_two_processes_hear_the_same(tmp_path: pathlib.Path) -> None:
    """A state that differs between them could not be saved."""
    shutil.copy(HERE / "own_module.py", tmp_path)
    (tmp_path / "c.toml").write_text(CONFIG)
    bus = tmp_path / "bus"
    bus.mkdir()
    (bus / "in.jsonl").write_bytes(b"no message\n")
    send(
        bus,
        Enable(on=False),
        Germinate(layer="a", seed=1, strategy="momentum"),
        Germinate(layer="b", seed=1),
        StopAndSave(),
    )
    words = ("--out", "run", "--bus", f"file:{bus}")
    statuses, _, errors = both(tmp_path, *words)
    assert statuses == [3, 3], errors
    folder = RunFolder(tmp_path / "run")
    assert len(Checkpointer(folder.checkpoints).steps()) == 1
    assert {a.command: a.outcome for a in said(bus, Acknowledged)} == {
        "Enable0": "OK",
        "Germinate1": "OK",
        "Germinate2": "INVALID",
        "StopAndSave3": "OK",
    }
    assert [t.tick for t in said(bus, TickReported)] == [1]
    assert [e.reason for e in said(bus, RunEnded)] == ["a command stopped it"]
    moved = [e for e in read_lines(folder.events) if e["layer"] == "a"]
    assert [(e["seed"], e["to"], e["command"]) for e in moved] == [
        (1, "GERMINATED", "Germinate1")
    ]
    assert len((bus / "dead.jsonl").read_bytes().splitlines()) == 1


@pytest.mark.slow
def test_two_processes_go_on_and_one_replays_them(tmp_path: pathlib.Path) -> None:
    test_two_processes_hear_the_same(tmp_path)
    bus = tmp_path / "bus"
    with (bus / "in.jsonl").open("ab") as file:
        style = SetStrategy(layer="a", seed=0, strategy="momentum")
        file.write(encode(style, "test", "style") + b"\n")
    words = ("--resume", "--out", "run", "--bus", f"file:{bus}", "--remote", "2")
    statuses, _, errors = both(tmp_path, *words)
    assert statuses == [0, 0], errors
    folder = RunFolder(tmp_path / "run")
    done = read_record(folder.commands)
    assert [(d.id, d.tick) for d in done] == [
        ("Enable0", 1),
        ("Germinate1", 1),
        ("StopAndSave3", 1),
        ("style", 2),
    ]
    statuses, _, errors = both(
        tmp_path, "--out", "again", "--replay", "run/commands.jsonl"
    )
    assert statuses == [0, 0], errors
    hashes = [
        json.loads(RunFolder(tmp_path / name).summary.read_text())["state_hash"]
        for name in ("run", "again")
    ]
    assert hashes[0] == hashes[1]


def test_bytes_that_are_no_text_are_told_too(monkeypatch: Any) -> None:
    """They may stand in fields that nobody reads."""
    told: list[str] = []
    monkeypatch.setattr(inboxes, "exchange", lambda text: told.append(text) or told)
    data = encode(Enable(on=True), "test", "a")
    odd = [data, data[:-1] + b', "x": "\xff\xc3\xa4"}', b"garbage", data]
    taken = []
    for index in (0, 1):
        monkeypatch.setattr(inboxes.jax, "process_index", lambda index=index: index)
        inbox = Inbox()
        inbox.shared = True
        for number, one in enumerate(odd if index == 0 else []):
            inbox.put(Delivery(one, f"{number}"))
        taken.append(inbox.take(100))
    first, second = taken
    assert [d.token for d, _ in first.commands] in (["0", "1", "3"], ["0", "3"])
    assert [d.data for d, _ in second.commands] == [d.data for d, _ in first.commands]
    assert [e.message for _, e in second.commands] == [
        e.message for _, e in first.commands
    ]
    assert first.unreadable
    assert not second.unreadable
