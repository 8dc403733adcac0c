"""Processes that run commands of ``esper-jax``, one after the other, and stay warm.

A command that starts alone needs seconds to import and compile. A worker builds the
program once and then calls the same `esper_jax.cli.main` for each command, so a fault
costs about a second. Signals reach it as they reach a command.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

__all__ = ["Pool", "Result", "Worker", "environment", "spawn"]

_END = "\x1eend "
"""Begins the line that ends a job, on both streams."""

_TIMEOUT = 150.0
"""Seconds after which a job counts as hung."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a command ended; a status below 0 is the signal that killed it."""

    status: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line on standard error."""
        return (self.err.splitlines() or [""])[-1]

    @property
    def foreign(self) -> bool:
        """Whether it said something that is no sentence of ``esper-jax``."""
        lines = self.err.splitlines()
        return self.status == 70 or not all(x.startswith("esper-jax: ") for x in lines)


def environment(cache: Path) -> dict[str, str]:
    """Variables of workers and commands: one compilation cache, on the CPU."""
    here = Path(__file__).parent
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": f"{here.parent}{os.pathsep}{here}",
    }


class Process:
    """A child process whose output is read as it comes."""

    def __init__(self, line: Sequence[str], env: dict[str, str], cwd: Path) -> None:
        pipe = subprocess.PIPE
        self.popen = subprocess.Popen(
            line, stdin=pipe, stdout=pipe, stderr=pipe, env=env, cwd=cwd
        )
        self._text = {"out": "", "err": ""}
        self._grown = threading.Condition()
        self._threads = [
            threading.Thread(target=self._read, args=(name, stream), daemon=True)
            for name, stream in (("out", self.popen.stdout), ("err", self.popen.stderr))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        return self.popen.pid

    def signal(self, number: int) -> None:
        """Sends a signal, if the process is still there."""
        with contextlib.suppress(ProcessLookupError):
            self.popen.send_signal(number)

    def done(self) -> bool:
        """Whether the process or its job has ended."""
        return self.popen.poll() is not None or all(
            _END in text for text in self._text.values()
        )

    def result(self) -> Result:
        """Waits for the end of the process or of its job.

        Raises:
          TimeoutError: if it takes too long; the process is killed then.
        """
        end = time.monotonic() + _TIMEOUT
        with self._grown:
            while not self.done():
                if time.monotonic() > end:
                    self.popen.kill()
                    raise TimeoutError(f"hangs after {_TIMEOUT:.0f} s")
                self._grown.wait(0.05)
        if self.popen.poll() is not None:
            for thread in self._threads:
                thread.join()
        out, _, status = self._text["out"].partition(_END)
        err, _, _ = self._text["err"].partition(_END)
        dead = self.popen.poll()
        self._text = {"out": "", "err": ""}
        return Result(int(status) if status.strip() else int(dead or 0), out, err)

    def _read(self, name: str, stream: IO[bytes]) -> None:
        while part := os.read(stream.fileno(), 65536):
            with self._grown:
                self._text[name] += part.decode(errors="replace")
                self._grown.notify_all()


class Worker(Process):
    """A process that runs jobs: lists of command lines, until one fails."""

    def __init__(self, env: dict[str, str], cwd: Path) -> None:
        super().__init__([sys.executable, __file__], env, cwd)
        self.busy = False

    def start(self, *lines: Sequence[Any]) -> None:
        """Starts a job; `result` waits for it."""
        assert self.popen.stdin is not None
        self.busy = True
        job = json.dumps([[str(word) for word in line] for line in lines]) + "\n"
        self.popen.stdin.write(job.encode())
        self.popen.stdin.flush()

    def result(self) -> Result:
        found = super().result()
        self.busy = False
        return found

    def run(self, *lines: Sequence[Any]) -> Result:
        """Runs a job to its end."""
        self.start(*lines)
        return self.result()


def spawn(line: Sequence[Any], env: dict[str, str], cwd: Path) -> Process:
    """Starts ``esper-jax`` as a command of its own."""
    words = [sys.executable, "-m", "esper_jax", *map(str, line)]
    return Process(words, env, cwd)


class Pool:
    """Warm workers; those that died are replaced while others work.

    Args:
      size: number of workers.
      make: starts one.
      warm: starts its first job.
    """

    def __init__(
        self, size: int, make: Callable[[], Worker], warm: Callable[[Worker], None]
    ) -> None:
        self._make, self._warm = make, warm
        self._free: list[tuple[Worker, bool]] = []  # and whether it is warm
        for _ in range(size):
            self._add()

    def take(self) -> Worker:
        """A worker that waits for a job; give it back.

        Raises:
          RuntimeError: if the first job of a new one fails.
        """
        while True:
            # A warm one if there is any: a late signal may have ended it.
            self._free.sort(key=lambda pair: not pair[1])
            worker, warm = self._free.pop(0)
            if worker.popen.poll() is not None and warm:
                self._add()
                continue
            if not warm:
                first = worker.result()
                if first.status:
                    raise RuntimeError(f"a worker does not start: {first}")
            return worker

    def give(self, worker: Worker) -> None:
        """Takes a worker back, or starts another if it is dead."""
        if worker.busy:  # with what nobody waited for
            worker.popen.kill()
            worker.popen.wait()
        if worker.popen.poll() is None:
            self._free.append((worker, True))
        else:
            self._add()

    def close(self) -> None:
        for worker, _ in self._free:
            worker.popen.kill()
            worker.popen.wait()

    def _add(self) -> None:
        worker = self._make()
        self._warm(worker)
        self._free.append((worker, False))


def _serve() -> None:
    """Runs the jobs that come on standard input."""
    # The commands put their own handlers in place of these. A signal that comes between
    # two commands ends the worker without a word.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)

    from esper_jax import cli
    from esper_jax.run import run

    build, made = run.build_run, []

    def build_run(*arguments: Any) -> Any:
        """All runs here have one program, so it is traced and compiled once."""
        if not made:
            made.append(build(*arguments))
        return made[0]

    run.build_run = build_run
    for job in sys.stdin:
        status: Any = 0
        for line in json.loads(job):
            sys.argv = ["esper-jax", *line]
            try:
                cli.main()
                status = 0
            except SystemExit as stopped:
                status = stopped.code
            except Exception:
                traceback.print_exc()
                status = 1
            if status:
                break
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(2, _END.encode())
        os.write(1, f"{_END}{status}\n".encode())


if __name__ == "__main__":
    _serve()
