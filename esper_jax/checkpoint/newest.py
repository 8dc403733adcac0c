"""Which step to restore: the newest sound one, the same in all processes."""

import dataclasses
import hashlib
import json
import logging
from typing import NamedTuple

import jax

from esper_jax.checkpoint import step_folder
from esper_jax.checkpoint.host_leaves import HostLeaf
from esper_jax.checkpoint.manifest import Damaged, Manifest
from esper_jax.checkpoint.step_directory import CheckpointError, StepDirectory
from esper_jax.parallel.processes import exchange, together

__all__ = ["Found", "agreed"]

_log = logging.getLogger(__name__)


class Found(NamedTuple):
    """A sound step as read from disk."""

    step: int
    damaged: dict[int, str]
    """Newer steps that were passed over, and what is wrong with each."""
    manifest: Manifest
    leaves: dict[str, HostLeaf]


def agreed(directory: StepDirectory, step: int | None) -> Found:
    """The newest sound step, or the given one.

    With several processes, process 0 chooses and all of them read the same step.

    Raises:
      CheckpointError: in all processes, if there is no sound step, or if a process sees
        another directory than process 0.
    """
    if jax.process_count() == 1:
        return _newest(directory, step)
    chooses = jax.process_index() == 0
    own = together(
        lambda: _newest(directory, step) if chooses else None, CheckpointError
    )
    chosen = "" if own is None else json.dumps([own.step, _seal(own), own.damaged])
    number, seal, damaged = json.loads(exchange(chosen)[0])

    def same() -> Found:
        if own is not None:
            return own
        there = _newest(directory, number)
        if _seal(there) != seal:
            raise CheckpointError(
                f"step {number} of {directory.path} is not the one that process 0 "
                "has: all processes must see one directory"
            )
        return there._replace(damaged={int(n): why for n, why in damaged.items()})

    return together(same, CheckpointError)


def _newest(directory: StepDirectory, step: int | None) -> Found:
    damaged: dict[int, str] = {}
    for number in directory.steps()[::-1] if step is None else [step]:
        folder = directory.folder(number)
        try:
            manifest, leaves = step_folder.read(folder, number)
        except Damaged as damage:
            damaged[number] = str(damage)
            _log.warning("checkpoint %s is damaged: %s", folder, damage)
            continue
        if damaged:
            _log.warning("fell back to step %d of %s", number, directory.path)
        return Found(number, damaged, manifest, leaves)
    if not damaged:
        raise CheckpointError(f"{directory.path} holds no checkpoint")
    reasons = "; ".join(f"step {n}: {why}" for n, why in damaged.items())
    raise CheckpointError(
        f"{directory.path} holds no sound checkpoint: {reasons}. Restore the directory "
        "from a copy, or start the run anew elsewhere"
    )


def _seal(found: Found) -> str:
    """A checksum of the manifest: equal for two copies of a step, and only for them."""
    content = json.dumps(dataclasses.asdict(found.manifest), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
