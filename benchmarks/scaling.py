"""Weak scaling of training on several devices while the model grows.

    python benchmarks/scaling.py [--smoke] [--modes MODE ...]

The number of devices goes from 1 to all there are, by powers of two; each device keeps
the same number of rows. A block is some train steps and one tick. During the
measurement the seeds go through their lives, several of them at a time. The same model
without seeds runs the same steps and evaluates the held-out rows once a block. Blocks
of all variants take turns, and a cell is the median over the blocks.

Efficiency is a block's time on one device over its time on N. "to plain" is the
efficiency of the model with seeds over that of the model without: what growth costs of
the scaling.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from esper_jax import ChunkedLayer, over_mesh
from esper_jax.lifecycle import GraftConfig, LifecycleConfig, Stage
from esper_jax.parallel.replicas import check_replicas, split_rows
from esper_jax.policy import ControllerConfig
from esper_jax.train import build, classification

GATES = LifecycleConfig(
    min_epochs=(0, 0, 1, 1, 1, 1, 2, 0, 1, 0, 1),
    reconstruction_threshold=1e9,
    min_stability=-1e9,
    cull_delta=-1e9,
    min_improvement=1e9,  # culls every tuned seed, so that growth never ends
    grafting=GraftConfig(ramp_duration=2),
)
POLICY = ControllerConfig(patience=1, threshold=0.9, max_training=2, tuning_limit=3)
MODES = ["pmap", "shard_map", "jit"]
P = PartitionSpec
Block = Callable[[], None]
Rows = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large a measurement is."""

    width: int
    """Of both hidden layers."""
    seeds: int
    """Of each hidden layer."""
    rows: int
    """Of a batch, on each device."""
    steps: int
    """Train steps of a block."""
    blocks: int
    """Timed blocks of each variant."""


SIZES = Sizes(width=4096, seeds=64, rows=8192, steps=20, blocks=24)
SMOKE = Sizes(width=64, seeds=4, rows=32, steps=4, blocks=3)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the variants of one number of devices share."""

    sizes: Sizes
    mesh: Mesh
    data: list[Rows]
    """Batches, which the steps take in turn."""
    held_out: Rows


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one number of devices came to."""

    seconds: dict[tuple[str, str], float]
    """Median seconds of a block, by mode and ``"plain"`` or ``"grown"``."""
    stages: dict[str, set[int]]
    """Stages that the seeds were seen in, by mode."""


