"""Whether growth pays: a grown network against other ways to spend the same.

    python benchmarks/growth.py [--task digits ...] [--runs 24] [--json FILE] [--quick]

Arms, each trained on the same rows in the same order from hosts drawn from the same
keys (those that train for longer, in other batches from the second phase on):

- grown: the controller decides when, where and what.
- host: the host that growth starts from, and nothing else.
- static: a wider host of the same shape, with at least the parameters that a grown
  model comes to at most.
- static, ops: the same, trained for as many epochs as take the operations of growth if
  all that may grow lived from the first tick to the last.
- always on: all seeds learn and count from the first step to the last.
- always on, ops: the same, for as many epochs as take those operations; where that is
  no more than always on takes anyhow, the same again.
- renewed, only where the data change: the same as always on, but at the beginning of
  each phase all blueprints are drawn afresh.
- retrained: each grown run's final topology, trained from scratch.
- random: as many seeds as the paired grown run ended with, at random places and times,
  none of them removed. (A seed whose worth is not above 0 stays in the model, frozen.)
  Times are of the first half of the run.
- random places: the same, but born at the ticks at which those of the grown run were;
  where the data change and seeds are renewed, those are of the last phase.

Three-way splits: training data; held-out data, which the gates and the controller read
and every arm is tuned on; test data, which are evaluated beside the training and read
by nothing. Each run draws for itself which of the rows that are no test data it learns
from, and which are held out (not of `text`, whose windows overlap); `--split` draws the
test data, where they are not published ones as those of MNIST-1D.

Every arm is tuned over the same grid of learning rate, weight decay and, where there
are seeds, the share of that rate that blueprints learn at, with the same number of
runs, whose random seeds are none of the final ones, by the held-out accuracy at the
last tick. (Arms without seeds have fewer grid points, and so more runs at each.) "last"
is the test accuracy of the model at the last tick; "stopped" is that at the tick with
the best held-out accuracy. Intervals are 95% Student-t intervals of the paired
difference over the random seeds of initialisation, order and rows; most of the rows
that two runs learn from are the same, since there are no others. The test data are one
and the same, and so is the grid point: that tuning could have chosen another is not in
the intervals.

In tasks whose data change, all three parts do so at the beginning of each phase, in a
way that each run draws for itself. Then every arm's optimizers start afresh, with the
schedule of the rate; the model is looked at as it is, on the new held-out data; and it
learns on. Every figure of accuracy is the mean over the phases, each at its own last
tick (or the one that is best on held-out data).

Operations are those of a whole run: forward and backward passes of host and living
seeds (incubation included) and, in the arms that decide by them, evaluations of
held-out data and counterfactuals. Seconds are those of all final runs of an arm
together, without compilation, beside the other programs of that time; all arms are
evaluated in them at every tick, and a dormant seed costs what a living one does.
Parameters are those after the last tick, accuracies those before its transitions.
"""

import argparse
import dataclasses
import json
import platform
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from growth_arms import (
    COUNTS,
    Arm,
    Runner,
    Runs,
    chosen,
    epoch_operations,
    grown,
    most_grown,
    renewed,
    replay,
    static,
)
from growth_tasks import TASKS, Task, host_size, widen
from scipy import stats

from esper_jax.lifecycle.stages import Stage

TUNING_SEED = 100_000
"""Random seeds of the tuning runs begin here; those of the final runs below."""


@dataclasses.dataclass(frozen=True)
class Result:
    """An arm, tuned, and its final runs."""

    arm: Arm
    point: tuple[float, float, float]
    """Learning rate, weight decay, and the blueprints' rate over the host's."""
    runs: Runs
    tuning: Runs
    """At the grid point that was chosen, a run for each tuning seed."""


