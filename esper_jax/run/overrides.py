"""``--set key.path=value``: what the command line changes in a config's tables."""

import tomllib
from typing import Any

from esper_jax.run.references import ConfigError

__all__ = ["set_key"]


def set_key(table: dict[str, Any], override: str) -> None:
    """Sets one ``key.path=value`` in the tables.

    Raises:
      ConfigError: if it has another form, is too large or too deep to read, or a value
        is where a table should be.
    """
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"--set expects key=value, got {override!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    except (ValueError, RecursionError):
        raise ConfigError(
            f"{key}: expected a value of TOML, got one of {len(text)} characters that "
            f"no key takes: {text:.40}..."
        ) from None
    for name in path[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{key}: {name} is a value, not a table")
    table[path[-1]] = value
