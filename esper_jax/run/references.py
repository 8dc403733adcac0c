"""Functions of one's own that a config names, as ``package.module:function``."""

import importlib
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from esper_jax.checkpoint.manifest import DEPTH, nested_deeper

__all__ = [
    "ConfigError",
    "call",
    "check_reference",
    "failure",
    "imported",
    "own_table",
    "shown",
    "written",
]


class ConfigError(ValueError):
    """A config that cannot be run; the message names the key and what was expected."""


def shown(value: Any) -> str:
    """A value as an error message can show it, however large or deep it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else f"{text[:80]}..."


def check_reference(name: str, reference: str) -> None:
    """Refuses what is neither empty nor of the form ``package.module:function``.

    Raises:
      ValueError: if so; it names the key.
    """
    if reference and not re.fullmatch(r"[\w.]+:[\w.]+", reference):
        raise ValueError(f'{name} must be "package.module:function", got {reference!r}')


def own_table(cls: type, table: Mapping[str, Any], prefix: str) -> Any:
    """A config dataclass of a table with a ``factory``, whose other keys are its own.

    Args:
      cls: has the fields ``factory`` and ``options``.
      table: of the config.
      prefix: of the table's keys in errors.

    Raises:
      ConfigError: if the factory is no reference, or a value is not of JSON.
    """
    options = {key: value for key, value in table.items() if key != "factory"}
    for key, value in options.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise ConfigError(
                f"{prefix}{key}: expected a number, text, list or table, got "
                f"{shown(value)}"
            ) from None
        except RecursionError:
            raise ConfigError(f"{prefix}{key}: is nested too deeply") from None
        if nested_deeper(value, DEPTH - 3):  # a checkpoint could not hold it
            raise ConfigError(f"{prefix}{key}: is nested too deeply")
    if not isinstance(table["factory"], str) or not table["factory"]:
        raise ConfigError(
            f'{prefix}factory: expected "package.module:function", '
            f"got {shown(table['factory'])}"
        )
    try:
        return cls(factory=table["factory"], options=options)
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from None


def written(table: dict[str, Any]) -> dict[str, Any]:
    """The table that `own_table`, or the class itself, reads back as the same."""
    rest = {k: v for k, v in table.items() if k not in ("factory", "options")}
    own = {"factory": table["factory"], **table["options"]}
    return own if table["factory"] else rest


def imported(key: str, reference: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """The function that a config names, if it can be called with these arguments.

    The current directory is searched first, as with ``python -m``.

    Args:
      key: of the config, for errors.
      reference: ``package.module:function``.
      *args: what it will be called with; only their number counts.
      **kwargs: the like; only their names count.

    Raises:
      ConfigError: if it cannot be imported or called so.
    """
    module, _, path = reference.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function: Any = importlib.import_module(module)
    except Exception as error:  # the module is the user's: anything may go wrong in it
        raise ConfigError(
            f"{key}: cannot import {module!r} from here ({os.getcwd()}): "
            f"{failure(error)}"
        ) from error
    for name in path.split("."):
        if not hasattr(function, name):
            raise ConfigError(f"{key}: {module!r} has no {path!r}")
        function = getattr(function, name)
    if not callable(function):
        raise ConfigError(
            f"{key}: expected a function, {reference} is {function!r:.80}"
        )
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except ValueError:
        pass  # a function of C may have no signature
    except TypeError as error:
        given = ", ".join([f"{len(args)} arguments"] * bool(args) + list(kwargs))
        raise ConfigError(
            f"{key}: {reference}{inspect.signature(function)} cannot be called with "
            f"{given or 'no arguments'}: {error}"
        ) from None
    return function


def call(key: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function of the user's.

    Raises:
      ConfigError: if it raises; the message names the key of the config and the line.
    """
    try:
        return function(*args, **kwargs)
    except Exception as error:
        raise ConfigError(f"{key}: {failure(error)}") from error


def failure(error: Exception) -> str:
    """An error in a line, with the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    # Of the frames outside of installed packages, the innermost is the user's.
    own = [f for f in frames if "site-packages" not in f.filename] or frames
    text = (str(error).splitlines() or [""])[0]
    where = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {text}{where}"