def tune_and_run(runner: Runner, first: int, extras: Any = (None, None)) -> Result:
    """Tunes an arm over the task's grid, and runs it at the best point.

    Args:
      runner: of the arm; as many runs are spent on tuning as in the end.
      first: random seed of the first final run.
      extras: the arm's extra for the tuning runs and for the final ones.
    """
    task, count = runner.task, runner.count
    points = task.grid
    if not runner.arm.grows:  # the blueprints' share is nothing to it
        points = tuple(dict.fromkeys((rate, decay, 1.0) for rate, decay, _ in points))
    each = count // len(points)
    grid = np.repeat(np.array(points, np.float32), each, axis=0)
    seeds = TUNING_SEED + np.tile(np.arange(each), len(points))
    tuning_extra, final_extra = extras
    if tuning_extra is not None:
        tuning_extra = jax.tree.map(
            lambda x: np.concatenate([x[:each]] * len(points)), tuning_extra
        )
    tried = runner(seeds, grid, tuning_extra)
    score = last(tried.accuracy, task).reshape(len(points), each).mean(axis=1)
    best = int(np.argmax(score))
    point = points[best]
    runs = runner(first + np.arange(count), point, final_extra)
    return Result(runner.arm, point, runs, _part(tried, best * each, each))


def _part(runs: Runs, first: int, count: int) -> Runs:
    rows = slice(first, first + count)
    fields = {
        f.name: getattr(runs, f.name)[rows]
        for f in dataclasses.fields(runs)
        if f.name not in ("stages", "seconds")
    }
    stages = {name: stage[rows] for name, stage in runs.stages.items()}
    return Runs(**fields, stages=stages, seconds=runs.seconds)


def final_topology(runs: Runs) -> dict[str, np.ndarray]:
    """Which seeds count in the end: bool (R, S) by layer."""
    return {name: COUNTS[stage[:, -1]] for name, stage in runs.stages.items()}


def birth_ticks(runs: Runs) -> dict[str, np.ndarray]:
    """When each seed that counts in the end germinated: int (R, S) by layer, -1 for one
    that does not count."""
    ticks = {}
    for name, stage in runs.stages.items():
        dormant = stage == Stage.DORMANT
        last = dormant.shape[1] - 1 - dormant[:, ::-1].argmax(axis=1)
        born = np.where(dormant.any(axis=1), last + 1, 0)
        ticks[name] = np.where(COUNTS[stage[:, -1]], born, -1)
    return ticks


