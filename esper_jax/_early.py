"""Signals wherever the command ``esper-jax`` has nothing to save.

The command imports for seconds. Nothing is at stake then, nor when it only reads, nor
once it is over, so a signal ends the process at once, with one line in place of a
traceback. An exception would not do: imports and JAX's callbacks swallow some, or turn
them into others.

`esper_jax` imports this module first, and this module imports as little as it can. The
handlers stay to the end of the process; `train.Stop` takes their place while there is
something to save. Other programs, and those that call `cli.main`, keep their own.
"""

import os
import signal
import sys

__all__ = ["SIGNALS", "installed", "leave", "over", "read_no_more", "started"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What a terminal, a scheduler and a closed terminal send."""

_starting = True
_status: int | None = None


def leave(number: int, frame: object) -> None:
    """The handler: ends the process, after a line that says why."""
    if _status is not None:
        os._exit(_status)
    said = "stopped while starting: nothing has changed"
    if not _starting:
        said = f"stopped by {signal.Signals(number).name}"
    try:
        os.write(2, f"esper-jax: {said}\n".encode())
    finally:
        os._exit(128 + number)


def started() -> None:
    """From now on a signal is told of as one that came while the command worked."""
    global _starting
    _starting = False


def over(status: int) -> None:
    """From now on a signal only hurries the end, with the status that the command has.

    All is written by then, and Python's own handlers would print a traceback.
    """
    global _status
    _status = status


def read_no_more() -> None:
    """Sends what is still printed nowhere, so that nothing fails over it."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # contextlib would be one import more
        return


def installed() -> bool:
    """Whether this process is the command, so that a signal may end it."""
    return _installed


def _is_the_command() -> bool:
    """Whether it was started as ``esper-jax``, or as ``python -m esper_jax``.

    A worker that multiprocessing starts for it has its ``sys.argv``, but is another.
    """
    words = sys.orig_argv
    if any(word.startswith("from multiprocessing") for word in words):
        return False
    if sys.argv[:1] != ["-m"]:  # stands there until Python has found the module
        return os.path.basename("".join(sys.argv[:1])) == "esper-jax"
    return " -m esper_jax" in " ".join(words).replace("-mesper", "-m esper")


_installed = _is_the_command()
if _installed:
    for _number in SIGNALS:
        if signal.getsignal(_number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(_number, leave)
