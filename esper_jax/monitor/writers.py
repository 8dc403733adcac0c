"""Writers of `Monitor` into files and to services: JSON lines, TensorBoard, W&B.

`Prometheus` has a module of its own. Other packages are imported when a writer is made.
"""

import contextlib
import errno
import importlib
import json
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np

from esper_jax.monitor.protocol import Record
from esper_jax.monitor.series import SERIES

__all__ = [
    "JsonLines",
    "TensorBoard",
    "WeightsAndBiases",
    "append_whole",
    "ends_within_a_line",
    "optional",
]

_LABELLED = {series.name for series in SERIES if series.label}

_SPARSE = {s.name for s in SERIES if s.label in ("stage", "to", "outcome", "fault")}
"""Series whose labels are known; most values are 0, and most of a file would be."""

_TOLD = 50
"""Lines of events that TensorBoard gets of one record, at most."""


def optional(module: str, who: str, install: str) -> Any:
    """A module of a package that need not be there.

    Args:
      module: to import.
      who: needs it.
      install: what ``pip install`` is told.

    Raises:
      ImportError: saying what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{who} needs {module.split('.')[0]}: pip install '{install}' ({error})"
        ) from error


class JsonLines:
    """Appends one JSON object for each record to a file.

    It has ``tick``, ``step``, ``time``, each series by its name (an object of values by
    label, where it has one), and ``events``. ``null`` is not finite or not measured.
    Stages, outcomes and faults that are left out are 0.

    Args:
      path: of the file; its folder must be there.
      after: the step that the run goes on from: lines of later ones, which will come
        again, are taken out.

    Raises:
      OSError: if the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], after: int | None = None) -> None:
        self._path = Path(path)
        if after is not None and self._path.is_file():
            _cut(self._path, after)
        self._file = self._path.open("a+b", buffering=0)
        if ends_within_a_line(self._file):  # a process was killed
            append_whole(self._file, b"\n")

    def write(self, record: Record) -> None:
        """Appends a line."""
        append_whole(self._file, _line(record))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def append_whole(file: Any, data: bytes) -> None:
    """Appends to a file without a buffer: all of the data or, on a full disk, none."""
    end = os.fstat(file.fileno()).st_size
    try:
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(file.fileno(), end)
        raise


def _line(record: Record) -> bytes:
    values: dict[str, Any] = {}
    for name, of in record.values.items():
        finite = {
            label: value if np.isfinite(value) else None
            for label, value in of.items()
            if value or name not in _SPARSE
        }
        values[name] = finite if name in _LABELLED else finite.get("")
    told = {"tick": record.tick, "step": record.step, "time": record.time}
    return (json.dumps({**told, **values, "events": [*record.events]}) + "\n").encode()


def _cut(path: Path, after: int) -> None:
    """Takes out lines of later steps, and what is no line."""

    def stays(line: bytes) -> bool:
        try:
            return bool(json.loads(line)["step"] <= after)
        except (ValueError, TypeError, KeyError, RecursionError):
            return False

    scratch = path.with_name(path.name + ".tmp")
    try:
        with path.open("rb") as old, scratch.open("wb") as new:
            new.writelines(x for x in old if x.endswith(b"\n") and stays(x))
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def ends_within_a_line(file: Any) -> bool:
    """Whether the last line of a file is cut off; its position is moved."""
    if not file.seekable() or not file.seek(0, os.SEEK_END):
        return False  # a pipe, or nothing
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) != b"\n")


class TensorBoard:
    """Writes an event file for TensorBoard. Needs tensorboardX.

    Scalars are called ``NAME`` or ``NAME/LABEL`` after the series, at the run's steps.
    ``esper_events`` is text.

    Args:
      folder: of the file; made if it is not there.
      after: the step that the run goes on from; TensorBoard forgets later ones.

    Raises:
      ImportError: without tensorboardX.
      OSError: if no file can be written there.
    """

    def __init__(
        self, folder: str | os.PathLike[str], after: int | None = None
    ) -> None:
        package, install = "tensorboardX", "esper-jax[tensorboard]"
        self._proto = optional(f"{package}.proto.event_pb2", "TensorBoard", install)
        summaries = optional(f"{package}.proto.summary_pb2", "TensorBoard", install)
        self._summary = summaries.Summary
        self._text = optional(f"{package}.summary", "TensorBoard", install).text
        framing = optional(f"{package}.record_writer", "TensorBoard", install)
        self._checksum = framing.masked_crc32c
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        who = f"{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / f"events.out.tfevents.{who}").open("xb", buffering=0)
        opening = self._event(file_version="brain.Event:2")
        if after is not None:
            session = self._proto.SessionLog
            log = session(status=session.START)
            opening += self._event(step=after + 1, session_log=log)
        append_whole(self._file, opening)

    def write(self, record: Record) -> None:
        """Appends the scalars and the events of a record."""
        kind = self._summary
        scalars = [kind.Value(tag=n, simple_value=v) for n, v in record.flat()]
        data = self._event(step=record.step, summary=kind(value=scalars))
        if record.events:
            said = "\n\n".join(event["text"] for event in record.events[:_TOLD])
            said += "\n\n..." if len(record.events) > _TOLD else ""
            text = self._text("esper_events", said)
            data += self._event(step=record.step, summary=text)
        append_whole(self._file, data)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _event(self, **what: Any) -> bytes:
        """An event as it stands in the file: length, data, and a checksum of each."""
        event = self._proto.Event(wall_time=time.time(), **what)
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        sums = [struct.pack("<I", self._checksum(part)) for part in (length, data)]
        return length + sums[0] + data + sums[1]


class WeightsAndBiases:
    """Logs to Weights & Biases. Needs wandb.

    Values are called ``NAME`` or ``NAME/LABEL`` after the series. The run begins with
    the first record, in the writer's thread, because that may wait for a network. A run
    that is resumed keeps what it got first: steps only grow there.

    Args:
      **init: for `wandb.init`: ``project``, ``dir``, ``mode="offline"``, ...

    Raises:
      ImportError: without wandb.
    """

    def __init__(self, **init: Any) -> None:
        self._wandb = optional("wandb", "WeightsAndBiases", "wandb")
        self._init = init
        self._run: Any = None

    def write(self, record: Record) -> None:
        """Logs the values at the record's step."""
        if self._run is None:
            self._run = self._wandb.init(**self._init)
        self._run.log(dict(record.flat()), step=record.step)

    def close(self) -> None:
        """Ends the run."""
        if self._run is not None:
            self._run.finish()
