"""Checkpoints: what is saved comes back, and damage never goes unseen."""

import dataclasses
import json
import logging
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_capacity import living, make_program

from esper_jax.checkpoint import CheckpointError, Retention, step_folder
from esper_jax.checkpoint.checkpointer import Checkpointer
from esper_jax.checkpoint.host_leaves import to_host
from esper_jax.checkpoint.manifest import Header, encode
from esper_jax.cli import main
from esper_jax.lifecycle.state import SeedState, init_seeds
from esper_jax.migrations.chain import CURRENT, from_tree, migrate
from esper_jax.trees import state_hash

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"


def small(value=0.0):
    return {
        "params": {"layers/0/kernel": jnp.arange(12.0).reshape(3, 4) + value},
        "rng": jax.random.key(7),
        "seeds": init_seeds(3, 2),
        "moments": (jnp.ones(2, jnp.bfloat16), np.zeros((0, 3), np.float32)),
        "step": 3,
    }


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    one, two = to_host(a), to_host(b)
    for name in one:
        assert one[name].kind == two[name].kind, name
        assert one[name].array.tobytes() == two[name].array.tobytes(), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three steps, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpointer(folder) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, small(step), metrics={"loss": 1 / step})
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "steps")
    return tmp_path / "steps"


def files_of(saved):
    return sorted(
        p.relative_to(saved / "3").as_posix()
        for p in (saved / "3").rglob("*")
        if p.is_file()
    )


def test_a_state_comes_back_bit_for_bit(saved):
    found = Checkpointer(saved).restore(small())
    assert (found.step, found.damaged) == (3, {})
    assert found.manifest.schema == CURRENT
    assert_same(found.state, small(3))
    assert isinstance(found.state["seeds"], SeedState)
    assert jax.random.bits(found.state["rng"]) == jax.random.bits(jax.random.key(7))
    assert_same(Checkpointer(saved).restore(small(), step=1).state, small(1))
    assert sorted(os.listdir(saved)) == ["1", "2", "3"]


def flip(path, data):
    bit = zlib.crc32(path.name.encode()) % (8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "empty", "extend"])
def test_damage_to_any_file_is_found_named_and_passed_over(
    damage, saved, tmp_path, caplog
):
    files = files_of(saved)
    assert len(files) >= 10
    for name in files:
        steps = tmp_path / "steps"
        shutil.copytree(saved, steps)
        path = steps / "3" / name
        data = bytearray(path.read_bytes())
        if damage in ("flip", "truncate", "empty") and not data:
            shutil.rmtree(steps)
            continue
        match damage:
            case "flip":
                flip(path, data)
            case "truncate":
                path.write_bytes(data[:-1])
            case "empty":
                path.write_bytes(b"")
            case "extend":
                path.write_bytes(data + b"\0")
            case "delete":
                path.unlink()
        caplog.clear()
        found = Checkpointer(steps).restore(small())
        assert found.step == 2, name
        assert_same(found.state, small(2))
        assert name in found.damaged[3]
        warnings = [r.message for r in caplog.records if r.name.startswith("esper")]
        assert name in warnings[0]
        assert "fell back to step 2" in warnings[1]
        assert Checkpointer(steps).verify(3).damage == found.damaged[3]
        shutil.rmtree(steps)


def test_every_bit_of_a_manifest_counts(copied):
    path = copied / "3" / "manifest.json"
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 97):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(step_folder.Damaged, match=r"manifest\.json"):
            step_folder.check(copied / "3", 3)


def test_foreign_and_half_written_things(copied, caplog):
    (copied / "notes.txt").write_text("mine")
    (copied / "007").mkdir()
    (copied / ".saving-4").mkdir()  # a save that was killed
    shutil.copytree(copied / "2", copied / "5")  # another step under this number
    (copied / "6").mkdir()
    (copied / "7").write_text("a file")
    (copied / "8").symlink_to(copied / "3")
    (copied / "3" / "state" / "foreign.bin").write_bytes(b"x")
    shutil.copytree(copied / "1", copied / "9")
    (copied / "9" / "pipe").symlink_to("/dev/zero")
    found = Checkpointer(copied).restore(small())
    assert found.step == 2
    assert {step: why.split(":")[0] for step, why in found.damaged.items()} == {
        9: "it is step 1, copied or renamed",
        8: "it is not a folder",
        7: "it is not a folder",
        6: "manifest.json is missing",
        5: "it is step 2, copied or renamed",
        3: "state/foreign.bin is foreign",
    }
    with Checkpointer(copied) as checkpoints:
        checkpoints.save(10, small())
    assert not (copied / ".saving-4").exists()
    assert (copied / "notes.txt").read_text() == "mine"


