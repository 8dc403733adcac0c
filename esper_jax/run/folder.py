"""The folder of a run: which files it holds, and how they are read and written."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from esper_jax.run.config import ConfigError, RunConfig, parse_config

__all__ = [
    "RunError",
    "RunFolder",
    "RunStopped",
    "append_lines",
    "finite_or_none",
    "lines_of",
    "read_config",
    "read_json",
    "read_lines",
    "sync",
    "write_json",
    "write_lines",
]


class RunError(ValueError):
    """A folder that cannot be used as asked; the message says what to do."""


class RunStopped(RunError):
    """The governor stopped a run; its last good state is saved."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of the files of a run.

    Args:
      path: the folder; ``~`` is expanded, as the `Checkpointer` inside does.
    """

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", self.path.expanduser())

    @property
    def config(self) -> Path:
        """The config, with all defaults filled in. A folder without it holds no run."""
        return self.path / "config.json"

    @property
    def record(self) -> Path:
        """Who the run is, what it ran under, and which keys were changed; see
        `record.Record`. Runs of version 0.2 and before have none."""
        return self.path / "run.json"

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
    def commands(self) -> Path:
        """Commands that joined a tick from outside, one JSON object a line."""
        return self.path / "commands.jsonl"

    @property
    def replayed(self) -> Path:
        """Commands of another run that are carried out at the same ticks."""
        return self.path / "replay.jsonl"

    @property
    def spill(self) -> Path:
        """Messages of the bus that could not be sent yet."""
        return self.path / "bus.unsent.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Directory of the `Checkpointer`."""
        return self.path / "checkpoints"

    @property
    def summary(self) -> Path:
        """The result; written last, so only a finished run has it."""
        return self.path / "summary.json"

    @property
    def metrics(self) -> Path:
        """What the monitor's writer ``jsonl`` writes, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder of the monitor's writer ``tensorboard``."""
        return self.path / "tensorboard"

    @property
    def profile(self) -> Path:
        """Folder of the profiler's traces."""
        return self.path / "profile"

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
    if not path.exists():
        raise RunError(
            f"{folder.path} holds no run (there is no {path.name}); start one with "
            "esper-jax train"
        )
    try:
        return parse_config(read_json(path))
    except ConfigError as error:
        raise RunError(f"{path}: {error}") from None


def read_json(path: Path) -> Any:
    """What a file of JSON holds.

    Raises:
      RunError: if it cannot be read or is not JSON.
    """
    text = _text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {_why(error)}") from None


def read_lines(
    path: Path, fields: Mapping[str, type] | None = None
) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; none if there is no file.

    Half a line at the end, which a run that was killed may leave, is passed over.

    Args:
      path: of the file.
      fields: what each object must hold, and of which type.

    Raises:
      RunError: if the file cannot be read, or a line is not such an object.
    """
    if not path.exists() and not path.is_symlink():
        return []
    whole, _, _ = _text(path).rpartition("\n")
    return [
        _entry(path, number, line, fields or {})
        for number, line in enumerate(whole.split("\n") if whole else [], 1)
    ]


def _entry(
    path: Path, number: int, line: str, fields: Mapping[str, type]
) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        wrong = _why(error)
    else:
        if isinstance(entry, dict):
            lacks = [k for k, kind in fields.items() if type(entry.get(k)) is not kind]
            if not lacks:
                return entry
            wrong = f"it has no {lacks[0]} of type {fields[lacks[0]].__name__}"
        else:
            wrong = "it is no JSON object"
    raise RunError(
        f"{path} is damaged in line {number}: {wrong}; mend or remove that line, or "
        "the file"
    )


def _text(path: Path) -> str:
    """A file's text, if it is one: a pipe would be waited for without end."""
    try:
        if path.exists() and not path.is_file():
            raise RunError(f"{path} must be a file, and is none")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is damaged: {error.reason}") from None


def _why(error: ValueError | RecursionError) -> str:
    return "too deeply nested" if isinstance(error, RecursionError) else f"{error}"


def lines_of(entries: Iterable[Any]) -> str:
    """One line of JSON for each entry."""
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def write_lines(path: Path, entries: Iterable[Any]) -> None:
    """Replaces a file by one line of JSON for each entry, as a whole or not at all."""
    _write_whole(path, lines_of(entries))


def append_lines(path: Path, text: str) -> None:
    """Appends lines, as `lines_of` makes them; in process 0 alone.

    Raises:
      RunError: naming the file, if that fails.
    """
    if jax.process_index():
        return
    with _writing(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


def write_json(path: Path, content: Any) -> None:
    """Replaces a file by ``content`` as indented JSON, as a whole or not at all."""
    _write_whole(path, json.dumps(content, indent=2) + "\n")


def sync(*paths: Path) -> None:
    """Returns when files and folders are on the disk, so that they outlive the power.

    Those that are not there are passed over. In process 0 alone.
    """
    if jax.process_index():
        return
    for path in paths:
        with contextlib.suppress(FileNotFoundError), _writing(path):
            number = os.open(path, os.O_RDONLY)
            try:
                os.fsync(number)
            finally:
                os.close(number)


def finite_or_none(value: Any) -> float | None:
    """A number as JSON can hold it: None if it is not finite."""
    return float(value) if np.isfinite(value) else None


def _write_whole(path: Path, text: str) -> None:
    if jax.process_index():  # one of several processes writes
        return
    scratch = path.with_suffix(".tmp")
    with _writing(path):
        try:
            with scratch.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)
            raise
    sync(path.parent)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Names the file where the system does not."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {error.strerror}; make room or give "
            "permission. What is saved is sound, and --resume goes on from it"
        ) from None
