"""Tunes the arms of `change.py` on a task and runs each at its best grid point."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from change_arms import Arm, chosen, grown, renewed, replay, static
from change_operations import COUNTS, epoch_operations, most_grown
from change_runs import Runner, Runs, last
from change_tasks import Task, widen

from esper_jax.lifecycle import Stage

__all__ = [
    "ARMS",
    "TUNING_SEED",
    "Result",
    "arms_of",
    "birth_ticks",
    "compare",
    "final_topology",
    "random_plan",
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
    "random",
    "random places",
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


def arms_of(task: Task, asked: Sequence[str]) -> list[str]:
    """The arms to run on a task: ``grown``, and those of ``asked`` that fit it."""
    possible = [a for a in ARMS if a != "renewed" or task.change is not None]
    return [a for a in possible if a in asked or a == "grown"]


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
        "random": [random_plan(r, True) for r in (best.tuning, best.runs)],
        "random places": [random_plan(r, False) for r in (best.tuning, best.runs)],
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


def birth_ticks(runs: Runs) -> dict[str, np.ndarray]:
    """Tick at which each seed that counts in the end germinated: int (R, S) by layer.

    It is -1 for a seed that does not count.
    """
    ticks = {}
    for name, stage in runs.stages.items():
        dormant = stage == Stage.DORMANT
        last = dormant.shape[1] - 1 - dormant[:, ::-1].argmax(axis=1)
        born = np.where(dormant.any(axis=1), last + 1, 0)
        ticks[name] = np.where(COUNTS[stage[:, -1]], born, -1)
    return ticks


def random_plan(runs: Runs, anytime: bool) -> dict[str, np.ndarray]:
    """A plan for `change_arms.replay`: as many seeds as each run ended with, anywhere.

    Args:
      runs: of the grown arm.
      anytime: True draws the ticks from the first half of the run, which leaves each
        seed time to be grafted; False takes the run's own ticks.

    Returns:
      The tick at which each seed germinates, or -1 for never: int32 (R, S) by layer.
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
