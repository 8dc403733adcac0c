"""A run in a process of its own that is killed while it is steered over Redis."""

import collections
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import pytest
from redis_server import Server, needs_redis

from esper_jax.bus import Acknowledged, Germinate, Move, SetStrategy, decode, encode
from esper_jax.bus.redis_streams import RedisClient
from esper_jax.bus.transport import TransportError
from esper_jax.bus.watch import answer_to
from esper_jax.run.folder import RunFolder

ROOT = pathlib.Path(__file__).parents[1]
L = "layers/0"
SETTINGS = ["train.ticks=600", "checkpoint.every=50", "monitor.writers=[]"]


def command(*words: Any) -> list[str]:
    train = ["train", str(ROOT / "configs" / "smoke.toml"), "--set", *SETTINGS]
    return [sys.executable, "-m", "esper_jax", *train, *map(str, words)]


def kind(number: int) -> Any:
    seed = number % 4
    return [
        Germinate(layer=L, seed=seed),
        Move(layer=L, seed=seed, stage="CANCELLED"),
        SetStrategy(layer=L, seed=seed, strategy="momentum"),
    ][number % 3]


def client(url: str) -> RedisClient:
    """When the run has told something."""
    until = time.monotonic() + 120
    while True:
        try:
            return RedisClient(url)
        except TransportError:
            assert time.monotonic() < until
            time.sleep(0.1)


@needs_redis
@pytest.mark.slow
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path: pathlib.Path) -> None:
    """Each command is carried out once; a replay of the record gives the same state."""
    server = Server(tmp_path).start()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = tmp_path / "run"
    with subprocess.Popen(
        command("--out", out, "--bus", server.url),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as run:
        sender = client(server.url)
        for number in range(30):
            sender.send(encode(kind(number), "test", f"c{number}"))
            assert answer_to(sender, f"c{number}", 120)
        run.kill()
    for number in range(25, 40):  # some come again, and some are new
        sender.send(encode(kind(number), "test", f"c{number}"))
    for words in (
        ("--out", out, "--resume", "--bus", server.url),
        ("--out", tmp_path / "replayed", "--replay", RunFolder(out).commands),
    ):
        subprocess.run(command(*words), env=environment, check=True, timeout=300)
    summaries = [
        json.loads(RunFolder(folder).summary.read_text())
        for folder in (out, tmp_path / "replayed")
    ]
    assert summaries[0]["state_hash"] == summaries[1]["state_hash"]
    texts = [[event["text"] for event in s["events"]] for s in summaries]
    assert texts[0] == texts[1]
    lines = RunFolder(out).commands.read_text().splitlines()
    done = [json.loads(line)["id"] for line in lines]
    assert sorted(done) == sorted(f"c{number}" for number in range(40))
    reader, said = RedisClient(server.url, last=None), []
    while more := reader.receive(0.01):
        said += [decode(data).message for data in more]
    answers = collections.Counter(
        m.command for m in said if isinstance(m, Acknowledged)
    )
    assert answers == {
        f"c{number}": 2 if 25 <= number < 30 else 1 for number in range(40)
    }
    server.kill()
