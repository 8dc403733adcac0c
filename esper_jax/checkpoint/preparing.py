"""What is saved beside a state: checked before anything is written or removed."""

import json
import operator
import time
from collections.abc import Mapping
from typing import Any

from esper_jax.checkpoint.location import CheckpointError
from esper_jax.checkpoint.manifest import DEPTH, Header, nested_deeper
from esper_jax.checkpoint.position import PositionError, position_of
from esper_jax.checkpoint.retention import Retention
from esper_jax.migrations.chain import CURRENT

__all__ = ["prepared"]


def prepared(step: Any, beside: tuple[Any, Any, Any], retention: Retention) -> Header:
    """The header of a step that is about to be saved.

    Args:
      step: its number.
      beside: metrics, config, and the data whose position is saved; None for none.
      retention: what is kept.

    Raises:
      CheckpointError: if an argument cannot be saved, or if there are metrics without
        the one that the retention goes by.
    """
    metrics, config, data = beside
    numbers = _numbers({} if metrics is None else metrics)
    best = retention.best
    if best is not None and numbers and best[0] not in numbers:
        raise CheckpointError(
            f"metrics: expected {best[0]!r} among them, which Retention.best names; "
            f"got {', '.join(map(repr, numbers))}; nothing was saved or removed"
        )
    return Header(
        schema=CURRENT,
        step=_step(step),
        saved=time.time(),
        metrics=numbers,
        config=_config(config),
        position=_position(data),
    )


def _position(data: Any) -> Any:
    try:
        position = position_of(data)
    except PositionError as error:
        raise CheckpointError(str(error)) from None
    if nested_deeper(position):
        raise CheckpointError(f"data: its position has more than {DEPTH} levels")
    return position


def _step(step: Any) -> int:
    try:
        number = operator.index(step)
    except TypeError:
        raise CheckpointError(f"step must be a whole number, got {step!r}") from None
    if number < 0:
        raise CheckpointError(f"step must be at least 0, got {number}")
    if number >= 2**63:
        raise CheckpointError(f"step must be less than 2**63, got {number}")
    return number


def _config(config: Any) -> Any:
    try:
        json.dumps(config)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"config must be JSON: {error}") from None
    if nested_deeper(config):
        raise CheckpointError(f"config must be JSON of at most {DEPTH} levels")
    return config


def _numbers(metrics: Any) -> dict[str, float]:
    wrong = f"metrics: expected numbers by name, got {str(metrics)[:200]}"
    if not isinstance(metrics, Mapping):
        raise CheckpointError(wrong)
    try:
        numbers = {name: float(value) for name, value in metrics.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{wrong}: {error}") from None
    if not all(isinstance(name, str) for name in numbers):
        raise CheckpointError(wrong)
    return numbers
