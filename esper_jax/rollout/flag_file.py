"""Flags in a TOML file: read, and changed in place.

[chunked_layers]
enabled = false           # true: on for every model
rollout_percentage = 10   # else on for so many percent of the model ids,
allowlist = ["probe-7"]   # on for these in any case,
blocklist = ["billing"]   # and off for these in any case

[grafting_strategies]     # a flag with a value answers with text
enabled = true
value = "momentum"
"""

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esper_jax.rollout.files import locked, replace_text
from esper_jax.rollout.flags import FEATURES, Flag, FlagError, check_value
from esper_jax.run.references import shown

__all__ = ["FlagFile", "parse_flags"]

_NAME = re.compile(r"[a-z][a-z0-9_]*")

_MARK = "\ufeff"
"""What some editors put before the first line."""


def parse_flags(text: str, where: str) -> dict[str, Flag]:
    """The flags of a file's text, by name.

    Args:
      text: TOML, a table for each flag.
      where: name of the file, for errors.

    Raises:
      FlagError: naming the line or the key, what was expected and what came.
    """
    text = text.removeprefix(_MARK)
    try:
        tables = tomllib.loads(text)
    except RecursionError:
        raise FlagError(f"{where}: is nested too deeply for a file of flags") from None
    except ValueError as error:
        raise FlagError(_not_toml(text, where, error)) from None
    return {name: _flag(where, name, table) for name, table in tables.items()}


def _not_toml(text: str, where: str, error: ValueError) -> str:
    """What is wrong with a text that tomllib refuses."""
    found = re.search(r"\(at line (\d+), column \d+\)", str(error))
    lines = text.split("\n")
    ends = len(text.rstrip().split("\n"))  # it may say "at end of document"
    number = int(found[1]) if found else ends
    line = lines[number - 1].strip()
    if re.match("Cannot (overwrite|declare)", str(error)):
        return (
            f"{where}: line {number}: {shown(line)} stands there for the second time; "
            "leave one of the two"
        )
    return f"{where}: line {number} is not TOML: {shown(line)} ({error})"


def _flag(where: str, name: str, table: Any) -> Flag:
    """One flag, from its table.

    Raises:
      FlagError: if it is none.
    """
    if not _NAME.fullmatch(name):
        raise FlagError(
            f"{where}: {shown(name)}: expected a flag's name of small letters, digits "
            "and _, so that ESPER_FEATURE_NAME can override it; rename it"
        )
    if not isinstance(table, Mapping):
        raise FlagError(
            f"{where}: {name}: expected a table, [{name}] and a line enabled = true "
            f"or false, got {shown(table)}"
        )
    keys = [field.name for field in dataclasses.fields(Flag)]
    for key in table:
        if key not in keys:
            raise FlagError(
                f"{where}: {name}.{key:.80}: unknown key{_meant(key, keys)}; expected "
                f"one of {', '.join(keys)}"
            )
    try:
        flag = Flag(**table)
        check_value(name, flag.value)
    except ValueError as error:
        raise FlagError(f"{where}: {name}: {error}") from None
    return flag


def _meant(name: str, names: Any) -> str:
    """A hint at the name that was meant, if one is close."""
    close = difflib.get_close_matches(name, list(names), 1, 0.75)
    return f" (did you mean {close[0]}?)" if close else ""


def _edited(text: str, name: str, keys: Mapping[str, Any]) -> str:
    """The text with some keys of one flag changed, and all else as it is.

    Raises:
      FlagError: if tomlkit is not installed.
    """
    try:
        import tomlkit
    except ImportError:
        raise FlagError(
            "changing a file of flags in place needs tomlkit: "
            "pip install 'esper-jax[rollout]', or change the file by hand"
        ) from None
    mark = _MARK if text.startswith(_MARK) else ""
    document = tomlkit.parse(text.removeprefix(_MARK))
    if name not in document:
        document.append(name, tomlkit.table())
    table: Any = document[name]
    for key, value in keys.items():
        if value is None:
            table.pop(key)
        else:
            table[key] = list(value) if isinstance(value, tuple) else value
    changed = mark + tomlkit.dumps(document)
    if text.count("\n") == text.count("\r\n"):
        changed = re.sub("(?<!\r)\n", "\r\n", changed) if "\n" in text else changed
    return changed


class FlagFile:
    """A TOML file of flags.

    Args:
      path: of the file; a link is followed, and ``~`` expanded.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser()

    def read(self) -> dict[str, Flag]:
        """The flags by name, as the file has them now.

        Raises:
          FlagError: if it cannot be read, or what it says is wrong: a key that is
            unknown or there twice, a percentage out of 0 to 100, ...
        """
        return parse_flags(self._text(), str(self.path))

    def change(self, name: str, **keys: Any) -> Flag:
        """Changes keys of one flag in the file, and nothing else: comments stay.

        The file is replaced as a whole or not at all, also if the machine stops in
        between. Two writers wait for one another, so no change is lost.

        Args:
          name: of the flag: one that the file has, or one of `FEATURES`.
          **keys: fields of `Flag`.

        Returns:
          The flag as it is now.

        Raises:
          FlagError: if there is no such flag, a value is impossible, or the file cannot
            be read or written; it is unchanged then.
        """
        with locked(self.path):
            text = self._text()
            flags = parse_flags(text, str(self.path))
            if name not in flags and name not in FEATURES:
                names = [*flags, *FEATURES]
                raise FlagError(
                    f"{self.path}: has no flag {name!r}{_meant(name, names)}; it has "
                    f"{', '.join(flags) or 'none'}. To add one, write [{name}] into it"
                )
            before = dataclasses.asdict(flags.get(name, Flag()))
            table = {k: v for k, v in (before | keys).items() if v is not None}
            flag = _flag(str(self.path), name, table)
            new = {k: v for k in keys if (v := getattr(flag, k)) != before[k]}
            changed = _edited(text, name, new)
            if parse_flags(changed, str(self.path)) != {**flags, name: flag}:
                raise FlagError(
                    f"{self.path}: {name} is written in a way that cannot be changed "
                    f"in place: write it as a table, [{name}], or change it by hand"
                )
            if changed != text:
                replace_text(self.path, changed)
        return flag

    def roll_out(self, name: str, percentage: int) -> Flag:
        """Turns a flag on for a percentage of the model ids, and for no others.

        The allowlist and the blocklist stay. 0 turns it off.

        Args:
          name: as for `change`, which also says what is raised.
          percentage: from 0 to 100.
        """
        return self.change(name, enabled=False, rollout_percentage=percentage)

    def _text(self) -> str:
        try:
            if self.path.exists() and not self.path.is_file():
                raise FlagError(f"{self.path}: expected a file of flags, and is none")
            return self.path.read_bytes().decode()
        except FileNotFoundError:
            raise FlagError(
                f"{self.path}: there is no such file of flags; name another, or write "
                "one: for each flag a line [NAME] and a line enabled = true or false"
            ) from None
        except OSError as error:
            raise FlagError(f"{self.path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise FlagError(
                f"{self.path}: is not text in UTF-8: {error.reason}"
            ) from None
