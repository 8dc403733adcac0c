"""Files of learned policies: safetensors with what made them as metadata; no pickle."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esper_jax.lifecycle.grafting import Strategy
from esper_jax.lifecycle.stages import Stage
from esper_jax.policy import network
from esper_jax.policy.sight import FEATURES, SIGNALS

__all__ = [
    "NUM_FEATURES",
    "SHIPPED",
    "VERSION",
    "PolicyFile",
    "PolicyFileError",
    "digest",
    "read_policy",
    "safetensors_numpy",
    "signature",
    "write_policy",
]

VERSION = "1"
"""Of the format. What the numbers that are read mean is part of it."""
SHIPPED = Path(__file__).with_name("learned.safetensors")
"""The policy that comes with the package."""
NUM_FEATURES = max(columns.stop for columns in FEATURES.values())


class PolicyFileError(ValueError):
    """A file is no policy that this version can use."""


class PolicyFile(NamedTuple):
    """A learned policy as its file holds it."""

    weights: dict[str, np.ndarray]
    made_by: dict[str, Any]
    """What made it: the command, its seed, the versions, and the ``hash`` of the
    weights."""


def signature() -> str:
    """What a policy of this version reads and says, in words."""
    words = {
        "reads": SIGNALS,
        "stages": [s.name for s in Stage],
        "strategies": [s.name for s in Strategy],
        "shapes": network.shapes(NUM_FEATURES),
    }
    return json.dumps(words, separators=(",", ":"))


def digest(weights: Mapping[str, Any]) -> str:
    """SHA-256 of the weights, as names and bytes."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode())
        found.update(np.ascontiguousarray(weights[name], np.float32).tobytes())
    return found.hexdigest()


def write_policy(path: Path, weights: Mapping[str, Any], **made_by: Any) -> None:
    """Writes a policy; what stood there before is replaced in one go.

    Args:
      path: of the file.
      weights: of the network.
      **made_by: what made it; anything that JSON can hold.
    """
    save = safetensors_numpy().save
    arrays = {n: np.ascontiguousarray(w, np.float32) for n, w in weights.items()}
    metadata = {
        "format": "esper_jax.policy",
        "version": VERSION,
        "signature": signature(),
        "made_by": json.dumps({**made_by, "hash": digest(arrays)}),
    }
    before = path.with_name(f".{path.name}.new")
    before.write_bytes(save(arrays, metadata))
    os.replace(before, path)


def read_policy(path: str | Path = "") -> PolicyFile:
    """Reads a policy.

    Args:
      path: of the file; empty for the one that the package ships.

    Raises:
      PolicyFileError: if the file cannot be read, is no policy, is one of another
        version or signature, or its bytes are not those that were written.
    """
    path = Path(path) if str(path) else SHIPPED
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PolicyFileError(f"{path}: cannot be read: {error.strerror}") from None
    load = safetensors_numpy().load
    try:
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
        weights = load(data)
        made_by = json.loads(metadata.get("made_by", "{}"))
        made_by.get("hash")
    except Exception as error:  # whatever the parsers say of bytes that are none
        raise PolicyFileError(
            f"{path}: expected safetensors with a learned policy; {error}"
        ) from None
    _check(path, metadata, weights)
    if made_by.get("hash") != digest(weights):
        raise PolicyFileError(
            f"{path}: expected weights with the hash {made_by.get('hash')}, got "
            f"{digest(weights)}: the file was changed after it was written"
        )
    return PolicyFile(weights, made_by)


def _check(path: Path, metadata: Mapping[str, str], weights: Mapping[str, Any]) -> None:
    wanted = {"format": "esper_jax.policy", "version": VERSION}
    for key, expected in wanted.items():
        if metadata.get(key) != expected:
            raise PolicyFileError(
                f"{path}: expected {key} {expected!r}, got {metadata.get(key)!r}; a "
                "policy is made by esper-jax policy train"
            )
    if metadata.get("signature") != signature():
        raise PolicyFileError(
            f"{path}: expected a policy with the signature of this version of "
            f"esper_jax, {_difference(metadata.get('signature', ''))}. Train it anew "
            "with this version"
        )
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    if shapes != network.shapes(NUM_FEATURES):
        raise PolicyFileError(
            f"{path}: expected arrays {network.shapes(NUM_FEATURES)}, got {shapes}"
        )


def _difference(other: str) -> str:
    """Where a signature differs from this version's."""
    try:
        theirs = dict(json.loads(other))
    except (TypeError, ValueError):
        return "got none"
    for key, ours in json.loads(signature()).items():
        if theirs.get(key) != ours:
            return f"whose {key} are {ours}; got {theirs.get(key)}"
    return "got another"


def safetensors_numpy() -> Any:
    """The module that reads and writes these files.

    Raises:
      PolicyFileError: if it is not installed.
    """
    try:
        import safetensors.numpy
    except ImportError:
        raise PolicyFileError(
            "a learned policy needs the package safetensors, which is not installed: "
            "pip install 'esper-jax[learn]'"
        ) from None
    return safetensors.numpy
