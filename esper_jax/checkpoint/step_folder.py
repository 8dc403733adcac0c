"""One checkpoint on disk: the arrays as Orbax writes them, and a manifest of ours.

A step's folder holds ``state/``, an Orbax checkpoint of one flat dictionary from leaf
names to arrays, and ``manifest.json``, which says what every file and every leaf must
be. Orbax alone returns wrong data after one flipped bit, so nothing that it reads is
believed before its files and its arrays have been compared with the manifest, and
nothing is read without one.

This is the only file that knows Orbax; its v1 API still moves.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as v0
from orbax.checkpoint import v1 as ocp

from esper_jax.checkpoint.host_leaves import HostLeaf

__all__ = ["Damaged", "FileRecord", "LeafRecord", "Manifest", "check", "read", "write"]

_MANIFEST = "manifest.json"


_STATE = "state"


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
class Manifest:
    """What a step must be.

    Attributes:
      schema: version of the state's structure.
      step: as given when it was saved.
      saved: when, in seconds since 1970.
      metrics: numbers that were measured of the state; may be NaN.
      config: of the run, as JSON.
      leaves: by name, the keys joined by slashes.
      files: by path relative to the step's folder; all but the manifest itself.
    """

    schema: int
    step: int
    saved: float
    metrics: dict[str, float]
    config: Any
    leaves: dict[str, LeafRecord]
    files: dict[str, FileRecord]


def write(
    folder: Path,
    leaves: Mapping[str, HostLeaf],
    *,
    schema: int,
    step: int,
    saved: float,
    metrics: Mapping[str, float],
    config: Any,
) -> Manifest:
    """Writes a step into an empty folder and reads it back.

    Everything is on disk, and found to be what was given, when this returns.

    Raises:
      Damaged: if what was read back is not what was given.
      OSError: if there is no room for the arrays as they are in memory, even if they
        would have shrunk.
      Exception: whatever Orbax raises if it cannot write.
    """
    records = {
        name: LeafRecord(
            leaf.keys,
            leaf.array.shape,
            str(leaf.array.dtype),
            leaf.key_impl,
            _digest(leaf.array),
        )
        for name, leaf in leaves.items()
    }
    # Orbax refuses arrays without elements: the manifest says all there is of them.
    arrays = {name: leaf.array for name, leaf in leaves.items() if leaf.array.size}
    if arrays:
        _make_sure_of_room(folder, sum(array.nbytes for array in arrays.values()))
        with _orbax():
            _save((folder / _STATE).resolve(), arrays)
    manifest = Manifest(
        schema=schema,
        step=step,
        saved=saved,
        metrics=dict(metrics),
        config=config,
        leaves=records,
        files={
            name: FileRecord(path.stat().st_size, _file_digest(path))
            for name, path in _files(folder)
        },
    )
    (folder / _MANIFEST).write_bytes(_encode(manifest))
    _sync(folder)
    read(folder, step)
    return manifest


def check(folder: Path, step: int, *, contents: bool = True) -> Manifest:
    """Compares a step's files with its manifest, without reading any array.

    Args:
      folder: of the step.
      step: that it must be of.
      contents: compare every byte, not only which files there are and their sizes.

    Raises:
      Damaged: naming the first file that is not as it must be, and how.
    """
    manifest = _read_manifest(folder)
    if manifest.step != step:
        raise Damaged(f"it is step {manifest.step}, copied or renamed")
    try:
        present = dict(_files(folder))
        for name, record in manifest.files.items():
            path = present.pop(name, None)
            if path is None:
                raise Damaged(f"{name} is missing")
            size = path.stat().st_size
            if size != record.size:
                raise Damaged(f"{name} has {size} bytes, expected {record.size}")
            if contents and _file_digest(path) != record.sha256:
                raise Damaged(f"{name} has other contents than were saved")
    except OSError as error:
        raise Damaged(_cannot_read(error)) from None
    if present:
        raise Damaged(f"{min(present)} is foreign: it was not saved with the step")
    return manifest


def read(folder: Path, step: int) -> tuple[Manifest, dict[str, HostLeaf]]:
    """The leaves of a step by name, each compared with its checksum.

    Raises:
      Damaged: naming the first file or leaf that is not as it must be, and how.
    """
    manifest = check(folder, step)
    arrays: dict[str, Any] = {}
    if any(math.prod(record.shape) for record in manifest.leaves.values()):
        try:
            with _orbax():
                arrays = ocp.load((folder / _STATE).resolve())
        except Exception as error:  # of any kind: it depends on what is broken
            raise Damaged(
                f"Orbax cannot read it: {type(error).__name__}: {_first_line(error)}"
            ) from None
    found = {}
    for name, record in manifest.leaves.items():
        array = arrays.get(name)
        if not math.prod(record.shape):
            array = np.zeros(record.shape, np.dtype(record.dtype))
        if array is None:
            raise Damaged(f"leaf {name} is missing")
        array = np.asarray(array)
        if _digest(array) != record.sha256:
            raise Damaged(f"leaf {name} has other values than were saved")
        found[name] = HostLeaf(record.keys, array, record.key_impl)
    return manifest, found


def _read_manifest(folder: Path) -> Manifest:
    path = folder / _MANIFEST
    try:
        if not folder.exists():
            raise Damaged("it is missing")
        if not folder.is_dir() or folder.is_symlink():
            raise Damaged("it is not a folder")
        if not path.is_file() or path.is_symlink():
            raise Damaged(f"{_MANIFEST} is missing")
        return _decode(path.read_bytes())
    except OSError as error:
        raise Damaged(_cannot_read(error)) from None


def _encode(manifest: Manifest) -> bytes:
    """A header line with the checksum of all that follows, then the content."""
    content = dataclasses.asdict(manifest)
    # JSON knows no NaN and no infinity.
    content["metrics"] = {
        name: value if math.isfinite(value) else str(value)
        for name, value in manifest.metrics.items()
    }
    return _sealed(json.dumps(content).encode() + b"\n")


def _sealed(body: bytes) -> bytes:
    digest = hashlib.sha256(body).hexdigest()
    return f"{_FORMAT}, sha256 of what follows: {digest}\n".encode() + body


def _decode(raw: bytes) -> Manifest:
    if not raw.startswith(_FORMAT.encode()):
        raise Damaged(f"{_MANIFEST} is not one of esper_jax, or cut off")
    body = raw[raw.find(b"\n") + 1 :]
    if raw != _sealed(body):
        raise Damaged(f"{_MANIFEST} has other contents than were saved")
    try:
        content = json.loads(body)
        return Manifest(
            schema=content["schema"],
            step=content["step"],
            saved=content["saved"],
            metrics={name: float(v) for name, v in content["metrics"].items()},
            config=content["config"],
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
        # Sealed, so it was written like this: by another program or version.
        raise Damaged(
            f"{_MANIFEST} is not of this program's form ({_first_line(error)})"
        ) from None


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """All that is in a folder and is neither a folder nor the manifest.

    Raises:
      Damaged: for what is no plain file, such as a link or a pipe.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise Damaged(f"{name} is foreign: it is not a plain file")
        if path.is_file() and name != _MANIFEST:
            yield name, path


