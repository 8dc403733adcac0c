"""What a tick of `Growth` takes while it measures what parts are worth.

    PYTHONPATH=. python3 benchmarks/worth.py [--width 256] [--rows 512] [--ticks 6]

A frozen perceptron of six layers with a part of rank 1 in each of eight places a layer,
all of which count. `evaluate` is jitted by its user. "one by one": as where it cannot
be vmapped. "vmapped": as it is. "first" is the first tick that measures worth, the
second program's compilation included; "then" is the median of later ones.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from esper_jax import Growth, make_growable
from esper_jax.blueprints import lora
from esper_jax.growth import worth
from esper_jax.policy import TrialConfig, trial, trial_lives

DEPTH, PLACES = 6, 8


def ticker(width: int, rows: int) -> Callable[[], float]:
    """A function that ticks a fresh model once and returns how many seconds it took."""
    rngs = nnx.Rngs(0)
    layers = [nnx.Linear(width, width, rngs=rngs) for _ in range(DEPTH)]
    model = nnx.Sequential(*(x for layer in layers for x in (layer, nnx.relu)))
    make_growable(model, nnx.Linear, PLACES, blueprints=[lora(rank=1)], rngs=rngs)
    growth = Growth(
        model,
        optax.adam(1e-2),
        wrt=None,
        policy=trial(TrialConfig(ticks=1000)),
        lifecycle_config=trial_lives(),
    )
    x = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)

    @nnx.jit
    def evaluate(model: nnx.Module) -> jax.Array:
        return jnp.mean((model(x) - 1) ** 2)

    def tick() -> float:
        start = time.perf_counter()
        growth.tick(model, evaluate)
        return time.perf_counter() - start

    for _ in range(3):  # until all parts count
        tick()
    return tick


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--ticks", type=int, default=6)
    args = parser.parse_args()
    print(
        f"{jax.devices()[0].device_kind}, Python {platform.python_version()}, jax "
        f"{jax.__version__}; {DEPTH * PLACES} parts\n"
    )
    print("| | first s | then s |\n|---|---|---|")
    few = worth.FEW
    for name, least in (("one by one", DEPTH * PLACES + 1), ("vmapped", few)):
        worth.FEW = least
        tick = ticker(args.width, args.rows)
        first, *rest = [tick() for _ in range(args.ticks)]
        print(f"| {name} | {first:.2f} | {statistics.median(rest):.3f} |", flush=True)


if __name__ == "__main__":
    main()
