"""Whether growth pays where the data change: against other ways to spend the same.

    python benchmarks/change.py [--task digits-labels ...] [--runs 24] [--quick]

Every arm trains on the same rows in the same order, from hosts drawn from the same
keys. Arms that train for more epochs see other batches from the second phase on.

- grown: the controller decides when, where and what grows.
- host: the host that growth starts from, without seeds.
- static: a wider host of the same shape. It has at least the parameters of the largest
  model that growth may reach.
- static, ops: the same host, trained until it has spent the operations of growth.
  These are counted as if all that may grow lived from the first tick to the last.
- always on: all seeds learn and count from the first step to the last.
- always on, ops: the same, trained until it has spent the operations of growth. Where
  always on spends those anyhow, this repeats it.
- renewed: always on, but at the beginning of each phase all blueprints are drawn
  afresh.
- retrained: the final topology of each grown run, trained from scratch.

Data are split three ways. The model learns from the training data. The gates and the
controller read the held-out data, and every arm is tuned on them. The test data are
evaluated during training, and nothing reads them. `--split` draws the test data, except
where they are published, as those of MNIST-1D. Each run draws its training and held-out
rows from the rest.

Every arm is tuned by the held-out accuracy at the last tick, over one grid of learning
rate, weight decay and the share of the rate that blueprints learn at. All arms get the
same number of tuning runs, with random seeds of their own. Arms without seeds have
fewer grid points, and so more runs at each.

"last" is the test accuracy at the last tick, "stopped" that at the tick of best
held-out accuracy. Intervals are 95% Student-t intervals of the paired difference, over
the random seeds of initialisation, order and rows. Two runs share most of their
training rows. Intervals leave out two sources of chance: all runs share the test data,
and all use the one grid point that tuning chose.

All three parts of the data change at the beginning of each phase, in a way that each
run draws for itself. The optimizers and the schedule of the rate then start afresh in
every arm. The model is evaluated on the new held-out data before it learns from the new
training data. Accuracies are means over the phases, each at its own last tick (or its
own tick of best held-out accuracy).

Operations are those of a whole run: forward and backward passes of the host and of
living seeds, incubation included. Arms whose seeds are judged by evaluations pay for
those of held-out data and of counterfactuals too. Seconds are those of all final runs
of an arm together, without compilation, beside whatever else the machine was doing.
They include evaluations at every tick in all arms, and a dormant seed takes as long as
a living one. Parameters are those after the last tick's transitions, accuracies those
before them.
"""

