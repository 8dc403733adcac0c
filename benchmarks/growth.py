"""Whether growing from scratch pays: a grown network against other ways to spend.

    python benchmarks/growth.py [--task digits ...] [--json FILE] [--quick]
    python benchmarks/growth.py --read FILE ...    # tables of what was found

With ``--json`` it goes on where an earlier call with the file has ended.

Every arm trains in as many steps on the same rows in the same order, from hosts drawn
from the same keys.

- grown: in each of several places of every layer a part is born before the first step;
  for 8% of the steps all learn together; those of the greatest worth for each parameter
  are kept within the budget (`policy.trial`), and learn on. A part is a `group`, which
  reads a layer's output and writes all of it.
- grown, whole budget: the same, but what is worth nothing, or less, is kept, too, as
  far as the budget goes (``rent=-inf``).
- static: the narrowest host of the same shape with at least the budget's parameters.
- everything on: the same parts in all places, from the first step to the last.
- retrained: what is in the paired grown run in the end, trained from scratch.
- host: the host that growth starts from.

Each arm is tuned by the accuracy on held-out rows, at the last step, of runs with other
random seeds, over one grid of AdamW's learning rate and weight decay. The rate rises by
a line (``--warm-up``) and falls by a cosine; a part has the rate and decay of its host.
While the best point is at an edge of the grid, the grid is widened there, by a factor
of two; "edge" marks an arm whose best point is at one still. A decay of 0 is none. Then
each arm learns at its best point from all rows that are not test rows. Parts are judged
by 900 of the rows that are learned from. Nothing reads the test data before the end.

"test" is the accuracy in percent after the last step, with half of a 95% Student-t
interval over runs, which differ by their host and the order of the rows. All runs share
the data. "grown minus it" is paired. "peak" is the most parameters that are in the
model at a time, those on trial included. "operations" are those of a run, over those of
static; a backward pass counts as two forward passes, and evaluations that decide
count. The regret of an arm on a task is how far it is behind the best arm there, in
points.
"""

import argparse
import dataclasses
import itertools
import json
import math
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from growth_runs import Host, Outcome
from growth_tasks import TASKS, Task, rows_of
from scipy import stats

WHOLE = "grown, whole budget"
ARMS = ("grown", WHOLE, "static", "everything on", "retrained", "host")
"""Rows of the table, in order."""
TUNING_SEED = 100_000
"""First random seed of the runs that tune. Those that are reported are below."""
WIDENINGS = 4
"""How often a grid is widened at most."""

Found = dict[str, dict[str, Any]]
"""What became of each arm, by task and arm."""


class Tuner:
    """Searches the grid of a task for the point at which an arm is best.

    Args:
      task: whose grid it is.
      runs: with which each point is tried.
    """

    def __init__(self, task: Task, runs: int) -> None:
        self.task, self.runs = task, runs
        self.seeds = TUNING_SEED + np.arange(runs)

    def best(self, host: Host, kept: Any = None) -> tuple[tuple[float, float], Any]:
        """The best rate and decay, and what is told of the search.

        Args:
          host: of the arm.
          kept: parts of each of ``runs`` runs; None for a trial or no parts.
        """
        axes = [list(self.task.rates), list(self.task.decays)]
        tried: dict[tuple[float, float], tuple[float, float]] = {}
        parts: dict[tuple[float, float], Any] = {}
        for _ in range(1 + WIDENINGS):
            points = [p for p in itertools.product(*axes) if p not in tried]
            outcome = self._outcome(host, points, kept)
            shape = (len(points), self.runs)
            loss, accuracy = outcome.held_out.T.reshape(2, *shape).mean(axis=2)
            for i, point in enumerate(points):  # what is not finite is worst
                score = np.nan_to_num([accuracy[i], -loss[i]], nan=-1e9)
                tried[point] = tuple(score.tolist())
                own = slice(i * self.runs, (i + 1) * self.runs)
                parts[point] = {n: k[own] for n, k in outcome.kept.items()}
            best = max(tried, key=lambda p: tried[p])
            wider = [widened(axis, at) for axis, at in zip(axes, best, strict=True)]
            if wider == axes:
                break
            axes = wider
        edge = any(at_edge(axis, at) for axis, at in zip(axes, best, strict=True))
        told = {
            "edge": edge,
            "grid": [[*point, *score] for point, score in tried.items()],
            "tuning_kept": plain(parts[best]),
        }
        return best, told

    def _outcome(self, host: Host, points: list[Any], kept: Any) -> Outcome:
        rates, decays = np.repeat(points, self.runs, axis=0).T
        many = len(points)
        return host(
            np.tile(self.seeds, many),
            rates,
            decays,
            host.rows - self.task.held_out,
            kept and {n: np.tile(k, (many, 1)) for n, k in kept.items()},
        )


