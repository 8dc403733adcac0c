"""How fast is `lifecycle.step`? ``PYTHONPATH=. python3 benchmarks/lifecycle.py``

One tick of 1,000, 10,000 and 1,000,000 seeds on the default device, against

- a plain Python loop over seeds: ``tests/lifecycle_oracle.py``, the slow and obviously
  right version that the tests use too;
- numpy on whole arrays: `numpy_step`, below;
- a copy of the state's bytes on the same device, in the same run: what reading and
  writing the state once costs. Its bandwidth gives the time that the bytes which a tick
  has to move would take.

All three versions step the same inputs first, and have to agree. Signals are given per
seed. States are donated.

The two columns of ``step``: what one more step in a call costs (so is the copy timed),
and one step in one call (with the cost of calling a jitted function of 44 arrays).
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

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import lifecycle_oracle as oracle

from esper_jax import lifecycle
from esper_jax.lifecycle.commands import Commands
from esper_jax.lifecycle.grafting import GraftMemory, Strategy
from esper_jax.lifecycle.history import pack_history, unpack_history
from esper_jax.lifecycle.rules import LifecycleConfig, gates
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import LEGAL, NUM_STAGES, Outcome, Stage
from esper_jax.lifecycle.state import SeedState, init_seeds

CONFIG = LifecycleConfig(max_epochs=500)
CAPACITY = 1024
STEPS = (2, 12)


def population(
    seeds: int, capacity: int, rng: np.random.Generator
) -> tuple[SeedState, Commands, Signals]:
    """Seeds in all stages, three quarters of the slots owned, one in ten seeds asked
    for something. On the host."""
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


# The plain Python loop.


def python_layer(state: SeedState) -> oracle.Layer:
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
    names = [f.name for f in dataclasses.fields(Signals)]
    return (
        commands.target.tolist(),
        commands.blueprint.tolist(),
        commands.strategy.tolist(),
        oracle.rows({name: getattr(signals, name) for name in names}),
    )


# Numpy on whole arrays.

_TABLE = np.zeros((NUM_STAGES, NUM_STAGES), bool)
for _source, _targets in LEGAL.items():
    _TABLE[_source, list(_targets)] = True


def numpy_step(
    state: SeedState, commands: Commands, signals: Signals, config: LifecycleConfig
) -> tuple[SeedState, np.ndarray]:
    """`lifecycle.step` with numpy."""
    epochs = np.minimum(state.epochs_in_stage, 65534) + np.uint16(1)
    climbing = state.stage == Stage.GRAFTING
    climbed = _numpy_climb(state.graft, state.strategy, signals, epochs, config)
    graft = {
        name: np.where(climbing, new, getattr(state.graft, name))
        for name, new in climbed.items()
    }
    state = dataclasses.replace(state, epochs_in_stage=epochs)

    stage, target = state.stage, np.maximum(commands.target, 0)
    requested = commands.target != -1
    legal = _TABLE[stage, target]
    exempt = (target == Stage.CANCELLED) | (target == Stage.ROLLED_BACK)
    late_enough = exempt | (epochs >= np.array(config.min_epochs)[stage])
    passed = np.ones(stage.shape, bool)
    for (source, goal), (rule, tests) in gates(config).items():
        results = [test.passes(state, signals) for test in tests]
        met = np.all(results, 0) if rule == "all" else np.any(results, 0)
        passed &= ~((stage == source) & (target == goal)) | met
    allowed = requested & legal & late_enough & passed

    freed = allowed & (target >= Stage.CULLED)
    slot_of_seed = np.where(freed, -1, state.slot_of_seed)
    owner = state.seed_of_slot
    owner = np.where((owner >= 0) & freed[owner], -1, owner)
    wanting = np.flatnonzero(allowed & (target == Stage.GERMINATED))
    free = np.flatnonzero(owner < 0)
    served = wanting[: free.size]
    owner[free[: served.size]] = served
    slot_of_seed[served] = free[: served.size]
    born = np.zeros(stage.shape, bool)
    born[served] = True
    accepted = allowed.copy()
    accepted[wanting[free.size :]] = False

    entered = accepted & (target == Stage.GRAFTING)
    fresh = {"alpha": config.grafting.min_alpha, "velocity": 0.0, "pause": 0}
    fresh |= {"stable_alpha": config.grafting.min_alpha, "previous_loss": np.nan}
    fresh |= {"unstable_checks": 0}
    pair = (stage * 16 + target).astype(np.uint8)
    recent = unpack_history(state.history)
    shifted = np.concatenate([pair[:, None], recent[:, :-1]], axis=1)
    restyled = (commands.strategy >= 0) & (accepted | ~requested)
    new = dataclasses.replace(
        state,
        stage=np.where(accepted, target, stage),
        parent_stage=np.where(accepted, stage, state.parent_stage),
        blueprint=np.where(
            born & (commands.blueprint >= 0), commands.blueprint, state.blueprint
        ),
        strategy=np.where(restyled, commands.strategy, state.strategy),
        epochs_in_stage=np.where(accepted, np.uint16(0), epochs),
        error_count=np.where(born, np.uint8(0), state.error_count),
        history=pack_history(np.where(accepted[:, None], shifted, recent)),
        slot_of_seed=slot_of_seed,
        graft=GraftMemory(
            **{
                name: np.where(entered, value.dtype.type(fresh[name]), value)
                for name, value in graft.items()
            }
        ),
        worth=np.where(accepted, np.float32(np.nan), state.worth),
        worth_ticks=np.where(accepted, np.uint8(0), state.worth_ticks),
        seed_of_slot=owner,
    )
    outcome = np.select(
        [~requested, ~legal, ~late_enough, ~passed, ~accepted],
        [
            np.int8(Outcome.NONE),
            np.int8(Outcome.ILLEGAL),
            np.int8(Outcome.TOO_EARLY),
            np.int8(Outcome.GATE),
            np.int8(Outcome.NO_CAPACITY),
        ],
        np.int8(Outcome.OK),
    )
    return new, outcome


def _numpy_climb(
    m: GraftMemory, strategy: Any, s: Signals, epochs: Any, config: LifecycleConfig
) -> dict[str, np.ndarray]:
    c = config.grafting
    base = np.float32(1 / c.ramp_duration)
    adaptive = strategy == Strategy.ADAPTIVE
    paused = m.pause > 0
    wary = adaptive & (paused | (s.drift > 0.5 * c.drift_threshold))
    drifts = (strategy == Strategy.DRIFT_CONTROLLED) | wary
    started = np.where(s.drift > c.drift_threshold, np.uint16(c.pause_duration), 0)
    pause = np.where(drifts, np.where(paused, m.pause - 1, started), m.pause)

    gathers = adaptive & ~wary & (s.performance_delta > 0.01)
    gathers |= strategy == Strategy.MOMENTUM
    gain = np.where(np.isfinite(s.performance_delta), s.performance_delta, 0)
    velocity = np.float32(c.momentum_factor) * m.velocity + np.float32(0.01) * gain

    steady = strategy == Strategy.STABILITY
    check = steady & (epochs % c.stability_window == 0)
    stable = (
        (s.loss_variance < c.max_loss_variance)
        & (s.grad_norm < c.max_grad_norm)
        & (s.accuracy_variance < c.max_accuracy_variance)
    )
    count = np.where(
        check, np.where(stable, 0, m.unstable_checks + 1), m.unstable_checks
    )
    revert = steady & (count >= 3)

    fall = (m.previous_loss - s.reconstruction_loss) / m.previous_loss
    fall = np.where((m.previous_loss > 0) & np.isfinite(fall), np.clip(fall, 0, 1), 0)
    is_open = (s.grad_norm >= c.grad_norm_lower) & (s.grad_norm <= c.grad_norm_upper)

    step = np.select(
        [
            drifts,
            gathers,
            revert,
            steady & (count > 0),
            strategy == Strategy.PERFORMANCE_LINKED,
            strategy == Strategy.GRAD_NORM_GATED,
        ],
        [
            np.where(paused | (s.drift > c.drift_threshold), np.float32(0), base),
            np.maximum(np.float32(0), base + velocity),
            np.float32(0),
            base / 2,
            base * (1 + np.float32(c.performance_gain) * fall),
            np.where(is_open, base, np.float32(0)),
        ],
        base,
    )
    alpha = np.where(revert, m.stable_alpha, m.alpha) + step
    measured = np.isfinite(s.reconstruction_loss)
    return {
        "alpha": np.clip(alpha, c.min_alpha, c.max_alpha).astype(np.float32),
        "velocity": np.where(gathers, velocity, m.velocity).astype(np.float32),
        "stable_alpha": np.where(check & stable, m.alpha, m.stable_alpha),
        "previous_loss": np.where(measured, s.reconstruction_loss, m.previous_loss),
        "pause": pause.astype(np.uint16),
        "unstable_checks": np.where(revert, 0, count).astype(np.uint8),
    }


# Checks.


def check_numpy(ours: tuple[SeedState, Any], theirs: tuple[SeedState, Any]) -> None:
    """Integers equal, floats to 1e-5."""

    def same(path: Any, a: Any, b: Any) -> None:
        a, b, name = np.asarray(a), np.asarray(b), jax.tree_util.keystr(path)
        if a.dtype.kind == "f":
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(a, b, name)

    jax.tree_util.tree_map_with_path(same, ours, theirs)


def check_python(
    ours: tuple[SeedState, Any], layer: oracle.Layer, outcome: list[int]
) -> None:
    """Everything that the loop knows about a seed."""
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


# Timing.


def median(run: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, after one that warms up."""
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
            # One after the other, and not merged into fewer kernels.
            held = jax.lax.optimization_barrier(step(held))
        return held

    def run(count: int) -> None:
        nonlocal held
        held = jax.block_until_ready(several(held, count))

    few, many = STEPS
    longer = median(lambda: run(many), repeats)
    return (longer - median(lambda: run(few), repeats)) / (many - few)


