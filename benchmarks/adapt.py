"""Whether growing pays where a pretrained host is frozen.

    python benchmarks/adapt.py [--task cipher ...] [--json FILE] [--quick]

With ``--json`` it goes on where an earlier call with the file has ended; ``--hosts`` is
a folder that keeps the pretrained hosts for other calls.

Every run pretrains a host of its own. Then each arm adapts the same hosts to the same
task, in the same number of steps of the same batches.

- grown by trial: a part of rank 1 in each of 8 places of every layer, embeddings
  included, collects the gradient for 10 steps; all learn together for 50; those of the
  greatest worth for each parameter are kept within the budget (`policy.trial`).
  What was worth nothing then, or less, counts and does not learn any more.
- grown by trial, all learn: the same but that it learns (``min_worth=-inf``).
- grown by trial, random start: the parts of the first, drawn at random.
- grown by placement: those 10 steps choose the places (``judge="gradient"``).
- random places: the same parts with the same start, kept at random.
- uniform, same start: LoRA of equal rank with the start of the grown parts.
- uniform LoRA: of equal rank. At the smallest budget rank 1 of queries, keys and values
  (text) or of the largest layer (digits); else of all matrices in the blocks or layers.
- AdaLoRA: of all matrices and 1.5 times the budget, pruned to the budget.
- biases, last layer, embeddings: those of the host's own parameters.
- everything: full fine-tuning.

Each arm is tuned by held-out loss (text) or error (digits) of runs with other hosts,
over one grid of rates for Adam with ten steps of warm-up and a cosine. While the best
rate is at an end of the grid, the next one beyond is tried; "edge" marks an arm whose
rate is at an end still. Seeds are judged by other data than arms are
tuned by. Nothing reads the test data before the end.

"score" is bits a character or error in percent, on test data, with half of a 95%
interval. "minus" is the arm less uniform LoRA, paired. "peak" is the most parameters
that an arm holds beside the frozen host, or trains. "operations" are those of a run
over uniform LoRA's, evaluations that decide included. The regret of an arm in a cell, a
task with a budget, is how far it is from the best arm there whose parameters the budget
covers, in percent of what full fine-tuning gains over the host. An arm that is larger
than the budget has no part in that cell.
"""

import argparse
import dataclasses
import json
import platform
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from adapt_grown import ANY_BUDGET, grown_arms
from adapt_runs import Arm, Run, measured, plain_arms, pretrained
from adapt_tasks import TASKS, Task
from scipy import stats

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
RUNS = 24
"""Runs that are reported, and that a program takes at a time."""
FIXED = ("biases", "last layer", "embeddings", "everything")
"""Arms that know no budget."""

Table = dict[str, dict[str, Any]]


def rates_of(name: str) -> list[int]:
    """Rates of `RATES` to begin with; in the middle is where such arms are best."""
    return list(range(2, 8) if name == "everything" else range(4, 10))


