"""Two thousand ticks with births, culls, rollbacks and saves use no more at the end.

    pytest -m slow tests/test_soak.py

Figures go to the folder that ESPER_JAX_FIGURES names, or to pytest's own.
"""

import collections
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from matplotlib.figure import Figure
from soak_module import BATCH, BROKEN_EVERY, CLASSES, STEPS, measured, rows

from esper_jax.checkpoint import Retention
from esper_jax.checkpoint.checkpointer import Checkpointer
from esper_jax.hosts import MLP
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.stages import Outcome, Stage
from esper_jax.monitor.words import drain
from esper_jax.policy.config import ControllerConfig
from esper_jax.run.config import parse_config
from esper_jax.train import Governor, build, fit

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
TICKS, SETTLED, WINDOW = 2000, 100, 300
ALLOWED = 16
"""MB that the memory may rise by."""

GROWTH = {"num_seeds": 6, "capacity": 2}
CONTROLLER = {
    "when": "period",
    "period": 3,
    "training_limit": 6,
    "evaluation_limit": 6,
    "tuning_limit": 6,
}
LIFECYCLE = {
    "min_stability": 0.0,
    "cull_delta": -1e9,
    "min_improvement": 1000.0,  # no seed brings so much, so each goes in the end
}
RAMP = {"ramp_duration": 2}
AGES = {
    "TRAINING": 2,
    "GRAFTING": 2,
    "STABILIZATION": 1,
    "EVALUATING": 2,
    "FINE_TUNING": 2,
    "CULLED": 2,
    "ROLLED_BACK": 2,
}


def windows(samples, name):
    """A measurement over the first ticks after it has settled, and over the last."""
    values = [sample[name] for sample in samples]
    return values[SETTLED : SETTLED + WINDOW], values[-WINDOW:]


def check_level(samples):
    """Compares what neither a save in flight nor a neighbour moves."""
    assert samples[-1]["compilations"] == samples[SETTLED]["compilations"]
    # The lowest is that between two saves. TensorStore's pool takes its threads when it
    # first has work for them.
    for name, more in (("files", 1), ("threads", 4), ("python threads", 0)):
        first, last = windows(samples, name)
        assert min(last) <= min(first) + more, name
        assert max(last) <= max(first) + 4 + more, name
    first, last = map(statistics.median, windows(samples, "memory"))
    # 160 saves lie between. TensorStore keeps 300 bytes an array of each, some 4 MB in
    # all (see test_checkpoint_faults.py). The heaps of Orbax's threads fill unevenly at
    # first. A run of the command line keeps its events, about 1 kB each.
    assert last <= first + ALLOWED, f"{first:.1f} MB became {last:.1f} MB"
    first, last = map(statistics.median, windows(samples, "milliseconds"))
    assert last <= 1.3 * first, f"a tick of {first:.2f} ms takes {last:.2f} ms"


def with_times(samples):
    """Adds the CPU time of each tick, which other processes hardly change."""
    pairs = itertools.pairwise(samples)
    return [{**b, "milliseconds": 1e3 * (b["cpu"] - a["cpu"])} for a, b in pairs]


def draw(samples, title, folder):
    """A figure of what was measured, one panel a quantity."""
    figure = Figure(figsize=(9, 11), layout="constrained")
    panels = {
        "memory": "memory (MB)",
        "files": "open files",
        "threads": "threads",
        "compilations": "compilations",
        "milliseconds": "CPU time of a tick (ms)",
    }
    for axes, (name, label) in zip(
        figure.subplots(len(panels), sharex=True), panels.items(), strict=True
    ):
        values = [sample[name] for sample in samples]
        axes.plot(values, linewidth=0.6)
        for window, start in zip(
            windows(samples, name), (SETTLED, len(values) - WINDOW), strict=True
        ):
            median = statistics.median(window)
            axes.plot([start, start + WINDOW], [median] * 2, "r", linewidth=2)
        axes.set_ylabel(label)
        if name == "milliseconds":
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0, top=1.15 * max(values))
    axes.set_xlabel("tick")
    figure.suptitle(f"{title}; red: medians of the first and last {WINDOW} ticks")
    folder = Path(os.environ.get("ESPER_JAX_FIGURES", folder))
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"soak-{title.replace(' ', '-')}.png", dpi=110)


