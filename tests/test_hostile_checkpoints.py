"""Checkpoints that somebody wrote on purpose, all checksums as they should be.

Odd contents of manifests are in test_checkpoint_faults.py; here are files and folders.
"""

import hashlib
import json
import os
import pickle
import shutil

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from esper_jax.checkpoint import CheckpointError, Retention, step_folder
from esper_jax.checkpoint.checkpointer import Checkpointer
from esper_jax.checkpoint.host_leaves import to_host
from esper_jax.checkpoint.manifest import Header

STATE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.int32)}
KEY = bytes(range(32))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    steps = tmp_path_factory.mktemp("steps")
    with Checkpointer(steps, retention=Retention(keep_last=None)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, STATE)
    return steps


def seal(folder, change):
    """Changes the text of a manifest, and computes its checksum anew."""
    path = folder / "manifest.json"
    body = change(path.read_text().split("\n", 1)[1]).encode()
    checksum = hashlib.sha256(body).hexdigest()
    head = f"esper_jax checkpoint, sha256 of what follows: {checksum}\n"
    path.write_bytes(head.encode() + body)


def edit(change):
    """Changes what a manifest holds."""

    def edited(text):
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return lambda folder: seal(folder, edited)


def of_each_file(**values):
    return edit(lambda content: [f.update(values) for f in content["files"].values()])


def recompute(folder):
    """The manifest of the files as they are, as an attacker computes it."""
    files = [path for path in (folder / "state").rglob("*") if path.is_file()]
    records = {
        str(path.relative_to(folder)): {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }
    edit(lambda content: content.update(files=records))(folder)


def linked(inner):
    """Something of a step, a folder or a file, is elsewhere."""

    def harm(folder):
        path, outside = folder / inner, folder.parent.parent / "outside"
        shutil.move(path, outside)
        path.symlink_to(outside)

    return harm


def a_pipe(inner):
    """Reading it would wait for ever."""

    def harm(folder):
        (folder / inner).unlink(missing_ok=True)
        os.mkfifo(folder / inner)

    return harm


class Run:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def pickles(folder):
    names = ("checkpoint.pkl", "state/_METADATA", "orbax.checkpoint", "state/_sharding")
    for name in (*names, "_CHECKPOINT_METADATA", "state/manifest.ocdbt"):
        (folder / "state" / name).write_bytes(pickle.dumps(Run()))
    recompute(folder)


def metadata(text):
    """Orbax reads this file; we do not."""

    def harm(folder):
        (folder / "state" / "state" / "_METADATA").write_bytes(text)
        recompute(folder)

    return harm


def of_another_program(folder):
    shutil.rmtree(folder)
    ocp.save(folder, {"a": np.ones(3)})


HARMS = {
    "a file elsewhere": linked("state/state/manifest.ocdbt"),
    "arrays elsewhere": linked("state"),
    "the step elsewhere": linked("."),
    "the manifest elsewhere": linked("manifest.json"),
    "a pipe for a manifest": a_pipe("manifest.json"),
    "a pipe among the arrays": a_pipe("state/p"),
    "pickles": pickles,
    "of another program": of_another_program,
    "a size below 0": of_each_file(size=-1),
    "a size of text": of_each_file(size="12"),
    "no checksum": of_each_file(sha256=None),
    "another field": of_each_file(more=1),
    "an absolute name": edit(
        lambda content: content["files"].update(
            {"/etc/passwd": {"size": 1, "sha256": "0" * 64}}
        )
    ),
    "leaves in a list": edit(lambda content: content.update(leaves=[])),
    "a kind of key": edit(lambda content: content["leaves"]["a"].update(key_impl=5)),
    "no path": edit(lambda content: content["leaves"]["a"].update(keys=[])),
}


@pytest.mark.parametrize("name", HARMS)
def test_it_is_damage_and_stops_nothing(name, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = tmp_path / "steps"
    shutil.copytree(saved, steps)
    HARMS[name](steps / "2")
    with Checkpointer(steps) as reader:
        assert reader.verify(2).damage
        assert str(reader.verify(2)).isprintable()
        assert len(reader.describe(2).splitlines()) == 1
        found = reader.restore(STATE)
        assert (found.step, set(found.damaged)) == (1, {2})
        with pytest.raises(CheckpointError):
            reader.migrate(2)
    with Checkpointer(steps, retention=Retention(keep_last=1)) as writer:
        writer.save(3, STATE)
    assert Checkpointer(steps).restore(STATE).step == 3
    assert not (tmp_path / "ran").exists()


def test_what_only_orbax_reads_harms_nothing(saved, tmp_path):
    for number, text in enumerate((b"{}", b"[" * 200_000)):
        steps = tmp_path / str(number)
        shutil.copytree(saved, steps)
        metadata(text)(steps / "2")
        assert Checkpointer(steps).verify(2).damage is None
        np.testing.assert_equal(Checkpointer(steps).restore(STATE).state, STATE)


def test_an_array_that_is_said_to_be_keys_does_not_fit(saved, tmp_path):
    steps = tmp_path / "steps"
    shutil.copytree(saved, steps)
    edit(lambda c: c["leaves"]["a"].update(key_impl="none such"))(steps / "2")
    with pytest.raises(
        CheckpointError, match=r"a: expected float32\[2, 3\], found none"
    ):
        Checkpointer(steps).restore(STATE)


def test_odd_numbers_of_steps(saved, tmp_path):
    steps = tmp_path / "steps"
    shutil.copytree(saved, steps)
    for name in ("-1", "1e3", "00", "01", "+3", " 4", "٣", "1_0", "0x10", "²", ".5"):
        (steps / name).mkdir()
    assert Checkpointer(steps).steps() == [1, 2]
    large = [2**63, int("9" * 200)]
    for step in large:
        shutil.copytree(saved / "2", steps / str(step))
    found = Checkpointer(steps).restore(STATE)
    assert (found.step, set(found.damaged)) == (2, set(large))


def test_other_values_are_refused_only_with_a_key(saved, tmp_path):
    """Checksums find damage, not an attacker, who computes them anew."""
    header = Header(schema=3, step=3, saved=4e9, metrics={}, config=None, order=9)
    with Checkpointer(tmp_path / "steps", key=KEY) as checkpoints:
        checkpoints.save(1, STATE)
    folder = tmp_path / "steps" / "3"
    folder.mkdir()
    other = {**STATE, "a": STATE["a"] * 1000}
    step_folder.write(folder, to_host(other), header)
    shutil.copytree(saved / "1", tmp_path / "plain" / "1")
    shutil.copytree(folder, tmp_path / "plain" / "3")
    found = Checkpointer(tmp_path / "plain").restore(STATE)
    np.testing.assert_equal(found.state, other)
    signed = Checkpointer(tmp_path / "steps", key=KEY).restore(STATE)
    assert (signed.step, set(signed.damaged)) == (1, {3})
    np.testing.assert_equal(signed.state, STATE)
