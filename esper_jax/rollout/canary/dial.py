"""What a canary turns: the percentage of one flag."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from esper_jax.rollout.canary.plan import CanaryError
from esper_jax.rollout.flag_file import FlagFile

__all__ = ["Dial", "FlagDial"]


class Dial(Protocol):
    """The percentage of a flag, wherever it is kept: in a file, or by a service."""

    @property
    def where(self) -> Mapping[str, str]:
        """What finds the flag again, as JSON; among it its name, as ``flag``."""

    def percentage(self) -> int:
        """Of the model ids that have the flag now."""

    def turn(self, percent: int) -> None:
        """Sets the percentage, and returns when it is kept. May be called again."""


class FlagDial:
    """The percentage of a flag in a file of flags.

    Args:
      flag: its name.
      file: path of the file.
    """

    def __init__(self, flag: str, file: str | Path) -> None:
        self._flag = flag
        self._file = FlagFile(Path(file).expanduser().resolve())

    @property
    def where(self) -> Mapping[str, str]:
        """The flag and its file."""
        return {"flag": self._flag, "file": str(self._file.path)}

    def percentage(self) -> int:
        """Of the model ids that have the flag now; 100 if it is on for every model.

        Raises:
          CanaryError: if the file has no such flag.
          FlagError: if the file cannot be read.
        """
        flags = self._file.read()
        if self._flag not in flags:
            raise CanaryError(
                f"{self._file.path}: has no flag {self._flag!r:.80}; it has "
                f"{', '.join(flags) or 'none'}. To add one, write [{self._flag:.80}] "
                "into it"
            )
        flag = flags[self._flag]
        return 100 if flag.enabled else flag.rollout_percentage

    def turn(self, percent: int) -> None:
        """Sets the percentage.

        Raises:
          FlagError: if the file cannot be read or written.
        """
        self._file.roll_out(self._flag, percent)
