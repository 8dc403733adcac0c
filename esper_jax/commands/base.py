"""What every command of ``esper-jax`` has."""

import abc
import contextlib
import dataclasses
from typing import Annotated, Any

import tyro

from esper_jax import _early

__all__ = ["Command", "Errand"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(abc.ABC):
    """The options of a command, and what it does.

    The modules of commands import late what their commands need, so that ``--help``
    and mistyped options answer at once.
    """

    traceback: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """After an error, also print where in the program it came from."""

    @abc.abstractmethod
    def run(self, stop: Any) -> int:
        """Carries the command out.

        Args:
          stop: a `train.stop.Stop`, whose module is imported late, to enter before
            anything is written: within it a signal raises KeyboardInterrupt.

        Returns:
          The exit status.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Errand(Command):
    """A command that has nothing to add when a signal stops it."""

    def run(self, stop: Any) -> int:
        """Carries the command out; returns the exit status."""
        _early.started()
        if _early.installed() and self.only_reads():
            stop = contextlib.nullcontext()
        with stop:
            return self.act()

    @abc.abstractmethod
    def act(self) -> int:
        """What the command does; returns the exit status."""

    def only_reads(self) -> bool:
        """Whether nothing is left behind where the process ends in the midst of it."""
        return False