def test_an_array_that_orbax_reads_wrong_is_found(copied):
    """Even where every file is as the manifest says."""
    folder = copied / "3"
    manifest = step_folder.check(folder, 3)
    [name] = [n for n in manifest.leaves if n.endswith("kernel")]
    leaves = dict(manifest.leaves)
    leaves[name] = dataclasses.replace(leaves[name], sha256="0" * 64)
    forged = dataclasses.replace(manifest, leaves=leaves)
    (folder / "manifest.json").write_bytes(encode(forged))
    assert f"leaf {name} has other values" in Checkpointer(copied).verify(3).damage


def test_no_sound_step_lists_every_reason(copied, tmp_path):
    (copied / "1" / "manifest.json").unlink()
    (copied / "2" / "state" / "commit").write_text("x")
    shutil.rmtree(copied / "3" / "state")
    with pytest.raises(CheckpointError, match="no sound checkpoint") as error:
        Checkpointer(copied).restore(small())
    for part in ("step 1: manifest.json", "step 2: state/commit", "step 3: state/"):
        assert part in str(error.value)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        Checkpointer(tmp_path / "nowhere").restore(small())
    with pytest.raises(CheckpointError, match="step 4: it is missing"):
        Checkpointer(copied).restore(small(), step=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": jnp.zeros(())}, r"step: expected float32\[\], found int64\[\]"),
        (
            {"params": {"layers/0/kernel": jnp.zeros((4, 3))}},
            r"params/layers/0/kernel: expected float32\[4, 3\], found float32\[3, 4\]",
        ),
        (
            {"params": {"layers/0/kernel": jnp.zeros((3, 4), jnp.float16)}},
            r"params/layers/0/kernel: expected float16\[3, 4\], found float32\[3, 4\]",
        ),
        ({"params": {"bias": jnp.zeros(3)}}, r"params/bias: expected .*found nothing"),
        ({"params": {}}, r"params/layers/0/kernel: expected nothing, found float32"),
        ({"rng": jnp.zeros(2, jnp.uint32)}, r"rng: expected uint32\[2\], found three"),
        ({"rng": jax.random.key(0, impl="rbg")}, r"rng: expected rbg keys .*found thr"),
        ({"seeds": init_seeds(4, 2)}, r"seeds/stage: expected int8\[4\], found int8\["),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message, saved):
    with pytest.raises(CheckpointError, match=message):
        Checkpointer(saved).restore({**small(), **change})


def test_keys_of_any_kind_and_shape(tmp_path):
    state = {
        "rbg": jax.random.key(1, impl="rbg"),
        "many": jax.random.split(jax.random.key(2), (2, 3)),
        "raw": jax.random.PRNGKey(3),
    }
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(0, state)
        back = checkpoints.restore(state).state
    assert_same(back, state)
    assert jnp.array_equal(
        jax.random.bits(back["many"][1, 2]), jax.random.bits(state["many"][1, 2])
    )


def test_a_save_does_not_see_what_comes_after(tmp_path):
    state = {"host": np.arange(3.0), "device": jnp.arange(1 << 16)}
    expected = {name: np.array(leaf) for name, leaf in state.items()}
    like = jax.tree.map(jnp.zeros_like, {"device": state["device"]})
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(0, state)
        state["host"][:] = -1
        jax.jit(lambda x: x * 0, donate_argnums=0)(state["device"])
        back = checkpoints.restore({"host": expected["host"], **like}).state
    assert_same({k: np.asarray(v) for k, v in back.items()}, expected)


def test_what_cannot_be_saved_is_refused(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="step must be at least 0, got -1"):
            checkpoints.save(-1, {})
        with pytest.raises(CheckpointError, match="leaf a/b: expected an array of num"):
            checkpoints.save(1, {"a": {"b": "text"}})
        with pytest.raises(CheckpointError, match=r"two leaves .* 'a/b'"):
            checkpoints.save(1, {"a": {"b": 1}, "a/b": 2})
        with pytest.raises(CheckpointError, match="config must be JSON"):
            checkpoints.save(1, {}, config={1, 2})
        assert checkpoints.steps() == []


