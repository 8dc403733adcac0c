"""What may differ between the config of a run and the one that it goes on with."""

from collections.abc import Mapping, Sequence
from typing import Any

from esper_jax.run.config import ConfigError, RunConfig, to_dict

__all__ = ["check_resumable", "differences", "differing"]

_FREE = (
    "train.ticks",
    "growth.capacity",
    "governor",
    "checkpoint",
    "compare",
    "monitor",
    "features.performance_monitoring",
    "features.ab_testing",
)
"""Keys and tables that may differ when a run goes on."""


def check_resumable(
    config: RunConfig, saved: RunConfig, allowed: Sequence[str] = ()
) -> list[tuple[str, Any, Any]]:
    """Checks that a run that was started with ``saved`` can go on with ``config``.

    ``train.ticks``, ``growth.capacity``, the tables ``governor``, ``checkpoint``,
    ``compare`` and ``monitor``, and the features ``performance_monitoring`` and
    ``ab_testing`` may differ.

    Args:
      config: to go on with.
      saved: of the run.
      allowed: keys, or tables of keys, that may differ as well.

    Returns:
      Key, saved and new value of each key that differs by ``allowed``.

    Raises:
      ConfigError: naming the first key that differs and may not, or the first of
        ``allowed`` that is no key or must never differ.
    """
    keys = _flat(to_dict(config)) | _flat(to_dict(saved))
    for name in allowed:
        if not any(_within(key, name) for key in keys):
            raise ConfigError(f"--allow-change {name}: there is no such key or table")
        if (
            _within(name, "model")
            or (_within(name, "growth") and name != "growth.capacity")
            or name in ("policy", "train.frozen", "learned", "learned.path")
            or name in ("features", "features.grafting_strategies")
        ):
            raise ConfigError(
                f"--allow-change {name}: the saved state has the form that this key "
                "gave it; start a new run"
            )
    found = differences(config, saved)
    for key, was, now in found:
        if not any(_within(key, name) for name in allowed):
            raise ConfigError(
                f"{key}: expected {was!r}, as the run to resume has it; got {now!r}. "
                f"To go on with another value on purpose, add --allow-change {key}"
            )
    return found


def differences(config: RunConfig, saved: RunConfig) -> list[tuple[str, Any, Any]]:
    """Keys that differ, but for those that any run may change; saved and new value."""
    new, old = _flat(to_dict(config)), _flat(to_dict(saved))
    return [
        (key, old.get(key), new.get(key))
        for key in sorted(set(new) | set(old))
        if not any(_within(key, name) for name in _FREE)
        and new.get(key) != old.get(key)
    ]


def differing(
    tables: Mapping[str, Any], others: Mapping[str, Any], without: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, and both values; a tuple is as the list of JSON.

    Args:
      tables: of a config, as `to_dict` makes them, or JSON of them.
      others: of another.
      without: keys and tables to leave out.
    """
    first, second = _flat(tables), _flat(others)

    def value(of: Mapping[str, Any], key: str) -> Any:
        found = of.get(key)
        return [*found] if isinstance(found, tuple) else found

    pairs = {k: (value(first, k), value(second, k)) for k in {**first, **second}}
    return {
        key: (a, b)
        for key, (a, b) in sorted(pairs.items())
        if a != b and not any(_within(key, name) for name in without)
    }


def _within(key: str, name: str) -> bool:
    """Whether a key is ``name``, or stands in the table of that name."""
    return key == name or key.startswith(f"{name}.")


def _flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
