"""The manifest of a saved step: what every file and every leaf of it must be.

The file is a header line with the SHA-256 of all that follows, then JSON.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from esper_jax.checkpoint.host_leaves import HostLeaf

__all__ = [
    "Damaged",
    "FileRecord",
    "Header",
    "LeafRecord",
    "Manifest",
    "decode",
    "digest",
    "encode",
    "file_record",
    "first_line",
    "leaf_record",
]

_FORMAT = "esper_jax checkpoint"


class Damaged(Exception):
    """A step on disk is not what was saved; the message says in which way."""


@dataclasses.dataclass(frozen=True)
class LeafRecord:
    """What the manifest says of a leaf."""

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    key_impl: str | None
    sha256: str


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """What the manifest says of a file."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What is saved beside the state.

    Attributes:
      schema: version of the state's layout.
      step: as given when it was saved.
      saved: when, in seconds since 1970.
      metrics: numbers that were measured of the state; may be NaN.
      config: of the run, as JSON.
      position: of the data's iterator, as JSON; None if it has none.
    """

    schema: int
    step: int
    saved: float
    metrics: Mapping[str, float]
    config: Any
    position: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest(Header):
    """What a step must be.

    Attributes:
      leaves: by name, the keys joined by slashes.
      files: by path relative to the step's folder; all but the manifest itself.
    """

    leaves: dict[str, LeafRecord]
    files: dict[str, FileRecord]

    @classmethod
    def of(
        cls,
        header: Header,
        leaves: dict[str, LeafRecord],
        files: dict[str, FileRecord],
    ) -> "Manifest":
        """The manifest of a step from its parts."""
        fields = {f.name: getattr(header, f.name) for f in dataclasses.fields(Header)}
        return cls(**fields, leaves=leaves, files=files)


def encode(manifest: Manifest) -> bytes:
    """The contents of the manifest's file."""
    content = dataclasses.asdict(manifest)
    # JSON knows no NaN and no infinity.
    content["metrics"] = {
        name: value if math.isfinite(value) else str(value)
        for name, value in manifest.metrics.items()
    }
    return _sealed(json.dumps(content).encode() + b"\n")


def decode(raw: bytes) -> Manifest:
    """The manifest from the contents of its file.

    Raises:
      Damaged: if they are not what `encode` gave.
    """
    if not raw.startswith(_FORMAT.encode()):
        raise Damaged("manifest.json is not one of esper_jax, or cut off")
    body = raw[raw.find(b"\n") + 1 :]
    if raw != _sealed(body):
        raise Damaged("manifest.json has other contents than were saved")
    try:
        content = json.loads(body)
        return Manifest(
            schema=content["schema"],
            step=content["step"],
            saved=content["saved"],
            metrics={name: float(v) for name, v in content["metrics"].items()},
            config=content["config"],
            position=content.get("position"),
            leaves={
                name: LeafRecord(
                    tuple(v["keys"]),
                    tuple(v["shape"]),
                    v["dtype"],
                    v["key_impl"],
                    v["sha256"],
                )
                for name, v in content["leaves"].items()
            },
            files={name: FileRecord(**v) for name, v in content["files"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # The seal is intact: another program or version wrote it like this.
        raise Damaged(
            f"manifest.json is not of this program's form ({first_line(error)})"
        ) from None


def leaf_record(leaf: HostLeaf) -> LeafRecord:
    """The record of a leaf."""
    array = leaf.array
    return LeafRecord(
        leaf.keys, array.shape, str(array.dtype), leaf.key_impl, digest(array)
    )


def file_record(path: Path) -> FileRecord:
    """The record of a file; reads all of it."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(path.stat().st_size, sha256)


def digest(array: np.ndarray) -> str:
    """SHA-256 of an array's dtype, shape and values."""
    result = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
    # As bytes: not every dtype of ml_dtypes offers a buffer.
    result.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return result.hexdigest()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters."""
    return (str(error).splitlines() or [""])[0][:200]


def _sealed(body: bytes) -> bytes:
    seal = hashlib.sha256(body).hexdigest()
    return f"{_FORMAT}, sha256 of what follows: {seal}\n".encode() + body
