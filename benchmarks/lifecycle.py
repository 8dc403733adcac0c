"""Times `lifecycle.step` with 1,000, 10,000 and 1,000,000 seeds.

    PYTHONPATH=. python3 benchmarks/lifecycle.py [--seeds N ...] [--repeats N]

The step runs on the default device. It is compared with

- a plain Python loop over seeds, ``tests/lifecycle_oracle.py``, which the tests use as
  their oracle;
- numpy on whole arrays, `lifecycle_numpy.numpy_step`;
- a copy of the state's bytes on the same device in the same run: the time to read and
  write the state once. Its bandwidth gives "bound", the time to move the bytes that a
  step has to move.

Before anything is timed, all three versions step the same inputs and must agree.
Signals have one value a seed. States are donated.

"step" is the time of one more step in a jitted call; the copy is timed in that way too.
"one call" is a call with one step, and includes the cost of calling a jitted function
of 44 arrays.
"""

import argparse
import dataclasses
import functools
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from lifecycle_numpy import check_numpy, numpy_step

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import lifecycle_oracle as oracle

from esper_jax import lifecycle
from esper_jax.lifecycle import (
    Commands,
    LifecycleConfig,
    SeedState,
    Signals,
    Stage,
    Strategy,
    init_seeds,
)
from esper_jax.lifecycle.history import unpack_history
from esper_jax.lifecycle.stages import LEGAL

CONFIG = LifecycleConfig(max_epochs=500)
CAPACITY = 1024
STEPS = (2, 12)
"""Steps of the shorter and of the longer call; the difference gives one step."""


def population(
    seeds: int, capacity: int, rng: np.random.Generator
) -> tuple[SeedState, Commands, Signals]:
    """Random seeds in all stages, with commands and signals, as numpy arrays.

    Three quarters of the slots are owned. One in ten seeds is asked for a transition.
    """
    living = rng.choice(seeds, int(0.75 * capacity), replace=False)
    stage = rng.choice(
        [Stage.DORMANT, Stage.CULLED, Stage.CANCELLED, Stage.ROLLED_BACK],
        seeds,
        p=[0.97, 0.01, 0.01, 0.01],
    )
    stage[living] = rng.integers(Stage.GERMINATED, Stage.CULLED, living.size)
    slots = rng.permutation(capacity)[: living.size]
    slot_of_seed = np.full(seeds, -1, np.int32)
    slot_of_seed[living] = slots
    seed_of_slot = np.full(capacity, -1, np.int32)
    seed_of_slot[slots] = living
    state = jax.device_get(init_seeds(seeds, capacity))
    state = dataclasses.replace(
        state,
        stage=stage.astype(np.int8),
        strategy=rng.integers(0, len(Strategy), seeds).astype(np.int8),
        epochs_in_stage=rng.integers(0, 200, seeds).astype(np.uint16),
        error_count=rng.integers(0, 8, seeds).astype(np.uint8),
        slot_of_seed=slot_of_seed,
        seed_of_slot=seed_of_slot,
        graft=dataclasses.replace(
            state.graft,
            alpha=rng.random(seeds, np.float32),
            pause=rng.integers(0, 3, seeds).astype(np.uint16),
        ),
    )
    table = np.array([(LEGAL[s] + (Stage.DORMANT,) * 4)[:4] for s in Stage])
    target = table[stage, rng.integers(0, 4, seeds)]
    asked = rng.random(seeds) < 0.1
    commands = Commands(
        target=np.where(asked, target, -1).astype(np.int8),
        blueprint=rng.integers(-1, 4, seeds).astype(np.int8),
        strategy=rng.integers(-1, len(Strategy), seeds).astype(np.int8),
    )
    names = [f.name for f in dataclasses.fields(Signals)]
    values = np.array([np.nan, 0.0, 0.005, 0.05, 0.5, 0.9, 1.0, -0.1], np.float32)
    signals = Signals(**{name: rng.choice(values, seeds) for name in names})
    return state, commands, signals


