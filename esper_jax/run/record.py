"""What a run knows of itself beside its config, and what each checkpoint seals.

`Record` is a file of the run's folder. The manifest of a checkpoint holds the config
and, under the key ``run``, what `sealed` returns. It has a checksum, so a config, a log
or a step that is damaged or of another run is found out.
"""

import dataclasses
import importlib.metadata
import logging
import os
import platform
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from esper_jax.checkpoint.location import absolute
from esper_jax.checkpoint.manifest import Damaged, Manifest
from esper_jax.checkpoint.step_directory import StepDirectory
from esper_jax.checkpoint.step_folder import manifest_of
from esper_jax.run.changes import differences
from esper_jax.run.config import ConfigError, RunConfig, parse_config, to_dict
from esper_jax.run.folder import RunError, RunFolder, read_json

__all__ = [
    "Record",
    "Seal",
    "check_seal",
    "newest_seal",
    "newest_step",
    "read_record",
    "seal_of",
    "sealed",
    "settings",
    "warn_unlike",
]

_OPTIONS = (
    "jax_enable_x64",
    "jax_threefry_partitionable",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_numpy_dtype_promotion",
)
"""Options of JAX that change what a program computes."""

_PACKAGES = ("esper-jax", "jax", "jaxlib", "flax", "optax", "numpy")


_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """Who a run is.

    Args:
      id: drawn when the run began; all of its checkpoints have it.
      settings: what the run was last trained under; see `settings`.
      changes: keys of the config that were changed on the way, oldest first: ``key``,
        ``from``, ``to``, and the ``tick`` after which.
      layers: what can grow, by the name of the layer: ``features``, ``num_seeds``,
        ``capacity``, and the names of its ``blueprints`` by id. Older runs have none.
    """

    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    changes: Sequence[Mapping[str, Any]] = ()
    layers: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


class Seal(NamedTuple):
    """What a checkpoint says of the run that saved it.

    All but the step and the config is empty in checkpoints of version 0.2 and before.
    """

    step: int
    config: RunConfig
    id: str | None
    settings: Mapping[str, str]
    logs: Mapping[str, Any]
    """Number and digest of the lines of each log; see `logs.Journal`."""
    missing: tuple[str, ...]
    """What the logs had lost before."""


def settings() -> dict[str, str]:
    """Versions, devices and options, which change numbers without a word.

    How many devices train is known, and added, when there is a state on them.
    """
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    found |= {name: str(getattr(jax.config, name, None)) for name in _OPTIONS}
    return found | {
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def warn_unlike(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Logs each setting that is another now; those that only one knows are not."""
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            _log.warning(
                "numbers may differ from here on: %s was %r and is %r",
                name,
                before[name],
                now[name],
            )


def sealed(
    config: RunConfig,
    record: Record,
    logs: Mapping[str, Any],
    missing: Sequence[str],
) -> dict[str, Any]:
    """What a checkpoint keeps beside its state, as JSON; `seal_of` reads it."""
    run = {"id": record.id, "settings": dict(record.settings), "logs": dict(logs)}
    return {**to_dict(config), "run": {**run, "missing": list(missing)}}


def seal_of(manifest: Manifest) -> Seal:
    """What a checkpoint says of its run.

    Raises:
      RunError: if it says nothing that a run would.
    """
    tables = dict(manifest.config) if isinstance(manifest.config, Mapping) else None
    run = {} if tables is None else tables.pop("run", {})
    try:
        if tables is None:
            raise ConfigError("there is none")
        return Seal(
            manifest.step,
            parse_config(tables),
            run.get("id"),
            dict(run.get("settings", {})),
            dict(run.get("logs", {})),
            tuple(run.get("missing", ())),
        )
    except (ConfigError, AttributeError, TypeError, ValueError) as error:
        raise RunError(
            f"step {manifest.step} was not saved by a run of esper-jax train, or by a "
            f"newer one (its config: {error}): move it out of checkpoints/"
        ) from None


def newest_seal(folder: RunFolder) -> Seal | None:
    """What the newest checkpoint that can be read says of its run; None without one.

    Reads manifests, and no arrays. Runs do not sign: a step that is signed counts as
    damaged here, and `Checkpointer.restore` refuses it by name.

    Raises:
      RunError: if it says nothing that a run would.
    """
    directory = StepDirectory(absolute(folder.checkpoints))
    for step in directory.newest_first():
        try:
            manifest = manifest_of(directory.folder(step), step)
        except Damaged:
            continue  # `Checkpointer.restore` tells of it
        return seal_of(manifest)
    return None


def newest_step(folder: RunFolder) -> int | None:
    """The step that a resume tries first; None if there is none."""
    directory = StepDirectory(absolute(folder.checkpoints))
    return next(iter(directory.newest_first()), None)


def read_record(folder: RunFolder) -> Record | None:
    """The record of a run; None for one of version 0.2 or before.

    Raises:
      RunError: if it is damaged.
    """
    if not folder.record.exists():
        return None
    found = read_json(folder.record)
    try:
        record = Record(**found)
        known = {"key", "from", "to", "tick"}
        if isinstance(record.id, str) and all(known <= {*c} for c in record.changes):
            return record
    except TypeError:
        pass
    raise RunError(
        f"{folder.record} is damaged: it has not the fields of a run's record; put it "
        "back, or remove it if no key of the config was ever changed"
    )


def check_seal(
    folder: RunFolder, config: RunConfig, record: Record | None, seal: Seal
) -> None:
    """Checks that a checkpoint was saved by the run whose folder it lies in.

    Args:
      folder: of the run.
      config: as ``config.json`` has it.
      record: of the run.
      seal: of the checkpoint.

    Raises:
      RunError: saying what differs.
    """
    changes = () if record is None else record.changes
    for key, was, now in differences(config, seal.config):
        said = [c for c in changes if c["key"] == key]
        known = [value for c in said for value in (c["from"], c["to"])]
        if not (_json(was) in known and _json(now) in known):
            raise RunError(
                f"{folder.config} says {key} = {now!r}, but step {seal.step} was saved "
                f"with {was!r}. One of them is damaged, or of another run: put "
                f"{was!r} back into config.json, or move that step out of checkpoints/"
            )
    if record is not None and seal.id not in (None, record.id):
        raise RunError(
            f"step {seal.step} in {folder.checkpoints} was saved by another run "
            f"({seal.id}, this one is {record.id}): move that step out of checkpoints/"
        )


def _json(value: Any) -> Any:
    """A value of a config as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value
