"""Config dataclasses from nested tables, checked key by key."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.stages import Stage
from esper_jax.run.references import ConfigError, own_table, shown

__all__ = ["built"]


def built(cls: type, table: Any, where: str) -> Any:
    """A config dataclass from its table.

    Args:
      cls: the dataclass.
      table: its values by key.
      where: the key that the table stands at; empty for the whole config.

    Raises:
      ConfigError: for an unknown key, a wrong type or an impossible value.
    """
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where or 'config'}: expected a table, got {shown(table)}")
    prefix = f"{where}." if where else ""
    kinds = typing.get_type_hints(cls)
    if kinds.pop("options", None) and "factory" in table:
        return own_table(cls, table, prefix)
    unknown = [key for key in table if key not in kinds]
    if unknown:
        raise ConfigError(
            f"{prefix}{unknown[0]:.80}: unknown key; expected one of {', '.join(kinds)}"
        )
    values = {
        key: _value(kinds[key], value, prefix + key) for key, value in table.items()
    }
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from None


def _value(kind: Any, value: Any, where: str) -> Any:
    """Checks ``value``, at the key ``where``, and converts it to the type ``kind``."""
    if dataclasses.is_dataclass(kind):
        return built(typing.cast(type, kind), value, where)
    if where == "lifecycle.min_epochs":
        return _min_epochs(value, where)
    if typing.get_origin(kind) is tuple:
        (element, _) = typing.get_args(kind)
        if not isinstance(value, (list, tuple)):
            raise ConfigError(
                f"{where}: expected a list of {element.__name__}, got {shown(value)}"
            )
        return tuple(_value(element, v, f"{where}[{i}]") for i, v in enumerate(value))
    if typing.get_origin(kind) is typing.Literal:
        kind = str  # which of them, the dataclass checks
    if isinstance(kind, types.UnionType) and int in typing.get_args(kind):
        kind = int  # or an array, which no file holds
    if isinstance(kind, types.UnionType):
        raise TypeError(f"{where}: unions are not supported")
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if is_number and not -(2**63) <= value < 2**63:
        raise ConfigError(
            f"{where}: expected {kind.__name__} of at most 64 bits, got one of "
            f"{value.bit_length()} bits"
        )
    if kind is float and is_number:
        value = float(value)
    if (kind is int and not is_number) or not isinstance(value, kind):
        raise ConfigError(f"{where}: expected {kind.__name__}, got {shown(value)}")
    if kind is float and _LARGEST < abs(value) < math.inf:
        raise ConfigError(
            f"{where}: expected a number that float32 can hold, at most "
            f"{_LARGEST:.3g}, got {value!r}"
        )
    return value


_LARGEST = 2.0**128 - 2.0**104
"""The largest finite float32."""


def _min_epochs(value: Any, where: str) -> tuple[int, ...]:
    """Epochs by stage code, from a table of stage names."""
    names = [stage.name for stage in Stage]
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a table of stages, got {shown(value)}")
    epochs = list(LifecycleConfig().min_epochs)
    for name, number in value.items():
        if name not in names:
            raise ConfigError(
                f"{where}.{name}: unknown stage; expected one of {', '.join(names)}"
            )
        epochs[Stage[name]] = _value(int, number, f"{where}.{name}")
    return tuple(epochs)
