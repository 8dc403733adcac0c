"""Weak scaling of training on several devices, with growth going on.

    python benchmarks/scaling.py [--smoke] [--modes MODE ...]

The rows per device stay the same while the devices grow from 1 to all that there are
(by powers of two). A block is some train steps and one tick: the seeds of the model go
through their lives during the measurement, several of them at a time. The same model
without seeds runs the same steps, and evaluates the held-out rows once a block. Blocks
of all variants take turns; a cell is the median over the blocks.

Efficiency is a block's time on one device over that on N. "to plain" is the efficiency
over that of the model without seeds: what growth costs of the scaling.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from esper_jax.layers.chunked import ChunkedLayer
from esper_jax.lifecycle import GraftConfig
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.stages import Stage
from esper_jax.parallel.replicas import check_replicas, split_rows
from esper_jax.policy.config import ControllerConfig
from esper_jax.train.mesh import over_mesh
from esper_jax.train.program import build, classification

GATES = LifecycleConfig(
    min_epochs=(0, 0, 1, 1, 1, 1, 2, 0, 1, 0, 1),
    reconstruction_threshold=1e9,
    min_stability=-1e9,
    cull_delta=-1e9,
    min_improvement=1e9,  # what has been tuned is culled, so that growth never ends
    grafting=GraftConfig(ramp_duration=2),
)
POLICY = ControllerConfig(patience=1, threshold=0.9, max_training=2, tuning_limit=3)
MODES = ["pmap", "shard_map", "jit"]
P = PartitionSpec
Block = Callable[[], None]


class Net(nnx.Module):
    """Two wide hidden layers in bfloat16; with ``seeds`` 0 they are plain."""

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


def rows_for(count: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, width), np.float32)
    return x.astype(jnp.bfloat16), rng.integers(0, 16, count).astype(np.int32)


def plain_block(mode: str, mesh: Mesh, args: Any, data: Any, held_out: Any) -> Block:
    """Steps and one evaluation of the model without seeds."""
    graph, params = nnx.split(Net(args.width, 0))
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

    step_on, evaluate_on, place = mapped(mode, mesh, step, evaluate)
    state = place((params, optimizer.init(params)), whole=True)
    data, held_out = [place(d) for d in data], place(held_out)

    def block() -> None:
        nonlocal state
        for i in range(args.steps):
            state = step_on(state, data[i % len(data)])
        jax.block_until_ready((state, evaluate_on(state, held_out)))

    return block


def mapped(mode: str, mesh: Mesh, step: Any, other: Any) -> tuple[Any, Any, Any]:
    """Both functions on all devices of the mesh, and how their arguments get there."""
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


def grown_block(
    mode: str, mesh: Mesh, args: Any, data: Any, held_out: Any
) -> tuple[Block, Callable[[], Any]]:
    """Steps and one tick of the model with seeds, and its state."""
    sharding = NamedSharding(mesh, P("data", None)) if mode == "jit" else None
    program = build(
        Net(args.width, args.seeds, sharding),
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
    data, held_out = [place(d) for d in data], place(held_out)

    def block() -> None:
        nonlocal state
        for i in range(args.steps):
            state = step(state, data[i % len(data)])
        state, report = tick(state, held_out)
        jax.block_until_ready((state, report))

    return block, lambda: state


def stages_of(state: Any) -> list[int]:
    return np.concatenate([np.ravel(s.stage) for s in state.seeds.values()]).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny, to see it run")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    args = parser.parse_args()
    sizes = (64, 4, 32, 4, 3) if args.smoke else (4096, 64, 8192, 20, 24)
    args.width, args.seeds, args.rows, args.steps, args.blocks = sizes
    count = len(jax.devices())
    print(f"{count} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(
        f"width {args.width}, {args.seeds} seeds in each of 2 layers, {args.rows} rows "
        f"a device, bfloat16; {args.steps} steps and a tick a block, {args.blocks} "
        "blocks"
    )
    if count == 1:
        print("only one device was found: there is nothing to scale over")

    numbers = [n for n in (1, 2, 4, 8) if n <= count]
    times: dict[tuple[str, str, int], float] = {}
    seen: dict[tuple[str, int], set[int]] = {}
    for n in numbers:
        mesh = jax.make_mesh(
            (n,), ("data",), (AxisType.Auto,), devices=jax.devices()[:n]
        )
        data = [rows_for(args.rows * n, args.width, seed) for seed in range(4)]
        held_out = rows_for(1024 * n, args.width, 9)
        blocks: dict[tuple[str, str], Block] = {}
        states = {}
        for mode in args.modes:
            blocks[mode, "plain"] = plain_block(mode, mesh, args, data, held_out)
            grown, states[mode] = grown_block(mode, mesh, args, data, held_out)
            blocks[mode, "grown"] = grown
            seen[mode, n] = set()
        taken: dict[Any, list[float]] = {key: [] for key in blocks}
        for round_ in range(args.blocks + 2):
            for key, block in blocks.items():
                start = time.perf_counter()
                block()
                if round_ > 1:  # the first two compile
                    taken[key].append(time.perf_counter() - start)
                if key[1] == "grown":
                    seen[key[0], n] |= set(stages_of(states[key[0]]()))
        for (mode, model), values in taken.items():
            times[mode, model, n] = statistics.median(values)
        for mode, state in states.items():
            check_replicas(state(), stacked=mode == "pmap")

    print(
        "\n| devices | mode | plain ms | grown ms | plain eff. | grown eff. | ", end=""
    )
    print("to plain | stages seen |\n|---|---|---|---|---|---|---|---|")
    for n in numbers:
        for mode in args.modes:
            plain, grown = (times[mode, model, n] for model in ("plain", "grown"))
            first = [times[mode, model, 1] for model in ("plain", "grown")]
            efficiency = first[0] / plain, first[1] / grown
            names = ", ".join(Stage(s).name[:6] for s in sorted(seen[mode, n]))
            print(
                f"| {n} | {mode} | {1e3 * plain:.1f} | {1e3 * grown:.1f} | "
                f"{efficiency[0]:.3f} | {efficiency[1]:.3f} | "
                f"{efficiency[1] / efficiency[0]:.3f} | {names} |"
            )
    print("\nThe replicas of every variant were equal, bit for bit, at the end.")


if __name__ == "__main__":
    main()
