"""Baselines: the statistic against noise, saved programs, and real comparisons."""

import contextlib
import dataclasses
import io
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from esper_jax.cli import main
from esper_jax.lifecycle.stages import Stage
from esper_jax.rollout import baseline
from esper_jax.rollout.baseline.comparison import judged
from esper_jax.rollout.baseline.exported import compiled, export_program, load, occupied
from esper_jax.rollout.baseline.timing import (
    Ratio,
    Times,
    busy_of_marks,
    device_times,
    ratio_of,
    take_turns,
)
from esper_jax.rollout.baseline.words import compared
from esper_jax.run.build import build_run, load_data
from esper_jax.run.config import ConfigError, load_config
from esper_jax.run.folder import RunError

SMOKE = Path(__file__).parents[1] / "configs" / "smoke.toml"
SMALL = (
    "model.hidden=[8]",
    "growth.num_seeds=2",
    "growth.capacity=2",
    'growth.blueprints=["affine"]',
    "train.batch_size=32",
)


def loaded_machine(rng, slower=1.0):
    """Times on a machine that others use: bursts over many calls, and long tails."""
    rounds, calls = 40, 10
    burst = np.repeat(
        rng.choice([1, 1.3, 2.5], (rounds // 4, 1), p=[0.6, 0.3, 0.1]), 4, 0
    )
    both = []
    for factor in (1.0, slower):
        of_turn = burst * rng.lognormal(0, 0.1, (rounds, 1))
        tails = 1 + rng.pareto(1.5, (rounds, calls)) * 0.2
        both.append(1e-3 * factor * of_turn * tails)
    return Times(both[0], both[1], "wall")


def test_the_same_program_raises_no_alarm_on_a_loaded_machine():
    rng = np.random.default_rng(0)
    alike = [ratio_of(loaded_machine(rng)) for _ in range(2000)]
    # Even without any tolerance: the interval allows 1 in 200 on this side.
    assert sum(r.low > 1 for r in alike) <= 0.0075 * 2000
    assert sum(r.low > 1.1 for r in alike) == 0
    # And what is a third slower is found.
    slower = [ratio_of(loaded_machine(rng, 4 / 3)) for _ in range(200)]
    assert sum(r.low > 1.1 for r in slower) >= 0.99 * 200
    assert np.median([r.value for r in slower]) == pytest.approx(4 / 3, rel=0.02)


def test_the_interval_is_that_of_the_sign_test():
    ones = np.ones((40, 3))
    ratios = np.arange(1.0, 41)[:, None] * ones
    found = ratio_of(Times(ones, ratios, "wall"))
    # The sign test of SciPy rejects each true ratio outside, and none inside.
    for below in range(0, 20):
        rejects = stats.binomtest(below, 40).pvalue <= 0.01
        assert (found.low > below + 0.5) == rejects
        assert (found.high < 40.5 - below) == rejects
    assert found.value == 20.5
    few = ratio_of(Times(ones[:7], ratios[:7], "wall"))
    assert (few.low, few.high) == (0, np.inf)
    assert np.isfinite(ratio_of(Times(ones[:8], ratios[:8], "wall")).high)


def test_the_busy_time_of_a_gpu_is_read_from_the_profilers_trace():
    def named(kind, pid, tid, name):
        return {"ph": "M", "pid": pid, "tid": tid, "name": kind, "args": {"name": name}}

    def span(pid, tid, name, start, length):
        return {
            "ph": "X",
            "pid": pid,
            "tid": tid,
            "name": name,
            "ts": start,
            "dur": length,
        }

    events = [
        named("process_name", 1, 0, "/host:CPU"),
        named("process_name", 2, 0, "/device:GPU:0"),
        named("thread_name", 1, 5, "python"),
        named("thread_name", 2, 7, "Stream #7(Compute)"),
        named("thread_name", 2, 8, "Stream #8(MemcpyD2D)"),
        named("thread_name", 2, 9, "XLA Modules"),
        span(1, 5, "call", 200, 90),
        span(1, 5, "call", 100, 90),
        span(2, 7, "before", 80, 10),  # no call's
        span(2, 7, "fusion", 110, 20),
        span(2, 8, "copy", 120, 20),  # 10 of it beside the fusion
        span(2, 7, "fusion", 199, 11),  # the clocks differ by a moment
        span(2, 9, "module", 110, 80),  # no kernel
        span(1, 5, "fusion", 150, 20),  # not on the device
    ]
    busy = busy_of_marks(events, "call")
    np.testing.assert_allclose(busy, [30e-6, 11e-6])
    assert busy_of_marks([e for e in events if e["pid"] != 2], "call") is None


def test_a_machine_without_a_gpu_has_no_kernels_in_the_profilers_trace():
    assert device_times([lambda: jnp.ones(3) + 1] * 2) is None


def test_turns_begin_with_each_program_in_turn():
    order = []

    def replay(name):
        def ready(count):
            order.append(name)
            return [lambda: jnp.zeros(())] * count

        return ready

    times = take_turns(replay("a"), replay("b"), 3)
    assert "".join(order[-6:]) == "abbaab"
    assert times.first.shape == times.second.shape == (3, 20)
    assert times.clock == "wall"


def test_a_saved_program_gives_the_same_bits_again(tmp_path):
    """With random keys, donated states, and dtypes that NumPy does not know."""

    def step(state, data):
        key, x = state["key"], state["x"]
        noise = jax.random.normal(key, x.shape, x.dtype)
        new = {"key": jax.random.fold_in(key, 1), "x": x + noise * data[0]}
        return new, x.sum()

    state = {"key": jax.random.key(3), "x": jnp.ones((2, 3), jnp.bfloat16)}
    data = (jnp.float16(2).astype(jnp.bfloat16), jnp.arange(3))
    exported = export_program(step, state, data)
    exported.save(tmp_path / "step")
    again = load(tmp_path / "step")
    assert again.text == exported.text
    ready = compiled(again)
    first, second = ready.replay(2)
    jax.block_until_ready(first())
    key, x, total = second()
    once, _ = step(state, data)
    expected, sum_before = step(once, data)
    np.testing.assert_array_equal(x, expected["x"])
    np.testing.assert_array_equal(key, jax.random.key_data(expected["key"]))
    assert (x.dtype, float(total)) == (jnp.bfloat16, float(sum_before))
    # Each turn begins with the saved state.
    np.testing.assert_array_equal(ready.replay(1)[0]()[1], once["x"])
    assert ready.memory > 0
    for name in ("step.stablehlo", "step.npz"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:50])
        with pytest.raises(
            RunError, match=r"cannot be used: .*save the baseline again"
        ):
            load(tmp_path / "step")
        (tmp_path / name).write_bytes(whole)
    other = dataclasses.replace(
        again, program=dataclasses.replace(again.program, platforms=("tpu",))
    )
    with pytest.raises(RunError, match="is for tpu, and this device is cpu"):
        compiled(other)


def esper(monkeypatch, *arguments):
    """Exit status of ``esper-jax bench``."""
    words = ["bench", str(SMOKE), *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", ["esper-jax", *words])
    try:
        main()
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A config, prepared, its baseline, and what the command printed of it."""
    folder = tmp_path_factory.mktemp("baselines") / "small"
    words = ["--save", "small", "--dir", folder.parent, "--rounds", 8, "--set", *SMALL]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        assert esper(patch, *words) == 0
    prepared = baseline.prepare(load_config(SMOKE, SMALL))
    return prepared, printed.getvalue().splitlines(), folder


def test_a_baseline_holds_what_is_needed_to_run_it_again(saved):
    prepared, printed, folder = saved
    table = json.loads((folder / "baseline.json").read_text())
    assert table["sizes"]["batch"] == ["float32[32, 64]", "int32[32]"]
    assert table["sizes"]["rows"] == 32
    assert table["sizes"]["slots"] == 2
    assert table["settings"]["platform"] == "cpu"
    assert len(table["config_hash"]) == 64
    step = table["figures"]["step"]
    assert 0 < step["median"] <= step["p95"] <= step["p99"]
    assert step["memory"] > 4 * sum(x.size for x in prepared.programs["step"].data)
    assert step["compile_seconds"] > 0
    assert table["rows_per_second"] == pytest.approx(32 / step["median"])
    assert [line.split(" ")[0] for line in printed[1:3]] == ["step", "tick"]
    assert f"{1e3 * step['median']:.3f} ms" in printed[1]
    assert printed[-2].endswith(
        "rows per second; times are wall clock, until the result is there"
    )
    assert printed[-1] == f"baseline: {folder}"
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(RunError, match="small exists: choose another --save NAME"):
        baseline.save(prepared, {}, folder)
    assert sorted(folder.parent.rglob("*")) == before


def test_every_slot_is_in_use_where_a_step_is_measured():
    config = load_config(SMOKE, SMALL)
    program = build_run(config, load_data(config))
    state = occupied(program.init(jax.random.key(0)))
    [seeds] = state.seeds.values()
    assert list(seeds.stage) == [Stage.FINE_TUNING] * 2
    assert list(seeds.seed_of_slot) == list(seeds.slot_of_seed) == [0, 1]


def test_the_same_code_is_no_regression(saved):
    prepared, _, folder = saved
    found = baseline.compare(prepared, folder, tolerance=0.0, rounds=8)
    assert found.same == {"step": True, "tick": True}
    assert not found.regressed
    assert not found.changes
    assert not found.unlike
    memory = [p for p in found.parts if p.name.endswith("memory")]
    assert [p.ratio.value for p in memory] == [1, 1]
    assert compared(found, 32)[-1].startswith(
        "no regression: the programs are the same"
    )


def test_a_config_that_does_more_work_is_a_regression(
    saved, tmp_path, monkeypatch, capsys
):
    *_, folder = saved
    more = ["--set", *SMALL, "--set", "model.hidden=[800]", "--rounds", 8]
    written = tmp_path / "comparison.json"
    where = ["--against", "small", "--dir", folder.parent, "--json", written]
    assert esper(monkeypatch, *where, *more) == 1
    printed = capsys.readouterr().out
    assert "config: model.hidden [8] -> [800]" in printed
    table = json.loads(written.read_text())
    assert table["regressed"]
    parts = {part["name"]: part for part in table["parts"]}
    assert {p["verdict"] for p in parts.values()} == {"regression"}
    assert parts["step"]["interval"][0] > 1.1
    assert parts["step memory"]["ratio"] > 10
    ratio = parts["step"]["ratio"]
    assert f"regression: step takes {ratio:.3f} times as long [" in printed


def test_verdicts_need_the_whole_interval():
    for low, high, verdict in (
        (1.11, 1.3, "regression"),
        (1.09, 1.3, "not decided"),
        (0.7, 1.09, "within tolerance"),
        (0.7, 0.9, "better"),
    ):
        ratio = Ratio((low + high) / 2, low, high)
        assert judged("step", 1.0, 1.0, ratio, 0.1, False).verdict == verdict
        assert judged("step", 1.0, 1.0, ratio, 0.1, True).verdict == "within tolerance"


def test_what_cannot_be_compared_is_refused(saved, tmp_path, monkeypatch, capsys):
    prepared, _, folder = saved
    monkeypatch.chdir(tmp_path)
    path = folder / "baseline.json"
    whole = path.read_text()
    table = json.loads(whole)
    gpu = table["settings"] | {"platform": "gpu"}
    rows = table["sizes"] | {"held_out": ["float32[9, 64]"]}
    for change, message in (
        ({"settings": gpu}, "with platform 'gpu', and this is 'cpu'"),
        ({"sizes": rows}, r"with held-out data of float32\[9, 64\]"),
        ({"sizes": None}, "is damaged: it has not the tables"),
    ):
        path.write_text(json.dumps(table | change))
        with pytest.raises(RunError, match=message):
            baseline.compare(prepared, folder, tolerance=0.1, rounds=8)
    path.write_text(whole)
    program = folder / "step.stablehlo"
    data = program.read_bytes()
    program.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    there = ["--dir", folder.parent, "--against"]
    for words, message in (
        ([*there, "small"], "step.stablehlo is damaged or gone: put it back"),
        ([*there, "other"], "other holds no baseline; there is small in"),
        (["--against", "one"], "one holds no baseline; there is none in baselines"),
        (["--against", "../one"], "expected a name of letters"),
        ([*there, "small", "--save", "small"], "expected one of them, got both"),
        (["--dir", folder.parent, "--save", "small"], "small exists"),
        (["--tolerance", "-1"], "--tolerance: expected a share"),
        (["--rounds", "7"], "--rounds: expected from 8"),
        (["--json", "x"], "--json: expected --against"),
        (["--set", "train.tics=1"], "train.tics: unknown key"),
    ):
        assert esper(monkeypatch, *words) == 2
        assert message in capsys.readouterr().err
    program.write_bytes(data)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="unknown key"):
        load_config(SMOKE, ["train.tics=1"])
