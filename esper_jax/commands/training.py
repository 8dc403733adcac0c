"""``esper-jax train``."""

import contextlib
import dataclasses
import itertools
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro

from esper_jax import _early
from esper_jax.commands.base import Command

__all__ = ["Train"]

_STOPPED_BY_COMMAND = 3
"""Exit status of a run that a command from outside has ended, saved."""


@dataclasses.dataclass(frozen=True)
class Train(Command):
    """Train a growing model as a config file describes."""

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """TOML file of the run."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for the run. Default: runs/CONFIG-TIME."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue the run in --out from its newest sound checkpoint; start it if there is
    none yet."""
    allow_change: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="KEY"),
        tyro.conf.UseAppendAction,
    ] = ()
    """With --resume: this key or table of the config may differ from the run's, for
    example train.learning_rate. May be repeated."""
    devices: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Devices of each process to train on, which must divide the rows. Default: all,
    or as many as do; one on CPUs."""
    profile: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Record N steps with JAX's profiler, from the second tick of this command on, into
    the run's folder profile/. Default: none."""
    bus: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """Tell what happens, and take commands: redis://HOST[:PORT][/DB] (rediss:// for
    TLS), or file:FOLDER. See docs/bus.md. Default: none."""
    serve: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """The same over a socket in the run's folder, for esper-jax bus watch DIR. Needs no
    server, and listens on no network."""
    replay: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Carry out the commands of another run at the same ticks: its commands.jsonl."""
    remote: Annotated[int | None, tyro.conf.arg(metavar="TICKS")] = None
    """With --bus or --serve: let a policy in another program decide
    (esper_jax.bus.RemotePolicy). The run's own decides again after so many ticks
    without it. Default: it always does."""
    distributed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Train as one of several processes. Slurm, Open MPI and Kubernetes tell the rest;
    elsewhere give the next three options."""
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Where process 0 listens."""
    num_processes: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """How many processes there are."""
    process_id: Annotated[int | None, tyro.conf.arg(metavar="I")] = None
    """Which one this is, from 0."""
    features: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File of flags, such as configs/features.toml: which features the run has. It
    keeps those that it began with."""
    model_id: Annotated[str | None, tyro.conf.arg(metavar="ID")] = None
    """What the flags know the run by. Default: the name of its folder."""
    set: Annotated[
        tuple[tuple[str, ...], ...],
        tyro.conf.arg(metavar="KEY=VALUE ..."),
        tyro.conf.UseAppendAction,
    ] = ()
    """Override config values, for example train.ticks=100 model.hidden=[32,32]."""

    def join(self) -> None:
        """Joins the processes of a run, if it has several."""
        from esper_jax.run.config import ConfigError
        from esper_jax.run.devices import join

        named = (self.coordinator, self.num_processes, self.process_id)
        if self.distributed:
            join(*named)
        elif any(value is not None for value in named):
            raise ConfigError(
                "--coordinator, --num-processes, --process-id: expected with "
                "--distributed"
            )

    def _trained(self, config: Any, out: Path, stop: Any) -> dict[str, Any]:
        from esper_jax.run.run import train_run

        return train_run(
            config,
            out,
            resume=self.resume,
            allow_change=self.allow_change,
            devices=self.devices,
            profile=self.profile,
            bus=self.bus,
            serve=self.serve,
            replay=self.replay,
            remote=self.remote,
            stop=stop,
        )

    def run(self, stop: Any) -> int:
        import jax

        from esper_jax.parallel.processes import together
        from esper_jax.rollout.opening import with_features
        from esper_jax.run.config import ConfigError, load_config
        from esper_jax.run.features import Features
        from esper_jax.run.folder import RunFolder
        from esper_jax.run.run import StoppedByCommand

        if jax.process_index():  # process 0 warns for all; errors are told by each
            logging.getLogger("esper_jax").setLevel(logging.ERROR)
        overrides = list(itertools.chain(*self.set))
        config = together(lambda: load_config(self.config, overrides), ConfigError)
        if self.resume and self.out is None:
            raise ConfigError("--resume: expected --out DIR with the run to go on with")
        if self.allow_change and not self.resume:
            raise ConfigError("--allow-change: expected --resume with it")
        if self.model_id is not None and self.features is None:
            raise ConfigError("--model-id: expected --features FILE with it")
        _early.started()
        with stop, _folder_for(self) as out:
            model_id = self.model_id or out.resolve().name
            config = with_features(
                config,
                RunFolder(out),
                self.features,
                model_id,
                resume=self.resume,
                allowed=self.allow_change,
            )
            flagged = self.features is not None or config.features != Features()
            if flagged and not jax.process_index():
                print(f"features of {model_id}: {config.features}", flush=True)
            if self.serve and not jax.process_index():
                print(f"watch it: esper-jax bus watch {out}", flush=True)
            try:
                summary = self._trained(config, out, stop)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(_how_to_go_on(out)) from None
            except StoppedByCommand as stopped:
                print(f"esper-jax: {stopped}", file=sys.stderr, flush=True)
                return _STOPPED_BY_COMMAND
        if jax.process_index():
            return 0  # process 0 says it
        try:
            _print_summary(summary)
            if config.compare.plot:
                print(f"plot: {RunFolder(out).picture}")
            if self.profile and RunFolder(out).profile.exists():
                print(f"profile: {RunFolder(out).profile}")
            print(f"run: {out}", flush=True)
        except OSError:  # the run is whole, whether or not anyone reads of it
            _early.read_no_more()
        return 0


@contextlib.contextmanager
def _folder_for(command: Train) -> Iterator[Path]:
    """The folder of a run; a new one of its own by default.

    Process 0 makes it at once, so that no other run takes the name, and removes it if
    nothing comes into it.
    """
    import jax

    from esper_jax.parallel.processes import exchange, together
    from esper_jax.run.folder import RunError

    if command.out is not None:
        yield command.out
        return
    makes, stem = not jax.process_index(), command.config.stem
    made = together(lambda: _new_folder(stem) if makes else Path(), RunError)
    out = Path(exchange(str(made))[0])
    try:
        yield out
    finally:
        if makes:
            with contextlib.suppress(OSError):
                out.rmdir()
                out.parent.rmdir()


def _new_folder(stem: str) -> Path:
    """Makes a folder for a run, named after its config and the time."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        more = f"-{number}" if number > 1 else ""
        out = Path("runs") / f"{stem}-{stamp}{more}"
        with contextlib.suppress(FileExistsError):
            out.mkdir(parents=True)
            break
    return out


def _how_to_go_on(out: Path) -> str:
    """What to tell a user who has stopped the training into ``out``."""
    from esper_jax.run.folder import RunFolder
    from esper_jax.run.record import newest_step

    folder = RunFolder(out)
    if not folder.config.exists():
        return "the run had not begun, and there is nothing to resume"
    again = f"--resume --out {out}"
    step = newest_step(folder)
    if step is None:
        return f"nothing was saved yet, and {again} begins again"
    return f"{again} goes on from step {step}"


def _print_summary(summary: dict[str, Any]) -> None:
    for name in ("final_accuracy", "final_loss", "host_params", "grown_params"):
        value = summary[name]
        print(f"{name}: {'not finite' if value is None else f'{value:.6g}'}")
    print(f"recompiles: {summary['recompiles']}")
    if "static" in summary:
        twin = summary["static"]
        accuracy = summary["final_accuracy"]
        grown = summary["host_params"] + summary["grown_params"]
        print(
            f"test accuracy: grown {accuracy:.4f} with {grown} parameters, "
            f"static {twin['accuracy']:.4f} with {twin['parameters']}"
        )