class Hosts:
    """Pretrained hosts, `RUNS` to report and others to tune by, made once.

    Args:
      folder: to keep them in, if any.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._made: dict[str, Any] = {}
        self._folder = folder

    @staticmethod
    def keys(task: Task) -> jax.Array:
        """Of the hosts of a task, those that are reported first."""
        return jax.random.split(jax.random.key(1), RUNS + task.tuners)

    def of(self, task: Task) -> Any:
        """Parameters of the hosts that a task begins with."""
        if task.family not in self._made:
            self._made[task.family] = self._kept(task)
        return self._made[task.family]

    def _kept(self, task: Task) -> Any:
        if self._folder is None:
            return jax.block_until_ready(pretrained(task, self.keys(task)))
        name = f"{task.family}, {task.pretrain} steps, {RUNS + task.tuners}.npz"
        file = self._folder / name.replace(" ", "-")
        if not file.exists():
            made = pretrained(task, self.keys(task))
            self._folder.mkdir(parents=True, exist_ok=True)
            np.savez(file, **{n.replace("/", "|"): p for n, p in made.items()})
        with np.load(file) as arrays:
            return {n.replace("|", "/"): jnp.asarray(arrays[n]) for n in arrays}

    def arguments(
        self, task: Task, which: np.ndarray, rates: Any, budget: int
    ) -> tuple[Any, Run]:
        """What an arm is called with: data and runs."""
        keys = self.keys(task)[which]
        params = jax.tree.map(lambda a: a[which], self.of(task))
        rates = jnp.broadcast_to(jnp.asarray(rates, jnp.float32), (len(which),))
        budgets = jnp.full(len(which), budget, jnp.int32)
        return changed(task, keys), Run(params, keys, rates, budgets)


def changed(task: Task, keys: jax.Array) -> Any:
    """The data of each run."""
    parts = jax.tree.map(jnp.asarray, task.target())
    return jax.jit(jax.vmap(task.change, in_axes=(0, None)))(keys, parts)


def compiled(task: Task, arm: Arm, arguments: Any) -> Any:
    """The program of an arm, for tasks of the same shapes."""

    def run(parts: Any, run: Run) -> Any:
        return arm.run(task, parts, run)

    return jax.jit(jax.vmap(run)).lower(*arguments).compile()


def score_of(task: Task, pairs: np.ndarray) -> np.ndarray:
    """What is reported of ``(loss, score)``, (R, 2): bits, or error in percent."""
    if task.score == "bits":
        return pairs[:, 0] / np.log(2)
    return 100 * (1 - pairs[:, 1])


def adapted(
    name: str, task: Task, budget: int, hosts: Hosts, run: Any
) -> tuple[Any, float, bool]:
    """An arm's outcomes at the rate that its tuning chose, that rate, and whether it is
    at an end of the grid."""
    tried: dict[int, tuple[float, float]] = {}
    new = rates_of(name)
    while new:
        tried |= _tried(new, task, budget, hosts, run)
        best = min(tried, key=lambda i: tried[i])
        beyond = {min(tried): best - 1, max(tried): best + 1}.get(best, -1)
        new = [beyond] if 0 <= beyond < len(RATES) else []
    final = hosts.arguments(task, np.arange(RUNS), RATES[best], budget)
    outcome = jax.device_get(run(*final))
    return outcome, RATES[best], best in (min(tried), max(tried))


def _tried(
    at: list[int], task: Task, budget: int, hosts: Hosts, run: Any
) -> dict[int, tuple[float, float]]:
    """Mean score and loss on held-out data with each of those `RATES`.

    Where errors are equal, the loss decides; what is not finite is worst.
    """
    which = np.tile(np.arange(RUNS, RUNS + task.tuners), len(at))
    rates = np.repeat([RATES[i] for i in at], task.tuners)
    pairs = []
    for begin in range(0, len(which), RUNS):
        some = slice(begin, begin + RUNS)
        few = RUNS - len(which[some])  # the last call is filled up
        wide = [np.pad(a[some], (0, few), mode="edge") for a in (which, rates)]
        held_out = run(*hosts.arguments(task, *wide, budget)).held_out
        pairs.append(np.asarray(held_out)[: RUNS - few])
    values = np.concatenate(pairs)
    both = np.stack([score_of(task, values), values[:, 0]], axis=1)
    means = both.reshape(len(at), task.tuners, 2).mean(axis=1)
    means = np.nan_to_num(means, nan=np.inf)
    return {i: tuple(mean) for i, mean in zip(at, means.tolist(), strict=True)}


def half(values: np.ndarray) -> float:
    """Half of a 95% Student-t interval."""
    n = len(values)
    return float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))


def operations(task: Task, arm: Arm) -> float:
    """Of a run, in passes over a batch of training data."""
    parts = task.target()
    judged = jax.tree.leaves(parts.judged)[0].shape[0]
    batch = jax.eval_shape(task.sample, parts.learned, jax.random.key(0))
    rows = jax.tree.leaves(batch)[0].shape[0]
    return task.steps * arm.backward + arm.evaluations * judged / rows


class Arms:
    """The arms of each family of tasks and each budget, compiled side by side."""

    def __init__(self, hosts: Hosts, only: list[str] | None) -> None:
        self.hosts, self.only = hosts, only
        self._pool = ThreadPoolExecutor(8)
        self._made: dict[Any, Future[tuple[Arm, Any]]] = {}

    def of(self, task: Task, budget: int) -> dict[str, Future[tuple[Arm, Any]]]:
        """Each arm and its program, by name; what is not there is begun."""
        like = self.hosts.arguments(task, np.arange(RUNS), 1e-2, budget)
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), like)

        def made(make: Any) -> tuple[Arm, Any]:
            arm = make if isinstance(make, Arm) else make()
            return arm, compiled(task, arm, shapes)

        found = {}
        every = {**grown_arms(task, budget), **plain_arms(task, budget)}
        for name, make in every.items():
            if self.only and name not in self.only:
                continue
            key = task.score, name, 0 if name in FIXED + ANY_BUDGET else budget
            if key not in self._made:
                self._made[key] = self._pool.submit(made, make)
            found[name] = self._made[key]
        return found


def cell(name: str, task: Task, budget: int, arms: Arms, table: Table) -> Iterator[str]:
    """Adds to ``table`` the arms that it lacks, on a task with a budget.

    Yields:
      The name of each that has been added.
    """
    for arm_name, made in arms.of(task, budget).items():
        if arm_name in table:
            continue
        arm, program = made.result()
        begin = time.perf_counter()
        outcome, rate, edge = adapted(arm_name, task, budget, arms.hosts, program)
        table[arm_name] = {
            "score": score_of(task, outcome.test),
            "rate": rate,
            "edge": edge,
            "parameters": np.asarray(outcome.parameters),
            "peak": arm.peak,
            "operations": operations(task, arm),
            "places": outcome.places,
            "seconds": time.perf_counter() - begin,
        }
        mean = table[arm_name]["score"].mean()
        seconds = table[arm_name]["seconds"]
        print(
            f"{name} {budget} {arm_name}: {mean:.4f} at {rate:g} ({seconds:.0f} s)",
            flush=True,
        )
        yield arm_name


def _print(name: str, task: Task, budget: int, table: Table) -> None:
    base = table.get("uniform LoRA")
    unit = "bits a character" if task.score == "bits" else "error %"
    print(f"\n### {name}, {budget} parameters\n")
    print(
        f"| arm | {unit} | minus uniform LoRA | parameters | peak | operations | rate |"
    )
    print("|---|---|---|---|---|---|---|")
    for arm, row in table.items():
        score = np.asarray(row["score"])
        minus = ""
        if base is not None and arm != "uniform LoRA":
            gap = score - np.asarray(base["score"])
            minus = f"{gap.mean():+.4f} ± {half(gap):.4f}"
        share = row["operations"] / base["operations"] if base else float("nan")
        print(
            f"| {arm} | {score.mean():.4f} ± {half(score):.4f} | {minus} "
            f"| {np.mean(row['parameters']):.0f} | {row['peak']} | {share:.2f} "
            f"| {row['rate']:g}{' (edge)' if row['edge'] else ''} |"
        )
    print(flush=True)


def regrets(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of each arm in each cell, in percent of full fine-tuning's gain over the host."""
    of: dict[str, dict[str, float]] = {}
    for label, table in found["cells"].items():
        name, budget = label.split()
        means = {arm: float(np.mean(row["score"])) for arm, row in table.items()}
        gain = found["host"][name] - means["everything"]
        fits = [a for a in table if np.mean(table[a]["parameters"]) <= int(budget)]
        best = min(means[arm] for arm in fits)
        for arm in fits:
            of.setdefault(arm, {})[label] = 100 * (means[arm] - best) / gain
    return of