def python_layer(state: SeedState) -> oracle.Layer:
    """The seeds and slots of ``state`` as the plain Python loop holds them."""
    layer = oracle.Layer(state.num_seeds, state.capacity)
    layer.slots = state.seed_of_slot.tolist()
    columns = {
        "stage": state.stage,
        "parent": state.parent_stage,
        "blueprint": state.blueprint,
        "strategy": state.strategy,
        "epochs": state.epochs_in_stage,
        "errors": state.error_count,
        "slot": state.slot_of_seed,
        "alpha": state.graft.alpha,
        "pause": state.graft.pause,
    }
    for name, values in columns.items():
        for seed, value in zip(layer.seeds, values.tolist(), strict=True):
            setattr(seed, name, value)
    return layer


def python_inputs(commands: Commands, signals: Signals) -> tuple[Any, ...]:
    """Commands and signals as lists with one entry a seed."""
    names = [f.name for f in dataclasses.fields(Signals)]
    return (
        commands.target.tolist(),
        commands.blueprint.tolist(),
        commands.strategy.tolist(),
        oracle.rows({name: getattr(signals, name) for name in names}),
    )


def check_python(
    ours: tuple[SeedState, Any], layer: oracle.Layer, outcome: list[int]
) -> None:
    """Compares all that the loop knows: integers exactly, floats to 1e-5."""
    state = ours[0]
    np.testing.assert_array_equal(ours[1], outcome)
    np.testing.assert_array_equal(state.seed_of_slot, layer.slots)
    exact = {
        "stage": state.stage,
        "parent": state.parent_stage,
        "blueprint": state.blueprint,
        "strategy": state.strategy,
        "epochs": state.epochs_in_stage,
        "errors": state.error_count,
        "slot": state.slot_of_seed,
        "pause": state.graft.pause,
        "unstable": state.graft.unstable_checks,
    }
    close = {
        "alpha": state.graft.alpha,
        "velocity": state.graft.velocity,
        "remembered": state.graft.stable_alpha,
        "previous": state.graft.previous_loss,
    }
    for name, values in (exact | close).items():
        theirs = [getattr(seed, name) for seed in layer.seeds]
        atol = 1e-5 if name in close else 0
        np.testing.assert_allclose(values, theirs, rtol=0, atol=atol, err_msg=name)
    last = [
        a << 4 | b
        for a, b in (s.history[0] if s.history else (0, 0) for s in layer.seeds)
    ]
    np.testing.assert_array_equal(unpack_history(state.history)[:, 0], last)


