"""Checkpoints when things go wrong: nothing silent, nothing lost, nobody trusted."""

import asyncio
import gc
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import NamedSharding, PartitionSpec

from esper_jax.checkpoint import CheckpointError, Retention, background, step_folder
from esper_jax.checkpoint import arrays as stored
from esper_jax.checkpoint.checkpointer import Checkpointer
from esper_jax.checkpoint.host_leaves import to_host
from esper_jax.checkpoint.manifest import Header
from esper_jax.checkpoint.step_directory import by_age

ROOT = Path(__file__).parents[1]
STATE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.int32)}


def state(value):
    return {**STATE, "a": STATE["a"] + value}


def fill(directory, steps, **options):
    with Checkpointer(directory, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), metrics={"loss": 1.0 / (1 + step)})


def script(body, *arguments, **environment):
    """Runs a program that has made its imports."""
    head = (
        "import os, resource, signal, sys, time\nimport numpy as np\n"
        "from esper_jax.checkpoint import Checkpointer\n"
        "big = {'x': np.random.default_rng(0).random(200_000)}\n"
    )
    return subprocess.run(
        [sys.executable, "-c", head + body, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_by_age():
    assert by_age({}) == []
    assert by_age({100: 0, 200: 0, 300: 0}) == [300, 200, 100]  # saved by 0.2
    forked = {100: 1, 200: 2, 300: 3, 150: 4, 160: 5}
    assert by_age(forked) == [160, 150, 100, 300, 200]
    # A manifest that cannot be read does not hide those that can.
    assert by_age({100: 1, 200: None, 300: 3}) == [300, 200, 100]
    assert by_age({100: 0, 200: 0, 150: 1}) == [150, 100, 200]


def test_an_abandoned_branch_is_not_restored(tmp_path):
    keep = Retention(keep_last=2)
    fill(tmp_path, (100, 200, 300), retention=Retention(keep_last=None))
    found = Checkpointer(tmp_path).restore(STATE, step=100)  # any object
    with Checkpointer(tmp_path, retention=keep) as checkpoints:
        for step in (150, 160):
            checkpoints.save(step, found.state)
    reader = Checkpointer(tmp_path)
    assert reader.restore(STATE).step == 160
    assert reader.steps() == [150, 160, 200, 300]  # what was given up is not overtaken
    assert "save 5" in reader.describe(160)
    assert reader.verify(160).manifest.order == 5
    (tmp_path / "160" / "manifest.json").write_bytes(b"")
    assert reader.restore(STATE).step == 150
    (tmp_path / "160").joinpath("manifest.json").unlink()
    with Checkpointer(tmp_path, retention=keep) as checkpoints:
        for step in (290, 400, 500):
            checkpoints.save(step, found.state)
    assert reader.steps() == [160, 400, 500]


def test_best_is_never_lost_to_a_metric_that_is_not_there(tmp_path, caplog):
    fill(tmp_path, (1, 2), retention=Retention(keep_last=None))
    wrong = Retention(keep_last=1, best=("los", "min"))
    with Checkpointer(tmp_path, retention=wrong) as checkpoints:
        with pytest.raises(CheckpointError, match=r"metrics: expected 'los'.*'loss'"):
            checkpoints.save(3, STATE, metrics={"loss": 9.0})
        checkpoints.save(3, STATE)
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2, 3]
        assert "no step has the metric 'los'" in caplog.text
    right = Retention(keep_last=1, best=("loss", "min"))
    with Checkpointer(tmp_path, retention=right) as checkpoints:
        checkpoints.save(4, STATE)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4]  # 1 / 3 at step 2 is the best
        for metrics, text in (([1], "numbers by name"), ({"loss": "x"}, "by name")):
            with pytest.raises(CheckpointError, match=text):
                checkpoints.save(5, STATE, metrics=metrics)
        with pytest.raises(CheckpointError, match=r"whole number, got 2\.5"):
            checkpoints.save(2.5, STATE)


