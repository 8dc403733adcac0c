"""Tunes the arms of `change.py` on a task and runs each at its best grid point."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from change_arms import Arm, chosen, grown, renewed, static
from change_operations import COUNTS, epoch_operations, most_grown
from change_runs import Runner, Runs, last
from change_tasks import Task, widen

__all__ = [
    "ARMS",
    "TUNING_SEED",
    "Result",
    "arms_of",
    "compare",
    "final_topology",
    "runners",
    "tune_and_run",
]

ARMS = (
    "grown",
    "static",
    "static, ops",
    "always on",
    "always on, ops",
    "renewed",
    "retrained",
    "host",
)
"""Rows of the table, in order."""

TUNING_SEED = 100_000
"""First random seed of the tuning runs. Those of the final runs are below."""


@dataclasses.dataclass(frozen=True)
class Result:
    """An arm, tuned, and its final runs."""

    arm: Arm
    point: tuple[float, float, float]
    """Learning rate, weight decay, and the blueprints' rate over the host's."""
    runs: Runs
    tuning: Runs
    """At the chosen grid point, a run for each tuning seed."""


def arms_of(asked: Sequence[str]) -> list[str]:
    """The arms to run: ``grown``, and those of ``asked``."""
    return [a for a in ARMS if a in asked or a == "grown"]


def runners(
    task: Task, count: int, names: Sequence[str], split: int
) -> dict[str, Runner]:
    """The program of each named arm.

    Arms that differ only in their ``extra`` share a program.
    """
    data = task.data(split)
    parameters, operations = most_grown(task, data)
    wide = widen(task, parameters)

    def as_long(arm: Arm) -> int:
        each = epoch_operations(task, arm, data)
        return max(task.epochs, int(np.ceil(operations / each)))

    same, every = static(task, "static", wide), chosen(task, "always on")
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
    """Yields the result of each named arm as soon as its runs end, ``grown`` first.

    Args:
      task: what the programs learn.
      programs: of the arms, as `runners` makes them.
      names: of the arms.
      first: random seed of the first final run.
    """
    best = tune_and_run(programs["grown"], first)
    yield "grown", best
    extras = {
        "retrained": [final_topology(r) for r in (best.tuning, best.runs)],
    }
    for name in names:
        if name != "grown":
            extra = extras.get(name, (None, None))
            yield name, tune_and_run(programs[name], first, extra)


def tune_and_run(
    runner: Runner, first: int, extras: Sequence[Any] = (None, None)
) -> Result:
    """Tunes an arm over the task's grid, and runs it at the best point.

    Tuning and the final runs each take ``runner.count`` runs.

    Args:
      runner: of the arm.
      first: random seed of the first final run.
      extras: ``extra`` for the tuning runs and for the final runs; None for the arm's
        own.
    """
    task, count = runner.task, runner.count
    points = task.grid
    if not runner.arm.grows:  # an arm without blueprints has no use for their share
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
    """``count`` of the runs, from number ``first`` on."""
    rows = slice(first, first + count)
    fields = {
        f.name: getattr(runs, f.name)[rows]
        for f in dataclasses.fields(runs)
        if f.name not in ("stages", "seconds")
    }
    stages = {name: stage[rows] for name, stage in runs.stages.items()}
    return Runs(**fields, stages=stages, seconds=runs.seconds)


def final_topology(runs: Runs) -> dict[str, np.ndarray]:
    """Which seeds count at the last tick: bool (R, S) by layer."""
    return {name: COUNTS[stage[:, -1]] for name, stage in runs.stages.items()}
