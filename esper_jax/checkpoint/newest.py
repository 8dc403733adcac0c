"""Which step to restore: the newest sound one, the same in all processes.

While one process saves and removes steps, others read. A step that is removed or
replaced while it is read is no damage: the reader looks again.
"""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax

from esper_jax.checkpoint import step_folder
from esper_jax.checkpoint.host_leaves import HostLeaf
from esper_jax.checkpoint.lock import shared
from esper_jax.checkpoint.manifest import Damaged, Manifest, WrongKey
from esper_jax.checkpoint.step_directory import CheckpointError, StepDirectory
from esper_jax.parallel.processes import exchange, together

__all__ = ["Found", "Gone", "agreed", "look"]

_log = logging.getLogger(__name__)


_Seen = TypeVar("_Seen")

_LOOKS = 1000
"""Times that a reader looks again. Each time a writer has just saved a step."""


class Gone(Damaged):
    """A step was there, or was asked for, and is not there."""


class Found(NamedTuple):
    """A sound step as read from disk."""

    step: int
    damaged: dict[int, str]
    """Newer steps that were passed over, and what is wrong with each."""
    manifest: Manifest
    leaves: dict[str, HostLeaf]


def look(directory: StepDirectory, step: int, work: Callable[[Path], _Seen]) -> _Seen:
    """``work`` on the folder of a step; again if the folder was replaced meanwhile.

    Raises:
      Gone: if there is no such step, or no longer.
      Damaged: what ``work`` found wrong in a folder that is still there.
    """
    for _ in range(_LOOKS):
        folder = directory.folder(step)
        try:
            with shared(folder) as descriptor:
                before = os.fstat(descriptor)
                try:
                    return work(folder)
                except Damaged:
                    if _is_at(folder, before):
                        raise
        except FileNotFoundError:
            if not os.path.lexists(directory.folder(step)):
                raise Gone("it is missing") from None
        except OSError:
            return work(folder)  # not a folder: it says so
    raise Damaged(f"it was replaced {_LOOKS} times while it was read")


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
    for turn in range(_LOOKS if step is None else 1):
        damaged: dict[int, str] = {}
        numbers = directory.newest_first() if step is None else [step]
        # One listing may miss a step that comes and one that goes.
        gone = not numbers and turn < 3
        for number in numbers:
            try:
                found = _read(directory, number)
            except Gone as missing:
                gone = step is None
                if not gone:
                    damaged[number] = str(missing)
                break  # a newer one may have come
            except Damaged as damage:
                damaged[number] = str(damage)
                continue
            _report(directory, found.step, damaged)
            return found._replace(damaged=damaged)
        if not gone:
            break
    _report(directory, None, damaged)
    if not damaged:
        raise CheckpointError(f"{directory.path} holds no checkpoint")
    reasons = "; ".join(f"step {n}: {why}" for n, why in damaged.items())
    raise CheckpointError(
        f"{directory.path} holds no sound checkpoint: {reasons}. Restore the directory "
        "from a copy, or start the run anew elsewhere"
    )


def _read(directory: StepDirectory, step: int) -> Found:
    try:
        manifest, leaves = look(
            directory,
            step,
            lambda folder: step_folder.read(folder, step, directory.key),
        )
    except WrongKey as wrong:
        if directory.key is None:
            # Older steps that are not signed would be another state than was saved.
            raise CheckpointError(
                f"step {step} of {directory.path} cannot be restored: {wrong}"
            ) from None
        raise
    return Found(step, {}, manifest, leaves)


def _report(
    directory: StepDirectory, found: int | None, damaged: dict[int, str]
) -> None:
    for step, why in damaged.items():
        folder = directory.folder(step)
        _log.warning("checkpoint %s is damaged: %s", folder, why)
    if damaged and found is not None:
        _log.warning("fell back to step %d of %s", found, directory.path)


def _is_at(folder: Path, before: os.stat_result) -> bool:
    try:
        return os.path.samestat(folder.lstat(), before)
    except OSError:
        return False


def _seal(found: Found) -> str:
    """A checksum of the manifest: equal for two copies of a step, and only for them."""
    content = json.dumps(dataclasses.asdict(found.manifest), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
