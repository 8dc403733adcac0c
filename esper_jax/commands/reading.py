"""``esper-jax evaluate``, ``export`` and ``report``: they read what a run wrote."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import tyro

from esper_jax.commands.base import Errand

__all__ = ["Evaluate", "Export", "Report"]


@dataclasses.dataclass(frozen=True)
class Evaluate(Errand):
    """Evaluate the newest sound checkpoint of a run on its test data.

    The last line of the output is one JSON object with step, accuracy and loss.
    """

    dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of the run."""

    def only_reads(self) -> bool:
        return True

    def act(self) -> int:
        from esper_jax.run.run import evaluate_run

        print(json.dumps(evaluate_run(self.dir)))
        return 0


@dataclasses.dataclass(frozen=True)
class Export(Errand):
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

    def act(self) -> int:
        from esper_jax.run.export import export_run

        written = export_run(self.dir, self.format, self.out, parts=self.parts)
        print(json.dumps(written))
        return 0


@dataclasses.dataclass(frozen=True)
class Report(Errand):
    """Write a page of HTML that tells of a run: curves, lives of its seeds, refusals.

    Reads the run's records, also of a run that has not ended. Of the training of a
    policy, its curves. Prints the page's path.
    """

    dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of the run, or of a policy's training."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Page to write; an older report is replaced. Default: DIR/report.html."""

    def act(self) -> int:
        from esper_jax.learning.report import holds_training, report_training
        from esper_jax.run.report import report_run

        report = report_training if holds_training(self.dir) else report_run
        print(f"report: {report(self.dir, self.out)}")
        return 0