def _digest(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
    # As bytes: not every dtype of ml_dtypes offers a buffer.
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_sure_of_room(folder: Path, size: int) -> None:
    """Asks the system for a file of ``size`` bytes, and gives it back.

    Orbax, when it runs out of room, leaves threads behind that print their stacks.
    """
    probe = folder / "room"
    with probe.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    probe.unlink()


def _sync(folder: Path) -> None:
    """Has the system write a folder and all that is in it."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _cannot_read(error: OSError) -> str:
    name = Path(error.filename).name if error.filename else "a file"
    return f"{name} cannot be read: {error.strerror}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    if jax.process_count() == 1:
        ocp.save(path, arrays)
        return
    # The v1 API would wait for all processes of the program, and others do not save.
    # The older one does not; the files are the same.
    own = jax.process_index()
    alone = v0.options.MultiprocessingOptions(
        primary_host=own,
        active_processes={own},
        barrier_sync_key_prefix=f"esper_jax-save-{own}",
    )
    handler = v0.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with v0.Checkpointer(handler, multiprocessing_options=alone) as writer:
        writer.save(path, arrays)


@contextlib.contextmanager
def _orbax() -> Iterator[None]:
    """Orbax in this process alone, whatever others of the program do, and quiet.

    When it fails it prints the stack of each of its threads. The error itself comes
    back as an exception.
    """

    def wanted(record: logging.LogRecord) -> bool:
        return "raised an exception" not in record.getMessage()

    own = jax.process_index()
    alone = ocp.Context()
    alone.multiprocessing.primary_host = own
    alone.multiprocessing.active_processes = {own}
    alone.multiprocessing.barrier_sync_key_prefix = f"esper_jax-{own}"
    logger = logging.getLogger("absl")
    logger.addFilter(wanted)
    try:
        with alone:
            yield
    finally:
        logger.removeFilter(wanted)
