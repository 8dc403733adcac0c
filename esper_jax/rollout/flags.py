"""Feature flags, and what they say of a model.

Nothing here needs OpenFeature; `esper_jax.rollout.provider` answers to it.
"""

import dataclasses
import hashlib
import os
from typing import Any, NamedTuple

from esper_jax.run.features import Features
from esper_jax.run.references import shown

__all__ = [
    "FEATURES",
    "Decision",
    "Flag",
    "FlagError",
    "bucket",
    "check_value",
    "decide",
    "overridden",
    "variable",
]

FEATURES: dict[str, bool | str] = dataclasses.asdict(Features())
"""The flags that esper_jax reads itself, and what holds where nobody sets them."""


class FlagError(ValueError):
    """Flags that cannot be used; the message says where, what came and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag of a file.

    Args:
      enabled: on for every model.
      rollout_percentage: else on for so many percent of the model ids.
      allowlist: ids of models that it is on for in any case.
      blocklist: ids of models that it is off for in any case, the allowlist's too.
      value: text that models with the flag get; None for a flag that is only on or off.

    Raises:
      ValueError: naming the key, what was expected and what came.
    """

    enabled: bool = False
    rollout_percentage: int = 0
    allowlist: tuple[str, ...] = ()
    blocklist: tuple[str, ...] = ()
    value: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.enabled, bool):
            raise ValueError(
                f"enabled must be true or false, got {shown(self.enabled)}"
            )
        _check_percentage(self.rollout_percentage)
        for name in ("allowlist", "blocklist"):
            object.__setattr__(self, name, _ids(name, getattr(self, name)))
        if self.value is not None and (
            not isinstance(self.value, str) or not self.value
        ):
            raise ValueError(f"value must be a text, got {shown(self.value)}")

    def __str__(self) -> str:
        if self.enabled:
            said = "on for all"
        elif self.rollout_percentage:
            said = f"on for {self.rollout_percentage}% of model ids"
        else:
            said = "off"
        for ids, word in ((self.allowlist, "on"), (self.blocklist, "off")):
            said += f", {word} for {', '.join(ids)}" if ids else ""
        return said if self.value is None else f"{self.value!r} {said}"


def _check_percentage(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 100:
        raise ValueError(
            "rollout_percentage must be a whole number from 0 (no model) to 100 (every "
            f"model with an id), got {shown(value)}"
        )


def _ids(name: str, value: Any) -> tuple[str, ...]:
    """A list of model ids, checked."""
    if not isinstance(value, list | tuple) or not all(
        isinstance(each, str) and each for each in value
    ):
        raise ValueError(
            f'{name} must be a list of model ids such as ["a", "b"], got {shown(value)}'
        )
    return tuple(value)


class Decision(NamedTuple):
    """Whether a flag is on for a model, and the reason in OpenFeature's words."""

    on: bool
    reason: str


def bucket(model_id: str) -> int:
    """Where a model stands in every rollout, from 0 to 99.

    A flag at ``n`` percent is on for the models below ``n``, so a rising percentage
    only ever adds models. It is the SHA-256 of the id in UTF-8, as a big-endian number
    modulo 100.
    """
    return int(hashlib.sha256(model_id.encode()).hexdigest(), 16) % 100


def decide(flag: Flag, model_id: str | None) -> Decision:
    """Whether a flag is on for a model: blocklist, allowlist, enabled, percentage.

    Args:
      flag: the flag.
      model_id: of the model; without one, lists and percentage say nothing.

    Returns:
      The decision. Its reason is TARGETING_MATCH by a list, STATIC if it is enabled,
      SPLIT by the percentage, DEFAULT where the percentage lacks an id, and DISABLED
      if the flag is off.
    """
    if model_id and model_id in flag.blocklist:
        return Decision(False, "TARGETING_MATCH")
    if model_id and model_id in flag.allowlist:
        return Decision(True, "TARGETING_MATCH")
    if flag.enabled:
        return Decision(True, "STATIC")
    if not flag.rollout_percentage:
        return Decision(False, "DISABLED")
    if not model_id:
        return Decision(False, "DEFAULT")
    return Decision(bucket(model_id) < flag.rollout_percentage, "SPLIT")


def variable(name: str) -> str:
    """The environment variable that overrides a flag."""
    return f"ESPER_FEATURE_{name.upper()}"


_WORDS = {
    **dict.fromkeys(("1", "true", "on", "yes"), True),
    **dict.fromkeys(("0", "false", "off", "no"), False),
}


def overridden(name: str, text: bool) -> bool | str | None:
    """What the environment says of a flag; None if it says nothing.

    Args:
      name: of the flag.
      text: whether the flag answers with text.

    Raises:
      FlagError: if the variable holds what the flag cannot be.
    """
    value = os.environ.get(variable(name), "").strip()
    if not value:
        return None
    if not text:
        if value.lower() not in _WORDS:
            raise FlagError(
                f"{variable(name)} must be 1 or 0, true or false, on or off, yes or "
                f"no; got {shown(value)}. Correct or unset it"
            )
        return _WORDS[value.lower()]
    try:
        check_value(name, value)
    except ValueError as error:
        raise FlagError(f"{variable(name)}: {error}. Correct or unset it") from None
    return value


def check_value(name: str, value: str | None) -> None:
    """Refuses a value that a flag of esper_jax's own cannot have.

    Raises:
      ValueError: if so.
    """
    kind = type(FEATURES.get(name))
    if kind is bool and value is not None:
        raise ValueError(
            f"value must not be given: this flag is on or off, got {value!r:.80}"
        )
    if kind is str:
        if value is None:
            raise ValueError("value must be given: this flag answers with text")
        Features(**{name: value})  # type: ignore[arg-type]