class Net(nnx.Module):
    """Two wide hidden layers in bfloat16, without seeds if ``seeds`` is 0."""

    def __init__(self, width: int, seeds: int, sharding: Any = None) -> None:
        rngs = nnx.Rngs(0)

        def layer() -> Any:
            base = nnx.Linear(width, width, dtype=jnp.bfloat16, rngs=rngs)
            if not seeds:
                return base
            return ChunkedLayer(base, seeds, sharding=sharding, rngs=nnx.Rngs(1))

        self.hidden = nnx.List([layer(), layer()])
        self.last = nnx.Linear(width, 16, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        return self.last(x)


def rows_for(count: int, width: int, seed: int) -> Rows:
    """Random inputs in bfloat16, (count, width), and labels of 16 classes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, width), np.float32)
    return x.astype(jnp.bfloat16), rng.integers(0, 16, count).astype(np.int32)


def plain_block(mode: str, setting: Setting) -> Block:
    """A block of the model without seeds: steps and one evaluation."""
    graph, params = nnx.split(Net(setting.sizes.width, 0))
    optimizer = optax.adam(1e-3)
    axis = None if mode == "jit" else "data"

    def loss(params: Any, batch: Any) -> Any:
        x, y = batch
        return jnp.mean(classification(nnx.merge(graph, params)(x), y)[0])

    def step(state: Any, batch: Any) -> Any:
        params, moments = state
        if mode == "shard_map":
            params = jax.tree.map(
                lambda p: jax.lax.pcast(p, axis, to="varying"), params
            )
        grads = jax.grad(loss)(params, batch)
        if axis:
            grads = jax.lax.pmean(grads, axis)
        updates, moments = optimizer.update(grads, moments)
        return optax.apply_updates(state[0], updates), moments

    def evaluate(state: Any, batch: Any) -> Any:
        value = loss(state[0], batch)
        return jax.lax.pmean(value, axis) if axis else value

    step_on, evaluate_on, place = mapped(mode, setting.mesh, step, evaluate)
    state = place((params, optimizer.init(params)), whole=True)
    data = [place(batch) for batch in setting.data]
    held_out = place(setting.held_out)

    def block() -> None:
        nonlocal state
        for i in range(setting.sizes.steps):
            state = step_on(state, data[i % len(data)])
        jax.block_until_ready((state, evaluate_on(state, held_out)))

    return block


def mapped(mode: str, mesh: Mesh, step: Any, other: Any) -> tuple[Any, Any, Any]:
    """``step`` and ``other`` on all devices of a mesh.

    Returns:
      Both functions, and ``place(tree, whole=False) -> tree``, which puts rows (divided
      among the devices) or a state (``whole`` on each) where the functions want it.
    """
    devices = list(mesh.devices.flat)
    if mode == "pmap":
        pmap = functools.partial(jax.pmap, axis_name="data", devices=devices)

        def spread(tree: Any, whole: bool = False) -> Any:
            if whole:
                stacked = jax.tree.map(lambda x: jnp.stack([x] * mesh.size), tree)
            else:
                stacked = split_rows("data", tree, mesh.size)
            return jax.device_put(stacked, NamedSharding(mesh, P("data")))

        return pmap(step, donate_argnums=0), pmap(other), spread
    if mode == "shard_map":
        specs = {"mesh": mesh, "in_specs": (P(), P("data")), "out_specs": P()}
        step, other = (jax.shard_map(f, **specs) for f in (step, other))

    def put(tree: Any, whole: bool = False) -> Any:
        return jax.device_put(tree, NamedSharding(mesh, P() if whole else P("data")))

    return jax.jit(step, donate_argnums=0), jax.jit(other), put


def grown_block(mode: str, setting: Setting) -> tuple[Block, Callable[[], Any]]:
    """A block of the model with seeds (steps and one tick), and its state's reader."""
    sizes, mesh = setting.sizes, setting.mesh
    sharding = NamedSharding(mesh, P("data", None)) if mode == "jit" else None
    program = build(
        Net(sizes.width, sizes.seeds, sharding),
        optax.adam(1e-3),
        optax.adam(1e-3),
        lifecycle_config=GATES,
        controller_config=POLICY,
        axis_name=None if mode == "jit" else "data",
        eval_batch=1 << 30,
    )
    key = jax.random.key(0)
    if mode == "shard_map":
        program = over_mesh(program, mesh)
        step, tick, state = program.step, program.tick, program.init(key)

        def place(tree: Any) -> Any:
            return program.place("data", tree, True)
    else:
        step, tick, place = mapped(mode, mesh, program.step, program.tick)
        if mode == "pmap":
            tick = jax.pmap(
                program.tick,
                axis_name="data",
                devices=list(mesh.devices.flat),
                donate_argnums=0,
            )
        else:
            step, tick = program.step, program.tick
        state = place(program.init(key), whole=True)
    data = [place(batch) for batch in setting.data]
    held_out = place(setting.held_out)

    def block() -> None:
        nonlocal state
        for i in range(setting.sizes.steps):
            state = step(state, data[i % len(data)])
        state, report = tick(state, held_out)
        jax.block_until_ready((state, report))

    return block, lambda: state


def stages_of(state: Any) -> set[int]:
    """Stages that some seed of the state is in."""
    return set(
        np.concatenate([np.ravel(s.stage) for s in state.seeds.values()]).tolist()
    )


def measure(devices: int, modes: Sequence[str], sizes: Sizes) -> Measured:
    """Times the blocks of all variants on so many devices.

    Raises:
      ValueError: if the devices end with different states.
    """
    mesh = jax.make_mesh(
        (devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )
    data = [rows_for(sizes.rows * devices, sizes.width, seed) for seed in range(4)]
    held_out = rows_for(1024 * devices, sizes.width, 9)
    setting = Setting(sizes, mesh, data, held_out)
    blocks: dict[tuple[str, str], Block] = {}
    states = {}
    for mode in modes:
        blocks[mode, "plain"] = plain_block(mode, setting)
        blocks[mode, "grown"], states[mode] = grown_block(mode, setting)
    seen: dict[str, set[int]] = {mode: set() for mode in modes}
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in blocks}
    for round_ in range(sizes.blocks + 2):
        for (mode, model), block in blocks.items():
            start = time.perf_counter()
            block()
            if round_ > 1:  # the first two compile
                taken[mode, model].append(time.perf_counter() - start)
            if model == "grown":
                seen[mode] |= stages_of(states[mode]())
    for mode, state in states.items():
        check_replicas(state(), stacked=mode == "pmap")
    return Measured({key: statistics.median(t) for key, t in taken.items()}, seen)


def report(measured: dict[int, Measured], modes: Sequence[str]) -> None:
    """Prints the table, a row for each number of devices and mode."""
    print(
        "\n| devices | mode | plain ms | grown ms | plain eff. | grown eff. | "
        "to plain | stages seen |\n|---|---|---|---|---|---|---|---|"
    )
    for devices, at in measured.items():
        for mode in modes:
            plain, grown = (at.seconds[mode, model] for model in ("plain", "grown"))
            first = [measured[1].seconds[mode, model] for model in ("plain", "grown")]
            efficiency = first[0] / plain, first[1] / grown
            names = ", ".join(Stage(s).name[:6] for s in sorted(at.stages[mode]))
            print(
                f"| {devices} | {mode} | {1e3 * plain:.1f} | {1e3 * grown:.1f} | "
                f"{efficiency[0]:.3f} | {efficiency[1]:.3f} | "
                f"{efficiency[1] / efficiency[0]:.3f} | {names} |"
            )


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny, to see it run")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    options = parser.parse_args()
    sizes = SMOKE if options.smoke else SIZES
    count = len(jax.devices())
    print(f"{count} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(
        f"width {sizes.width}, {sizes.seeds} seeds in each of 2 layers, {sizes.rows} "
        f"rows a device, bfloat16; {sizes.steps} steps and a tick a block, "
        f"{sizes.blocks} blocks"
    )
    if count == 1:
        print("only one device was found: there is nothing to scale over")
    measured = {n: measure(n, options.modes, sizes) for n in (1, 2, 4, 8) if n <= count}
    report(measured, options.modes)
    print("\nThe replicas of every variant were equal, bit for bit, at the end.")


if __name__ == "__main__":
    main()