def report(samples, title):
    """Prints the medians, for benchmarks/RESULTS.md."""
    for name in ("memory", "files", "threads", "compilations", "milliseconds"):
        lowest = name in ("files", "threads")
        level = min if lowest else statistics.median
        first, last = map(level, windows(samples, name))
        print(f"{title} | {name} | {first:.2f} | {last:.2f}")


def test_in_one_process(tmp_path):
    """`fit` is called forty times, each time with a governor of its own."""
    gates = parse_config(
        {"lifecycle": {**LIFECYCLE, "grafting": RAMP, "min_epochs": AGES}}
    ).lifecycle
    assert isinstance(gates, LifecycleConfig)
    program = build(
        MLP(6, (8,), CLASSES, **GROWTH, rngs=nnx.Rngs(0)),
        optax.adam(1e-2),
        optax.adam(1e-3),
        lifecycle_config=gates,
        controller_config=ControllerConfig(**CONTROLLER),
        eval_batch=32,
    )
    broken = set()

    def step_from(state, data, order, batch_size):
        tick, step = divmod(int(state.step), STEPS)
        if tick % BROKEN_EVERY == 30 and step == 2 and tick not in broken:
            broken.add(tick)
            data = (data[0] * jnp.nan, data[1])
        return program.step_from(state, data, order, batch_size)

    train, held_out = rows(BATCH * STEPS, 1), rows(32, 2)
    samples, counts = [], collections.Counter()

    def on_rollback(rollback):
        counts["rollbacks"] += 1

    with Checkpointer(tmp_path / "steps", retention=Retention(keep_last=3)) as saver:

        def on_tick(state, report):
            samples.append(measured())
            for layer in report.layers.values():
                for event in drain(layer, layer.signals, gates):
                    if event.outcome is Outcome.OK:
                        counts[Stage(event.target)] += 1
            if report.tick % 10 == 0:
                saver.save(int(state.step), state)
                counts["saves"] += 1

        state = program.init(jax.random.key(0))
        for ticks in range(50, TICKS + 1, 50):
            state = fit(
                program._replace(step_from=step_from),
                state,
                train,
                held_out,
                ticks=ticks,
                batch_size=BATCH,
                on_tick=on_tick,
                governor=Governor(
                    program, num_classes=CLASSES, on_rollback=on_rollback
                ),
            )
    samples = with_times(samples)
    print(counts)
    draw(samples, "in one process", tmp_path)
    report(samples, "in one process")
    check_level(samples)
    assert program.recompiles() == 0
    assert counts["rollbacks"] >= TICKS / BROKEN_EVERY
    assert counts["saves"] == TICKS / 10
    assert min(counts[Stage.GERMINATED], counts[Stage.CULLED]) > TICKS / 100


CONFIG = f"""
[model]
factory = "soak_module:model"
[data]
factory = "soak_module:data"
samples = "samples.jsonl"
[growth]
layers = ["hidden"]
num_seeds = {GROWTH["num_seeds"]}
capacity = {GROWTH["capacity"]}
[train]
ticks = {TICKS}
steps_per_tick = {STEPS}
learning_rate = 1e-2
[checkpoint]
every = 10
keep = 3
"""


def test_by_the_command_line(tmp_path):
    tables = {
        "controller": CONTROLLER,
        "lifecycle": LIFECYCLE,
        "lifecycle.grafting": RAMP,
        "lifecycle.min_epochs": AGES,
    }
    text = CONFIG + "".join(
        f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in table.items())
        for name, table in tables.items()
    )
    (tmp_path / "soak.toml").write_text(text)
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    subprocess.run(
        [sys.executable, "-m", "esper_jax", "train", "soak.toml", "--out", "run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    samples = with_times([json.loads(line) for line in lines])
    draw(samples, "by the command line", tmp_path)
    report(samples, "by the command line")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    events = summary["events"]
    moves = collections.Counter(e["to"] for e in events if e["outcome"] == "OK")
    print(moves, len(summary["rollbacks"]), len(events))
    check_level(samples)
    assert summary["recompiles"] == 0
    assert len(summary["rollbacks"]) >= TICKS / BROKEN_EVERY
    assert min(moves["GERMINATED"], moves["CULLED"]) > TICKS / 100
