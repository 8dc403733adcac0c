"""What is seen of the two arms of a rollout, one JSON object a line.

A line has an ``arm``, ``candidate`` or ``baseline``, and what was measured: ``latency``
(seconds), ``error`` (true or false), ``accuracy`` (0 to 1), ``loss``, and ``nan``. It
may say more under ``time``, ``model_id`` and ``run``. What is not finite, as in
``"loss": NaN``, counts as NaN; what is null or left out was not measured.

Each line should be an independent draw of its arm: a request, a batch, a run. Many
lines of few models say less than they seem to.
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from esper_jax.rollout.canary.plan import CanaryError
from esper_jax.run.references import shown

__all__ = [
    "ARMS",
    "Batch",
    "Observer",
    "batch_of",
    "end_of",
    "observation",
    "read_from",
]

ARMS = ("candidate", "baseline")

_MEASURED = ("latency", "error", "accuracy", "loss", "nan")
_TOLD = ("time", "model_id", "run")

_SHOWN = 3
"""Lines that are no observations and are named, at each reading."""

_log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """``N`` observations in the order in which they came. NaN is "not measured"."""

    candidate: Bool[np.ndarray, " N"]
    nan: Bool[np.ndarray, " N"]
    """Whether a value was not finite."""
    error: Float[np.ndarray, " N"]
    """1 for an error, 0 for none."""
    latency: Float[np.ndarray, " N"]
    """In seconds."""
    accuracy: Float[np.ndarray, " N"]


def observation(fields: Mapping[str, Any]) -> dict[str, Any]:
    """An observation, checked, with what is not finite moved into ``nan``.

    Args:
      fields: as a line has them.

    Raises:
      CanaryError: naming the field, what was expected and what came.
    """
    found: dict[str, Any] = {k: v for k, v in fields.items() if v is not None}
    if found.get("arm") not in ARMS:
        raise CanaryError(
            f"arm: expected candidate or baseline, got {shown(found.get('arm'))}"
        )
    for key in found:
        if key not in ("arm", *_MEASURED, *_TOLD):
            raise CanaryError(
                f"{key:.80}: unknown; expected arm, {', '.join(_MEASURED + _TOLD)}"
            )
    for name in ("error", "nan"):
        if name in found:
            found[name] = _truth(name, found[name])
    broken = found.get("nan", False)
    for name, expected, most in (
        ("latency", "seconds from 0", math.inf),
        ("accuracy", "a number from 0 to 1", 1.0),
        ("loss", "a number", math.inf),
    ):
        if name not in found:
            continue
        value = _number(name, found[name], expected)
        if not math.isfinite(value):
            del found[name]
            broken = True
        elif name != "loss" and not 0 <= value <= most:
            raise CanaryError(f"{name}: expected {expected}, got {value:g}")
        else:
            found[name] = value
    if not broken and not any(name in found for name in _MEASURED):
        raise CanaryError(
            f"expected something measured ({', '.join(_MEASURED)}), got the arm alone"
        )
    return found | ({"nan": True} if broken else {})


def _truth(name: str, value: Any) -> bool:
    if isinstance(value, bool | np.bool_) or (
        isinstance(value, int | float) and value in (0, 1)
    ):
        return bool(value)
    raise CanaryError(f"{name}: expected true or false, got {shown(value)}")


def _number(name: str, value: Any, expected: str) -> float:
    try:
        if not isinstance(value, bool | str):
            return float(value)
    except (TypeError, ValueError):
        pass
    except OverflowError:
        return math.inf
    raise CanaryError(f"{name}: expected {expected}, got {shown(value)}")


def batch_of(observations: Sequence[Mapping[str, Any]]) -> Batch:
    """Checked observations as columns."""

    def column(name: str) -> Float[np.ndarray, " N"]:
        return np.array([float(o.get(name, math.nan)) for o in observations])

    return Batch(
        candidate=np.array([o["arm"] == ARMS[0] for o in observations], bool),
        nan=np.array([o.get("nan", False) for o in observations], bool),
        error=column("error"),
        latency=column("latency"),
        accuracy=column("accuracy"),
    )


class Observer:
    """Appends observations to a file that a canary reads.

    Several processes and threads may append to one file: each line is one write.

    Args:
      path: of the file; made if it is not there.

    Raises:
      CanaryError: if it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        try:
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._file = os.open(self.path, flags, 0o666)
        except OSError as error:
            raise CanaryError(
                f"{self.path}: observations cannot be written there: {error.strerror}"
            ) from None
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")  # a process was killed within a line

    def observe(
        self,
        arm: str,
        *,
        latency: float | None = None,
        error: bool | None = None,
        accuracy: float | None = None,
        loss: float | None = None,
        **told: Any,
    ) -> None:
        """Appends an observation. What is not finite counts as NaN.

        Args:
          arm: ``candidate`` for a model with the flag, ``baseline`` for one without.
          latency: in seconds.
          error: whether it failed.
          accuracy: from 0 to 1.
          loss: looked at only for whether it is finite.
          **told: ``nan``, ``model_id`` or ``run``.

        Raises:
          CanaryError: naming the argument, what was expected and what came; nothing is
            written then.
        """
        given = {"latency": latency, "error": error, "accuracy": accuracy, "loss": loss}
        self.add({"arm": arm, **given, **told})

    def add(self, fields: Mapping[str, Any]) -> None:
        """The same, of a dictionary."""
        line = {"time": time.time(), **observation(fields)}
        data = (json.dumps(line) + "\n").encode()
        try:
            written = os.write(self._file, data)
        except OSError as error:
            raise CanaryError(
                f"{self.path}: an observation cannot be written: {error.strerror}"
            ) from None
        if written < len(data):  # the disk is full: the line is no observation
            raise CanaryError(f"{self.path}: an observation was cut off; make room")

    def close(self) -> None:
        """Closes the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "Observer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def end_of(path: Path) -> int:
    """Bytes of a file up to the end of its last whole line.

    Raises:
      CanaryError: if it cannot be read.
    """
    try:
        return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
    except OSError as error:
        raise CanaryError(f"{path}: cannot be read: {error.strerror}") from None


def read_from(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """The observations of a file behind an offset, and the offset behind them.

    A line without its end is left for the next time. Lines that are no observations are
    passed over with a warning: one torn line of a process that was killed must not keep
    a canary from rolling back.

    Args:
      path: of the file; one that is not there has none.
      offset: in bytes.

    Raises:
      CanaryError: if the file cannot be read, or is shorter than the offset.
    """
    try:
        size = path.stat().st_size if path.exists() else 0
        if size < offset:
            raise CanaryError(
                f"{path}: has {size} bytes, and {offset} were read before: it was cut "
                "or replaced. Put it back, or abort this canary and start another"
            )
        if size == offset:
            return [], offset
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except OSError as error:
        raise CanaryError(f"{path}: cannot be read: {error.strerror}") from None
    whole = data.rpartition(b"\n")[0]
    if not whole:
        return [], offset
    return _parsed(path, offset, whole.split(b"\n")), offset + len(whole) + 1


def _parsed(path: Path, offset: int, lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """The observations among lines; warns about the others."""
    found, wrong = [], []
    for line in lines:
        start, offset = offset, offset + len(line) + 1
        try:
            fields = json.loads(line) if line.strip() else None
            if fields is None:
                continue
            if not isinstance(fields, dict):
                raise CanaryError("expected a JSON object")
            found.append(observation(fields))
        except (ValueError, RecursionError) as error:
            why = str(error) if isinstance(error, CanaryError) else "is no JSON"
            wrong.append(f"at byte {start}: {why}")
    for each in wrong[:_SHOWN]:
        _log.warning("%s: a line is passed over %s", path, each)
    if len(wrong) > _SHOWN:
        _log.warning("%s: so are %d lines more", path, len(wrong) - _SHOWN)
    return found