def at_edge(axis: list[float], at: float) -> bool:
    """Whether a point is at an end of the grid; 0 is none."""
    return at == axis[-1] or (at == axis[0] and at > 0)


def widened(axis: list[float], at: float) -> list[float]:
    """The axis with another point beyond ``at``, if that is at an end of it."""
    if at == axis[-1]:
        return [*axis, 2 * at]
    return [at / 2, *axis] if at_edge(axis, at) else axis


def arm_of(name: str, hosts: dict[str, Host], known: dict[str, Any]) -> Any:
    """Host of an arm, and its parts in runs that tune and in those that are reported.

    Args:
      name: of the arm.
      hosts: of the task.
      known: the arms of the task that have run.

    Returns:
      The host and two functions of a number of runs.
    """
    host = hosts.get(name, hosts["grown"])
    if name == "everything on":

        def every(runs: int) -> dict[str, np.ndarray]:
            return {n: ~k for n, k in host.none(runs).items()}

        return host, every, every
    if name == "retrained":
        of = {
            key: {n: np.asarray(k, bool) for n, k in known["grown"][key].items()}
            for key in ("tuning_kept", "kept")
        }
        return host, lambda _: of["tuning_kept"], lambda _: of["kept"]
    return host, lambda _: None, lambda _: None


def found_of(
    name: str, hosts: dict[str, Host], tuner: Tuner, runs: int, known: Any
) -> Any:
    """An arm's numbers, as JSON types."""
    begin = time.perf_counter()
    host, to_tune, to_report = arm_of(name, hosts, known)
    (rate, decay), told = tuner.best(host, to_tune(tuner.runs))
    outcome = host(np.arange(runs), rate, decay, host.rows, to_report(runs))
    sizes = host.parameters(outcome.kept)
    tries = name in ("grown", WHOLE)
    return plain(
        {
            "rate": rate,
            "decay": decay,
            **told,
            "about": tuner.task.about(),
            "test": outcome.test[:, 1],
            "widths": host.widths,
            "parameters": sizes,
            "peak": host.peak if tries else sizes.max(),
            "operations": host.spent(outcome, tries),
            "kept": outcome.kept,
            "seconds": time.perf_counter() - begin,
        }
    )


def plain(tree: Any) -> Any:
    """Arrays as lists; flags as 0 and 1."""

    def of(x: Any) -> Any:
        x = np.asarray(x)
        return (x.astype(int) if x.dtype == bool and x.ndim else x).tolist()

    return jax.tree.map(of, tree)


def hosts_of(task: Task, count: int, split: int) -> dict[str, Host]:
    """Hosts of a task; arms that are not named share that of ``grown``."""
    rows = rows_of(task, split)
    return {
        "grown": Host(task, task.widths, True, rows, count),
        WHOLE: Host(task, task.widths, True, rows, count, rent=-math.inf),
        "static": Host(task, task.widened(task.budget), False, rows, count),
        "host": Host(task, task.widths, False, rows, count),
    }


def half(values: np.ndarray) -> float:
    """Half of a 95% Student-t interval."""
    n = len(values)
    return float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))


def gap(table: dict[str, Any], arm: str) -> tuple[float, float]:
    """Grown minus an arm in points, paired, and half of its interval."""
    gaps = 100 * np.subtract(table["grown"]["test"], table[arm]["test"])
    return float(gaps.mean()), half(gaps)


def lines_of(name: str, table: dict[str, Any]) -> Iterator[str]:
    """The table of a task."""
    runs = len(table["grown"]["test"])
    yield f"\n### {name}\n"
    yield f"{table['grown']['about']}; {runs} runs.\n"
    yield (
        "| arm | test % | grown minus it | parameters | peak | operations "
        "| rate, decay |"
    )
    yield "|---|---|---|---|---|---|---|"
    base = np.mean(table.get("static", table["grown"])["operations"])
    for arm in (a for a in ARMS if a in table):
        row = table[arm]
        test = 100 * np.asarray(row["test"])
        minus = "" if arm == "grown" else "{:+.2f} ± {:.2f}".format(*gap(table, arm))
        yield (
            f"| {arm} | {test.mean():.2f} ± {half(test):.2f} | {minus} "
            f"| {np.mean(row['parameters']):.0f} | {row['peak']:.0f} "
            f"| {np.mean(row['operations']) / base:.2f} "
            f"| {row['rate']:g}, {row['decay']:g}{' (edge)' if row['edge'] else ''} |"
        )
    for arm in (a for a in ("grown", WHOLE) if a in table):
        kept = table[arm]["kept"].values()
        means = ", ".join(f"{np.sum(k, axis=1).mean():.1f}" for k in kept)
        yield f"\nParts that are kept in each layer, {arm}: {means}."


