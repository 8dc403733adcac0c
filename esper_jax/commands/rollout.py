"""``esper-jax flags``: which models get what, in a file of flags."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Annotated, Any

import tyro

from esper_jax.commands.base import Errand

__all__ = ["Flags", "ListFlags", "RollOut", "SetFlag"]

FILE = Path("configs/features.toml")
_File = Annotated[Path, tyro.conf.arg(metavar="FILE")]
_Name = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListFlags:
    """Print every flag, and what it is for a model."""

    file: _File = FILE
    """File of flags."""
    model_id: Annotated[str | None, tyro.conf.arg(metavar="ID")] = None
    """Also print what each flag is for this model, and why."""

    def act(self) -> None:
        """Prints a line for each flag."""
        from esper_jax.rollout.flag_file import FlagFile
        from esper_jax.rollout.flags import FEATURES

        flags = FlagFile(self.file).read()
        names = [*flags, *(name for name in FEATURES if name not in flags)]
        rows = []
        for name in names:
            flag = flags.get(name)
            if flag is None:
                said = "not in the file: as the code has it"
            else:
                said = str(flag) + ("" if name in FEATURES else " (a flag of your own)")
            rows.append((name, said, *_for_model(name, flag, self.model_id)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (cell.ljust(w) for cell, w in zip(row, widths, strict=True))
            print("  ".join(cells).rstrip())


def _for_model(name: str, flag: Any, model_id: str | None) -> tuple[str]:
    """What a flag is for a model, and why."""
    from esper_jax.rollout.flags import FEATURES, decide, overridden, variable

    text = isinstance(FEATURES.get(name), str) or (flag and flag.value is not None)
    override = overridden(name, bool(text))
    if override is not None:
        value = override if text else "on" if override else "off"
        return (f"{variable(name)} makes it {value}",)
    if model_id is None:
        return ("",)
    if flag is None:
        return (f"{model_id}: on (DEFAULT)" if not text else f"{model_id}: (DEFAULT)",)
    on, reason = decide(flag, model_id)
    return (f"{model_id}: {'on' if on else 'off'} ({reason})",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetFlag:
    """Turn a flag on or off for all models, or set keys of it.

    off also sets its rollout percentage to 0. Comments and the rest of the file stay.
    """

    name: _Name
    """The flag."""
    changes: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="on|off|KEY=VALUE ..."),
    ]
    """on, off, or keys, such as blocklist='["model-7"]' or value=momentum."""
    file: _File = FILE
    """File of flags."""

    def act(self) -> None:
        """Changes the file."""
        _change(self.file, self.name, _keys(self.changes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RollOut:
    """Turn a flag on for a percentage of the model ids, and for no others.

    A rising percentage only adds models. The allowlist and the blocklist stay.
    """

    name: _Name
    """The flag."""
    percent: Annotated[int, tyro.conf.Positional, tyro.conf.arg(metavar="PERCENT")]
    """From 0, which turns it off, to 100."""
    file: _File = FILE
    """File of flags."""

    def act(self) -> None:
        """Changes the file."""
        keys = {"enabled": False, "rollout_percentage": self.percent}
        _change(self.file, self.name, keys)


def _keys(changes: tuple[str, ...]) -> dict[str, Any]:
    """The keys of a flag that ``changes`` set.

    Raises:
      FlagError: if one has another form.
    """
    from esper_jax.rollout.flags import FlagError

    if not changes:
        raise FlagError("flags set: expected on, off or KEY=VALUE after the name")
    keys: dict[str, Any] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if change == "on":
            keys["enabled"] = True
        elif change == "off":
            keys |= {"enabled": False, "rollout_percentage": 0}
        elif not equals:
            raise FlagError(
                f"flags set: expected on, off or KEY=VALUE, got {change!r:.80}. For a "
                "percentage: esper-jax flags rollout NAME PERCENT"
            )
        else:
            try:
                keys[key] = tomllib.loads(f"value = {text}")["value"]
            except (ValueError, RecursionError):
                keys[key] = text  # a bare word is a text
    return keys


def _change(path: Path, name: str, keys: dict[str, Any]) -> None:
    from esper_jax.rollout.flag_file import FlagFile

    file = FlagFile(path)
    before = file.read().get(name)
    after = file.change(name, **keys)
    print(f"{name}: {after} (was: {'not in the file' if before is None else before})")


@dataclasses.dataclass(frozen=True)
class Flags(Errand):
    """List the flags of a file, or change one: which models get what.

    A model is known by its id. blocklist, allowlist, enabled and percentage of a flag
    count in this order.
    """

    action: Annotated[
        Annotated[ListFlags, tyro.conf.subcommand("list")]
        | Annotated[SetFlag, tyro.conf.subcommand("set")]
        | Annotated[RollOut, tyro.conf.subcommand("rollout")],
        tyro.conf.arg(name=""),
    ]

    def only_reads(self) -> bool:
        return isinstance(self.action, ListFlags)

    def act(self) -> int:
        self.action.act()
        return 0
