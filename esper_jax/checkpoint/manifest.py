"""The manifest of a saved step: what every file and every leaf of it must be.

The file is a header line with the SHA-256 of all that follows, or with its HMAC-SHA256
if it is signed, then JSON. Whoever wrote it, what is read here has the right types and
sizes, or is damaged.
"""

import dataclasses
import hashlib
import hmac
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from esper_jax.checkpoint.host_leaves import HostLeaf
from esper_jax.checkpoint.location import printable

__all__ = [
    "DEPTH",
    "Damaged",
    "FileRecord",
    "Header",
    "LeafRecord",
    "Manifest",
    "WrongKey",
    "decode",
    "digest",
    "encode",
    "file_record",
    "first_line",
    "leaf_record",
    "nested_deeper",
    "peek_order",
]

_FORMAT = b"esper_jax checkpoint, "
_SHA, _HMAC = b"sha256", b"hmac-sha256"
_OF = b" of what follows: "

_HEX = re.compile(r"[0-9a-f]{64}")
_NUMBERS = (
    rb'.{1,200}\n\{(?:"order": (?P<order>\d{1,15}), )?'
    rb'"schema": \d{1,9}, "step": (?P<step>\d{1,19}), '
)
_BEGINNING = re.compile(_NUMBERS)

DEPTH = 200
"""Levels of a config. What handles one may be recursive."""

_LATEST = 253402300799
"""Seconds since 1970 at the end of the year 9999, which calendars end with."""


class Damaged(Exception):
    """A step on disk is not what was saved; the message says in which way."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class WrongKey(Damaged):
    """A step is signed and there is no key, or the other way round, or another key."""


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
      order: place among all saves in the directory, from 1; None for steps of
        esper_jax 0.2 and before, which are older than all that have one.
    """

    schema: int
    step: int
    saved: float
    metrics: Mapping[str, float]
    config: Any
    position: Any = None
    order: int | None = None


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


def encode(manifest: Manifest, key: bytes | None = None) -> bytes:
    """The contents of the manifest's file, signed if there is a key."""
    fields = {f.name: getattr(manifest, f.name) for f in dataclasses.fields(manifest)}
    order = fields.pop("order")
    content = fields | {
        # JSON knows no NaN and no infinity.
        "metrics": {
            name: value if math.isfinite(value) else str(value)
            for name, value in manifest.metrics.items()
        },
        "leaves": {n: dataclasses.asdict(v) for n, v in manifest.leaves.items()},
        "files": {n: dataclasses.asdict(v) for n, v in manifest.files.items()},
    }
    if order is not None:  # first, where `peek_order` looks
        content = {"order": order, **content}
    return _sealed(json.dumps(content).encode() + b"\n", key)


def decode(raw: bytes, key: bytes | None = None) -> Manifest:
    """The manifest from the contents of its file.

    Args:
      raw: contents of the file.
      key: the manifest must be signed with it; None if it must not be signed.

    Raises:
      WrongKey: if it is not signed with the key.
      Damaged: if the contents are not what `encode` gave.
    """
    body = raw[raw.find(b"\n") + 1 :]
    _check_seal(raw, body, key)
    try:
        return _manifest(json.loads(body))
    except Exception as error:
        # The seal is intact: another program or version wrote it like this. What it
        # raises depends on what is odd: types, digits, levels, names of dtypes.
        raise Damaged(
            f"manifest.json is not of this program's form ({first_line(error)})"
        ) from None


def peek_order(raw: bytes, step: int) -> int | None:
    """The order of a step by the first bytes of its manifest, which are not checked.

    Returns:
      0 if it was saved without one, None if these are not the bytes of such a step.
    """
    found = _BEGINNING.match(raw)
    if found is None or int(found["step"]) != step:
        return None
    return int(found["order"] or 0)


