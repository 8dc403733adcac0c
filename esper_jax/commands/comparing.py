"""``esper-jax ab`` and ``bench``: they run two things beside each other."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from esper_jax import _early
from esper_jax.commands.base import Command, Errand

__all__ = ["Ab", "Bench"]

_Overrides = Annotated[
    tuple[tuple[str, ...], ...],
    tyro.conf.arg(metavar="KEY=VALUE ..."),
    tyro.conf.UseAppendAction,
]


@dataclasses.dataclass(frozen=True)
class Ab(Command):
    """Compare two configs by paired runs: the same data, seeds and order of rows.

    Tells before how many pairs a difference takes, and afterwards the difference with
    its interval. The same command goes on with a test that was stopped.
    """

    config_a: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG_A")]
    """TOML file of A. Its seed is that of the first pair."""
    config_b: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG_B")]
    """TOML file of B; may be the same file, changed by --set-b."""
    seeds: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Pairs of runs; at most that many with --sequential. Default: as many as --effect
    and --power take."""
    metric: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="NAME"),
        tyro.conf.UseAppendAction,
    ] = ()
    """A key of summary.json, ticks:KEY, or metrics:SERIES[/LABEL]; the latter two may
    end in :last, :first, :min, :max, :mean, :median or :sum. May be repeated. Default:
    final_loss."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of the test. Default: runs/ab-CONFIG_A-CONFIG_B."""
    sequential: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Look after each pair, and stop once the first metric differs; the error stays
    --alpha."""
    alpha: float = 0.05
    """Chance to see a difference where there is none, over all metrics."""
    power: float = 0.8
    """Chance to see a difference of --effect."""
    effect: float = 0.8
    """Difference to plan for, in standard deviations of the pairs' differences."""
    features: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File of flags for both configs; they know the test by the name of its folder."""
    set: _Overrides = ()
    """Override values of both configs, for example train.ticks=100."""
    set_a: _Overrides = ()
    """Override values of A."""
    set_b: _Overrides = ()
    """Override values of B."""

    def run(self, stop: Any) -> int:
        from esper_jax.rollout.ab.design import pairs_worked_out
        from esper_jax.rollout.ab.plan import Plan
        from esper_jax.rollout.ab.running import run_ab
        from esper_jax.rollout.opening import with_features
        from esper_jax.run.config import RunConfig, load_config
        from esper_jax.run.folder import RunFolder

        both = list(itertools.chain(*self.set))
        metrics = self.metric or ("final_loss",)
        seeds = self.seeds
        if seeds is None:
            seeds = pairs_worked_out(
                self.effect,
                self.power,
                self.alpha,
                metrics=len(metrics),
                sequential=self.sequential,
            )
        stems = f"ab-{self.config_a.stem}-{self.config_b.stem}"
        out = self.out or Path("runs") / stems

        def arm(path: Path, own: Iterable[Sequence[str]]) -> RunConfig:
            config = load_config(path, [*both, *itertools.chain(*own)])
            name = out.resolve().name
            return with_features(config, RunFolder(out), self.features, name)

        plan = Plan(
            a=arm(self.config_a, self.set_a),
            b=arm(self.config_b, self.set_b),
            metrics=metrics,
            pairs=seeds,
            alpha=self.alpha,
            power=self.power,
            effect=self.effect,
            sequential=self.sequential,
        )
        _early.started()
        with stop:
            result = run_ab(plan, out, stop=stop, say=print)
        print("", *result.lines(), "", f"result: {out / 'result.json'}", sep="\n")
        return 0


@dataclasses.dataclass(frozen=True)
class Bench(Errand):
    """Measure step and tick of a config; save them as a baseline, or compare with one.

    A comparison runs the saved programs again, in turns with today's. It exits with
    status 1 if today's take more time or memory than the tolerance, beyond doubt, and
    with 2 if they cannot be compared.
    """

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """TOML file with the model and its data."""
    save: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Save a baseline under this name."""
    against: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Compare with the baseline of this name."""
    dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("baselines")
    """Folder of the baselines."""
    tolerance: float = 0.1
    """With --against: share by which time and memory may be worse."""
    rounds: Annotated[int, tyro.conf.arg(metavar="N")] = 40
    """Turns of each program."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """With --against: also write the comparison there."""
    set: _Overrides = ()
    """Override config values."""

    def act(self) -> int:
        from esper_jax.rollout.baseline import saved as baseline
        from esper_jax.rollout.baseline.words import compared, figures_told
        from esper_jax.run.config import ConfigError, load_config
        from esper_jax.run.folder import write_json

        if self.save is not None and self.against is not None:
            raise ConfigError("--save and --against: expected one of them, got both")
        if self.json is not None and self.against is None:
            raise ConfigError("--json: expected --against NAME with it")
        if not 0 <= self.tolerance <= 10:
            raise ConfigError(
                f"--tolerance: expected a share from 0 to 10, such as 0.1, got "
                f"{self.tolerance}"
            )
        if not 8 <= self.rounds <= 10_000:
            raise ConfigError(
                "--rounds: expected from 8, below which there is no interval, to "
                f"10000, got {self.rounds}"
            )
        name = self.save or self.against
        folder = None if name is None else baseline.check_name(self.dir, name)
        overrides = list(itertools.chain(*self.set))
        config = load_config(self.config, overrides)
        if folder is not None:
            baseline.check_there(folder, self.against is not None)
        prepared = baseline.prepare(config)
        rows = prepared.sizes["rows"]
        if folder is None or self.save is not None:
            figures = baseline.measure(prepared, self.rounds)
            print(*figures_told(figures, rows), sep="\n")
            if folder is not None:
                baseline.save(prepared, figures, folder)
                print(f"baseline: {folder}")
            return 0
        comparison = baseline.compare(
            prepared, folder, tolerance=self.tolerance, rounds=self.rounds
        )
        if self.json is not None:
            write_json(self.json, comparison.to_dict())
        print(*compared(comparison, rows), sep="\n")
        return 1 if comparison.regressed else 0