def random_plan(runs: Runs, anytime: bool) -> dict[str, np.ndarray]:
    """As many seeds as each run ended with, anywhere: int32 (R, S) by layer, the tick
    at which each germinates or -1 for never.

    Those are the run's own ticks or, with ``anytime``, any that leaves a seed the time
    to be grafted.
    """
    by_layer = birth_ticks(runs)
    ticks = runs.accuracy.shape[1]
    ends = np.cumsum([b.shape[1] for b in by_layer.values()])[:-1]
    rng = np.random.default_rng(0)
    births = np.concatenate(list(by_layer.values()), axis=1)
    plan = np.full(births.shape, -1, np.int32)
    for row, born in zip(plan, births, strict=True):
        kept = born[born >= 0]
        places = rng.permutation(len(row))[: len(kept)]
        drawn = rng.integers(0, max(1, ticks // 2), len(kept))
        row[places] = drawn if anytime else kept
    return dict(zip(by_layer, np.split(plan, ends, axis=1), strict=True))


ARMS = (
    "grown",
    "static",
    "static, ops",
    "always on",
    "always on, ops",
    "renewed",
    "retrained",
    "host",
    "random",
    "random places",
)


def runners(
    task: Task, count: int, names: Sequence[str], split: int
) -> dict[str, Runner]:
    """A program for each arm; those that differ in what they are given share one."""
    data = task.data(split)
    parameters, operations = most_grown(task, data)
    wide = widen(task, parameters)

    def as_long(arm: Arm) -> int:
        each = epoch_operations(task, arm, data)
        return max(task.epochs, int(np.ceil(operations / each)))

    same = static(task, "static", wide)
    every, again = chosen(task, "always on"), replay(task)
    longer = as_long(every)
    arms = {
        "grown": grown(task),
        "static": same,
        "static, ops": static(task, "static, ops", wide, as_long(same)),
        "always on": every,
        "always on, ops": every
        if longer == task.epochs
        else chosen(task, "always on, ops", longer),
        "renewed": renewed(task),
        "retrained": every,
        "host": static(task, "host", task.widths),
        "random": again,
        "random places": again,
    }
    programs: dict[Arm, Runner] = {}
    return {
        name: programs.setdefault(arm, Runner(task, arm, data, count))
        for name, arm in arms.items()
        if name in names
    }


def compare(
    task: Task, programs: dict[str, Runner], names: Sequence[str], first: int
) -> Iterator[tuple[str, Result]]:
    """The arms of a task, ``grown`` first."""
    best = tune_and_run(programs["grown"], first)
    yield "grown", best
    extras = {
        "retrained": [final_topology(r) for r in (best.tuning, best.runs)],
        "random": [random_plan(r, True) for r in (best.tuning, best.runs)],
        "random places": [random_plan(r, False) for r in (best.tuning, best.runs)],
    }
    for name in names:
        if name != "grown":
            extra = extras.get(name, (None, None))
            yield name, tune_and_run(programs[name], first, extra)


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95% Student-t interval, in percentage points."""
    mean, n = differences.mean(), len(differences)
    half = stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n)
    return 100 * mean, 100 * (mean - half), 100 * (mean + half)


def last(of: np.ndarray, task: Task) -> np.ndarray:
    """``of`` (R, T) at the last tick of a run, or of each phase and their mean."""
    return of.reshape(len(of), task.phases, -1)[:, :, -1].mean(axis=1)


def stopped(runs: Runs, task: Task) -> np.ndarray:
    """Test accuracy at each run's tick of best held-out accuracy; the mean of those of
    its phases."""
    by_phase = (len(runs.test), task.phases, -1)
    best = runs.accuracy.reshape(by_phase).argmax(axis=2)[..., None]
    picked = np.take_along_axis(runs.test.reshape(by_phase), best, axis=2)
    return picked[..., 0].mean(axis=1)


def report(name: str, task: Task, split: int, results: dict[str, Result]) -> None:
    """Prints the table of a task and the paired differences."""
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
    if task.phases > 1:
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
    """What the table was made of, as JSON holds it."""
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


def _arms_of(task: Task, asked: Sequence[str]) -> list[str]:
    possible = [a for a in ARMS if a != "renewed" or task.change is not None]
    return [a for a in possible if a in asked or a == "grown"]


def main() -> None:
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
    device = jax.devices()[0]
    print(
        f"device {device.device_kind} ({platform.processor() or platform.machine()}), "
        f"jax {jax.__version__}"
    )
    tasks = {name: TASKS[name] for name in options.task}
    if options.quick:
        tasks = {n: dataclasses.replace(t, epochs=6) for n, t in tasks.items()}
    count = options.runs
    arms = {name: _arms_of(task, options.arms) for name, task in tasks.items()}
    programs = {
        name: runners(task, count, arms[name], options.split)
        for name, task in tasks.items()
    }
    with ThreadPoolExecutor(options.threads) as pool:  # compiling is what takes time
        every = [runner for by_arm in programs.values() for runner in by_arm.values()]
        list(pool.map(Runner.compile, dict.fromkeys(every)))
    numbers = {}
    for name, task in tasks.items():
        results = {}
        for arm, result in compare(task, programs[name], arms[name], options.first):
            results[arm] = result
            numbers[name] = _plain(results, task)
            if options.json:
                options.json.write_text(json.dumps(numbers) + "\n")
        report(name, task, options.split, results)


if __name__ == "__main__":
    main()
