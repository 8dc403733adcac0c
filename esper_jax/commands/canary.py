"""``esper-jax canary``: a flag's percentage rises by itself, or falls back."""

import dataclasses
import re
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from esper_jax.commands.base import Errand
from esper_jax.commands.rollout import FILE

__all__ = ["AbortCanary", "Canary", "Observe", "Resume", "Start", "Status", "Step"]

_Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
_Time = Annotated[str, tyro.conf.arg(metavar="TIME")]

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}

_ROLLED_BACK = 1
"""Exit status of a step that rolls back."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """Begin a canary: turn the flag to the first percentage.

    TIME is a number of s, m, h or d, such as 90s. None leaves a trigger out.
    """

    flag: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FLAG")]
    """The flag. It must be off, or below the first percentage."""
    dir: _Folder
    """Folder for its journal and observations."""
    file: Annotated[Path, tyro.conf.arg(metavar="FILE")] = FILE
    """File of flags."""
    observations: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File that observations come in; observations.jsonl in DIR by default."""
    percents: tuple[int, ...] = (1, 10, 25, 50, 100)
    """Of the model ids that have the flag, stage after stage."""
    watch: _Time = "1h"
    """How long each stage lasts at least."""
    error_increase: float | None = 0.02
    """The share of errors may not be higher by this much."""
    latency_ratio: float | None = 1.2
    """Latencies may not be longer by this factor."""
    accuracy_drop: float | None = 0.02
    """The mean accuracy may not be lower by this much."""
    nan_rate: float | None = 0.05
    """One NaN rolls back; a stage lasts until one in so many would have shown up."""
    accuracy_spread: float = 1.0
    """Larger differences of accuracies count as this; below 1 only for whole runs."""
    slow_after: float | None = None
    """Seconds after which an observation counts as an error."""
    prove_at: int = 25
    """Beyond this percentage only what is shown to be no regression gets."""
    alpha: float = 0.05
    """Chance that a candidate that is no worse is rolled back, at most."""
    power: float = 0.95
    """Chance that a regression is stopped there, at least."""
    patience: Annotated[str | None, tyro.conf.arg(metavar="TIME")] = None
    """A stage that is not decided then is rolled back; by default it is held."""

    def act(self) -> int:
        """Begins it."""
        from esper_jax.rollout.canary.canary import Canary
        from esper_jax.rollout.canary.dial import FlagDial
        from esper_jax.rollout.canary.plan import Plan, in_words

        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(Plan)}
        given["watch"] = _seconds("watch", self.watch)
        if self.patience is not None:
            given["patience"] = _seconds("patience", self.patience)
        plan = Plan(**given)
        dial = FlagDial(self.flag, self.file)
        with Canary.start(self.dir, dial, plan, observations=self.observations) as it:
            found = it.report()
        stages = ", ".join(map(str, plan.percents))
        print(f"{self.flag}: {found.before}% -> {found.percent}%")
        print(f"  stages of {in_words(plan.watch)} at least: {stages}%")
        print(f"  observations come in {found.observations}")
        print(f"  look at them now and then: esper-jax canary step {self.dir}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """Look at what was observed since the last step; advance, hold or roll back.

    Exits with status 1 if the flag was rolled back.
    """

    dir: _Folder
    """Folder of the canary."""
    every: Annotated[str | None, tyro.conf.arg(metavar="TIME")] = None
    """Go on with a step each TIME, such as 60s, until the canary is over."""

    def act(self) -> int:
        """Does a step, or all."""
        from esper_jax.rollout.canary.canary import BlindError

        pause = None if self.every is None else _seconds("every", self.every)
        with _opened(self.dir) as canary:
            if canary.mended:
                print(canary.mended)
            while True:
                try:
                    canary.step()
                except BlindError as error:
                    if pause is None:
                        raise
                    print(f"hold: {error}", flush=True)
                else:
                    print(_last(canary.report()), flush=True)
                status = canary.report().state.status
                if pause is None or status != "watching":
                    return _ROLLED_BACK if status == "rolled back" else 0
                time.sleep(pause)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observe:
    """Observe runs of esper-jax train: one observation for each that is over.

    A run that goes on is passed over, unless it has a NaN; one that was observed
    before, too.
    """

    dir: _Folder
    """Folder of the canary."""
    runs: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")
    ]
    """Folders of runs."""
    arm: Literal["candidate", "baseline"] | None = None
    """Arm of these runs; by default whether each began with the flag's feature."""
    failed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Runs without a summary.json have failed, and do not go on."""

    def act(self) -> int:
        """Appends the observations."""
        from esper_jax.rollout.canary.canary import report
        from esper_jax.rollout.canary.observations import Observer, read_from
        from esper_jax.rollout.canary.plan import CanaryError
        from esper_jax.rollout.canary.runs import arm_of, observation_of

        found = report(self.dir)
        if not self.runs:
            raise CanaryError("RUN: expected the folder of a run at least, got none")
        known = {o.get("run") for o in read_from(found.observations, 0)[0]}
        new = []
        for run in self.runs:
            folder = run.expanduser()
            arm = self.arm or arm_of(folder, found.flag)
            seen = observation_of(folder, arm, failed=self.failed)
            if not seen:
                print(f"{run}: goes on")
            elif seen["run"] in known:
                print(f"{run}: was observed before")
            else:
                known.add(seen["run"])
                new.append((run, seen))
        with Observer(found.observations) as observer:
            for run, seen in new:
                observer.add(seen)
                told = (f"{k} {v}" for k, v in seen.items() if k not in ("arm", "run"))
                print(f"{run}: {seen['arm']}: {', '.join(told)}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """Say where a canary stands."""

    dir: _Folder
    """Folder of the canary."""

    def act(self) -> int:
        """Prints it."""
        from esper_jax.rollout.canary.canary import report
        from esper_jax.rollout.canary.dial import FlagDial
        from esper_jax.rollout.canary.showing import lines_of

        found = report(self.dir)
        for line in lines_of(found, time.time()):
            print(line)
        if found.turned and found.state.status == "watching" and _in_file(found):
            now = FlagDial(**found.where).percentage()
            if now != found.percent:
                print(f"  the flag is at {now}%: somebody else turned it")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resume:
    """After a crash, or after somebody else turned the flag: turn it to its stage.

    A step finishes what a crash has left half done, too.
    """

    dir: _Folder
    """Folder of the canary."""

    def act(self) -> int:
        """Turns the flag."""
        with _opened(self.dir) as canary:
            print(canary.resume() or "nothing was left half done")
            print(_last(canary.report()))
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbortCanary:
    """End a canary, and turn the flag back to what it was before."""

    dir: _Folder
    """Folder of the canary."""
    reason: str = "by hand"
    """For the journal."""

    def act(self) -> int:
        """Ends it."""
        with _opened(self.dir) as canary:
            canary.abort(self.reason)
            print(_last(canary.report()))
        return 0


@dataclasses.dataclass(frozen=True)
class Canary(Errand):
    """Let a flag's percentage rise by itself while nothing gets worse.

    docs/rollout.md walks through one.
    """

    action: Annotated[
        Annotated[Start, tyro.conf.subcommand("start")]
        | Annotated[Step, tyro.conf.subcommand("step")]
        | Annotated[Observe, tyro.conf.subcommand("observe")]
        | Annotated[Status, tyro.conf.subcommand("status")]
        | Annotated[Resume, tyro.conf.subcommand("resume")]
        | Annotated[AbortCanary, tyro.conf.subcommand("abort")],
        tyro.conf.arg(name=""),
    ]

    def only_reads(self) -> bool:
        return isinstance(self.action, Status)

    def act(self) -> int:
        return self.action.act()


def _seconds(name: str, text: str) -> float:
    """Seconds of a time such as ``90s``, ``10m``, ``1.5h`` or ``2d``.

    Raises:
      CanaryError: if it is none.
    """
    from esper_jax.rollout.canary.plan import CanaryError

    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd]?)", text)
    if not found or not float(found[1]):
        raise CanaryError(
            f"--{name}: expected a time such as 90s, 10m, 1h or 2d, got {text!r:.80}"
        )
    return float(found[1]) * _UNITS[found[2]]


def _opened(folder: Path) -> Any:
    """The canary of a folder, with the flag that its journal names."""
    from esper_jax.rollout.canary.canary import Canary, report
    from esper_jax.rollout.canary.dial import FlagDial
    from esper_jax.rollout.canary.plan import CanaryError

    found = report(folder)
    where = found.where
    if not _in_file(found):
        raise CanaryError(
            f"{folder}: its flag is in no file ({dict(where)}): go on with it where it "
            "was begun, with esper_jax.rollout.Canary"
        )
    return Canary(folder, FlagDial(**where))


def _in_file(found: Any) -> bool:
    """Whether a canary's flag is in a file, and not somewhere that we do not know."""
    return set(found.where) == {"flag", "file"}


def _last(found: Any) -> str:
    """A line of the last decision."""
    return f"{found.flag} at {found.percent}%: {found.action}: {found.reason}"
