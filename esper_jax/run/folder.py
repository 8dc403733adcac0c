"""The folder of a run: which files it holds, and how they are read and written."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from esper_jax.run.config import ConfigError, RunConfig, parse_config

__all__ = [
    "RunError",
    "RunFolder",
    "append_lines",
    "finite_or_none",
    "read_config",
    "read_lines",
    "write_json",
    "write_lines",
]


class RunError(ValueError):
    """A folder that cannot be used as asked; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of the files of a run.

    Args:
      path: the folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The config, with all defaults filled in. A folder without it holds no run."""
        return self.path / "config.json"

    @property
    def events(self) -> Path:
        """Every requested transition and its outcome, one JSON object a line."""
        return self.path / "events.jsonl"

    @property
    def rollbacks(self) -> Path:
        """Every rollback of the governor, one JSON object a line."""
        return self.path / "rollbacks.jsonl"

    @property
    def ticks(self) -> Path:
        """Losses and accuracy of every tick, one JSON object a line."""
        return self.path / "ticks.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Directory of the `Checkpointer`."""
        return self.path / "checkpoints"

    @property
    def summary(self) -> Path:
        """The result; written last, so only a finished run has it."""
        return self.path / "summary.json"

    @property
    def picture(self) -> Path:
        """Accuracy over time, if the config asks for a plot."""
        return self.path / "accuracy.png"


def read_config(folder: RunFolder) -> RunConfig:
    """The config of the run in a folder.

    Raises:
      RunError: if the folder holds no run, or its ``config.json`` cannot be used.
    """
    path = folder.config
    try:
        return parse_config(json.loads(path.read_text()))
    except OSError as error:
        raise RunError(
            f"{folder.path} holds no run ({path.name}: {error.strerror}); start one "
            "with esper-jax train"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged: {error}") from None
    except ConfigError as error:
        raise RunError(f"{path}: {error}") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; none if there is no file.

    Raises:
      RunError: if a line is not JSON.
    """
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    # A run that was killed may leave half a line at the end.
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is damaged: {error}; mend or remove it") from None


def write_lines(path: Path, entries: Iterable[Any]) -> None:
    """Replaces a file by one line of JSON for each entry, as a whole or not at all."""
    _write_whole(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def append_lines(path: Path, entries: Iterable[Any]) -> None:
    """Appends one line of JSON for each entry; in process 0 alone."""
    if jax.process_index():
        return
    with path.open("a") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)


def write_json(path: Path, content: Any) -> None:
    """Replaces a file by ``content`` as indented JSON, as a whole or not at all."""
    _write_whole(path, json.dumps(content, indent=2) + "\n")


def finite_or_none(value: Any) -> float | None:
    """A number as JSON can hold it: None if it is not finite."""
    return float(value) if np.isfinite(value) else None


def _write_whole(path: Path, text: str) -> None:
    if jax.process_index():  # one of several processes writes
        return
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text)
    scratch.replace(path)