def moved_bytes(state: SeedState, commands: Commands, signals: Signals) -> int:
    """Bytes that a step has to read and write: what it changes, twice; what it only
    reads, and the outcome, once."""
    untouched = (state.statistics, state.health, state.reconstruction, state.gain)
    untouched += (state.errors, state.steps)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    size -= sum(leaf.nbytes for leaf in jax.tree.leaves(untouched))
    reads = ("reconstruction_loss", "performance_delta", "stability_score")
    reads += ("error_rate", "total_improvement", "final_stability", "drift")
    reads += ("loss_variance", "accuracy_variance", "grad_norm")
    size = 2 * size + sum(getattr(signals, name).nbytes for name in reads)
    return (
        size + sum(leaf.nbytes for leaf in jax.tree.leaves(commands)) + state.num_seeds
    )


def measure(seeds: int, repeats: int, python_time: dict[int, float]) -> list[str]:
    """One row of the table."""
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
        f"step: what one more step in a call takes, by calls of {STEPS[0]} and "
        f"{STEPS[1]}; step/copy: over\nreading and writing the state once; step/bound: "
        "over the bytes that a step has to\nmove (signals and commands included) at "
        "the copy's bandwidth; numpy and loop: times on\nthe host over step. The loop "
        "and numpy gave the same results. * the loop's time for\n10,000 seeds, scaled "
        "up."
    )


if __name__ == "__main__":
    main()
