"""What writers cost a step: `fit` without a monitor, and with all that write here.

    PYTHONPATH=. python3 benchmarks/monitor.py [--rounds 40] [--steps 200]

The arms take turns in one process on one program: a round is ``--steps`` steps of each.
*wall* is the ratio of the times of a step: the median over rounds, with quartiles.
Other work on the machine disturbs it, the other two less. *cpu* is the ratio of the CPU
times of all threads, which is what a loop pays whose device is the same cores. *main*
is what one pays whose device is another: to the time of a step without writers it adds
what the main thread takes more CPU time for with them. *write* is what `Monitor.write`
takes of the main thread, once a tick; *threads* is what the writers' own threads take.

The writers are JSON lines, TensorBoard, and Prometheus, which another process scrapes
every second (Weights & Biases needs a server).
"""

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from esper_jax import Monitor, build, fit
from esper_jax.hosts import MLP
from esper_jax.monitor import JsonLines, Prometheus, TensorBoard
from esper_jax.train.program import Program

FEATURES, CLASSES, BATCH = 256, 10, 128

SCRAPER = """
import sys, time, urllib.request
while True:
    urllib.request.urlopen(sys.argv[1]).read()
    time.sleep(1)
"""

OnTick = Callable[[Any, Any], Any]
Times = tuple[float, float, float]


def rows(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, FEATURES)).astype(np.float32)
    return x, rng.integers(0, CLASSES, count).astype(np.int32)


@contextmanager
def all_writers() -> Iterator[Monitor]:
    """A monitor with every writer of this machine, and someone who scrapes."""
    with tempfile.TemporaryDirectory() as folder:
        served = Prometheus(port=0)
        path = Path(folder)
        writers = [JsonLines(path / "metrics.jsonl"), TensorBoard(path), served]
        command = [sys.executable, "-c", SCRAPER, str(served.url)]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as scraper:
            with Monitor(writers) as monitor:
                yield monitor
            scraper.kill()
        assert not monitor.lost, monitor.lost


def timed(
    program: Program, data: Any, held_out: Any, ticks: int, on_tick: OnTick
) -> Times:
    """Wall time, and CPU time of all threads and of the main one, of so many ticks."""
    state = program.init(jax.random.key(0))
    jax.block_until_ready(state.params)
    clocks = (time.perf_counter, time.process_time, time.thread_time)
    began = [clock() for clock in clocks]
    state = fit(
        program, state, data, held_out, ticks=ticks, batch_size=BATCH, on_tick=on_tick
    )
    jax.block_until_ready(state.params)
    wall, cpu, main = (clock() - b for clock, b in zip(clocks, began, strict=True))
    return wall, cpu, main


def compare(
    program: Program, per_tick: int, steps: int, rounds: int, monitor: Monitor
) -> dict[str, list[Times]]:
    """Both arms' times of each round."""
    data, held_out = rows(BATCH * per_tick, 0), rows(BATCH, 1)
    arms: dict[str, OnTick] = {
        "none": lambda state, report: None,
        "all": lambda state, report: monitor.write(report),
    }
    found: dict[str, list[Times]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name in sorted(arms, reverse=bool(number % 2)):
            ticks = max(1, steps // per_tick)
            found[name].append(timed(program, data, held_out, ticks, arms[name]))
    return {name: times[1:] for name, times in found.items()}  # the first compiles


def alone(program: Program, monitor: Monitor, ticks: int = 200) -> tuple[float, float]:
    """Microseconds of a tick that the main thread, and that the writers' take."""
    held_out = rows(BATCH, 1)
    state = program.step(program.init(jax.random.key(0)), held_out)
    report = jax.device_get(program.tick(state, held_out)[1])
    main = whole = 0.0
    for _ in range(ticks):
        before, all_before = time.thread_time(), time.process_time()
        monitor.write(report)
        main += time.thread_time() - before
        time.sleep(0.01)  # its threads have the time that steps would take
        whole += time.process_time() - all_before
    return 1e6 * main / ticks, 1e6 * (whole - main) / ticks


def spread(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=320)
    args = parser.parse_args()
    hidden = (args.hidden,) * 2
    model = MLP(FEATURES, hidden, CLASSES, num_seeds=4, capacity=2, rngs=nnx.Rngs(0))
    program = build(model, optax.adam(1e-3), optax.adam(1e-3))
    print(
        f"{jax.devices()[0].device_kind}, {platform.machine()}, Python "
        f"{platform.python_version()}, jax {jax.__version__}; {args.rounds} rounds of "
        f"{args.steps} steps\n"
    )
    print("| steps a tick | step ms, no writer | with all: wall | cpu | main |")
    print("|---|---|---|---|---|")
    with all_writers() as monitor:
        for per_tick in (10, 50, 200):
            times = compare(program, per_tick, args.steps, args.rounds, monitor)
            count = max(1, args.steps // per_tick) * per_tick
            step = statistics.median(wall for wall, *_ in times["none"]) / count
            pairs = list(zip(times["all"], times["none"], strict=True))
            wall = [ours[0] / plain[0] for ours, plain in pairs]
            typical = step * count
            cpu = [ours[1] / plain[1] for ours, plain in pairs]
            main = [1 + (ours[2] - plain[2]) / typical for ours, plain in pairs]
            print(
                f"| {per_tick} | {1e3 * step:.2f} | {spread(wall)} | {spread(cpu)} | "
                f"{spread(main)} |",
                flush=True,
            )
        write, threads = alone(program, monitor)
    print(f"\nA tick, us: write {write:.0f}, threads {threads:.0f}")


if __name__ == "__main__":
    main()