def median(run: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, after one call that warms up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def time_steps(
    state: SeedState, commands: Commands, signals: Signals, repeats: int
) -> tuple[float, float]:
    """Seconds of one more step in a call, and of one step in one call."""

    @functools.partial(jax.jit, donate_argnums=0)
    def one(state: SeedState, commands: Commands, signals: Signals) -> Any:
        return lifecycle.step(state, commands, signals, CONFIG)

    held: Any = one(state, commands, signals)

    def run_one() -> None:
        nonlocal held
        held = jax.block_until_ready(one(held[0], commands, signals))

    alone = median(run_one, repeats)

    def more(held: Any) -> Any:
        return lifecycle.step(held[0], commands, signals, CONFIG)

    return time_more(more, held, repeats), alone


def time_copy(size: int, repeats: int) -> float:
    """Seconds to read and write ``size`` bytes once on the device."""
    buffer = jnp.zeros((-(-size // 4),), jnp.uint32)
    return time_more(lambda b: b + jnp.uint32(1), buffer, repeats)


def time_more(step: Callable[[Any], Any], held: Any, repeats: int) -> float:
    """Seconds that one more ``held = step(held)`` in a jitted call takes."""

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=1)
    def several(held: Any, count: int) -> Any:
        for _ in range(count):
            # The barrier keeps XLA from merging steps into fewer kernels.
            held = jax.lax.optimization_barrier(step(held))
        return held

    def run(count: int) -> None:
        nonlocal held
        held = jax.block_until_ready(several(held, count))

    few, many = STEPS
    longer = median(lambda: run(many), repeats)
    return (longer - median(lambda: run(few), repeats)) / (many - few)


def moved_bytes(state: SeedState, commands: Commands, signals: Signals) -> int:
    """Bytes that a step has to read and write.

    What it changes counts twice. What it only reads counts once, as does the outcome.
    """
    untouched = (state.statistics, state.health, state.reconstruction, state.gain)
    untouched += (state.errors, state.steps)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    size -= sum(leaf.nbytes for leaf in jax.tree.leaves(untouched))
    reads = ("reconstruction_loss", "worth", "stability")
    reads += ("error_rate", "mean_worth", "drift")
    reads += ("loss_variance", "accuracy_variance", "grad_norm")
    size = 2 * size + sum(getattr(signals, name).nbytes for name in reads)
    return (
        size + sum(leaf.nbytes for leaf in jax.tree.leaves(commands)) + state.num_seeds
    )


def measure(seeds: int, repeats: int, python_time: dict[int, float]) -> list[str]:
    """One row of the table.

    Args:
      seeds: how many.
      repeats: timed calls of each kind.
      python_time: seconds of the Python loop by number of seeds. Up to 10,000 seeds the
        loop runs and is entered here; above, the largest entry is scaled up.
    """
    capacity = min(CAPACITY, seeds)
    rng = np.random.default_rng(seeds)
    state, commands, signals = population(seeds, capacity, rng)
    ours = jax.jit(lifecycle.step, static_argnums=3)(
        *jax.device_put((state, commands, signals)), CONFIG
    )
    ours = jax.device_get(ours)
    with np.errstate(all="ignore"):
        check_numpy(ours, numpy_step(state, commands, signals, CONFIG))
        numpy_time = median(lambda: numpy_step(state, commands, signals, CONFIG), 5)
    if seeds <= 10_000:
        layer = python_layer(state)
        inputs = python_inputs(commands, signals)
        start = time.perf_counter()
        outcome = layer.tick(*inputs, CONFIG)
        python_time[seeds] = time.perf_counter() - start
        check_python(ours, layer, outcome)
        loop, mark = python_time[seeds], ""
    else:
        known = max(python_time)
        loop, mark = python_time[known] * seeds / known, "*"

    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    state, commands, signals = jax.device_put((state, commands, signals))
    moved = moved_bytes(state, commands, signals)
    copy = time_copy(size, repeats)
    together, alone = time_steps(state, commands, signals, repeats)
    bandwidth = 2 * size / copy
    return [
        f"{seeds:,}",
        f"{capacity:,}",
        f"{size / seeds:.1f}",
        f"{together * 1e6:,.0f}",
        f"{alone * 1e6:,.0f}",
        f"{seeds / together:.3g}",
        f"{copy * 1e6:,.1f}",
        f"{bandwidth / 1e9:,.0f}",
        f"{together / copy:.2f}",
        f"{together / (moved / bandwidth):.2f}",
        f"{numpy_time / together:,.1f}",
        f"{loop / together:,.0f}{mark}",
    ]


HEADER = [
    "seeds",
    "slots",
    "bytes/seed",
    "step us",
    "one call us",
    "seeds/s",
    "copy us",
    "copy GB/s",
    "step/copy",
    "step/bound",
    "numpy/step",
    "loop/step",
]


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1000, 10_000, 1_000_000]
    )
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    device = jax.devices()[0]
    print(
        f"device {device.device_kind} ({device.platform}), host {platform.machine()}, "
        f"python {platform.python_version()}, jax {jax.__version__}, "
        f"jaxlib {jaxlib.__version__}, numpy {np.__version__}"
    )
    python_time: dict[int, float] = {}
    rows = [HEADER]
    for seeds in sorted(args.seeds):
        if seeds > 10_000 and not python_time:
            measure(10_000, 1, python_time)
        rows.append(measure(seeds, args.repeats, python_time))
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    for row in rows:
        print("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)))
    print(
        f"step: one more step in a call, from calls of {STEPS[0]} and {STEPS[1]} "
        "steps.\nstep/copy: step over the time to read and write the state once.\n"
        "step/bound: step over the time to move, at the copy's bandwidth, the bytes "
        "that\na step has to move, signals and commands included.\n"
        "numpy/step, loop/step: times on the host over step. Both gave the same "
        "results.\n* the loop's time for 10,000 seeds, scaled up."
    )


if __name__ == "__main__":
    main()
