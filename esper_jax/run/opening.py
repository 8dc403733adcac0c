"""What is looked at before a run writes into its folder. Nothing here writes."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esper_jax.checkpoint.checkpointer import Checkpointer
from esper_jax.data import Dataset
from esper_jax.growth.state import TrainState
from esper_jax.run.changes import check_resumable
from esper_jax.run.config import ConfigError, RunConfig
from esper_jax.run.folder import RunError, RunFolder, read_config, read_lines
from esper_jax.run.record import (
    Record,
    Seal,
    check_seal,
    newest_seal,
    read_record,
    settings,
    warn_unlike,
)
from esper_jax.train.batches import is_iterable
from esper_jax.train.losses import common_rows

__all__ = ["Opening", "check_data", "check_ticks", "examine"]

_log = logging.getLogger(__name__)

_BEGUN = ("checkpoints", "run.json", "run.tmp", "config.tmp")
"""What a run that was killed in its first moments may leave."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opening:
    """How a run begins or goes on.

    Args:
      fresh: whether it begins.
      record: of the run, as it is to be written.
      changes: key, old and new value of what the user changes in the config.
      seal: of the newest checkpoint; None if there is none.
    """

    fresh: bool
    record: Record
    changes: Sequence[tuple[str, Any, Any]] = ()
    seal: Seal | None = None


def examine(
    folder: RunFolder,
    config: RunConfig,
    *,
    resume: bool,
    allowed: Sequence[str],
    warn: bool = True,
) -> Opening:
    """Looks whether a run may begin or go on in a folder.

    Args:
      folder: of the run.
      config: to train with.
      resume: whether a run that is there may go on.
      allowed: keys of the config that may differ from those of that run.
      warn: log that the run begins, or goes on under other settings.

    Raises:
      RunError: if something else is there, or what is there is damaged.
      ConfigError: if the config does not fit the run.
    """
    if not resume:
        _check_empty(folder.path)
    elif folder.config.exists():
        return _going_on(folder, config, allowed, warn)
    elif _names(folder.path) - {*_BEGUN} or _steps(folder):
        raise RunError(
            f"{folder.path} is not empty and holds no run (there is no "
            f"{folder.config.name}): choose another --out"
        )
    elif warn:
        _log.warning("%s holds no run yet: starts one", folder.path)
    return Opening(fresh=True, record=Record(settings=settings()))


def _going_on(
    folder: RunFolder, config: RunConfig, allowed: Sequence[str], warn: bool
) -> Opening:
    saved, record, seal = read_config(folder), read_record(folder), newest_seal(folder)
    changes = check_resumable(config, saved, allowed)
    if seal is not None:
        check_seal(folder, saved, record, seal)
    elif not _steps(folder):
        _check_nothing_is_lost(folder, saved)
    if record is None:
        record = Record()
        if seal is not None and seal.id is not None:
            record = dataclasses.replace(record, id=seal.id)
    if seal is not None and warn:
        warn_unlike(seal.settings, settings())
    return Opening(
        fresh=False,
        record=dataclasses.replace(record, settings=settings()),
        changes=changes,
        seal=seal,
    )


def _check_empty(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is no folder: choose another --out")
    # A process that has just locked it has made the folder of checkpoints.
    if _names(out) - {"checkpoints"} or _steps(RunFolder(out)):
        raise RunError(f"{out} is not empty: choose another --out, or --resume the run")


def _names(path: Path) -> set[str]:
    try:
        return {entry.name for entry in path.iterdir()}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise RunError(f"{path} cannot be written to ({error.strerror})") from None


def _steps(folder: RunFolder) -> list[int]:
    return Checkpointer(folder.checkpoints).steps()


def _check_nothing_is_lost(folder: RunFolder, saved: RunConfig) -> None:
    """Refuses to start over where checkpoints must have been.

    A second save begins when the first is on the disk.
    """
    ticks = [entry["tick"] for entry in read_lines(folder.ticks, {"tick": int})]
    done = max(ticks, default=0)
    if not (
        folder.summary.exists()
        or done > 2 * saved.checkpoint.every
        or (done and not folder.checkpoints.exists())
    ):
        return
    raise RunError(
        f"{folder.path} holds a run of {done} ticks, but no checkpoint is in "
        f"{folder.checkpoints}: mount it or put it back, and --resume goes on. To "
        "start over, choose another --out, or remove the folder"
    )


def check_ticks(config: RunConfig, state: TrainState) -> None:
    """Refuses to end before what is done.

    Raises:
      ConfigError: if ``train.ticks`` is below the ticks of the state.
    """
    if config.train.ticks < int(state.ticks):
        raise ConfigError(
            f"train.ticks: expected at least {int(state.ticks)}, which the run to "
            f"resume has done; got {config.train.ticks}"
        )


def check_data(config: RunConfig, data: Dataset) -> None:
    """Refuses data that cannot be trained on as the config says.

    Raises:
      ConfigError: naming the key.
    """
    key, name = "data.name", config.data.name
    if config.data.factory:
        key, name = "data.factory", config.data.factory
    parts = {"training": data.train, "held-out": data.held_out, "test": data.test}
    for part, arrays in parts.items():
        if not is_iterable(arrays) and common_rows(arrays) == 0:
            raise ConfigError(
                f"{key}: expected rows in each part of {name}, but its {part} part is "
                "empty"
            )
    train = config.train
    if is_iterable(data.train):
        steps = train.steps_per_tick or 1  # a pass has at least one
    else:
        rows = common_rows(data.train) or 0
        if train.steps_per_tick:
            raise ConfigError(
                "train.steps_per_tick: expected 0, since the training data are arrays, "
                f"which have a tick an epoch; got {train.steps_per_tick}"
            )
        if train.batch_size > rows:
            raise ConfigError(
                f"train.batch_size: expected at most the {rows} training rows of "
                f"{name}, got {train.batch_size}"
            )
        steps = rows // train.batch_size
    most = (2**31 - 1) // steps
    if train.ticks > most:
        raise ConfigError(
            f"train.ticks: expected at most {most}, as steps are counted in 31 bits; "
            f"got {train.ticks}"
        )
