"""The command line: ``esper-jax train`` and ``esper-jax evaluate``."""

import dataclasses
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro

__all__ = ["Evaluate", "Train", "main"]


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a model that grows, as a config says."""

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """TOML file of the run."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for the run. Default: runs/CONFIG-TIME."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with the run in --out from its newest checkpoint."""
    set: Annotated[
        tuple[tuple[str, ...], ...],
        tyro.conf.arg(metavar="KEY=VALUE ..."),
        tyro.conf.UseAppendAction,
    ] = ()
    """Overrides, such as train.ticks=100 model.hidden=[32,32]."""


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluate the newest checkpoint of a run on its test data.

    The last line of the output is one JSON object with step, accuracy and loss.
    """

    dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of the run."""


def main() -> None:
    """Runs the command line. Exit status 2 for input that cannot be used."""
    command = tyro.extras.subcommand_cli_from_dict(
        {"train": Train, "evaluate": Evaluate},
        prog="esper-jax",
        description="Grow neural networks while they train.",
    )
    # Imported late, so that --help and mistyped options answer at once.
    from esper_jax.config import ConfigError
    from esper_jax.run import RunError

    try:
        if isinstance(command, Train):
            _train(command)
        else:
            _evaluate(command)
    except (ConfigError, RunError) as error:
        print(f"esper-jax: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("esper-jax: stopped; --resume goes on", file=sys.stderr)
        raise SystemExit(130) from None


def _train(command: Train) -> None:
    from esper_jax.config import ConfigError, load_config
    from esper_jax.run import train_run

    config = load_config(command.config, list(itertools.chain(*command.set)))
    if command.resume and command.out is None:
        raise ConfigError("--resume: expected --out DIR with the run to go on with")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    out = command.out or Path("runs") / f"{command.config.stem}-{stamp}"
    summary = train_run(config, out, resume=command.resume)
    for name in ("final_accuracy", "final_loss", "host_params", "grown_params"):
        print(f"{name}: {summary[name]:.6g}")
    print(f"recompiles: {summary['recompiles']}")
    print(f"run: {out}")


def _evaluate(command: Evaluate) -> None:
    from esper_jax.run import evaluate_run

    print(json.dumps(evaluate_run(command.dir)))
