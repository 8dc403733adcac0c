"""The command line: ``esper-jax train``, ``evaluate``, ``export``, ``checkpoint``."""

import contextlib
import dataclasses
import itertools
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

__all__ = ["Checkpoint", "Evaluate", "Export", "Train", "main"]


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a growing model as a config file describes."""

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """TOML file of the run."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for the run. Default: runs/CONFIG-TIME."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue the run in --out from its newest sound checkpoint."""
    devices: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Devices of each process to train on, which must divide the rows. Default: all,
    or as many as do; one on CPUs."""
    distributed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Train as one of several processes. Slurm, Open MPI and Kubernetes tell the rest;
    elsewhere give the next three options."""
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Where process 0 listens."""
    num_processes: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """How many processes there are."""
    process_id: Annotated[int | None, tyro.conf.arg(metavar="I")] = None
    """Which one this is, from 0."""
    set: Annotated[
        tuple[tuple[str, ...], ...],
        tyro.conf.arg(metavar="KEY=VALUE ..."),
        tyro.conf.UseAppendAction,
    ] = ()
    """Override config values, for example train.ticks=100 model.hidden=[32,32]."""


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluate the newest sound checkpoint of a run on its test data.

    The last line of the output is one JSON object with step, accuracy and loss.
    """

    dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of the run."""


@dataclasses.dataclass(frozen=True)
class Export:
    """Write the model of a run, without seeds and slots, for use elsewhere.

    Takes the newest sound checkpoint. The last line of the output is one JSON object
    with path, format, step and the number of parameters.
    """

    dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of the run."""
    format: Literal["safetensors", "stablehlo", "orbax"]
    """safetensors: named arrays. stablehlo: a program that jax.export.deserialize
    reads, for any number of rows on cpu, cuda and tpu. orbax: a folder."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """What to write; must not exist. Default: DIR.FORMAT, beside the run."""
    parts: Literal["fossils", "counting"] = "fossils"
    """What to keep: fossils, or whatever counts in the output at the checkpoint."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """List, verify or migrate the checkpoints of a run.

    verify reads every byte, prints one line per step and exits with status 1 if any
    step is damaged. migrate rewrites checkpoints of an older schema in today's schema.
    """

    action: Annotated[Literal["list", "verify", "migrate"], tyro.conf.Positional]
    """What to do."""
    dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of the run, or of its checkpoints."""


def main() -> None:
    """Runs the command line.

    Exits with status 2 for input that cannot be used, and with 130 when interrupted.
    """
    command = tyro.extras.subcommand_cli_from_dict(
        {
            "train": Train,
            "evaluate": Evaluate,
            "export": Export,
            "checkpoint": Checkpoint,
        },
        prog="esper-jax",
        description="Grow neural networks while they train.",
    )
    try:
        _run(command)
    except KeyboardInterrupt as stop:
        print(f"esper-jax: {str(stop) or 'stopped'}", file=sys.stderr)
        raise SystemExit(130) from None


def _run(command: Train | Evaluate | Export | Checkpoint) -> None:
    # Imported late, so that --help and mistyped options answer at once.
    from esper_jax.checkpoint import CheckpointError
    from esper_jax.run.config import ConfigError
    from esper_jax.run.folder import RunError

    try:
        with _log_on_stderr():
            if isinstance(command, Train):
                _train(command)
            elif isinstance(command, Evaluate):
                _evaluate(command)
            elif isinstance(command, Export):
                _export(command)
            else:
                _checkpoint(command)
    except (CheckpointError, ConfigError, RunError, OSError) as error:
        print(f"esper-jax: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Prints the library's log messages, warnings and above, on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("esper-jax: %(message)s"))
    logger = logging.getLogger("esper_jax")
    logger.addHandler(handler)
    logger.propagate = False  # the root's handlers, if any, would print it twice
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


def _train(command: Train) -> None:
    import jax

    from esper_jax.parallel.processes import exchange
    from esper_jax.run.config import ConfigError, load_config
    from esper_jax.run.devices import join
    from esper_jax.run.folder import RunFolder
    from esper_jax.run.run import train_run

    named = (command.coordinator, command.num_processes, command.process_id)
    if command.distributed:
        join(*named)
    elif any(value is not None for value in named):
        raise ConfigError(
            "--coordinator, --num-processes, --process-id: expected with --distributed"
        )
    config = load_config(command.config, list(itertools.chain(*command.set)))
    if command.resume and command.out is None:
        raise ConfigError("--resume: expected --out DIR with the run to go on with")
    stamp = exchange(time.strftime("%Y%m%d-%H%M%S"))[0]  # of process 0
    out = command.out or Path("runs") / f"{command.config.stem}-{stamp}"
    try:
        summary = train_run(config, out, resume=command.resume, devices=command.devices)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(out)) from None
    if jax.process_index():
        return  # process 0 says it
    _print_summary(summary)
    if config.compare.plot:
        print(f"plot: {RunFolder(out).picture}")
    print(f"run: {out}")


def _how_to_go_on(out: Path) -> str:
    """What to tell a user who has interrupted the training into ``out``."""
    from esper_jax.checkpoint.checkpointer import Checkpointer
    from esper_jax.run.folder import RunFolder

    folder = RunFolder(out)
    if not folder.config.exists():
        return "stopped before the run began: there is nothing to resume"
    again = f"--resume --out {out}"
    steps = Checkpointer(folder.checkpoints).steps()
    if not steps:
        return f"stopped before the first checkpoint; {again} begins again"
    return f"stopped; {again} goes on from step {steps[-1]}"


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


def _evaluate(command: Evaluate) -> None:
    from esper_jax.run.run import evaluate_run

    print(json.dumps(evaluate_run(command.dir)))


def _export(command: Export) -> None:
    from esper_jax.run.export import export_run

    written = export_run(command.dir, command.format, command.out, parts=command.parts)
    print(json.dumps(written))


def _checkpoint(command: Checkpoint) -> None:
    from esper_jax.checkpoint import CheckpointError
    from esper_jax.checkpoint.checkpointer import Checkpointer
    from esper_jax.run.folder import RunFolder

    inner = RunFolder(command.dir).checkpoints
    with Checkpointer(inner if inner.is_dir() else command.dir) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise CheckpointError(f"{checkpoints.directory} holds no checkpoint")
        if command.action == "list":
            for step in steps:
                print(checkpoints.describe(step))
            return
        migrate = command.action == "migrate"
        sound = [_verify(checkpoints, step, migrate) for step in steps]
    if not all(sound):
        raise SystemExit(1)


def _verify(checkpoints: Any, step: int, migrate: bool) -> bool:
    """Prints whether a step is sound, and migrates it first if asked to.

    Args:
      checkpoints: the `Checkpointer`, whose module is imported late.
      step: to look at.
      migrate: whether to rewrite the step in today's schema.

    Returns:
      Whether it is sound.
    """
    verdict = checkpoints.verify(step)
    if verdict.manifest is None or not migrate:
        print(verdict)
        return verdict.damage is None
    notes = checkpoints.migrate(step)
    after = checkpoints.verify(step)
    changed = after.manifest != verdict.manifest
    print(f"{after}, {f'was {verdict.manifest.schema}' if changed else 'as it was'}")
    for note in notes:
        print(f"  {note}")
    return True
