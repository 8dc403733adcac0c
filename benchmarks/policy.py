"""A learned policy beside the heuristic, chance, everything at once, and nothing.

    python benchmarks/policy.py sets build/sets.npz
    python benchmarks/policy.py tune configs/policy.toml build/heuristic.json
    python benchmarks/policy.py run build/policy --heuristic build/heuristic.json
    python benchmarks/policy.py figure build/policy

``tune`` evolves the heuristic's numbers as the policy was trained: the same tasks, and
as many runs. ``run`` compares all arms on the cells of `policy_tasks.py`, run by run:
run ``i`` of every arm has the same host, rows, rates and budget.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from policy_arms import (
    NUMBERS,
    everywhere,
    heuristic_plays,
    nothing_tuned,
    numbers_of,
    played,
    random_plan,
)
from policy_tasks import BUDGETS, CELLS, HOSTS, Cell, Sets, write_sets

from esper_jax.learning import Episodes, Family
from esper_jax.learning.config import load_policy_config
from esper_jax.learning.episodes import growing_nothing
from esper_jax.learning.train import Trainer
from esper_jax.lifecycle import Stage
from esper_jax.policy.learned_file import read_policy
from esper_jax.policy.sight import FEATURES

AT_ONCE = 5
"""Arms that a program runs side by side."""
ARMS = ("learned", "heuristic", "random", "everywhere", "none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sets = commands.add_parser("sets", help="write the data sets set aside")
    sets.add_argument("path", type=Path)
    tuned = commands.add_parser("tune", help="tune the heuristic")
    tuned.add_argument("config", type=Path)
    tuned.add_argument("path", type=Path)
    tuned.add_argument("--minutes", type=float, default=float("inf"))
    tuned.add_argument("--generations", type=int, required=True)
    tuned.add_argument("--set", nargs="*", default=[])
    run = commands.add_parser("run", help="compare all arms")
    run.add_argument("out", type=Path)
    run.add_argument("--policy", default="")
    run.add_argument("--heuristic", type=Path, required=True)
    run.add_argument("--sets", type=Path)
    run.add_argument("--runs", type=int, default=256)
    run.add_argument("--hosts", nargs="*", default=list(HOSTS))
    run.add_argument("--quick", action="store_true", help="only to see that it runs")
    drawn = commands.add_parser("figure", help="draw what the policy does")
    drawn.add_argument("out", type=Path)
    given = parser.parse_args()
    if given.command == "sets":
        given.path.parent.mkdir(parents=True, exist_ok=True)
        write_sets(given.path)
    elif given.command == "tune":
        tune(given)
    elif given.command == "run":
        compare(given)
    else:
        from policy_figure import draw

        draw(given.out)


def tune(given: argparse.Namespace) -> None:
    """Evolves the heuristic's numbers, and writes them."""
    config = load_policy_config(given.config, given.set)
    other = dataclasses.replace(config.evolution, sigma=0.4, learning_rate=0.1)
    config = dataclasses.replace(config, evolution=other)
    begun = time.monotonic()
    trainer = Trainer(config, heuristic_plays, NUMBERS, nothing_tuned)
    rows = []
    given.path.parent.mkdir(parents=True, exist_ok=True)
    while len(rows) < given.generations:
        if time.monotonic() - begun > 60 * given.minutes:
            break
        rows.append(trainer.generation())
        print({k: round(v, 4) for k, v in rows[-1].items()}, flush=True)
        if len(rows) % 5 == 0 or len(rows) == given.generations:
            numbers = jax.tree.map(lambda x: np.asarray(x).tolist(), trainer.state.mean)
            told = {"numbers": numbers, "generations": len(rows), "rows": rows}
            given.path.write_text(json.dumps(told, indent=1))


