"""Runs that older programs saved: they evaluate, go on and migrate.

``run_v0.1_smoke`` is ``configs/smoke.toml`` as version 0.1 ran it, without two of its
four checkpoints. The others are small runs of commits from before, when schema 3 had
other layouts: ``bytes`` (d62e44a), ``words`` (03b617f) and ``wide`` (91e9278).
"""

import json
import logging
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_jax.checkpoint import Checkpointer, CheckpointError, step_folder
from esper_jax.checkpoint.host_leaves import HostLeaf
from esper_jax.cli import main
from esper_jax.data import DATASETS
from esper_jax.lifecycle.stages import Stage
from esper_jax.lifecycle.state import transitions
from esper_jax.migrations import CURRENT
from esper_jax.run.folder import RunFolder, read_config
from esper_jax.run.run import build_run

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
SMOKE = FIXTURES / "run_v0.1_smoke"
EARLY = {name: FIXTURES / f"run_schema_3_{name}" for name in ("bytes", "words", "wide")}


def esper(*arguments, patch):
    patch.setattr(sys, "argv", ["esper-jax", *map(str, arguments)])
    try:
        main()
    except SystemExit as stopped:
        return stopped.code
    return 0


def summary_of(run):
    return json.loads((run / "summary.json").read_text())


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_of_version_0_1_evaluates(monkeypatch, capsys):
    assert esper("evaluate", SMOKE, patch=monkeypatch) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["step"] == 320
    # Other devices and versions of XLA round otherwise.
    assert found["accuracy"] == pytest.approx(summary_of(SMOKE)["final_accuracy"])
    assert found["loss"] == pytest.approx(summary_of(SMOKE)["final_loss"], rel=1e-4)


def test_a_run_of_version_0_1_goes_on(tmp_path, monkeypatch, capsys):
    run = shutil.copytree(SMOKE, tmp_path / "run")
    arguments = ["--out", run, "--resume", "--set", "train.ticks=42"]
    config = ROOT / "configs" / "smoke.toml"
    assert esper("train", config, *arguments, patch=monkeypatch) == 0
    old, new = summary_of(SMOKE), summary_of(run)
    assert new["events"][: len(old["events"])] == old["events"]
    assert new["host_params"] == old["host_params"]
    assert new["grown_params"] == old["grown_params"] == 152  # two fossils
    ticks = lines_of(run / "ticks.jsonl")
    assert ticks[:40] == lines_of(SMOKE / "ticks.jsonl")
    assert [line["tick"] for line in ticks[40:]] == [41, 42]
    # It went on from what it was: the loss is about that of tick 40, not of tick 1.
    assert ticks[41]["loss"] == pytest.approx(ticks[39]["loss"], abs=0.05)
    assert Checkpointer(run / "checkpoints").steps() == [160, 320, 336]


def test_a_run_of_version_0_1_migrates(tmp_path, monkeypatch, capsys):
    run = shutil.copytree(SMOKE, tmp_path / "run")
    assert esper("checkpoint", "migrate", run, patch=monkeypatch) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2
    assert esper("checkpoint", "verify", run, patch=monkeypatch) == 0
    lines = [f"step {step}: sound (schema {CURRENT})" for step in (160, 320)]
    assert capsys.readouterr().out.splitlines() == lines


@pytest.fixture(scope="module")
def program():
    """Of the early runs, whose configs are equal where they say anything."""
    config = read_config(RunFolder(EARLY["wide"]))
    data = DATASETS[config.data.name](config.data.seed)
    built = build_run(config, data)
    return built, built.init(jax.random.key(1)), jax.tree.map(jnp.asarray, data.test)


LACKING = {
    "bytes": {"history", "worth_ticks", "memory/key", "monitor/gra", "governor/best"},
    "words": {"worth_ticks", "memory/key", "monitor/gra"},
    "wide": {"worth_ticks"},
}


