"""A/B tests: paired runs of two configs, on the same data and with the same seeds.

A test is a folder, and its runs are runs like any other:

===================  ===============================================================
``plan.json``        the `Plan`, both configs in full, versions and devices
``a-SEED/``          a run of A; with ``stopped.json`` if the governor stopped it
``b-SEED/``          the run of B on the same rows in the same order, with equal keys
``result.json``      the `Finding` of each metric; written last
===================  ===============================================================

A test that was stopped or killed goes on where it was: runs that have ended are not run
again, and one that was cut goes on from its checkpoint.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from esper_jax.rollout.ab.design import told
from esper_jax.rollout.ab.metrics import read_metric
from esper_jax.rollout.ab.plan import Plan, altered, changes_told, plan_of
from esper_jax.rollout.ab.verdict import (
    Finding,
    Pair,
    advised,
    findings,
    is_decided,
    table,
)
from esper_jax.run.build import SharedPrograms, load_data
from esper_jax.run.config import ConfigError, RunConfig
from esper_jax.run.folder import (
    RunError,
    RunFolder,
    RunStopped,
    finite_or_none,
    read_json,
    write_json,
)
from esper_jax.run.monitoring import check_writers
from esper_jax.run.opening import check_data
from esper_jax.run.own import check_one_step, is_own
from esper_jax.run.record import settings, warn_unlike
from esper_jax.run.run import train_run
from esper_jax.train.stop import Stop

__all__ = ["Result", "run_ab"]

_log = logging.getLogger(__name__)

_VERSION = 1
"""Of ``plan.json`` and ``result.json``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """How an A/B test ended.

    Args:
      plan: of the test.
      pairs: that were run, in order.
      stopped_early: whether the sequential rule ended it before the last pair.
      findings: of each metric, in the plan's order.
    """

    plan: Plan
    pairs: tuple[Pair, ...]
    stopped_early: bool
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON: None for what is not finite."""

        def of(values: Mapping[str, float]) -> dict[str, Any]:
            return {name: finite_or_none(value) for name, value in values.items()}

        plan = self.plan.to_dict()
        return {
            "version": _VERSION,
            "plan": {k: v for k, v in plan.items() if k not in ("a", "b")},
            "differs": {
                key: {"a": a, "b": b}
                for key, (a, b) in altered(self.plan.a, self.plan.b).items()
            },
            "pairs": len(self.pairs),
            "stopped_early": self.stopped_early,
            "metrics": [dataclasses.asdict(f) for f in self.findings],
            "runs": [{"seed": p.seed, "a": of(p.a), "b": of(p.b)} for p in self.pairs],
        }

    def lines(self) -> list[str]:
        """A table, and a sentence for each metric."""
        number = len(self.pairs)
        seeds = f"seeds {self.pairs[0].seed} to {self.pairs[-1].seed}"
        if self.stopped_early:
            how = f"stopped by the sequential rule; {self.plan.pairs} were allowed"
        elif self.plan.sequential:
            how = "all that were allowed; looked at after each"
        else:
            how = "as many as were planned"
        head = f"{number} pairs ({seeds}): {how}"
        return [head, "", *table(self.plan, self.findings)]


def run_ab(
    plan: Plan,
    out: Path,
    *,
    stop: Stop | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Result:
    """Runs an A/B test in the folder ``out``, or goes on with the one there.

    Args:
      plan: of the test; the same as before to go on. A sequential test may be given
        more ``pairs``, since it was looked at all along; another may not, since its
        error was counted for its number.
      out: folder of the test; absent, empty, or with the same test.
      stop: signals to end for, as in `run.run.train_run`.
      say: is given lines that tell how far it is.

    Raises:
      ConfigError: if one of the configs cannot be run, or ``out`` holds another test.
        No run has begun then.
      RunError: if ``out`` cannot be used.
      KeyboardInterrupt: if a signal came, with all that is done saved.
    """
    _check_folder(plan, out)
    shared = SharedPrograms()
    for arm in ("a", "b"):  # both, before hours go into one
        try:
            _check_arm(plan.config(arm, 0), shared)
        except ConfigError as error:
            raise ConfigError(f"{arm.upper()}: {error}") from None
    _open(plan, out)
    for line in (changes_told(plan), *told(plan)):
        say(line)
    pairs: list[Pair] = []
    train = functools.partial(_run, plan, out, shared, stop)
    try:
        while len(pairs) < plan.pairs and not is_decided(plan, pairs):
            number = len(pairs)
            # Which comes first alternates, for metrics that are times.
            order = ("a", "b") if number % 2 == 0 else ("b", "a")
            values = {arm: train(arm, number) for arm in order}
            pairs.append(Pair(plan.a.seed + number, values["a"], values["b"]))
            say(_progress(plan, pairs))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{len(pairs)} of {plan.pairs} pairs are done; the same command with --out "
            f"{out} goes on"
        ) from None
    result = Result(
        plan=plan,
        pairs=tuple(pairs),
        stopped_early=len(pairs) < plan.pairs,
        findings=tuple(advised(plan, f) for f in findings(plan, pairs)),
    )
    write_json(out / "result.json", result.to_dict())
    return result


def _check_arm(config: RunConfig, shared: SharedPrograms) -> None:
    """Builds what an arm runs with, as `train_run` would, and writes nothing."""
    check_writers(config)
    data = load_data(config)
    check_data(config, data)
    program = shared(config, data)
    if is_own(config):
        state = program.init(jax.random.key(config.seed))
        check_one_step(config, program, state, data)


def _check_folder(plan: Plan, out: Path) -> None:
    """Refuses a folder with something else, or with another test."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is no folder: choose another --out")
    path = out / "plan.json"
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise RunError(
                f"{out} is not empty and holds no A/B test (there is no {path.name}): "
                "choose another --out"
            )
        return
    written = read_json(path)
    try:
        before = plan_of(written["plan"])
    except (ConfigError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged: {error}") from None
    for field in dataclasses.fields(Plan):
        if not _goes_on(field.name, before, plan):
            raise ConfigError(_another(out, field.name, before, plan))
    warn_unlike(written.get("settings", {}), settings())


def _goes_on(name: str, before: Plan, plan: Plan) -> bool:
    """Whether a test may go on with a field of its plan as it is now."""
    was, now = getattr(before, name), getattr(plan, name)
    if name in ("a", "b"):
        return not altered(was, now) and (name == "b" or was.seed == now.seed)
    return was == now or (name == "pairs" and plan.sequential and now >= was)


def _another(out: Path, name: str, before: Plan, plan: Plan) -> str:
    """Why a test cannot go on with another plan."""
    was, now = getattr(before, name), getattr(plan, name)
    if name in ("a", "b"):
        changes = altered(was, now) or {"seed": (was.seed, now.seed)}
        key, (was, now) = next(iter(changes.items()))
        name = f"{key} of {name.upper()}"
    elif name == "pairs":
        name = "--seeds"
    else:
        name = f"--{name.removesuffix('s')}"
    more = ""
    if name == "--seeds" and not plan.sequential:
        more = (
            ". To add pairs to a test whose result is known makes its error larger "
            "than it says; plan more from the beginning, or test with --sequential"
        )
    return (
        f"{name}: expected {was!r}, as the test in {out} was planned; got {now!r}"
        f"{more}. Choose another --out for another test"
    )


def _open(plan: Plan, out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{out} cannot be written to ({error.strerror}): choose another --out"
        ) from None
    content = {"version": _VERSION, "plan": plan.to_dict(), "settings": settings()}
    write_json(out / "plan.json", content)


def _run(
    plan: Plan,
    out: Path,
    shared: SharedPrograms,
    stop: Stop | None,
    arm: str,
    pair: int,
) -> dict[str, float]:
    """The metrics of a run, which is trained if it has not ended; none if it failed."""
    config = plan.config(arm, pair)
    folder = RunFolder(out / f"{arm}-{config.seed}")
    failed = folder.path / "stopped.json"
    if not folder.summary.exists() and not failed.exists():
        try:
            train_run(
                config,
                folder.path,
                resume=folder.path.exists(),
                console=Console(quiet=True),
                stop=stop,
                build=shared,
            )
        except RunStopped as error:
            _log.warning("%s: %s", folder.path, error)
            write_json(failed, {"why": str(error)})
    if failed.exists():
        return {}
    return {metric.name: read_metric(metric, folder) for metric in plan.parsed()}


def _progress(plan: Plan, pairs: list[Pair]) -> str:
    """A line about the newest pair."""
    newest, name = pairs[-1], plan.metrics[0]
    values = (
        f"{arm.upper()} {of[name]:.5g}" if of else f"{arm.upper()} failed"
        for arm, of in (("a", newest.a), ("b", newest.b))
    )
    return (
        f"pair {len(pairs)} of {plan.pairs}, seed {newest.seed}: {name}: "
        f"{', '.join(values)}"
    )
