"""What becomes of a network when what it incubated begins to count.

    PYTHONPATH=. python3 benchmarks/incubation.py [--tasks digits spirals] [--runs 16]

In every chunk of a small MLP a blueprint is born at the first tick. It learns for
``--epochs`` epochs without counting, is blended in over four, and goes on learning. The
blueprints' learning rate is the column. "jump" is the highest held-out loss while they
are blended in, over the last before; "accuracy" is the test accuracy in the end, less
that of the same host alone, in points: the mean of paired runs (same host, same rows)
with its 95% interval. A jump that is no number had a loss that was none.
"""

import argparse
import functools
import math
import platform
from typing import Any

import jax
import jaxlib
import numpy as np
import optax
from flax import nnx

from esper_jax import ControllerConfig, GraftConfig, LifecycleConfig, Stage, build
from esper_jax.data import DATASETS
from esper_jax.hosts import MLP
from esper_jax.train.scan import scan_fit, start_from

HIDDEN, SEEDS, RAMP, REST, BATCH = 32, 4, 4, 12, 64
ARMS = ("task", "bounded", "reconstruction")
RATES = (1e-3, 1e-2, 3e-2, 1e-1)
Run = dict[str, np.ndarray]


def lives(epochs: int) -> LifecycleConfig:
    """Ages without gates: incubation, a ramp, and FINE_TUNING to the end."""
    ages = [0] * len(Stage)
    ages[Stage.TRAINING], ages[Stage.GRAFTING] = epochs, RAMP
    ages[Stage.FINE_TUNING] = 65535
    return LifecycleConfig(
        min_epochs=tuple(ages),
        reconstruction_threshold=math.inf,
        min_stability=-math.inf,
        cull_delta=-math.inf,
        worth_window=1,
        grafting=GraftConfig(ramp_duration=RAMP),
    )


def train(task: str, incubation: Any, rate: float, args: argparse.Namespace) -> Run:
    """Losses and accuracies of all runs, (runs, ticks); without growth if rate is 0."""
    data = DATASETS[task]()
    features = data.train[0].shape[1]

    def make(rngs: nnx.Rngs) -> MLP:
        return MLP(
            features,
            (HIDDEN,),
            data.num_classes,
            num_seeds=SEEDS,
            incubation=incubation,
            rngs=rngs,
        )

    program = build(
        make(nnx.Rngs(0)),
        optax.adam(3e-3),
        optax.adam(rate or 1.0),
        lifecycle_config=lives(args.epochs),
        controller_config=ControllerConfig(
            enabled=rate > 0,
            when="period",
            period=1,
            births=SEEDS,
            max_training=SEEDS,
            keep_tolerance=1e9,
            tuning_limit=65535,
            evaluation_limit=65535,
        ),
    )
    run = jax.jit(
        jax.vmap(
            functools.partial(
                scan_fit,
                program,
                ticks=1 + args.epochs + RAMP + REST,
                batch_size=min(BATCH, len(data.train[0])),
                watched=data.test,
            ),
            in_axes=(0, None, None),
        ),
        donate_argnums=0,
    )
    states = jax.vmap(start_from(program, make))(
        jax.random.split(jax.random.key(1), args.runs)
    )
    _, report = jax.device_get(run(states, data.train, data.held_out))
    stage = next(iter(report.ticks.layers.values())).stage
    return {
        "loss": report.ticks.loss,
        "test": report.watched[..., 1],
        "grafts": np.any(stage == Stage.GRAFTING, axis=-1),
    }


def jump(run: Run) -> np.ndarray:
    """Highest held-out loss from the first tick of grafting on, over the one before."""
    first = np.argmax(run["grafts"], axis=1)
    return np.array(
        [
            np.max(loss[at : at + RAMP + 2]) / loss[at - 1] if at else np.nan
            for loss, at in zip(run["loss"], first, strict=True)
        ]
    )


def interval(points: np.ndarray) -> str:
    half = 1.96 * points.std(ddof=1) / math.sqrt(len(points))
    return f"{points.mean():+.2f} ±{half:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["digits", "spirals"])
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--runs", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    print(
        f"{jax.devices()[0].device_kind}, Python {platform.python_version()}, jax "
        f"{jax.__version__}, jaxlib {jaxlib.__version__}; {args.runs} runs each\n"
    )
    head = " | ".join(f"{rate:g}" for rate in args.rates)
    print(f"| task | incubation | | {head} |\n|---|---|---{'|---' * len(args.rates)}|")
    for task in args.tasks:
        alone = train(task, "task", 0.0, args)["test"][:, -1]
        for arm in ARMS:
            runs = [train(task, arm, rate, args) for rate in args.rates]
            jumps = " | ".join(f"{np.mean(jump(run)):.2f}" for run in runs)
            gains = " | ".join(
                interval(100 * (run["test"][:, -1] - alone)) for run in runs
            )
            print(f"| {task} | {arm} | jump | {jumps} |", flush=True)
            print(f"| | | accuracy | {gains} |", flush=True)


if __name__ == "__main__":
    main()
