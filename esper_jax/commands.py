"""What each command of ``esper-jax`` takes."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

__all__ = ["Checkpoint", "Command", "Evaluate", "Export", "Report", "Train"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Any:
    """What every command takes."""

    traceback: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """After an error, also print where in the program it came from."""


@dataclasses.dataclass(frozen=True)
class Train(_Any):
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
class Evaluate(_Any):
    """Evaluate the newest sound checkpoint of a run on its test data.

    The last line of the output is one JSON object with step, accuracy and loss.
    """

    dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of the run."""


@dataclasses.dataclass(frozen=True)
class Export(_Any):
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
class Checkpoint(_Any):
    """List, verify or migrate the checkpoints of a run.

    verify reads every byte, prints one line per step and exits with status 1 if any
    step is damaged. migrate rewrites checkpoints of an older schema in today's schema.
    """

    action: Annotated[Literal["list", "verify", "migrate"], tyro.conf.Positional]
    """What to do."""
    dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of the run, or of its checkpoints."""


@dataclasses.dataclass(frozen=True)
class Report(_Any):
    """Write a page of HTML that tells of a run: curves, lives of its seeds, refusals.

    Reads the run's records, also of a run that has not ended. Prints the page's path.
    """

    dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of the run."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Page to write; an older report is replaced. Default: DIR/report.html."""


Command = Train | Evaluate | Export | Checkpoint | Report
