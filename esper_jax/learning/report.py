"""A page of HTML from what the training of a policy wrote down."""

import json
from pathlib import Path
from typing import Any

from esper_jax.monitor.page import training_page
from esper_jax.run.folder import RunError
from esper_jax.run.report import write_page

__all__ = ["holds_training", "read_config", "read_training", "report_training"]


def holds_training(out: Path) -> bool:
    """Whether a folder holds the training of a policy, and not a run."""
    return not (out / "run.json").exists() and (out / "state.safetensors").exists()


def read_config(out: Path) -> dict[str, Any]:
    """The config of a training, as it stands in its folder.

    Raises:
      RunError: if there is none, or it is damaged.
    """
    path = out / "config.json"
    try:
        known = json.loads(_text(out, path.name))
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}; restore it") from None
    if not isinstance(known, dict):
        raise RunError(f"{path} is damaged: it is no JSON object; restore it")
    return known


def read_training(out: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The lines of the generations, and the config. A torn last line is passed over.

    Raises:
      RunError: if the folder holds no training, or a file of it is damaged.
    """
    name, config, rows = "metrics.jsonl", read_config(out), []
    for number, line in enumerate(_text(out, name).split("\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise RunError(f"{out / name}, line {number} is damaged; restore it")
        rows.append(row)
    return rows, config


def _text(out: Path, name: str) -> str:
    try:
        return (out / name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise RunError(
            f"{out} holds no training of a policy, or none that went through a "
            f"generation: it has no {name}"
        ) from None
    except OSError as error:
        raise RunError(f"{out / name} cannot be read: {error.strerror}") from None


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
