"""What growth costs in a whole model: a train step with seeds over the plain step.

    python benchmarks/model.py gpt [--blocks 12] [--layers 12|36] [--blueprint group]
    python benchmarks/model.py depth        # 4, 12, 24 blocks, scanned and unrolled
    python benchmarks/model.py small        # an MLP and a ViT, in float32

The plain loop is `nnx.value_and_grad` and `nnx.Optimizer` with AdamW, jitted on split
states. The grown loop is the same with `Growth.update`; its tick is `Growth.tick`, or,
with ``--loop build``, the functions of `build`. Layers have chunks of 64 features and 8
slots. All variants run in one process. Each round times each variant once, in random
order, over several steps with other data. A cell is the variant's median over that of
the plain step. "plain again" is the plain step as another program: its distance from 1
is noise.

Columns: time of a step, kernels a step (GPU only, by the profiler), peak memory of the
compiled step, time to compile step and tick, by XLA and in all.
"""

import argparse
import dataclasses
import gc
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from model_hosts import GPT, MLP, Size, ViT
from profiled import kernels_of

from esper_jax import Growth, SeedState, Stage, make_growable
from esper_jax.layers.bed import SeedBed

CHUNK = 64
"""Features of a chunk."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and its data.

    Args:
      host: makes the plain model.
      batch: makes the batch of a step, given its number.
      growable: names of the layers that can grow.
      stack: blocks of a scanned trunk, if it is one.
      blueprint: what grows.
    """

    host: Callable[[], nnx.Module]
    batch: Callable[[int], tuple[jax.Array, jax.Array]]
    growable: tuple[str, ...]
    stack: int | None = None
    blueprint: str = "residual_mlp"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A compiled step and its state.

    Args:
      step: ``step(state, x, y) -> state, loss``, compiled.
      state: before the next step; None once it was given away.
      traced: seconds to trace and lower the step.
      compiled: seconds that XLA took.
      memory: peak bytes of the compiled step, arguments included.
    """

    step: Callable[..., Any]
    state: Any
    traced: float
    compiled: float
    memory: int


def tokens(size: Size, batch: int) -> Callable[[int], tuple[jax.Array, jax.Array]]:
    """Random tokens and the next ones."""

    def make(number: int) -> tuple[jax.Array, jax.Array]:
        rng = np.random.default_rng(number)
        ids = rng.integers(0, size.vocabulary, (batch, size.length + 1), dtype=np.int32)
        return jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:])

    return make


def rows(shape: tuple[int, ...], classes: int) -> Callable[[int], tuple[Any, Any]]:
    """Random rows and labels."""

    def make(number: int) -> tuple[jax.Array, jax.Array]:
        rng = np.random.default_rng(number)
        return (
            jnp.asarray(rng.normal(size=shape), jnp.float32),
            jnp.asarray(rng.integers(0, classes, shape[0]), jnp.int32),
        )

    return make


def alive(seeds: SeedState, living: int) -> SeedState:
    """``seeds`` with the first ``living`` in FINE_TUNING: they count, and learn.

    With as many as there are slots, if those are fewer.
    """
    living = min(living, seeds.capacity)
    index = jnp.arange(living)
    return dataclasses.replace(
        seeds,
        stage=seeds.stage.at[..., :living].set(Stage.FINE_TUNING),
        slot_of_seed=seeds.slot_of_seed.at[..., :living].set(index),
        seed_of_slot=seeds.seed_of_slot.at[..., :living].set(index),
    )


def loss_of(model: nnx.Module, x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    logits = model(x).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def grown_model(case: Case, living: int) -> nnx.Module:
    """The model with seeds, of which ``living`` a layer live."""
    model = case.host()
    make_growable(
        model,
        lambda path, _: bool(path) and path[-1] in case.growable,
        lambda _, layer: layer.out_features // CHUNK,
        stack=case.stack,
        blueprints=[case.blueprint],
        rngs=nnx.Rngs(1),
    )
    for _, node in nnx.iter_graph(model):
        if isinstance(node, SeedBed):
            node.seeds.set_value(alive(node.seeds.get_value(), living))
    return model


def train_step(case: Case, living: int | None) -> tuple[Callable[..., Any], Any]:
    """The step to be compiled, ``step(state, x, y) -> state, loss``, and its state.

    Args:
      case: the model.
      living: seeds of each layer that live; None for the plain model.
    """
    model = case.host() if living is None else grown_model(case, living)
    optimizer = nnx.Optimizer(model, optax.adamw(1e-4), wrt=nnx.Param)
    growth = None if living is None else Growth(model, optax.adam(3e-4))
    graph, state = nnx.split((model, optimizer, growth))
    # A list of arrays: flattening Flax's own State costs Python a millisecond.
    leaves, tree = jax.tree.flatten(state)

    def step(leaves: Any, x: jax.Array, y: jax.Array) -> tuple[Any, jax.Array]:
        state = jax.tree.unflatten(tree, leaves)
        model, optimizer, growth = nnx.merge(graph, state, copy=True)
        wrt = nnx.DiffState(0, nnx.Param) if growth is None else growth.argnums
        loss, grads = nnx.value_and_grad(loss_of, argnums=wrt)(model, x, y)
        optimizer.update(model, nnx.state(grads, nnx.Param))
        if growth is not None:
            growth.update(model, grads, loss=loss)
        return jax.tree.leaves(nnx.state((model, optimizer, growth))), loss

    return step, leaves


def compiled(case: Case, living: int | None) -> Variant:
    """Compiles a step, without any cache."""
    step, state = train_step(case, living)
    x, y = case.batch(0)
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0).lower(state, x, y)
    middle = time.perf_counter()
    program = lowered.compile()
    end = time.perf_counter()
    memory = program.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    return Variant(program, state, middle - start, end - middle, peak)


def run(variant: Variant, data: list[Any], steps: int) -> tuple[Variant, float]:
    """Runs some steps: the variant with its new state, and seconds a step."""
    state, step = variant.state, variant.step
    start = time.perf_counter()
    for number in range(steps):
        state, loss = step(state, *data[number % len(data)])
    jax.block_until_ready((state, loss))
    seconds = (time.perf_counter() - start) / steps
    if not np.isfinite(float(loss)):
        raise SystemExit("the loss is not finite: these times say nothing")
    return dataclasses.replace(variant, state=state), seconds


def kernels(variant: Variant, data: list[Any]) -> str:
    """Number of kernels of one step, and their time in all."""
    found = kernels_of(lambda: run(variant, data, 1))
    count, busy = (sum(column) for column in zip(*found.values(), strict=True))
    return f"{count} ({busy / 1e3:.2f} ms)"


def compare(case: Case, living: list[int], rounds: int, steps: int) -> list[list[str]]:
    """A table's rows: the plain step, the plain step again, and the grown ones."""
    asked: dict[str, int | None] = {"plain": None, "plain again": None}
    asked |= {f"{n} living" if n else "dormant": n for n in living}
    data = [case.batch(number) for number in range(4)]
    variants: dict[str, Variant] = {}
    for name, number in asked.items():
        variants[name] = compiled(case, number)
        print(f"compiled: {name}", file=sys.stderr, flush=True)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for name in variants:
        variants[name], _ = run(variants[name], data, 3)
    order, draw = list(variants), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            variants[name], seconds = run(variants[name], data, steps)
            times[name].append(seconds)
    base, plain = statistics.median(times["plain"]), variants["plain"]
    table = []
    for name, variant in variants.items():
        count = kernels(variant, data) if jax.default_backend() == "gpu" else ""
        seconds = statistics.median(times[name])
        extra = (variant.memory / plain.memory - 1) * 100
        table.append(
            [
                name,
                f"{seconds * 1e3:.3f}",
                f"{(seconds / base - 1) * 100:+.2f}%",
                count,
                f"{variant.memory / 1e9:.3f} GB ({extra:+.2f}%)",
                f"{variant.traced:.1f} + {variant.compiled:.1f}",
            ]
        )
    del variants
    gc.collect()
    return table


