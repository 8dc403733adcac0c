"""One trial: a run that something happens to, and that is resumed to its end."""

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fault_workers import Pool, Process, Result, Worker

__all__ = ["STEPS", "TICKS", "Failed", "Lab", "Silent", "Trial"]

CONFIG = Path(__file__).parents[1] / "configs" / "smoke.toml"
TICKS, STEPS, EVERY = 24, 8, 4
"""Ticks of the run, steps in each, ticks between two saves."""

SETTINGS = [f"train.ticks={TICKS}", f"checkpoint.every={EVERY}", "checkpoint.keep=3"]


class Failed(Exception):
    """A run that did not go on, or words that were not to be expected."""


class Silent(Failed):
    """A result that differs from the undisturbed one, without a word."""


@dataclasses.dataclass(frozen=True)
class Lab:
    """What all trials share.

    Args:
      root: folder of all.
      disk: a small file system of its own, to fill; None where that is not permitted.
      pool: warm workers.
      env: variables of commands that start alone.
      life: seconds that such a command takes.
      reference: an undisturbed run.
      stopped: a run that SIGTERM stopped about half way.
    """

    root: Path
    disk: Path | None
    pool: Pool
    env: dict[str, str]
    life: float
    reference: Path
    stopped: Path


class Trial:
    """A run in a folder of its own.

    Args:
      lab: what all trials share.
      number: of the trial.
      rng: draws everything; signals still come at moments that differ by milliseconds.

    Attributes:
      lost: ticks that must be done again.
      refused: whether a sentence told of the fault.
    """

    def __init__(self, lab: Lab, number: int, rng: random.Random) -> None:
        self.lab, self.rng = lab, rng
        self.root = lab.root / f"trial-{number}"
        self.root.mkdir()
        self.out = self.root / "run"
        self.lost = 0.0
        self.refused = False
        self.settings = list(SETTINGS)
        self.worker = lab.pool.take()
        self._others: list[Worker] = []

    def line(self, *words: Any, resume: bool = True) -> list[Any]:
        """The command line of the run; the same one starts it and goes on with it."""
        more = ["--resume"] if resume else []
        words = (*more, *words, "--set", *self.settings)
        return ["train", CONFIG, "--out", self.out, *words]

    def another(self) -> Worker:
        """A second worker, for what goes on beside the run."""
        self._others.append(self.lab.pool.take())
        return self._others[-1]

    def copied(self, run: Path) -> None:
        """Begins with a copy of a run."""
        shutil.copytree(run, self.out)

    def until(self, process: Process, tick: int, milliseconds: float) -> None:
        """Waits until a tick is written down, and a bit; at most until the end."""
        while not process.done() and ticks_in(self.out) < tick:
            time.sleep(0.001)
        time.sleep(milliseconds / 1000)

    def until_saving(self, process: Process, tick: int, milliseconds: float) -> None:
        """Waits for the next save after a tick, and a bit."""
        self.until(process, tick, 0)
        while not process.done() and not saving(self.out):
            time.sleep(0.0005)
        time.sleep(milliseconds / 1000)

    def moment(self) -> tuple[int, float]:
        """A tick of the run and some milliseconds, at random."""
        return self.rng.randrange(TICKS), self.rng.uniform(0, 60)

    def check_words(self, result: Result) -> None:
        """Looks for foreign words; the table counts them as tracebacks."""
        if result.foreign:
            raise Failed(f"traceback: status {result.status}: {result.err}")

    def expect(self, result: Result, status: Sequence[int], words: str = "") -> None:
        """Checks how a command ended, and its last line if it failed.

        Raises:
          Failed: if otherwise.
        """
        self.check_words(result)
        if result.status not in status:
            raise Failed(f"status {result.status}, not {status}: {result.err}")
        if result.status > 0 and not re.search(words, result.last):
            raise Failed(f"expected {words!r}: {result.err}")

    def count_lost(self, newest: int = -1) -> None:
        """Counts the ticks since a checkpoint, the newest by default."""
        steps = saved_in(self.out)
        saved = steps[newest] if len(steps) >= -newest else 0
        self.lost = max(0.0, ticks_in(self.out) - saved / STEPS)

    def resume(self, *words: Any) -> Result:
        """Runs the command line to its end."""
        if self.worker.popen.poll() is not None:
            self.lab.pool.give(self.worker)
            self.worker = self.lab.pool.take()
        return self.worker.run(self.line(*words))

    def finish(self) -> None:
        """Resumes to the end and compares with the undisturbed run.

        Raises:
          Silent: if anything differs that the run does not tell of.
          Failed: if it does not end.
        """
        self.expect(self.resume(), [0])
        self.compare()

    def compare(self) -> None:
        """Compares a run that has ended with the undisturbed one."""
        mine, due = summary(self.out), summary(self.lab.reference)
        told = mine.pop("incomplete", [])
        log = (self.out / "ticks.jsonl").read_text()
        if mine["state_hash"] != due["state_hash"]:
            raise Silent("another state")
        if told:
            self.refused = True
            mine["events"] = due["events"]
        elif log != (self.lab.reference / "ticks.jsonl").read_text():
            raise Silent("other lines in ticks.jsonl")
        mine["recompiles"] = due["recompiles"]  # of the program, which workers share
        if mine != due:
            differs = [k for k in due if mine.get(k) != due[k]]
            raise Silent(f"another summary: {differs}")

    def close(self) -> None:
        """Gives the workers back and removes the folder."""
        for worker in (self.worker, *self._others):
            self.lab.pool.give(worker)
        shutil.rmtree(self.root, ignore_errors=True)


def summary(out: Path) -> dict[str, Any]:
    """What a run that has ended says of itself."""
    return dict(json.loads((out / "summary.json").read_text()))


def ticks_in(out: Path) -> int:
    """Ticks that a run has written down."""
    try:
        return (out / "ticks.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def saved_in(out: Path) -> list[int]:
    """Steps of a run's checkpoints."""
    with contextlib.suppress(OSError):
        return sorted(int(n) for n in os.listdir(out / "checkpoints") if n.isdigit())
    return []


def saving(out: Path) -> bool:
    """Whether a save is in flight."""
    with contextlib.suppress(OSError):
        return any(n.startswith(".saving") for n in os.listdir(out / "checkpoints"))
    return False


def mount(*words: Any) -> bool:
    """Whether ``mount`` does so."""
    line = ["mount", *map(str, words)]
    return not subprocess.run(line, stderr=subprocess.DEVNULL).returncode
