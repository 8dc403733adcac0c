"""Signals to the command: who answers them, from its first import to its end."""

import ast
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import esper_jax
from esper_jax import _early, cli
from esper_jax.run import run
from esper_jax.train import Stop

ROOT = Path(__file__).parents[1]
SMOKE = str(ROOT / "configs" / "smoke.toml")


def imports(path):
    """What a file imports, in its order."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_the_handlers_come_before_all_other_imports():
    assert next(imports(Path(esper_jax.__file__))) == "esper_jax._early"
    assert set(imports(Path(_early.__file__))) <= {"os", "signal", "sys"}


PROGRAM = """
import importlib.util, signal, sys
sys.argv, sys.orig_argv = {argv!r}, ["python", *{orig_argv!r}]
spec = importlib.util.spec_from_file_location("early", {path!r})
early = importlib.util.module_from_spec(spec)
spec.loader.exec_module(early)
{then}
try:
    signal.raise_signal(signal.SIGTERM)
except BaseException:
    print("swallowed")
print(early.installed())
"""

WORKER = "from multiprocessing.spawn import spawn_main; spawn_main(pipe_handle=5)"


@pytest.mark.parametrize(
    ("argv", "orig_argv", "then", "status", "said"),
    [
        (["/bin/esper-jax"], [], "", 143, "stopped while starting: nothing has"),
        (["-m"], ["-X", "dev", "-m", "esper_jax"], "", 143, "stopped while starting"),
        (["-m", "x"], ["-mesper_jax", "x"], "", 143, "stopped while starting"),
        (["esper-jax"], [], "early.started()", 143, "esper-jax: stopped by SIGTERM\n"),
        (["esper-jax"], [], "early.started(); early.over(3)", 3, ""),
        (["train.py"], ["-m", "esper_jax"], "", -signal.SIGTERM, ""),
        (["-m"], ["-m", "pytest"], "", -signal.SIGTERM, ""),
        ([], [], "", -signal.SIGTERM, ""),
        (["esper-jax"], ["-c", WORKER], "", -signal.SIGTERM, ""),
    ],
)
def test_the_command_leaves_and_other_programs_keep_their_handlers(
    argv, orig_argv, then, status, said
):
    words = {"argv": argv, "orig_argv": orig_argv, "path": _early.__file__}
    text = PROGRAM.format(**words, then=then)
    line = [sys.executable, "-I", "-S", "-c", text]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (status, "")
    assert said in ended.stderr
    assert bool(said) == bool(ended.stderr)


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """The command line in this process, as if the process were the command's.

    Gives exit status, standard error and the handlers of SIGTERM that were set.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_early, "_installed", True)
    monkeypatch.setattr(_early, "_starting", True)
    monkeypatch.setattr(_early, "_status", None)
    before = [signal.signal(number, _early.leave) for number in _early.SIGNALS]
    set_, handlers = signal.signal, []

    def recorded(number, handler):
        if number == signal.SIGTERM:
            handlers.append(handler)
        return set_(number, handler)

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["esper-jax", *arguments])
        status = 0
        with monkeypatch.context() as patch:
            patch.setattr(signal, "signal", recorded)
            try:
                cli.main()
            except SystemExit as stopped:
                status = stopped.code
        return status, capsys.readouterr().err, handlers

    yield command
    for number, handler in zip(_early.SIGNALS, before, strict=True):
        signal.signal(number, handler)


def test_no_default_handler_stands_while_a_run_takes_over_and_gives_back(
    command, monkeypatch
):
    def train_run(*arguments, stop, **options):
        assert signal.getsignal(signal.SIGTERM) == stop._received
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the signal did not interrupt the run")

    monkeypatch.setattr(run, "train_run", train_run)
    status, errors, handlers = command("train", SMOKE, "--out", "r")
    said = "stopped by SIGTERM; the run had not begun, and there is nothing to resume"
    assert (status, errors) == (143, f"esper-jax: {said}\n")
    [taken, given_back] = handlers
    assert isinstance(taken.__self__, Stop)
    assert given_back is _early.leave
    assert (_early._starting, _early._status) == (False, 143)


def test_what_only_reads_has_no_handler_that_raises(command, monkeypatch):
    """So JAX can swallow nothing; what writes has one, and cleans up."""
    for line in (["evaluate", "r"], ["checkpoint", "list", "r"]):
        status, errors, handlers = command(*line)
        assert (status, handlers) == (2, [])
        assert "r holds no" in errors
    for line in (["export", "r", "--format", "orbax"], ["checkpoint", "migrate", "r"]):
        status, _, handlers = command(*line)
        assert (status, handlers[-1]) == (2, _early.leave)
        assert isinstance(handlers[-2].__self__, Stop)


def test_what_an_interrupted_import_raises_is_not_told_as_an_error(
    command, monkeypatch
):
    def train_run(*arguments, **options):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        raise ImportError("numpy failed to import")

    monkeypatch.setattr(run, "train_run", train_run)
    status, errors, _ = command("train", SMOKE, "--out", "r")
    assert status == 143
    assert errors.startswith(
        "esper-jax: stopped by SIGTERM; an error that is not fores"
    )


LINES = (
    ["train", SMOKE, "--out", "{new}"],
    ["evaluate", "run"],
    ["checkpoint", "list", "run"],
    ["checkpoint", "verify", "run"],
    ["export", "run", "--format", "orbax", "--out", "{new}"],
    ["--help"],
)


@pytest.mark.slow
def test_a_signal_at_any_moment(tmp_path):
    """But for the first 20 ms or so, in which Python starts and has not come to us.

    At its very end Python puts the default handlers back: it dies of the signal then.
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

    def spawn(line, new):
        words = [word.format(new=new) for word in line]
        words = [sys.executable, "-m", "esper_jax", *words]
        return subprocess.Popen(words, cwd=tmp_path, env=env, **pipe)

    def whole(line, new):
        process = spawn(line, new)
        process.communicate(timeout=100)
        assert not process.returncode

    whole(LINES[0], "run")
    rng = random.Random(0)
    for line in LINES:
        begun = time.monotonic()
        whole(line, f"{line[0]}-whole")
        life = time.monotonic() - begun
        for moment in range(12):
            number = rng.choice(_early.SIGNALS)
            process = spawn(line, f"{line[0]}-{moment}")
            maps = Path(f"/proc/{process.pid}/maps")
            while "jaxlib" not in maps.read_text():  # so we are imported
                time.sleep(0.001)
            time.sleep(max(0.0, (moment - rng.random()) / 10 * life))
            process.send_signal(number)
            _, errors = process.communicate(timeout=100)
            ended = (line, number, moment, process.returncode, errors)
            assert process.returncode in (0, 128 + number, -number), ended
            assert b"Traceback" not in errors, ended