@pytest.mark.slow
def test_another_number_of_devices(tmp_path):
    """One device to four, in several shardings, and back."""
    program = make_program()
    state = living(program, 1)
    with Checkpointer(tmp_path / "one") as checkpoints:
        checkpoints.save(1, state)
    flags = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    )
    script = ROOT / "tests" / "four_devices.py"
    folders = tmp_path / "one", tmp_path / "four"
    result = subprocess.run(
        [sys.executable, script, *folders, state_hash(state)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    like = program.init(jax.random.key(5))
    back = Checkpointer(tmp_path / "four").restore(like).state
    assert state_hash(back) == state_hash(state)
    assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(back))


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ({"keep_last": None}, {10, 20, 30, 40, 50, 60}),
        ({"keep_last": 2}, {50, 60}),
        ({"keep_last": 1, "best": ("loss", "min")}, {30, 60}),
        ({"keep_last": 1, "best": ("loss", "max")}, {10, 60}),
        ({"keep_last": 1, "best": ("other", "max")}, {60}),
        ({"keep_last": 1, "every": 20}, {20, 40, 60}),
        ({"keep_last": 1, "pinned": [10, 11]}, {10, 60}),
    ],
)
def test_retention(rules, kept):
    losses = {10: 3.0, 20: math.nan, 30: 1.0, 40: -math.inf, 50: math.inf, 60: 2.0}
    steps = {step: {"loss": loss} for step, loss in losses.items()}
    assert Retention(**rules).keeps(steps) == kept


