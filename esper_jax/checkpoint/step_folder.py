"""One checkpoint on disk: the arrays as Orbax writes them, and our own manifest.

A step's folder holds ``state/``, an Orbax checkpoint of one flat dictionary from leaf
names to arrays, and ``manifest.json`` (``manifest.py``). Orbax alone returns wrong data
after one flipped bit. So files and arrays are compared with the manifest before anyone
uses them, and nothing is read without a manifest.

Only this file knows Orbax, whose v1 API still moves.
"""

import contextlib
import errno
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
from esper_jax.checkpoint.manifest import (
    Damaged,
    FileRecord,
    Header,
    LeafRecord,
    Manifest,
    decode,
    digest,
    encode,
    file_record,
    first_line,
    leaf_record,
)

__all__ = [
    "Damaged",
    "FileRecord",
    "Header",
    "LeafRecord",
    "Manifest",
    "check",
    "read",
    "write",
]

_MANIFEST = "manifest.json"

_STATE = "state"


def write(folder: Path, leaves: Mapping[str, HostLeaf], header: Header) -> Manifest:
    """Writes a step into an empty folder and reads it back.

    When this returns, everything is on disk and has been found equal to what was given.

    Args:
      folder: empty.
      leaves: by name.
      header: everything else that the manifest says of the step.

    Raises:
      Damaged: if what was read back is not what was given.
      OSError: if there is no room for the arrays as they are in memory, even if they
        would have shrunk.
      Exception: whatever Orbax raises if it cannot write.
    """
    records = {name: leaf_record(leaf) for name, leaf in leaves.items()}
    # Orbax refuses arrays without elements. The manifest holds all there is of them.
    arrays = {name: leaf.array for name, leaf in leaves.items() if leaf.array.size}
    if arrays:
        _make_sure_of_room(folder, sum(array.nbytes for array in arrays.values()))
        with _orbax():
            _save((folder / _STATE).resolve(), arrays)
    files = {name: file_record(path) for name, path in _files(folder)}
    manifest = Manifest.of(header, records, files)
    (folder / _MANIFEST).write_bytes(encode(manifest))
    _sync(folder)
    read(folder, header.step)
    return manifest


def check(folder: Path, step: int, *, contents: bool = True) -> Manifest:
    """Compares a step's files with its manifest, without reading any array.

    Args:
      folder: of the step.
      step: number that the step must have been saved under.
      contents: compare every byte, not only the names and sizes of the files.

    Raises:
      Damaged: naming the first file that differs from the manifest, and how.
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
            if contents and file_record(path) != record:
                raise Damaged(f"{name} has other contents than were saved")
    except OSError as error:
        raise Damaged(_cannot_read(error)) from None
    if present:
        raise Damaged(f"{min(present)} is foreign: it was not saved with the step")
    return manifest


def read(folder: Path, step: int) -> tuple[Manifest, dict[str, HostLeaf]]:
    """The leaves of a step by name, each compared with its checksum.

    Raises:
      Damaged: naming the first file or leaf that differs from the manifest, and how.
    """
    manifest = check(folder, step)
    arrays: dict[str, Any] = {}
    if any(math.prod(record.shape) for record in manifest.leaves.values()):
        try:
            with _orbax():
                arrays = ocp.load((folder / _STATE).resolve())
        except Exception as error:  # its kind depends on what is broken
            raise Damaged(
                f"Orbax cannot read it: {type(error).__name__}: {first_line(error)}"
            ) from None
    found = {}
    for name, record in manifest.leaves.items():
        array = arrays.get(name)
        if not math.prod(record.shape):
            array = np.zeros(record.shape, np.dtype(record.dtype))
        if array is None:
            raise Damaged(f"leaf {name} is missing")
        array = np.asarray(array)
        if digest(array) != record.sha256:
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
        return decode(path.read_bytes())
    except OSError as error:
        raise Damaged(_cannot_read(error)) from None


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every file below a folder but the manifest, by relative path.

    Raises:
      Damaged: for anything but plain files and folders, such as a link or a pipe.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise Damaged(f"{name} is foreign: it is not a plain file")
        if path.is_file() and name != _MANIFEST:
            yield name, path


def _make_sure_of_room(folder: Path, size: int) -> None:
    """Asks the system for a file of ``size`` bytes, and removes it again.

    If Orbax runs out of room, it leaves threads behind that print their stacks.
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
    """Flushes a folder and everything in it to disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _cannot_read(error: OSError) -> str:
    name = Path(error.filename).name if error.filename else "a file"
    return f"{name} cannot be read: {error.strerror}"


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    if jax.process_count() == 1:
        ocp.save(path, arrays)
        return
    # Only one process saves, and Orbax's v1 API would wait for all of them. The older
    # API does not; the files are the same.
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
    """Keeps Orbax to this process, whatever other processes do, and keeps it quiet.

    When Orbax fails it prints the stack of each of its threads. The error itself comes
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
