"""Checkpoints of a program that runs in two processes (CPU, gloo)."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_parallel as single

from esper_jax.checkpoint.checkpointer import Checkpointer
from esper_jax.parallel.processes import exchange, together, whole
from esper_jax.train.loop import fit

HERE = Path(__file__).parent


def both(action, directory):
    """What the two processes print, as JSON; None for one that printed nothing."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    script = str(HERE / "two_processes.py")
    # One device each.
    flags = os.environ["XLA_FLAGS"].replace("device_count=4", "device_count=1")
    sides = [
        subprocess.Popen(
            [sys.executable, script, port, str(index), action, str(directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(HERE.parent), "XLA_FLAGS": flags},
        )
        for index in (0, 1)
    ]
    try:
        said = [side.communicate(timeout=120) for side in sides]
    finally:
        for side in sides:
            side.kill()
            side.wait()
    lines = [[x for x in out.splitlines() if x.startswith("{")] for out, _ in said]
    if not action.startswith("die"):
        assert [side.returncode for side in sides] == [0, 0], said
    return [json.loads(line[0]) if line else None for line in lines]


def test_two_processes_save_and_restore_the_same(tmp_path):
    first, second = both("life", tmp_path)
    assert first["hash"] == second["hash"]
    for side in (first, second):
        assert side["newest"] == [3, True]
        assert side["shardings"] == [True] * 4
        assert side["steps"] == [2, 3]
        assert side["fallback"] == [2, {"3": "manifest.json is missing"}]
        assert "leaf own of process 1 is not as process 0 has it" in side["differs"]
        assert "step: expected float32[2], found int" in side["wide"]
        assert "step 5 could not be saved" in side["failed"]
        assert "is being written to" in side["locked"]
    assert first["config"].startswith("process 1: config must be JSON")
    assert second["failed"].startswith("process 0: ")
    # What is on disk is the state of the whole, and one process alone can read it.
    rows = np.arange(12, dtype=np.float32).reshape(4, 3) + 2
    like = {
        "split": rows * 0,
        "copied": jnp.zeros((4, 3)),
        "own": jnp.zeros(3, jnp.bfloat16),
        "rng": jax.random.key(0),
        "step": 0,
    }
    back = Checkpointer(tmp_path).restore(like, step=2).state
    np.testing.assert_array_equal(back["split"], rows)
    np.testing.assert_array_equal(back["copied"], -rows)
    assert back["own"].tolist() == [2, 2, 2]
    assert back["step"] == 2
    assert jax.random.bits(back["rng"]) == jax.random.bits(jax.random.key(2))


@pytest.mark.parametrize(
    ("action", "newest"),
    [("die0", 1), pytest.param("die1", 2, marks=pytest.mark.slow)],
)
def test_a_process_that_dies_leaves_no_half_written_step(action, newest, tmp_path):
    both(action, tmp_path)
    hidden = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert hidden == [".saving-2"] * (action == "die0")
    checkpoints = Checkpointer(tmp_path)
    assert checkpoints.steps() == list(range(1, newest + 1))
    assert all(checkpoints.verify(step).damage is None for step in checkpoints.steps())
    first, second = both("resume", tmp_path)
    assert first == second
    assert first["step"] == newest
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *map(str, range(1, newest + 1)),
        "7",
    ]


@pytest.mark.slow
def test_two_processes_grow_the_same_as_one(tmp_path):
    first, second = both("train", tmp_path)
    assert first == second
    assert first["restored"]
    assert "that of process 1 differs from that of process 0" in first["apart"]
    program = single.make()
    state = program.init(jax.random.key(0))
    stages = []
    fit(
        program,
        state,
        single.TRAIN,
        single.HELD_OUT,
        ticks=single.TICKS,
        batch_size=single.BATCH,
        on_tick=lambda _, r: stages.append(r.layers["layers/0"].stage.tolist()),
    )
    assert first["stages"] == stages


def test_one_process_talks_to_nobody():
    assert exchange("text") == ["text"]
    assert together(lambda: 3, ValueError) == 3
    array = jnp.zeros(3)
    assert whole(array) is array