def nested_deeper(tree: Any, levels: int = DEPTH) -> bool:
    """Whether JSON has more levels than that; not recursive."""
    level = [tree]
    for _ in range(levels + 1):
        level = [
            child
            for node in level
            if isinstance(node, dict | list | tuple)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return False
    return True


def _check_seal(raw: bytes, body: bytes, key: bytes | None) -> None:
    if key is None and raw.startswith(_FORMAT + _HMAC + _OF):
        raise WrongKey("it is signed: give Checkpointer the key that it was saved with")
    if key is not None and raw.startswith(_FORMAT + _SHA + _OF):
        raise WrongKey("it is not signed, so it is not trusted with a key")
    if not raw.startswith(_FORMAT):
        raise Damaged("manifest.json is not one of esper_jax, or cut off")
    if hmac.compare_digest(raw, _sealed(body, key)):
        return
    if key is not None:
        raise WrongKey(
            "manifest.json was signed with another key, or changed since it was signed"
        )
    raise Damaged("manifest.json has other contents than were saved")


def _manifest(content: Any) -> Manifest:
    """The manifest from its JSON, each value of its type and in its range."""
    order = content.get("order")
    if order is not None and _whole("order", order) >= 10**15:  # `peek_order` has that
        _odd("order", "at most 15 digits", order)
    for field in ("config", "position"):
        if nested_deeper(content.get(field)):
            _odd(field, f"at most {DEPTH} levels", "more")
    saved = content["saved"]
    if type(saved) not in (int, float) or not 0 <= saved <= _LATEST:
        _odd("saved", "seconds since 1970", saved)
    return Manifest(
        order=order,
        schema=_whole("schema", content["schema"], 1),
        step=_whole("step", content["step"]),
        saved=saved,
        metrics={name: _number(name, v) for name, v in content["metrics"].items()},
        config=content["config"],
        position=content.get("position"),
        leaves={name: _leaf(name, v) for name, v in content["leaves"].items()},
        files={name: _file(name, v) for name, v in content["files"].items()},
    )


def _leaf(name: str, content: Any) -> LeafRecord:
    keys, shape, text = content["keys"], content["shape"], content["dtype"]
    if (
        type(keys) is not list
        or not all(isinstance(key, str) for key in keys)
        or "/".join(keys) != name
    ):
        _odd(f"keys of {name}", "the parts of its name", keys)
    if type(shape) is not list or len(shape) > 32:
        _odd(f"shape of {name}", "a list of up to 32 sizes", shape)
    for size in shape:
        _whole(f"shape of {name}", size)
    dtype = np.dtype(text) if isinstance(text, str) else None
    if dtype is None or str(dtype) != text or dtype.hasobject or dtype.kind in "SUmM":
        _odd(f"dtype of {name}", "the name of a type of numbers", text)
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 2**63:
        _odd(f"shape of {name}", "fewer bytes than 2**63", shape)
    impl = content["key_impl"]
    if not (impl is None or isinstance(impl, str)):
        _odd(f"key_impl of {name}", "a name or null", impl)
    return LeafRecord(tuple(keys), tuple(shape), text, impl, _sha256(name, content))


def _file(name: str, content: Any) -> FileRecord:
    parts = name.split("/")
    if not all(parts) or "." in parts or ".." in parts or "\0" in name:
        _odd("files", "paths below the step", name)
    if set(content) != {"size", "sha256"}:
        _odd(f"file {name}", "size and sha256", sorted(content))
    return FileRecord(
        _whole(f"size of {name}", content["size"]), _sha256(name, content)
    )


def _sha256(name: str, content: Any) -> str:
    value = content["sha256"]
    if not isinstance(value, str) or not _HEX.fullmatch(value):
        _odd(f"sha256 of {name}", "64 hexadecimal digits", value)
    return value


def _whole(name: str, value: Any, least: int = 0) -> int:
    if type(value) is not int or not least <= value < 2**63:
        _odd(name, f"a whole number from {least} to 2**63", value)
    return int(value)


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) and value not in ("nan", "inf", "-inf"):
        _odd(f"metric {name}", "a number", value)
    return float(value)


def _odd(name: str, expected: str, got: Any) -> NoReturn:
    raise ValueError(f"{name}: expected {expected}, got {str(got)[:60]!r}")


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


def _sealed(body: bytes, key: bytes | None) -> bytes:
    if key is None:
        name, seal = _SHA, hashlib.sha256(body).hexdigest()
    else:
        name, seal = _HMAC, hmac.digest(key, body, "sha256").hex()
    return b"".join((_FORMAT, name, _OF, seal.encode(), b"\n", body))