def evaluate_compile(case: Case, grown: bool) -> float:
    """Seconds to compile the plain model's evaluation, or a tick with evaluation."""
    x, y = case.batch(0)
    model = grown_model(case, 0) if grown else case.host()
    graph, state = nnx.split(model)

    @jax.jit
    def measure(state: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return loss_of(nnx.merge(graph, state), x, y)

    def evaluate(model: nnx.Module) -> jax.Array:
        return measure(nnx.state(model), x, y)

    if not grown:
        start = time.perf_counter()
        jax.block_until_ready(measure(state, x, y))
        return time.perf_counter() - start
    growth = Growth(model, optax.adam(3e-4))
    graph, state = nnx.split(nnx.view(model, deterministic=True))
    start = time.perf_counter()
    growth.tick(model, evaluate)
    return time.perf_counter() - start


HEAD = ["model", "step ms", "over plain", "kernels", "peak memory", "compile s"]


def show(title: str, head: list[str], table: list[list[str]]) -> None:
    """Prints a table in Markdown."""
    print(f"\n{title}\n")
    for row in [head, ["---"] * len(head), *table]:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


def gpt(args: argparse.Namespace) -> None:
    """The GPT of the given size."""
    size = Size(
        blocks=args.blocks,
        width=args.width,
        heads=args.width // CHUNK,
        length=args.length,
        vocabulary=args.vocabulary,
        dtype=args.dtype,
        scanned=args.scanned,
    )
    names = {"12": ("down",), "36": ("proj", "up", "down")}
    for layers in args.layers:
        case = Case(
            host=lambda: GPT(size, nnx.Rngs(0)),
            batch=tokens(size, args.batch),
            growable=names[layers],
            stack=size.blocks if size.scanned else None,
            blueprint=args.blueprint,
        )
        count = size.blocks * len(case.growable)
        title = f"GPT, {size.blocks} blocks, {count} layers grow {args.blueprint}"
        if args.alone:
            one = compiled(case, None if args.alone == "plain" else int(args.alone))
            took = f"{one.traced:.1f} + {one.compiled:.1f} s"
            print(f"{title}, {args.alone}, trace + compile: {took}")
            continue
        if not args.no_time:
            table = compare(case, args.living, args.rounds, args.steps)
            show(title, HEAD, table)
        if not args.no_tick:
            plain, tick = (evaluate_compile(case, grown) for grown in (False, True))
            show(
                f"{title}: first call of the plain evaluation, and of a tick with it",
                ["evaluation s", "tick s", "more"],
                [[f"{plain:.1f}", f"{tick:.1f}", f"{tick - plain:+.1f}"]],
            )


def depth(args: argparse.Namespace) -> None:
    """Compile times by depth, scanned and unrolled."""
    table = []
    for scanned in (True, False):
        for blocks in args.depths:
            size = Size(
                blocks=blocks,
                width=128,
                heads=2,
                length=32,
                vocabulary=256,
                dtype="float32",
                scanned=scanned,
            )
            case = Case(
                host=lambda size=size: GPT(size, nnx.Rngs(0)),
                batch=tokens(size, 4),
                growable=("down",),
                stack=blocks if scanned else None,
            )
            plain, grown = compiled(case, None), compiled(case, 0)
            tick = evaluate_compile(case, True)
            table.append(
                [
                    "scanned" if scanned else "unrolled",
                    str(blocks),
                    f"{plain.traced + plain.compiled:.2f}",
                    f"{grown.traced + grown.compiled:.2f}",
                    f"{evaluate_compile(case, False):.2f}",
                    f"{tick:.2f}",
                ]
            )
    head = ["blocks", "number", "plain step s", "step s", "evaluation s", "tick s"]
    show("Seconds to trace and compile, by depth", head, table)


def small(args: argparse.Namespace) -> None:
    """An MLP and a vision transformer in float32."""
    size = Size(4, 128, 2, 16, 10, "float32")
    cases = {
        "MLP, 2 hidden layers of 256, batch 128": Case(
            host=lambda: MLP(64, 256, 10, nnx.Rngs(0)),
            batch=rows((128, 64), 10),
            growable=("up", "down"),
        ),
        "ViT, 4 blocks of 128, 16 patches, batch 64": Case(
            host=lambda: ViT(size, 48, nnx.Rngs(0)),
            batch=rows((64, 16, 48), 10),
            growable=("down",),
        ),
    }
    for title, case in cases.items():
        show(title, HEAD, compare(case, args.living, args.rounds, args.steps))


def main() -> None:
    """Parses the command line and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("gpt", "depth", "small"))
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--scanned", action="store_true")
    parser.add_argument("--layers", nargs="+", default=["12", "36"])
    parser.add_argument("--blueprint", default="residual_mlp")
    parser.add_argument("--living", nargs="+", type=int, default=[0, 1, 8])
    parser.add_argument("--depths", nargs="+", type=int, default=[4, 12, 24])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--no-tick", action="store_true")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument(
        "--alone",
        metavar="plain|LIVING",
        help="gpt: only compile this variant, the first program of the process",
    )
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    device = jax.devices()[0].device_kind
    print(
        f"{device}, jax {jax.__version__}, flax {flax.__version__}, "
        f"Python {platform.python_version()}"
    )
    {"gpt": gpt, "depth": depth, "small": small}[args.what](args)


if __name__ == "__main__":
    main()