import argparse
import dataclasses
import json
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from change_compare import ARMS, TUNING_SEED, Result, arms_of, compare, runners
from change_runs import Runner, last, stopped
from change_tasks import TASKS, Task, host_size
from scipy import stats


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean, low and high end of a 95% Student-t interval, in percentage points."""
    mean, n = differences.mean(), len(differences)
    half = stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n)
    return 100 * mean, 100 * (mean - half), 100 * (mean + half)


def report(name: str, task: Task, split: int, results: dict[str, Result]) -> None:
    """Prints the table of a task and the paired differences from ``grown``."""
    count = len(results["grown"].runs.test)
    lines = [
        f"\n### {name}\n",
        f"host widths {task.widths} ({host_size(task, task.widths)} parameters), "
        f"{task.num_seeds} seeds a layer, blueprint {task.blueprints[0]}, "
        f"{task.phases} x {task.epochs} epochs, batch {task.batch}, {count} runs, "
        f"split {split}\n",
        "| arm | rate, decay, share | test % last | stopped | held-out % | parameters "
        "| operations | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, r in results.items():
        mean, low, _ = interval(last(r.runs.test, task))
        point = ", ".join(f"{x:g}" for x in r.point)
        lines.append(
            f"| {key} | {point} | {mean:.2f} ± {mean - low:.2f} "
            f"| {100 * stopped(r.runs, task).mean():.2f} "
            f"| {100 * last(r.runs.accuracy, task).mean():.2f} "
            f"| {r.runs.parameters[:, -1].mean():.0f} "
            f"| {r.runs.operations.mean():.3g} | {r.runs.seconds:.0f} |"
        )
    lines += ["", "Test % at the last tick of each phase:", ""]
    for key, r in results.items():
        by_phase = r.runs.test.reshape(count, task.phases, -1)[:, :, -1]
        lines.append(
            f"- {key}: " + " ".join(f"{100 * x:.1f}" for x in by_phase.mean(axis=0))
        )
    lines += ["", "| grown minus | last, 95% interval | stopped, 95% interval |"]
    lines.append("|---|---|---|")
    ours = results["grown"].runs
    for key, r in results.items():
        if key != "grown":
            late = interval(last(ours.test, task) - last(r.runs.test, task))
            early = interval(stopped(ours, task) - stopped(r.runs, task))
            lines.append(f"| {key} | {_cell(late)} | {_cell(early)} |")
    print("\n".join(lines), flush=True)


def _cell(values: tuple[float, float, float]) -> str:
    mean, low, high = values
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def _plain(results: dict[str, Result], task: Task) -> dict[str, Any]:
    """The numbers behind the table, as JSON types."""
    return {
        key: {
            "point": r.point,
            "widths": r.arm.widths,
            "epochs": r.arm.epochs,
            "test": last(r.runs.test, task).tolist(),
            "stopped": stopped(r.runs, task).tolist(),
            "held_out": last(r.runs.accuracy, task).tolist(),
            "parameters": r.runs.parameters[:, -1].tolist(),
            "operations": r.runs.operations.tolist(),
            "seconds": r.runs.seconds,
        }
        for key, r in results.items()
    }


def _options() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument(
        "--runs",
        type=int,
        default=96,
        help="final runs, and tuning runs, of each arm; a multiple of the grid points",
    )
    parser.add_argument(
        "--split", type=int, default=0, help="random seed of the three-way split"
    )
    parser.add_argument(
        "--first", type=int, default=0, help="random seed of the first final run"
    )
    parser.add_argument(
        "--arms", nargs="*", choices=ARMS, default=ARMS, help="grown is always run"
    )
    parser.add_argument("--json", type=Path, help="file to write every number to")
    parser.add_argument("--quick", action="store_true", help="6 epochs a phase")
    parser.add_argument("--threads", type=int, default=2, help="compilations at a time")
    options = parser.parse_args()
    for name in options.task:
        points = len(TASKS[name].grid)
        if options.runs < 2 or options.runs % points:
            parser.error(
                f"--runs must be a multiple of the {points} grid points of {name}, "
                f"got {options.runs}"
            )
    if not 0 <= options.first <= TUNING_SEED - options.runs:
        parser.error(
            f"--first must be from 0 to {TUNING_SEED - options.runs}, below the tuning "
            f"runs' random seeds; got {options.first}"
        )
    return options


def main() -> None:
    """Runs the benchmark from the command line."""
    options = _options()
    device = jax.devices()[0]
    print(
        f"device {device.device_kind} ({platform.processor() or platform.machine()}), "
        f"jax {jax.__version__}"
    )
    tasks = {name: TASKS[name] for name in options.task}
    if options.quick:
        tasks = {n: dataclasses.replace(t, epochs=6) for n, t in tasks.items()}
    arms = arms_of(options.arms)
    programs = {
        name: runners(task, options.runs, arms, options.split)
        for name, task in tasks.items()
    }
    with ThreadPoolExecutor(options.threads) as pool:  # compiling is what takes time
        every = [runner for by_arm in programs.values() for runner in by_arm.values()]
        list(pool.map(Runner.compile, dict.fromkeys(every)))
    numbers = {}
    for name, task in tasks.items():
        results: dict[str, Result] = {}
        for arm, result in compare(task, programs[name], arms, options.first):
            results[arm] = result
            numbers[name] = _plain(results, task)
            if options.json:
                options.json.write_text(json.dumps(numbers) + "\n")
        report(name, task, options.split, results)


if __name__ == "__main__":
    main()