@pytest.mark.parametrize("form", EARLY)
def test_early_forms_of_schema_3_restore_and_migrate(
    form, tmp_path, program, monkeypatch, capsys, caplog
):
    built, like, test = program
    run = shutil.copytree(EARLY[form], tmp_path / "run")
    checkpoints = Checkpointer(run / "checkpoints")
    with caplog.at_level(logging.WARNING, logger="esper_jax"):
        state = checkpoints.restore(like).state
    told = "\n".join(record.getMessage() for record in caplog.records)
    every = set.union(*LACKING.values())
    assert {name for name in every if name in told} == LACKING[form]
    loss, accuracy = built.evaluate(state, test)
    expected = summary_of(run)
    assert float(accuracy) == pytest.approx(expected["final_accuracy"])
    assert float(loss) == pytest.approx(expected["final_loss"], rel=1e-4)
    seeds = state.seeds["layers/0"]
    assert seeds.stage.tolist() == [Stage.FINE_TUNING, Stage.DORMANT]
    path = [event["to"] for event in expected["events"] if event["outcome"] == "OK"]
    assert [to.name for _, to in transitions(seeds, 0)] == path[::-1]
    if form == "wide":
        assert int(state.memory.tried[0]) == 1
        assert int(seeds.worth_ticks[0]) > 0
    else:
        assert state.memory.tried.tolist() == [0]
        assert np.isnan(state.memory.before["layers/0"]).all()
        assert seeds.worth_ticks.tolist() == [0, 0]
    if form == "bytes":
        assert np.isnan(state.governor.losses).all()
        assert int(state.governor.rollbacks) == 0

    assert esper("checkpoint", "migrate", run, patch=monkeypatch) == 0
    assert f"step 40: sound (schema {CURRENT}), was 3" in capsys.readouterr().out
    caplog.clear()
    again = checkpoints.restore(like).state
    assert caplog.records == []
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for one, two in zip(*map(jax.tree.leaves, (again, state)), strict=True):
        a, b = (
            jax.random.key_data(x)
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            else x
            for x in (one, two)
        )
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def rewritten(run, change):
    """The step of a run with one leaf changed, as if it had been saved like this."""
    folder = run / "checkpoints" / "40"
    manifest, leaves = step_folder.read(folder, 40)
    leaves = change(leaves)
    shutil.rmtree(folder)
    folder.mkdir()
    step_folder.write(folder, leaves, manifest)


def with_leaf(name, value):
    def change(leaves):
        array = leaves[name].array.copy()
        array[...] = value
        return {**leaves, name: HostLeaf(leaves[name].keys, array)}

    return change


def without(start):
    return lambda leaves: {n: x for n, x in leaves.items() if not n.startswith(start)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            with_leaf("seeds/layers/0/strategy", 7),
            r"strategy of seed 0: expected from 0 to 6, got 7",
        ),
        (
            with_leaf("seeds/layers/0/stage", 11),
            r"stage of seed 0: expected from 0 to 10, got 11",
        ),
        (
            with_leaf("memory/reason", 99),
            r"memory/reason: expected from 0 to 11, got 99",
        ),
        (
            without("seeds/layers/0/health"),
            r"health: expected .* found nothing|health is missing",
        ),
        (without("monitor/initial"), r"monitor/initial_loss: .* found nothing"),
        (without("memory/"), r"memory/best_loss: expected .* found nothing"),
    ],
)
def test_what_no_program_saved_is_refused_by_name(change, message, tmp_path, program):
    run = shutil.copytree(EARLY["wide"], tmp_path / "run")
    rewritten(run, change)
    with pytest.raises(CheckpointError, match=message):
        Checkpointer(run / "checkpoints").restore(program[1])


def test_an_early_step_without_a_config_needs_a_state_to_fill(tmp_path, program):
    run = shutil.copytree(EARLY["words"], tmp_path / "run")
    folder = run / "checkpoints" / "40"
    manifest, leaves = step_folder.read(folder, 40)
    shutil.rmtree(folder)
    folder.mkdir()
    fields = {
        name: getattr(manifest, name) for name in ("schema", "step", "saved", "metrics")
    }
    step_folder.write(folder, leaves, step_folder.Header(**fields, config=None))
    with Checkpointer(run / "checkpoints") as checkpoints:
        with pytest.raises(CheckpointError, match=r"memory/tried cannot be .* size N"):
            checkpoints.migrate(40)
        assert checkpoints.restore(program[1]).state.memory.tried.tolist() == [0]
