"""Signals while the command ``esper-jax`` imports what it needs, which takes seconds.

Nothing is at stake then, so a signal ends the process with one line instead of a
traceback. This module is imported first, and does nothing in other programs.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["SIGNALS", "end"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What a terminal, a scheduler and a closed terminal send."""

_before: dict[int, Any] = {}


def end() -> None:
    """Gives the signals back."""
    while _before:
        signal.signal(*_before.popitem())


def _is_the_command() -> bool:
    script = Path(sys.argv[0]).name if sys.argv else ""
    module = sys.orig_argv[1:3] == ["-m", "esper_jax"]
    return script == "esper-jax" or module


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"esper-jax: stopped while starting: nothing has changed\n")
    os._exit(128 + number)


if _is_the_command():
    for _number in SIGNALS:
        if signal.getsignal(_number) in (signal.SIG_DFL, signal.default_int_handler):
            _before[_number] = signal.signal(_number, _leave)
