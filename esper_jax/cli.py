"""The command line: ``esper-jax train``, ``evaluate``, ``export`` ..."""

import contextlib
import dataclasses
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

from esper_jax import _early
from esper_jax.commands import COMMANDS, Command, Train
from esper_jax.commands import Checkpoint as Checkpoint  # its path in version 0.1
from esper_jax.commands import Evaluate as Evaluate

__all__ = ["main"]


_CLOSED_PIPE = 128 + signal.SIGPIPE
"""What a shell reports of a program that nobody reads from any more."""

_UNFORESEEN = 70
"""EX_SOFTWARE of sysexits.h."""


def main() -> None:
    """Runs the command line.

    Exits with status 2 for input that cannot be used, with 128 and the number of the
    signal when it was stopped by one, with 141 when its output is closed, and with 70
    after an error that is not foreseen.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # In place of UnicodeEncodeError; and a signal loses no line.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    command = tyro.extras.subcommand_cli_from_dict(
        dict(COMMANDS),
        prog="esper-jax",
        description="Grow neural networks while they train.",
    )
    status = _guarded(command)
    _early.over(status)
    if status:
        raise SystemExit(status)


def _guarded(command: Command) -> int:
    """Runs a command and turns what it raises into a line and an exit status."""
    # Imported late, so that --help and mistyped options answer at once.
    from esper_jax.train.stop import Stop

    # It takes the signals within the `try`, and gives them back to `_early` there, so
    # what it raises is caught here, and nothing is raised beside it.
    stop = Stop(*_early.SIGNALS, again=_leave_at_once)
    with _log_on_stderr():
        try:
            command = _at_home(command)
            if isinstance(command, Train):
                command.join()  # before JAX looks for its devices
            _check_backend()
            status = command.run(stop)
            sys.stdout.flush()
            return status
        except KeyboardInterrupt as stopped:
            return _stopped(stop, str(stopped))
        except BrokenPipeError:
            _early.read_no_more()
            return _CLOSED_PIPE
        except Exception as error:
            if command.traceback:
                traceback.print_exc()
            said, status = _in_words(error)
            if stop.number and status == _UNFORESEEN:
                # Code that a signal interrupts may raise something else for it.
                return _stopped(stop, said)
            return _said(said, status)


def _stopped(stop: Any, more: str) -> int:
    """Says which signal has ended the command, and ``more`` if there is any."""
    number = stop.number or signal.SIGINT
    by = f"stopped by {signal.Signals(number).name}"
    return _said(f"{by}{more and f'; {more}'}", 128 + number)


def _said(text: str, status: int) -> int:
    """Says why the command ends, if anyone still reads it."""
    with contextlib.suppress(OSError):
        print(f"esper-jax: {text}", file=sys.stderr, flush=True)
    return status


def _in_words(error: Exception) -> tuple[str, int]:
    """One line about an error, and the exit status."""
    import jax

    from esper_jax.checkpoint import CheckpointError
    from esper_jax.policy.learned_file import PolicyFileError
    from esper_jax.rollout.canary.plan import CanaryError
    from esper_jax.rollout.flags import FlagError
    from esper_jax.run.config import ConfigError
    from esper_jax.run.folder import RunError
    from esper_jax.train.batches import DataError

    known = (
        CanaryError
        | CheckpointError
        | ConfigError
        | DataError
        | FlagError
        | PolicyFileError
        | RunError
        | OSError
    )
    if isinstance(error, known):
        return str(error), 2
    first = (str(error).splitlines() or [""])[0][:300]
    exhausted = isinstance(error, jax.errors.JaxRuntimeError) and (
        "RESOURCE_EXHAUSTED" in str(error)
    )
    if exhausted or isinstance(error, MemoryError):
        return (
            "the memory does not hold this: expected a smaller model.hidden or "
            f"train.batch_size ({first or type(error).__name__})"
        ), 2
    return (
        f"an error that is not foreseen: {type(error).__name__}: {first} (--traceback "
        "shows where)"
    ), _UNFORESEEN


def _check_backend() -> None:
    """Refuses to go on without a device.

    Raises:
      RunError: naming what was asked for.
    """
    import jax

    from esper_jax.run.folder import RunError

    try:
        jax.devices()
    except Exception as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        first = (str(error).splitlines() or [""])[0][:200]
        raise RunError(
            f"JAX has no device for JAX_PLATFORMS={asked!r}: expected a platform of "
            f"this machine, such as cpu, or the variable unset "
            f"({first or type(error).__name__})"
        ) from error


def _leave_at_once(number: int) -> None:
    """Ends the process without a further word from Python; all steps are sound."""
    with contextlib.suppress(OSError):
        os.write(2, b"esper-jax: stopped at once\n")
    os._exit(128 + number)


def _at_home(command: Command) -> Command:
    """The command with ``~`` expanded in its paths.

    A shell leaves it in ``--out=~/run``, and only some of us would expand it.

    Raises:
      RunError: if there is no such user.
    """
    from esper_jax.run.folder import RunError

    paths = {k: v for k, v in vars(command).items() if isinstance(v, Path)}
    try:
        there: dict[str, Any] = {
            name: path.expanduser() for name, path in paths.items()
        }
    except RuntimeError as error:
        told = ", ".join(map(str, paths.values()))
        raise RunError(f"{told}: {error} Write the path out") from None
    return dataclasses.replace(command, **there)


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Prints the library's log messages, warnings and above, on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("esper-jax: %(message)s"))
    logger = logging.getLogger("esper_jax")
    logger.addHandler(handler)
    logger.propagate = False  # the root's handlers, if any, would print it twice
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