def test_only_steps_that_decide_are_read_before_one_is_removed(tmp_path, monkeypatch):
    fill(tmp_path, range(30), retention=Retention(keep_last=None))
    looked = []
    check = step_folder.check
    monkeypatch.setattr(
        step_folder,
        "check",
        lambda folder, *a, **k: looked.append(folder.name) or check(folder, *a, **k),
    )
    with Checkpointer(tmp_path, retention=Retention(keep_last=2, every=1)) as all_stay:
        all_stay.save(30, STATE)
    assert looked in ([".saving-30"], [])  # what was written is read back
    looked.clear()
    with Checkpointer(tmp_path, retention=Retention(keep_last=2, every=2)) as half:
        half.save(31, STATE)
        half.wait()
        assert half.steps() == [*range(0, 30, 2), 30, 31]
    assert not {"0", "2", "4"} & set(looked)


def test_a_relative_path_is_that_of_the_beginning(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "a")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with Checkpointer("steps") as checkpoints:
        checkpoints.save(1, STATE)
        monkeypatch.chdir(tmp_path / "b")
        checkpoints.save(2, STATE)
    assert Checkpointer(tmp_path / "a" / "steps").steps() == [1, 2]
    assert os.listdir(tmp_path / "b") == []
    assert Checkpointer("~/steps").directory == tmp_path / "home" / "steps"
    for far in ("gs://bucket/run", Path("s3://bucket/run"), "file:///tmp/x"):
        with pytest.raises(CheckpointError, match="local or mounted"):
            Checkpointer(far)
    for odd in ("", "a\0b", 3, None):
        with pytest.raises(CheckpointError, match="directory: expected a path"):
            Checkpointer(odd)


@pytest.mark.parametrize("name", ["run[lr=1e-3]", "a\\b", "a*b", "\x1b[2J\n"])
def test_a_path_is_not_a_pattern(name, tmp_path):
    (tmp_path / "aXb" / "ocdbt.process_9").mkdir(parents=True)
    fill(tmp_path / name, (1, 2))
    found = Checkpointer(tmp_path / name).restore(STATE)
    np.testing.assert_array_equal(found.state["a"], state(2)["a"])
    assert sorted(os.listdir(tmp_path)) == sorted(["aXb", name])
    with pytest.raises(CheckpointError) as error:
        Checkpointer(tmp_path / name).restore(STATE, step=7)
    assert str(error.value).isprintable()


def test_arrays_over_a_mesh_come_back_as_they_were_laid_out(tmp_path):
    mesh = jax.make_mesh((4,), ("x",))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*p)) for p in (("x",), ()))
    laid = {
        "rows": jax.device_put(jnp.arange(8.0).reshape(4, 2), rows),
        "whole": jax.device_put(jnp.arange(3.0), whole),
        "keys": jax.device_put(jax.random.split(jax.random.key(0), 4), rows),
        "one": jax.device_put(jnp.ones(2), jax.devices()[2]),
    }
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), laid
    )
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, laid)
        for like in (laid, shapes, jax.eval_shape(lambda: laid)):
            back = checkpoints.restore(like).state
            keys = [jax.random.key_data(tree["keys"]) for tree in (back, laid)]
            np.testing.assert_array_equal(*keys)
            np.testing.assert_array_equal(back["rows"], laid["rows"])
            if like is laid or like is shapes:
                assert [v.sharding for v in back.values()] == [
                    laid[name].sharding for name in back
                ]


def test_a_step_out_of_the_way_of_its_replacement_is_seen(tmp_path):
    fill(tmp_path, (1, 2))
    (tmp_path / "2").rename(tmp_path / ".replaced-2")  # and the writer was killed
    reader = Checkpointer(tmp_path)
    assert reader.steps() == [1, 2]
    assert reader.restore(STATE).step == 2
    assert reader.verify(2).damage is None
    fill(tmp_path, (3,))
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "3"]


