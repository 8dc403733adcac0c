"""A page of HTML from what the training of a policy wrote down."""

import json
from pathlib import Path
from typing import Any

from esper_jax.monitor.page import training_page
from esper_jax.run.folder import RunError
from esper_jax.run.report import write_page

__all__ = ["holds_training", "read_training", "report_training"]


def holds_training(out: Path) -> bool:
    """Whether a folder holds the training of a policy, and not a run."""
    return not (out / "run.json").exists() and (out / "state.safetensors").exists()


def read_training(out: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The lines of the generations, and the config. A torn last line is passed over.

    Raises:
      RunError: if the folder holds no training, or a file of it is damaged.
    """
    metrics, config = out / "metrics.jsonl", out / "config.json"
    try:
        lines = metrics.read_text(encoding="utf-8").split("\n")
        known = json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        name = Path(error.filename).name
        raise RunError(
            f"{out} holds no training of a policy: it has no {name}"
        ) from None
    except OSError as error:
        raise RunError(f"{out} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RunError(f"{config} is damaged: {error}; restore it") from None
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise RunError(f"{metrics}, line {number} is damaged; restore it")
        rows.append(row)
    return rows, known if isinstance(known, dict) else {}


def report_training(out: Path, path: Path | None = None) -> Path:
    """Writes a report of a policy's training, whether or not it has ended.

    Args:
      out: its folder.
      path: of the page; as for `run.report.report_run`.

    Returns:
      The path of the page.

    Raises:
      RunError: as by `read_training` and `run.report.report_run`.
    """
    rows, config = read_training(out)
    return write_page(training_page(out.resolve().name, rows, config), out, path)