def summary(found: dict[str, Any]) -> None:
    """Prints the regrets, and the intervals against two arms by cell."""
    of = regrets(found)
    print("\n### Regret, % of what full fine-tuning gains\n")
    print("| arm | worst | where | mean | cells |\n|---|---|---|---|---|")
    for arm, by_cell in sorted(of.items(), key=lambda a: max(a[1].values())):
        where = max(by_cell, key=lambda c: by_cell[c])
        mean = np.mean(list(by_cell.values()))
        print(
            f"| {arm} | {by_cell[where]:.1f} | {where} | {mean:.1f} | {len(by_cell)} |"
        )
    print("\n### Cells in which an interval lies below 0 (better) / above it (worse)\n")
    print("| arm | against uniform LoRA | against AdaLoRA | cells |\n|---|---|---|---|")
    for arm, by_cell in of.items():
        line = []
        for other in ("uniform LoRA", "AdaLoRA"):
            tables = [found["cells"][label] for label in by_cell]
            gaps = [
                np.subtract(t[arm]["score"], t[other]["score"])
                for t in tables
                if other in t
            ]
            better = sum(g.mean() + half(g) < 0 for g in gaps)
            worse = sum(g.mean() - half(g) > 0 for g in gaps)
            line.append(f"{better} / {worse}")
        print(f"| {arm} | {' | '.join(line)} | {len(by_cell)} |")


