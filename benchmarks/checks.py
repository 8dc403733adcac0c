"""What `fit` pays a step for its checks: signals, shapes, labels, data that passed.

    PYTHONPATH=. python3 benchmarks/checks.py [--rounds 40] [--steps 200]

The same `fit` runs with a program and with that program's jitted functions bare: no
check of a batch, no flag of signals. *of 2 ms* times both on a real step, in turns; the
machine's noise is far above the difference, so medians of the differences of a round
are given, with their quartiles. *alone* puts a step that returns its state in place of
the real one, so that nothing but the loop is left, and gives the lowest of all rounds,
in CPU time of the main thread: what a check takes on the host, whether or not a device
waits for it.

"arrays" are cut by `fit` and were checked once. Of "NumPy batches" and "JAX batches"
every step brings others, whose shapes and labels are looked at.
"""

import argparse
import dataclasses
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from esper_jax import build, fit
from esper_jax.hosts import MLP
from esper_jax.train import Stop
from esper_jax.train.checks import checked
from esper_jax.train.program import Program
from esper_jax.train.tracing import unmeasured_is_nan

FEATURES, CLASSES, BATCH = 256, 10, 128


class Deaf(Stop):
    """Takes no signal and looks for none."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers = ()

    def check(self, state: Any) -> None: ...

    check_step = check


@dataclasses.dataclass(frozen=True)
class Loop:
    """`fit` with a program, how it hears of signals, and what times it."""

    program: Program
    stop: Callable[[], Stop]
    clock: Callable[[], float] = time.perf_counter

    def seconds(self, data: Any, held_out: Any, steps: int) -> float:
        """Seconds a step over one tick, the tick included."""
        state = self.program.init(jax.random.key(0))
        size = BATCH if isinstance(data, tuple) else None
        with self.stop() as stop:
            start = self.clock()
            state = fit(
                self.program, state, data, held_out,
                ticks=1, batch_size=size, stop=stop,
            )  # fmt: skip
            jax.block_until_ready(state.params)
        return (self.clock() - start) / steps


def bare(program: Program) -> Program:
    """The jitted functions of a program, without what is checked around them."""
    names = ("step", "step_from", "tick")
    found = {name: getattr(program, name).__wrapped__.__wrapped__ for name in names}
    return program._replace(check=lambda *_: None, **found)


def idle(program: Program, *, checks: bool) -> Program:
    """A program whose steps and ticks do nothing but what is checked around them."""
    state = program.init(jax.random.key(0))
    report = program.tick(program.step(state, rows(BATCH, 2)), rows(BATCH, 1))[1]

    def step(state: Any, *_: Any) -> Any:
        return state

    def tick(state: Any, held_out: Any) -> Any:
        return dataclasses.replace(state, ticks=np.int32(1)), report

    if not checks:
        return bare(program)._replace(step=step, step_from=step, tick=tick)
    made = {
        name: checked(program.check, data, unmeasured_is_nan(step), whole)
        for name, data, whole in (("step", "batch", False), ("step_from", "data", True))
    }
    return program._replace(**made, tick=tick)


def rows(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, FEATURES)).astype(np.float32)
    return x, rng.integers(0, CLASSES, count).astype(np.int32)


def pairs(ours: Loop, plain: Loop, data: Any, rounds: int) -> list[tuple[float, float]]:
    """Microseconds a step of both loops, measured in turns."""
    held_out, found = rows(BATCH, 1), []
    steps = len(data[0]) // BATCH if isinstance(data, tuple) else len(data)
    for number in range(rounds + 1):
        order = (ours, plain) if number % 2 else (plain, ours)
        took = {id(loop): loop.seconds(data, held_out, steps) for loop in order}
        found.append((1e6 * took[id(ours)], 1e6 * took[id(plain)]))
    return found[1:]  # the first one compiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=320)
    args = parser.parse_args()
    model = MLP(
        FEATURES, (args.hidden,) * 2, CLASSES, num_seeds=4, capacity=2, rngs=nnx.Rngs(0)
    )
    program = build(model, optax.adam(1e-3), optax.adam(1e-3))
    x, y = rows(BATCH * args.steps, 0)
    cuts = [slice(i, i + BATCH) for i in range(0, len(x), BATCH)]
    kinds = {
        "arrays": (x, y),
        "NumPy batches": [(x[cut], y[cut]) for cut in cuts],
        "JAX batches": [tuple(map(jax.numpy.asarray, (x[c], y[c]))) for c in cuts],
    }
    print(
        f"{jax.devices()[0].device_kind}, {platform.machine()}, Python "
        f"{platform.python_version()}, jax {jax.__version__}; {args.rounds} rounds of "
        f"{args.steps} steps\n"
    )
    print("| data | step us | checks us (quartiles) | share | alone us | share |")
    print("|---|---|---|---|---|---|")
    for name, data in kinds.items():
        real = pairs(Loop(program, Stop), Loop(bare(program), Deaf), data, args.rounds)
        step = statistics.median(plain for _, plain in real)
        more = [ours - plain for ours, plain in real]
        low, middle, high = statistics.quantiles(more, n=4)
        ours = Loop(idle(program, checks=True), Stop, time.thread_time)
        plain = Loop(idle(program, checks=False), Deaf, time.thread_time)
        many = data * 5 if isinstance(data, list) else data  # to see a step beside fit
        none = pairs(ours, plain, many, args.rounds)
        alone = min(ours for ours, _ in none) - min(plain for _, plain in none)
        print(
            f"| {name} | {step:.0f} | {middle:.1f} ({low:.1f} to {high:.1f}) | "
            f"{middle / step:.2%} | {alone:.1f} | {alone / step:.2%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