def test_the_interpreter_waits_for_a_save_however_it_ends(tmp_path):
    ended = script(
        "c = Checkpointer(sys.argv[1]); c.save(1, big); raise RuntimeError('mine')",
        tmp_path,
    )
    assert ended.returncode == 1
    assert "mine" in ended.stderr
    assert Checkpointer(tmp_path).verify(1).damage is None
    ended = script(
        "c = Checkpointer(sys.argv[1]); c.save(1, big); c.wait()\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "c.save(2, {'x': 1 + big['x']})\n",
        tmp_path,
    )
    last = ended.stderr.splitlines()
    assert len(last) == 1, ended.stderr
    assert last[0].startswith("esper_jax: step 2 could not be saved in")
    assert "File too large" in last[0]


def failing(monkeypatch, make_error):
    def write(*_):
        raise make_error()

    monkeypatch.setattr(step_folder, "write", write)


def test_a_failed_save_is_told_on_every_way_out(tmp_path, monkeypatch, caplog):
    file = str(tmp_path / "2" / "file")
    failing(monkeypatch, lambda: OSError(28, "No space left on device", file))

    def saving(then):
        with Checkpointer(tmp_path) as checkpoints:
            checkpoints.save(1, STATE)
            if then is not None:
                raise then

    with pytest.raises(CheckpointError, match=r"step 1 .*No space left .*2/file"):
        saving(SystemExit(0))
    with pytest.raises(KeyError) as error:
        saving(KeyError("mine"))
    assert "No space left on device" in error.value.__notes__[0]
    caplog.clear()
    dropped = Checkpointer(tmp_path)
    dropped.save(1, STATE)
    dropped._background._done.wait()
    del dropped
    gc.collect()
    for _ in range(100):  # the thread may be about to let go of it
        if caplog.text:
            break
        time.sleep(0.05)
    assert "step 1 could not be saved" in caplog.text
    failing(monkeypatch, SystemExit)
    with pytest.raises(CheckpointError, match=r"save in .* failed: SystemExit"):
        saving(None)


@pytest.mark.parametrize("at_once", [False, True])  # True: Python 3.12.0 and .1
def test_an_interrupted_wait_can_be_repeated(at_once, tmp_path, monkeypatch):
    write = step_folder.write
    monkeypatch.setattr(background, "_WAITS", at_once)

    def slowly(*arguments):
        time.sleep(0.6)
        return write(*arguments)

    monkeypatch.setattr(step_folder, "write", slowly)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with Checkpointer(tmp_path) as checkpoints:
            calls = [lambda: checkpoints.save(1, STATE), checkpoints.wait]
            if not at_once:
                calls.pop(0)()
                calls.append(checkpoints.wait)
            for call in calls:
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                with pytest.raises(KeyboardInterrupt):
                    call()
            checkpoints.wait()
            assert Checkpointer(tmp_path).steps() == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_lock_is_not_kept_by_what_is_gone(tmp_path):
    dropped = Checkpointer(tmp_path)
    dropped.save(1, STATE)
    cycle = {"it": dropped}  # as a traceback holds it
    cycle["self"] = cycle
    del dropped, cycle
    with Checkpointer(tmp_path) as checkpoints:  # the notebook's cell, run again
        checkpoints.save(2, STATE)
        with pytest.raises(CheckpointError, match=r"this process: close\(\) it"):
            Checkpointer(tmp_path).acquire()
    # The child lives on, its parent was killed.
    parent = script(
        "c = Checkpointer(sys.argv[1]); c.save(3, big); c.wait()\n"
        "child = os.fork()\n"
        "if child: print(child, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.close(1), os.close(2); c.close(); time.sleep(60)\n",
        tmp_path,
    )
    child = int(parent.stdout)
    try:
        with Checkpointer(tmp_path) as checkpoints:
            checkpoints.save(4, STATE)
            os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)
    assert Checkpointer(tmp_path).steps() == [1, 2, 3, 4]