@dataclasses.dataclass
class Host:
    """A host's program, for `AT_ONCE` arms on a number of tasks."""

    family: Family
    episodes: Episodes
    places: int
    program: Any = None

    @classmethod
    def of(cls, name: str, numbers: Any, quick: bool) -> "Host":
        family = HOSTS[name]
        if quick:
            family = dataclasses.replace(family, ticks=6, steps=2, batch=64)
            family = dataclasses.replace(family, held_out=64, test=64)
        places = family.num_seeds * len(family.hidden)
        return cls(family, Episodes(family, played, numbers(places)), places)

    def compile(self, sets: Sets, numbers: Any, runs: int) -> None:
        tasks = sets.tasks(CELLS[0], self.family, 1.0, runs)
        of_tasks = jax.vmap(self.episodes.one)
        arms = jax.jit(jax.vmap(of_tasks, in_axes=(0, None)))
        like = _stacked([_repeated(numbers(self.places), runs)] * AT_ONCE)
        self.program = arms.lower(like, tasks).compile()


def _repeated(numbers: Any, runs: int) -> Any:
    return jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], runs, 0), numbers)


def _stacked(many: list[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *many)


def compare(given: argparse.Namespace) -> None:
    """Runs all cells, and writes ``results.json`` and ``results.md``."""
    given.out.mkdir(parents=True, exist_ok=True)
    found = read_policy(given.policy)
    tuned = json.loads(given.heuristic.read_text())
    heuristic = {k: np.asarray(v, np.float32) for k, v in tuned["numbers"].items()}
    sets = Sets(given.sets)

    def numbers(places: int, which: int = 0, weights: Any = found.weights) -> Any:
        return numbers_of(weights, heuristic, places, which)

    begun = time.monotonic()
    hosts = {name: Host.of(name, numbers, given.quick) for name in given.hosts}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for done in [
            pool.submit(host.compile, sets, numbers, given.runs)
            for host in hosts.values()
        ]:
            done.result()
    print(f"compiled after {time.monotonic() - begun:.0f} s", flush=True)
    rows = []
    for cell in CELLS:
        if cell.host not in hosts:
            continue
        for budget in BUDGETS:
            row = one_cell(cell, budget, hosts[cell.host], sets, numbers, given.runs)
            rows.append(row)
            print(line(row), flush=True)
            told = {
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
                "runs": given.runs,
                "policy": {k: v for k, v in found.made_by.items() if k != "config"},
                "heuristic": {k: tuned[k] for k in ("numbers", "generations")},
                "cells": rows,
            }
            (given.out / "results.json").write_text(json.dumps(told))
    (given.out / "results.md").write_text(table(rows))


def one_cell(
    cell: Cell, budget: float, host: Host, sets: Sets, numbers: Any, runs: int
) -> dict[str, Any]:
    """All arms of a cell; at the middle budget of the first host, all ablations too."""
    tasks, places = sets.tasks(cell, host.family, budget, runs), host.places
    learned = numbers(places)
    weights = learned["weights"]
    nothing = numbers(places, 0, growing_nothing(jax.tree.map(jnp.asarray, weights)))
    arms = [
        _repeated(arm, runs)
        for arm in (
            learned,
            numbers(places, 1),
            numbers(places, 0, everywhere(weights)),
            nothing,
            nothing,
        )
    ]
    first = jax.device_get(host.program(_stacked(arms), tasks))
    mine = jax.tree.map(lambda x: x[0], first)
    found = {"learned": 0, "heuristic": 1, "everywhere": 2, "none": 3}
    result = {
        name: jax.tree.map(lambda x, i=i: x[i], first) for name, i in found.items()
    }
    ablated = {}
    if cell.host == "mlp" and budget == BUDGETS[1]:
        ablated = {name: _blind(weights, name) for name in FEATURES}
    queue = [("random", _chance(mine, host, numbers(places, 2), runs))]
    queue += [(n, _repeated(numbers(places, 0, w), runs)) for n, w in ablated.items()]
    without = {}
    while queue:
        some, queue = queue[:AT_ONCE], queue[AT_ONCE:]
        filled = [arm for _, arm in some] + [arms[4]] * (AT_ONCE - len(some))
        more = jax.device_get(host.program(_stacked(filled), tasks))
        for i, (name, _) in enumerate(some):
            one = jax.tree.map(lambda x, i=i: x[i], more)
            (result if name == "random" else without)[name] = one
    return {
        "cell": dataclasses.asdict(cell),
        "budget": budget,
        "arms": {name: _summary(result[name]) for name in ARMS},
        "over": {n: _paired(mine, result[n]) for n in ARMS if n != "learned"},
        "ablation": {name: _paired(mine, other) for name, other in without.items()},
        "births": _births(mine, len(host.family.hidden)),
    }


def _blind(weights: Mapping[str, Any], name: str) -> dict[str, Any]:
    read = np.array(weights["read"])
    read[FEATURES[name]] = 0
    return {**weights, "read": read}


def _born(result: Any) -> np.ndarray:
    """Where and when something was born: (R, T, P)."""
    stage = np.asarray(result.stage)
    before = np.concatenate([np.zeros_like(stage[:, :1]), stage[:, :-1]], axis=1)
    return (stage == Stage.GERMINATED) & (before == Stage.DORMANT)


def _chance(mine: Any, host: Host, like: Any, runs: int) -> Any:
    """A random plan for each run, with as many births as the network's run had."""
    rng = np.random.default_rng(0)
    born = _born(mine)
    plans = []
    for i in range(runs):
        kinds = np.asarray(mine.blueprint)[i][born[i]]
        ticks = host.family.ticks
        plans.append(random_plan(rng, len(kinds), kinds, host.places, ticks))
    plan = jax.tree.map(lambda *x: np.stack(x), *plans)
    return {**_repeated(like, runs), "plan": plan}


def _summary(result: Any) -> dict[str, float]:
    names = ("accuracy", "loss", "parameters", "births")
    return {name: float(np.mean(getattr(result, name))) for name in names}


def _paired(mine: Any, other: Any) -> dict[str, float]:
    """Points of accuracy that the network has over an arm, with 95% limits."""
    gap = 100 * (np.asarray(mine.accuracy) - np.asarray(other.accuracy))
    half = 1.96 * gap.std(ddof=1) / np.sqrt(len(gap))
    mean = float(gap.mean())
    return {"mean": mean, "low": mean - float(half), "high": mean + float(half)}


def _births(mine: Any, layers: int) -> list[Any]:
    """Births a run at each tick, by layer and blueprint: (T, layers, kinds)."""
    born, kind = _born(mine), np.asarray(mine.blueprint)
    runs, ticks, places = born.shape
    layer = np.arange(places) * layers // places
    counts = np.zeros((ticks, layers, 3))
    run, tick, place = np.nonzero(born)
    np.add.at(counts, (tick, layer[place], kind[run, tick, place]), 1 / runs)
    return counts.round(4).tolist()


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    cell = row["cell"]
    over = [
        f"{x['mean']:+.2f} [{x['low']:+.2f}, {x['high']:+.2f}]"
        for x in (row["over"][n] for n in ARMS[1:])
    ]
    arms = row["arms"]
    seen = "seen" if cell["seen"] else "unseen"
    used = (
        f"{arms['learned']['parameters']:.2f} / {arms['heuristic']['parameters']:.2f}"
    )
    score = f"{100 * arms['learned']['accuracy']:.1f}"
    first = (cell["name"], cell["host"], seen, f"{row['budget']:g}", score)
    return f"| {' | '.join([*first, *over, used])} |"


def table(rows: list[dict[str, Any]]) -> str:
    """All rows, and the ablations."""
    heads = [
        "task",
        "host",
        "",
        "budget",
        "learned %",
        *(f"over {n}" for n in ARMS[1:]),
    ]
    heads.append("parameters, learned / heuristic")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *map(line, rows)]
    blind = [row for row in rows if row["ablation"]]
    if blind:
        names = [f"{r['cell']['name']}" for r in blind]
        lines += [
            "",
            f"| blind to | {' | '.join(names)} |",
            "|---" * (1 + len(blind)) + "|",
        ]
        for name in FEATURES:
            lost = [row["ablation"][name] for row in blind]
            cells = [f"{x['mean']:+.2f} ± {x['high'] - x['mean']:.2f}" for x in lost]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