def summary(found: Found) -> Iterator[str]:
    """Regrets of all arms, and how often grown is ahead of each."""
    whole = {n: t for n, t in found.items() if all(arm in t for arm in ARMS)}
    if not whole:
        return
    means = {
        name: {arm: 100 * float(np.mean(table[arm]["test"])) for arm in ARMS}
        for name, table in whole.items()
    }
    regret = {
        arm: {name: max(of.values()) - of[arm] for name, of in means.items()}
        for arm in ARMS
    }
    yield "\n### Regret in points, and grown minus each arm\n"
    yield "| arm | worst | where | mean | grown above it | level | below |"
    yield "|---|---|---|---|---|---|---|"
    for arm in sorted(ARMS, key=lambda a: max(regret[a].values())):
        of = regret[arm]
        where = max(of, key=lambda name: of[name])
        counts = ["", "", ""]
        if arm != "grown":
            gaps = [gap(table, arm) for table in whole.values()]
            above = sum(mean - wide > 0 for mean, wide in gaps)
            below = sum(mean + wide < 0 for mean, wide in gaps)
            counts = [str(above), str(len(gaps) - above - below), str(below)]
        yield (
            f"| {arm} | {of[where]:.2f} | {where} | {np.mean(list(of.values())):.2f} "
            f"| {' | '.join(counts)} |"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--runs", type=int, default=200, help="that are reported")
    parser.add_argument(
        "--tuners", type=int, default=8, help="runs with which a point is tried"
    )
    parser.add_argument(
        "--warm-up",
        type=float,
        default=0.08,
        help="steps in which the rate rises; below 1, their share of all",
    )
    parser.add_argument("--split", type=int, default=2, help="random seed of the data")
    parser.add_argument("--json", type=Path, help="file to write every number to")
    parser.add_argument("--quick", action="store_true", help="2 epochs, a small grid")
    parser.add_argument("--threads", type=int, default=3, help="compilations at a time")
    parser.add_argument("--read", nargs="+", type=Path, help="tables of those files")
    options = parser.parse_args()
    if not 2 <= options.runs <= TUNING_SEED or options.tuners < 1:
        parser.error(
            f"--runs must be from 2 to {TUNING_SEED} and --tuners at least 1; got "
            f"{options.runs} and {options.tuners}"
        )
    if not 0 < options.warm_up < np.inf:
        parser.error(f"--warm-up must be a number above 0, got {options.warm_up}")
    return options


def main() -> None:
    """Runs the benchmark from the command line."""
    options = _options()
    if options.read:
        found: Found = {}
        for file in options.read:
            for name, table in json.loads(file.read_text()).items():
                found.setdefault(name, {}).update(table)
        for name in (n for n in TASKS if "grown" in found.get(n, {})):
            print("\n".join(lines_of(name, found[name])))
        print("\n".join(summary(found)))
        return
    device = jax.devices()[0].device_kind
    print(f"{device}, Python {platform.python_version()}, jax {jax.__version__}")
    found = {}
    if options.json and options.json.exists():
        found = json.loads(options.json.read_text())
    tasks = {
        name: dataclasses.replace(TASKS[name], warm_up=options.warm_up)
        for name in options.task
    }
    if options.quick:
        tasks = {
            n: dataclasses.replace(t, epochs=2, rates=t.rates[1:4], decays=t.decays[:2])
            for n, t in tasks.items()
        }
    every = {
        name: hosts_of(task, options.runs, options.split)
        for name, task in tasks.items()
        if any(arm not in found.get(name, {}) for arm in ARMS)
    }
    with ThreadPoolExecutor(options.threads) as pool:  # compiling is what takes time
        hosts = [host for of in every.values() for host in of.values()]
        list(pool.map(Host.compile, hosts))
    for name, of in every.items():
        table = found.setdefault(name, {})
        tuner = Tuner(tasks[name], options.tuners)
        for arm in (a for a in ARMS if a not in table):
            table[arm] = found_of(arm, of, tuner, options.runs, table)
            row = table[arm]
            print(
                f"{name}, {arm}: {100 * np.mean(row['test']):.2f} at {row['rate']:g}, "
                f"{row['decay']:g} ({row['seconds']:.0f} s)",
                flush=True,
            )
            if options.json:
                options.json.write_text(json.dumps(found) + "\n")
        print("\n".join(lines_of(name, table)), flush=True)
    print("\n".join(summary(found)))


if __name__ == "__main__":
    main()