def read(files: list[Path]) -> dict[str, Any]:
    """What several calls have found, together."""
    found: dict[str, Any] = {"host": {}, "cells": {}}
    for file in files:
        more = json.loads(file.read_text())
        found["host"] |= more["host"]
        for label, table in more["cells"].items():
            found["cells"].setdefault(label, {}).update(table)
    fixed: dict[str, dict[str, Any]] = {}
    for label, table in found["cells"].items():  # the same at every budget
        task = fixed.setdefault(label.split()[0], {})
        task.update({arm: row for arm, row in table.items() if arm in FIXED})
    for label, table in found["cells"].items():
        table.update(fixed[label.split()[0]])
    return found


def main() -> None:
    """Runs the tasks, and prints tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--budget", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--hosts", type=Path, help="folder to keep hosts in")
    parser.add_argument("--quick", action="store_true", help="few steps, to try it out")
    parser.add_argument("--read", nargs="+", type=Path, help="tables of those files")
    options = parser.parse_args()
    if options.read:
        found = read(options.read)
        for label, table in found["cells"].items():
            name, budget = label.split()
            _print(name, TASKS[name], int(budget), table)
        summary(found)
        return
    device = jax.devices()[0].device_kind
    print(f"{device}, Python {platform.python_version()}, jax {jax.__version__}")
    found: dict[str, Any] = {"host": {}, "cells": {}}
    if options.json and options.json.exists():
        found = json.loads(options.json.read_text())
    hosts = Hosts(options.hosts)
    arms = Arms(hosts, options.arms)
    for name in options.task:
        task = TASKS[name]
        if options.quick:
            task = dataclasses.replace(task, pretrain=30, steps=80)
        found["host"][name] = host_alone(task, hosts)
        print(f"{name}: the host alone {found['host'][name]:.4f}", flush=True)
        budgets = [task.budgets[i] for i in options.budget]
        for budget in budgets:
            arms.of(task, budget)  # all begin to compile
        for budget in budgets:
            known = found["cells"].get(f"{name} {budgets[0]}", {})
            known = {arm: row for arm, row in known.items() if arm in FIXED}
            table = found["cells"].setdefault(f"{name} {budget}", {})
            table.update({**known, **table})
            for _ in cell(name, task, budget, arms, table):
                if options.json:
                    options.json.write_text(json.dumps(_plain(found)))
            _print(name, task, budget, table)


def host_alone(task: Task, hosts: Hosts) -> float:
    """Mean score of the hosts before they are adapted."""
    parts, runs = hosts.arguments(task, np.arange(RUNS), 0.0, 0)
    test = jax.jit(jax.vmap(lambda p, of: measured(task, p, of)[1]))(runs.host, parts)
    return float(score_of(task, np.asarray(test)).mean())


def _plain(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: np.asarray(x).tolist() if hasattr(x, "shape") else x, tree
    )


if __name__ == "__main__":
    main()
