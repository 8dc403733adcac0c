"""The command line: ``esper-jax train``, ``evaluate``, ``export`` ..."""

import contextlib
import dataclasses
import io
import itertools
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

from esper_jax import _early
from esper_jax.commands import Checkpoint, Command, Evaluate, Export, Report, Train

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
        {
            "train": Train,
            "evaluate": Evaluate,
            "export": Export,
            "checkpoint": Checkpoint,
            "report": Report,
        },
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
                _join(command)  # before JAX looks for its devices
            _check_backend()
            status = _run(command, stop)
            sys.stdout.flush()
            return status
        except KeyboardInterrupt as stopped:
            return _stopped(stop, str(stopped))
        except BrokenPipeError:
            _read_no_more()
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
    from esper_jax.run.config import ConfigError
    from esper_jax.run.folder import RunError
    from esper_jax.train.batches import DataError

    known = CheckpointError | ConfigError | DataError | RunError | OSError
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


def _join(command: Train) -> None:
    """Joins the processes of a run, if it has several."""
    from esper_jax.run.config import ConfigError
    from esper_jax.run.devices import join

    named = (command.coordinator, command.num_processes, command.process_id)
    if command.distributed:
        join(*named)
    elif any(value is not None for value in named):
        raise ConfigError(
            "--coordinator, --num-processes, --process-id: expected with --distributed"
        )


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


def _read_no_more() -> None:
    """Sends what is still printed nowhere, so that nothing fails over it."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(command: Command, stop: Any) -> int:
    """Runs a command; returns the exit status.

    Args:
      command: to run.
      stop: a `Stop`, whose module is imported late.
    """
    if isinstance(command, Train):
        return _train(command, stop)
    _early.started()
    if _early.installed() and _only_reads(command):
        stop = contextlib.nullcontext()
    with stop:
        runs: dict[type, Any] = {Evaluate: _evaluate, Export: _export, Report: _report}
        return runs.get(type(command), _checkpoint)(command)


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


def _only_reads(command: Command) -> bool:
    """Whether nothing is left behind where the process ends in the midst of it."""
    if isinstance(command, Checkpoint):
        return command.action != "migrate"
    return isinstance(command, Evaluate)


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


def _train(command: Train, stop: Any) -> int:
    import jax

    from esper_jax.parallel.processes import together
    from esper_jax.run.config import ConfigError, load_config
    from esper_jax.run.folder import RunFolder
    from esper_jax.run.run import train_run

    if jax.process_index():  # process 0 warns for all; errors are told by each
        logging.getLogger("esper_jax").setLevel(logging.ERROR)
    overrides = list(itertools.chain(*command.set))
    config = together(lambda: load_config(command.config, overrides), ConfigError)
    if command.resume and command.out is None:
        raise ConfigError("--resume: expected --out DIR with the run to go on with")
    if command.allow_change and not command.resume:
        raise ConfigError("--allow-change: expected --resume with it")
    _early.started()
    with stop, _folder_for(command) as out:
        try:
            summary = train_run(
                config,
                out,
                resume=command.resume,
                allow_change=command.allow_change,
                devices=command.devices,
                profile=command.profile,
                stop=stop,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_how_to_go_on(out)) from None
    if jax.process_index():
        return 0  # process 0 says it
    try:
        _print_summary(summary)
        if config.compare.plot:
            print(f"plot: {RunFolder(out).picture}")
        if command.profile and RunFolder(out).profile.exists():
            print(f"profile: {RunFolder(out).profile}")
        print(f"run: {out}", flush=True)
    except OSError:  # the run is whole, whether or not anyone reads of it
        _read_no_more()
    return 0


@contextlib.contextmanager
def _folder_for(command: Train) -> Iterator[Path]:
    """The folder of a run; a new one of its own by default.

    Process 0 makes it at once, so that no other run takes the name, and removes it if
    nothing comes into it.
    """
    import jax

    from esper_jax.parallel.processes import exchange, together
    from esper_jax.run.folder import RunError

    if command.out is not None:
        yield command.out
        return
    makes, stem = not jax.process_index(), command.config.stem
    made = together(lambda: _new_folder(stem) if makes else Path(), RunError)
    out = Path(exchange(str(made))[0])
    try:
        yield out
    finally:
        if makes:
            with contextlib.suppress(OSError):
                out.rmdir()
                out.parent.rmdir()


def _new_folder(stem: str) -> Path:
    """Makes a folder for a run, named after its config and the time."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        more = f"-{number}" if number > 1 else ""
        out = Path("runs") / f"{stem}-{stamp}{more}"
        with contextlib.suppress(FileExistsError):
            out.mkdir(parents=True)
            break
    return out