def test_a_directory_that_was_moved_is_not_written_to(tmp_path):
    checkpoints = Checkpointer(tmp_path / "a")
    checkpoints.save(1, STATE)
    checkpoints.wait()
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "a").mkdir()
    with pytest.raises(CheckpointError, match="moved or removed"):
        checkpoints.save(2, STATE)
    assert os.listdir(tmp_path / "a") == []
    checkpoints.close()


def test_a_reader_beside_a_writer_sees_sound_steps(tmp_path):
    body = (
        "from esper_jax.checkpoint import Checkpointer, Retention\n"
        "c = Checkpointer(sys.argv[1], retention=Retention(keep_last=1))\n"
        "until = time.time() + 3; k = 0\n"
        "while time.time() < until:\n"
        "    k += 1\n"
        "    for s in (k, 0):\n"
        "        c.save(s, {'a': np.full((2, 3), s, 'f4'), 'b': np.ones(4, 'i4')})\n"
        "c.close()\n"
    )
    head = (
        "import sys, time, numpy as np\nfrom esper_jax.checkpoint import Checkpointer\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", head + body, tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        while not Checkpointer(tmp_path).steps():
            time.sleep(0.01)
        seen = 0
        while writer.poll() is None:
            reader = Checkpointer(tmp_path)
            found = reader.restore(STATE)
            assert found.damaged == {}
            assert float(found.state["a"][1, 2]) == found.step
            for step in reader.steps():
                assert reader.verify(step).damage is None
                assert "damaged" not in reader.describe(step)
            seen += 1
        assert seen > 10
        assert writer.returncode == 0
    finally:
        writer.kill()
        writer.wait()
    reader = Checkpointer(tmp_path)
    assert reader.verify(12345).damage == "it is missing"  # it never was there


def test_a_step_is_not_removed_under_a_reader(tmp_path, monkeypatch):
    fill(tmp_path, (1,))
    write = stored.load

    def slowly(folder, records):
        if folder.name == "1":
            fill(tmp_path, (2, 3), retention=Retention(keep_last=1))
        return write(folder, records)

    monkeypatch.setattr(stored, "load", slowly)
    assert Checkpointer(tmp_path).restore(STATE).step == 1
    monkeypatch.undo()
    fill(tmp_path, (4,), retention=Retention(keep_last=1))
    assert Checkpointer(tmp_path).steps() == [4]


def seal(folder, change):
    """Changes a manifest, and computes its checksum anew."""
    path = folder / "manifest.json"
    content = json.loads(path.read_bytes().split(b"\n", 1)[1])
    body = change(content) or content
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    checksum = hashlib.sha256(body).hexdigest()
    head = f"esper_jax checkpoint, sha256 of what follows: {checksum}\n"
    path.write_bytes(head.encode() + body)


def put(*path, value):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


ODD = {
    "levels": lambda _: b"[" * 100_000 + b"]" * 100_000,
    "levels of the config": put("config", value=json.loads("[" * 300 + "]" * 300)),
    "digits": lambda _: b'{"schema":' + b"9" * 5000 + b"}",
    "no object": lambda _: b"[]",
    "saved late": put("saved", value=1e300),
    "saved not": put("saved", value=None),
    "saved nan": put("saved", value=float("nan")),
    "schema of text": put("schema", value="3"),
    "schema 0": put("schema", value=0),
    "schema true": put("schema", value=True),
    "step of a fraction": put("step", value=2.0),
    "order": put("order", value=10**20),
    "metric of text": put("metrics", "loss", value="abc"),
    "metric too large": put("metrics", "loss", value=10**400),
    "keys": put("leaves", "a", "keys", value=["..", "x"]),
    "shape below 0": put("leaves", "a", "shape", value=[2, -3]),
    "shape too large": put("leaves", "a", "shape", value=[0, 2**62, 2**62]),
    "too many axes": put("leaves", "a", "shape", value=[0] * 70),
    "objects": put("leaves", "a", "dtype", value="object"),
    "dtype": put("leaves", "a", "dtype", value=[]),
    "checksum": put("leaves", "a", "sha256", value=None),
    "another shape": put("leaves", "a", "shape", value=[10**12]),
    "outside": put("files", "../x", value={"size": 1, "sha256": "0" * 64}),
}


def test_odd_manifests_are_damage_and_stop_nothing(tmp_path):
    fill(tmp_path, (1, 2))
    for step, (name, change) in enumerate(ODD.items(), start=3):
        shutil.copytree(tmp_path / "2", tmp_path / str(step))
        seal(tmp_path / str(step), put("step", value=step))
        seal(tmp_path / str(step), change)
        verdict = Checkpointer(tmp_path).verify(step)
        assert verdict.damage, name
        if name != "another shape":  # of an array, which `describe` does not read
            assert "damaged" in Checkpointer(tmp_path).describe(step), name
        with pytest.raises(CheckpointError, match="damaged"):
            Checkpointer(tmp_path).migrate(step)
    nested = os.open(tmp_path / "2" / "state", os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=nested)
        inner = os.open("d", os.O_RDONLY, dir_fd=nested)
        os.close(nested)
        nested = inner
    os.close(nested)
    found = Checkpointer(tmp_path).restore(STATE)
    assert found.step == 1
    assert set(found.damaged) == set(range(2, 3 + len(ODD)))
    last = 3 + len(ODD)
    fill(tmp_path, (last,), retention=Retention(keep_last=1))
    assert Checkpointer(tmp_path).restore(STATE).step == last
    assert 1 not in Checkpointer(tmp_path).steps()
    subprocess.run(["rm", "-rf", tmp_path / "2"], check=True)  # too deep for pytest


def test_a_terminal_is_not_obeyed(tmp_path):
    fill(tmp_path, (1,))
    seal(tmp_path / "1", put("metrics", "\x1b[2J\n step 9: sound", value=1.0))
    assert Checkpointer(tmp_path).describe(1).isprintable()
    (tmp_path / "1" / "\x1b]0;x\x07").write_text("")
    assert str(Checkpointer(tmp_path).verify(1)).isprintable()
    with pytest.raises(CheckpointError) as error:
        Checkpointer(tmp_path).restore(STATE)
    assert str(error.value).isprintable()


def test_a_bomb_is_not_inflated(tmp_path):
    """400 MB of zeros in a step of some kB, all checksums as they should be."""
    folder = tmp_path / "1"
    folder.mkdir()
    header = Header(schema=3, step=1, saved=0.0, metrics={}, config=None)
    zeros = {**STATE, "a": np.zeros(100_000_000, np.float32)}
    step_folder.write(folder, to_host(zeros), header)
    small = to_host(STATE)["a"]
    seal(folder, put("leaves", "a", "shape", value=[2, 3]))
    seal(folder, put("leaves", "a", "sha256", value=step_folder.digest(small.array)))
    read = script(
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        "print(Checkpointer(sys.argv[1]).verify(1))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n",
        tmp_path,
    )
    first, verdict, after = read.stdout.splitlines()
    assert "stored as float32[100000000], expected float32[2, 3]" in verdict
    assert int(after) - int(first) < 100_000, "kB"


KEY = bytes(range(32))


def test_a_signature_finds_an_attacker(tmp_path):
    fill(tmp_path, (1, 2), key=KEY, retention=Retention(keep_last=1))
    signed = Checkpointer(tmp_path, key=KEY)
    assert signed.steps() == [2]
    assert signed.restore(STATE).step == 2
    assert signed.verify(2).damage is None
    with pytest.raises(CheckpointError, match="give Checkpointer the key"):
        Checkpointer(tmp_path).restore(STATE)
    with pytest.raises(CheckpointError, match="another key, or changed"):
        Checkpointer(tmp_path, key=bytes(32)).restore(STATE)
    assert "is signed" in Checkpointer(tmp_path).describe(2)
    fill(tmp_path, (3,))  # by somebody without the key
    found = signed.restore(STATE)
    assert found.step == 2
    assert "it is not signed" in found.damaged[3]
    seal(tmp_path / "3", lambda content: None)
    shutil.copytree(tmp_path / "2", tmp_path / "4")  # played again
    assert signed.restore(STATE).damaged[4] == "it is step 2, copied or renamed"
    manifest = tmp_path / "2" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"loss"', b'"lose"'))
    assert "another key, or changed" in signed.verify(2).damage
    for odd in ("text", b"short", 3):
        with pytest.raises(CheckpointError, match="key: expected at least 16 secret"):
            Checkpointer(tmp_path, key=odd)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
def test_a_disk_that_fills_while_orbax_writes(tmp_path):
    """The room that was asked for is taken by another program."""
    body = (
        "from esper_jax.checkpoint import step_folder\n"
        "c = Checkpointer(sys.argv[1]); c.save(1, {'a': np.ones(3)}); c.wait()\n"
        "step_folder._make_sure_of_room = lambda *_: None\n"
        "c.save(2, {str(i): np.random.rand(10_000) for i in range(20)}); c.close()\n"
    )
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        ended = script(body, tmp_path / "steps")
        assert ended.returncode == 1
        assert "No space left on device" in ended.stderr.splitlines()[-1]
        assert "Event loop is closed" not in ended.stderr
        assert Checkpointer(tmp_path / "steps").verify(1).damage is None
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_orbax_is_not_asked_where_it_cannot_make_its_folder(tmp_path):
    """Its threads would wait five minutes for the folder, and the program for them."""
    (tmp_path / "file").write_text("")
    body = (
        "from esper_jax.checkpoint import arrays\nfrom pathlib import Path\n"
        "try:\n    arrays.save(Path(sys.argv[1]), big)\n"
        "except OSError as error:\n    print(error.strerror)\n"
    )
    ended = script(body, tmp_path / "file" / "step")
    found = (ended.returncode, ended.stdout, ended.stderr)
    assert found == (0, "Not a directory\n", "")


def test_tasks_that_orbax_drops_are_not_told_of(tmp_path, caplog):
    """A race of its arrays; here a task from a file of its name, and another."""
    stored.save(tmp_path, {"x": np.ones(3)})

    async def dropped(path):
        names = {}
        exec(compile("async def fail():\n    1 / 0\n", path, "exec"), names)
        asyncio.get_running_loop().create_task(names["fail"]())
        await asyncio.sleep(0)

    for path in ("/site-packages/orbax/checkpoint/a.py", "/home/mine.py"):
        asyncio.run(dropped(path))
    gc.collect()
    [record] = [r.getMessage() for r in caplog.records if r.name == "asyncio"]
    assert "exception was never retrieved" in record
    assert "/home/mine.py" in record


def test_saves_leave_nothing_behind_but_what_tensorstore_keeps(tmp_path):
    """It keeps one reference too many to what is in a spec that it writes as JSON.

    Orbax asks it for one such spec an array.
    """

    def kept(call, times):
        """Blocks of memory that Python holds more of after each call, once warm."""
        for number in range(2 * times):
            if number == times:
                gc.collect()
                before = sys.getallocatedblocks()
            call()
        gc.collect()
        return (sys.getallocatedblocks() - before) / times

    spec = ts.KvStore.Spec({"driver": "file", "path": "/x/"})
    leak = kept(spec.to_json, 1000)
    numbers = itertools.count()
    arrays = {f"a{n}": np.full(3, n) for n in range(60)}
    with Checkpointer(tmp_path, retention=Retention(keep_last=2)) as checkpoints:

        def save():
            checkpoints.save(next(numbers), arrays)
            checkpoints.wait()
            checkpoints.restore(arrays)

        assert kept(save, 12) <= (leak + 1) * len(arrays)