def test_retention_on_disk(tmp_path):
    retention = Retention(keep_last=1, best=("loss", "min"), pinned=(2,))
    losses = [5.0, 4.0, 3.0, 1.0, math.nan, 2.0, math.nan]
    with Checkpointer(tmp_path, retention=retention) as checkpoints:
        for step, loss in enumerate(losses):
            checkpoints.save(step, {"x": step}, metrics={"loss": loss})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3, 6]
    with Checkpointer(tmp_path, retention=retention) as checkpoints:
        # Damaged steps count for nothing; the best is then another.
        (tmp_path / "3" / "manifest.json").unlink()
        checkpoints.save(5, {"x": 5}, metrics={"loss": 7.0})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3, 5, 6]
        assert checkpoints.restore({"x": 0}, step=5).state == {"x": 5}
        checkpoints.save(6, {"x": 66}, metrics={"loss": 8.0})  # replaces it
        assert checkpoints.restore({"x": 0}).state == {"x": 66}
        assert sorted(os.listdir(tmp_path)) == ["2", "3", "6"]
    for wrong in ({"keep_last": 0}, {"every": 0}, {"best": ("loss", "least")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Retention(**wrong)


def test_damaged_steps_do_not_push_out_a_sound_one(copied):
    for step in (2, 3):
        (copied / str(step) / "manifest.json").write_text("{}")
    with Checkpointer(copied, retention=Retention(keep_last=2)) as checkpoints:
        checkpoints.save(0, small(9))
        checkpoints.wait()
        assert checkpoints.steps() == [0, 1, 2, 3]
        assert checkpoints.restore(small()).step == 0  # saved last
        assert checkpoints.restore(small(), step=1).step == 1


def test_a_killed_replacement_leaves_the_step(copied):
    (copied / "3").rename(copied / ".replaced-3")
    with Checkpointer(copied) as checkpoints:
        checkpoints.acquire()
        assert checkpoints.restore(small()).step == 3


@pytest.fixture
def full_disk():
    """A limit on the size of files, below what a step needs."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_failed_save_surfaces_once_and_damages_nothing(copied, full_disk, capfd):
    checkpoints = Checkpointer(copied)
    big = dict(enumerate(np.random.default_rng(0).random((100, 1000))))
    full_disk()
    checkpoints.save(4, big)
    with pytest.raises(CheckpointError, match=r"step 4 could not .*: File too large"):
        checkpoints.save(5, small(5))
    checkpoints.save(6, small(6))
    checkpoints.wait()
    checkpoints.save(7, big)
    with pytest.raises(CheckpointError, match="step 7"):
        checkpoints.close()
    assert checkpoints.steps() == [1, 2, 3, 6]
    assert all(checkpoints.verify(step).damage is None for step in (1, 2, 3, 6))
    assert sorted(os.listdir(copied)) == ["1", "2", "3", "6"]
    assert "Traceback" not in capfd.readouterr().err
    with Checkpointer(copied) as again:  # the lock was given back
        again.acquire()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
def test_a_full_disk(tmp_path, capfd):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with Checkpointer(disk / "steps") as checkpoints:
            checkpoints.save(1, small(1))
            checkpoints.save(2, {"big": np.random.default_rng(0).random(100_000)})
            with pytest.raises(CheckpointError, match="No space left on device"):
                checkpoints.wait()
            assert checkpoints.steps() == [1]
            assert_same(checkpoints.restore(small()).state, small(1))
        assert "Traceback" not in capfd.readouterr().err
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_read_only_directory(saved):
    with tempfile.TemporaryDirectory() as name:  # tmp_path is closed to others
        folder = Path(name)
        steps = shutil.copytree(saved, folder / "steps")
        folder.chmod(0o755)
        steps.chmod(0o555)
        user = os.geteuid()
        os.seteuid(65534 if user == 0 else user)  # root may write anywhere
        try:
            checkpoints = Checkpointer(steps)
            with pytest.raises(CheckpointError, match="cannot be written to: Perm"):
                checkpoints.save(4, small(4))
            with pytest.raises(CheckpointError, match="cannot be written to: Perm"):
                Checkpointer(folder / "new").acquire()
            assert checkpoints.restore(small()).step == 3
        finally:
            os.seteuid(user)
            steps.chmod(0o755)


def test_two_writers(tmp_path):
    holder = (
        "import sys; from esper_jax.checkpoint import Checkpointer\n"
        f"c = Checkpointer({str(tmp_path)!r}); c.acquire()\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", holder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(CheckpointError, match="by another process"):
                Checkpointer(tmp_path).save(1, small())
        finally:
            other.kill()
    with Checkpointer(tmp_path) as checkpoints:  # the lock died with its holder
        checkpoints.save(1, small())
        with pytest.raises(CheckpointError, match="or Checkpointer"):
            Checkpointer(tmp_path).save(2, small())


def seeds_of_schema(version):
    lists = json.loads((FIXTURES / f"seeds_v{version}.json").read_text())
    return {
        name: np.asarray(rows, np.int32 if np.asarray(rows).dtype.kind == "i" else "f4")
        for name, rows in lists.items()
    }


def write_old(directory, step, tree, schema):
    (directory / str(step)).mkdir(parents=True)
    step_folder.write(
        directory / str(step),
        to_host(tree),
        Header(schema=schema, step=step, saved=time.time(), metrics={}, config=None),
    )


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_schema_restores_into_todays(version, tmp_path, monkeypatch, capsys):
    old = {
        "params": np.arange(3.0, dtype=np.float32),
        "rng": jax.random.key(5),
        "seeds": {"layers/0": seeds_of_schema(version)},
    }
    write_old(tmp_path, 4, old, version)
    num = len(old["seeds"]["layers/0"]["state_tensor"])
    like = {
        "params": jnp.zeros(3),
        "rng": jax.random.key(0),
        "seeds": {"layers/0": init_seeds(num, num)},
    }
    restored = Checkpointer(tmp_path).restore(like).state
    tree, _ = migrate(version, old["seeds"]["layers/0"], capacity=num)
    assert_same(restored["seeds"]["layers/0"], from_tree(tree))
    assert_same(restored["rng"], old["rng"])
    assert esper("checkpoint", "migrate", tmp_path, patch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert f"step 4: sound (schema {CURRENT}), was {version}" in printed
    assert Checkpointer(tmp_path).verify(4).manifest.schema == CURRENT
    assert esper("checkpoint", "migrate", tmp_path, patch=monkeypatch) == 0
    assert f"step 4: sound (schema {CURRENT}), as it was" in capsys.readouterr().out


def test_a_newer_schema_is_refused(tmp_path):
    write_old(tmp_path, 1, {"x": np.zeros(2)}, CURRENT + 1)
    with pytest.raises(
        CheckpointError, match=f"schema {CURRENT + 1}, newer than {CURRENT}"
    ):
        Checkpointer(tmp_path).restore({"x": np.zeros(2)})


def esper(*arguments, patch):
    patch.setattr(sys, "argv", ["esper-jax", *map(str, arguments)])
    try:
        main()
    except SystemExit as stopped:
        return stopped.code
    return 0


def test_the_command_line(copied, monkeypatch, capsys):
    run = copied.parent
    copied.rename(run / "checkpoints")
    assert esper("checkpoint", "verify", run, patch=monkeypatch) == 0
    lines = [f"step {n}: sound (schema {CURRENT})" for n in (1, 2, 3)]
    assert capsys.readouterr().out.splitlines() == lines
    (run / "checkpoints" / "2" / "manifest.json").unlink()
    assert esper("checkpoint", "verify", run / "checkpoints", patch=monkeypatch) == 1
    lines[1] = "step 2: damaged: manifest.json is missing"
    assert capsys.readouterr().out.splitlines() == lines
    assert esper("checkpoint", "list", run, patch=monkeypatch) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[1] == lines[1]
    assert listed[2].startswith(f"step 3: schema {CURRENT}, 20")
    assert listed[2].endswith(", loss 0.333333")
    assert esper("checkpoint", "migrate", run, patch=monkeypatch) == 1
    assert esper("checkpoint", "verify", run / "no", patch=monkeypatch) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    assert logging.getLogger("esper_jax").handlers == []