def _how_to_go_on(out: Path) -> str:
    """What to tell a user who has stopped the training into ``out``."""
    from esper_jax.run.folder import RunFolder
    from esper_jax.run.record import newest_step

    folder = RunFolder(out)
    if not folder.config.exists():
        return "the run had not begun, and there is nothing to resume"
    again = f"--resume --out {out}"
    step = newest_step(folder)
    if step is None:
        return f"nothing was saved yet, and {again} begins again"
    return f"{again} goes on from step {step}"


def _print_summary(summary: dict[str, Any]) -> None:
    for name in ("final_accuracy", "final_loss", "host_params", "grown_params"):
        value = summary[name]
        print(f"{name}: {'not finite' if value is None else f'{value:.6g}'}")
    print(f"recompiles: {summary['recompiles']}")
    if "static" in summary:
        twin = summary["static"]
        accuracy = summary["final_accuracy"]
        grown = summary["host_params"] + summary["grown_params"]
        print(
            f"test accuracy: grown {accuracy:.4f} with {grown} parameters, "
            f"static {twin['accuracy']:.4f} with {twin['parameters']}"
        )


def _evaluate(command: Evaluate) -> int:
    from esper_jax.run.run import evaluate_run

    print(json.dumps(evaluate_run(command.dir)))
    return 0


def _export(command: Export) -> int:
    from esper_jax.run.export import export_run

    written = export_run(command.dir, command.format, command.out, parts=command.parts)
    print(json.dumps(written))
    return 0


def _report(command: Report) -> int:
    from esper_jax.run.report import report_run

    print(f"report: {report_run(command.dir, command.out)}")
    return 0


def _checkpoint(command: Checkpoint) -> int:
    from esper_jax.checkpoint import CheckpointError
    from esper_jax.checkpoint.checkpointer import Checkpointer
    from esper_jax.run.folder import RunFolder

    inner = RunFolder(command.dir).checkpoints
    with Checkpointer(inner if inner.is_dir() else command.dir) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise CheckpointError(f"{checkpoints.directory} holds no checkpoint")
        if command.action == "list":
            for step in steps:
                print(checkpoints.describe(step))
            return 0
        migrate = command.action == "migrate"
        sound = [_verify(checkpoints, step, migrate) for step in steps]
    return 0 if all(sound) else 1


def _verify(checkpoints: Any, step: int, migrate: bool) -> bool:
    """Prints whether a step is sound, and migrates it first if asked to.

    Args:
      checkpoints: the `Checkpointer`, whose module is imported late.
      step: to look at.
      migrate: whether to rewrite the step in today's schema.

    Returns:
      Whether it is sound.
    """
    verdict = checkpoints.verify(step)
    if verdict.manifest is None or not migrate:
        print(verdict)
        return verdict.manifest is not None
    notes = checkpoints.migrate(step)
    after = checkpoints.verify(step)
    changed = after.manifest != verdict.manifest
    print(f"{after}, {f'was {verdict.manifest.schema}' if changed else 'as it was'}")
    for note in notes:
        print(f"  {note}")
    return True
