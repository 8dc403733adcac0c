"""One checkpoint on disk: the arrays as Orbax writes them, and our own manifest.

A step's folder holds ``state/``, an Orbax checkpoint of one flat dictionary from leaf
names to arrays (``arrays.py``), and ``manifest.json`` (``manifest.py``). Orbax alone
returns wrong data after one flipped bit. So files and arrays are compared with the
manifest before anyone uses them, and nothing is read without a manifest.
"""

import errno
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from esper_jax.checkpoint import arrays
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
    leaf_record,
    peek_order,
)

__all__ = [
    "Damaged",
    "FileRecord",
    "Header",
    "LeafRecord",
    "Manifest",
    "check",
    "manifest_of",
    "order",
    "read",
    "sign",
    "write",
]

_MANIFEST = "manifest.json"

_MANIFEST_BYTES = 1 << 28
"""No manifest is larger: it is read at once."""

_LEVELS = 16
"""Folders in one another below a step. Orbax makes five."""


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
    full = {name: leaf.array for name, leaf in leaves.items() if leaf.array.size}
    if full:
        _make_sure_of_room(folder, sum(array.nbytes for array in full.values()))
        arrays.save(folder, full)
    files = {name: file_record(path) for name, path in _files(folder)}
    manifest = Manifest.of(header, records, files)
    (folder / _MANIFEST).write_bytes(encode(manifest))
    _sync(folder)
    read(folder, header.step)
    return manifest


def sign(folder: Path, manifest: Manifest, key: bytes) -> None:
    """Signs the manifest of a step that `write` has written.

    Raises:
      OSError: if it cannot be written.
    """
    with (folder / _MANIFEST).open("wb") as file:
        file.write(encode(manifest, key))
        file.flush()
        os.fsync(file.fileno())


def check(
    folder: Path, step: int, *, contents: bool = True, key: bytes | None = None
) -> Manifest:
    """Compares a step's files with its manifest, without reading any array.

    Args:
      folder: of the step.
      step: number that the step must have been saved under.
      contents: compare every byte, not only the names and sizes of the files.
      key: that the manifest must be signed with; compared before anything is read.

    Raises:
      Damaged: naming the first file that differs from the manifest, and how.
    """
    manifest = manifest_of(folder, step, key)
    try:
        present, foreign = set(), None
        for name, _ in _files(folder):
            if name in manifest.files:
                present.add(name)
            else:
                foreign = foreign or name
        for name, record in manifest.files.items():
            if name not in present:
                raise Damaged(f"{name} is missing")
            path = folder / name
            size = path.stat().st_size
            if size != record.size:
                raise Damaged(f"{name} has {size} bytes, expected {record.size}")
            if contents and file_record(path) != record:
                raise Damaged(f"{name} has other contents than were saved")
    except OSError as error:
        raise Damaged(_cannot_read(error)) from None
    if foreign:
        raise Damaged(f"{foreign} is foreign: it was not saved with the step")
    return manifest


def read(
    folder: Path, step: int, key: bytes | None = None
) -> tuple[Manifest, dict[str, HostLeaf]]:
    """The leaves of a step by name, each compared with its checksum.

    Raises:
      Damaged: naming the first file or leaf that differs from the manifest, and how.
    """
    manifest = check(folder, step, key=key)
    full = {n: r for n, r in manifest.leaves.items() if math.prod(r.shape)}
    try:
        found = arrays.load(folder, full)
    except OSError as error:
        raise Damaged(_cannot_read(error)) from None
    leaves = {}
    for name, record in manifest.leaves.items():
        array = found.get(name)
        if array is None:
            array = np.zeros(record.shape, np.dtype(record.dtype))
        if digest(array) != record.sha256:
            raise Damaged(f"leaf {name} has other values than were saved")
        leaves[name] = HostLeaf(record.keys, array, record.key_impl)
    return manifest, leaves


def manifest_of(folder: Path, step: int, key: bytes | None = None) -> Manifest:
    """The manifest of a step, whose files are not looked at.

    Raises:
      Damaged: if it is damaged or another step's, or not signed with the key.
    """
    path = folder / _MANIFEST
    try:
        if not folder.exists():
            raise Damaged("it is missing")
        if not folder.is_dir() or folder.is_symlink():
            raise Damaged("it is not a folder")
        if not path.is_file() or path.is_symlink():
            raise Damaged(f"{_MANIFEST} is missing")
        with path.open("rb") as file:
            raw = file.read(_MANIFEST_BYTES + 1)
    except OSError as error:
        raise Damaged(_cannot_read(error)) from None
    if len(raw) > _MANIFEST_BYTES:
        raise Damaged(f"{_MANIFEST} has more than {_MANIFEST_BYTES} bytes")
    manifest = decode(raw, key)
    if manifest.step != step:
        raise Damaged(f"it is step {manifest.step}, copied or renamed")
    return manifest


def order(folder: Path, step: int) -> int | None:
    """The order of a step, read quickly and not checked (`manifest.peek_order`)."""
    try:
        descriptor = os.open(folder / _MANIFEST, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return peek_order(os.read(descriptor, 512), step)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _files(
    folder: Path, inside: str = "", levels: int = _LEVELS
) -> Iterator[tuple[str, Path]]:
    """Every file below a folder but the manifest, by relative path.

    Raises:
      Damaged: for anything but plain files and folders, such as a link or a pipe, and
        for folders nested deeper than a step's are.
    """
    with os.scandir(folder / inside) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        name = f"{inside}{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            if not levels:
                raise Damaged(f"{name} is foreign: no step has as many levels")
            yield from _files(folder, f"{name}/", levels - 1)
        elif not entry.is_file(follow_symlinks=False):
            raise Damaged(f"{name} is foreign: it is not a plain file")
        elif name != _MANIFEST:
            yield name, folder / name


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
