"""The faults: each is a function of a trial, which it leaves to be resumed."""

import json
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from durability import delete, extend, flip, foreign, garble, truncate, zero
from fault_trials import (
    TICKS,
    Failed,
    Silent,
    Trial,
    mount,
    saved_in,
    summary,
)
from fault_workers import Result, spawn

__all__ = ["KINDS"]

GENTLE = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
_STOPPED = "stopped by SIG"
_FULL = "No space left|File too large|Read-only file system|Disk quota"

_RECORD = (
    "damaged|config.json|run.json|saved by another run|expected .*, as the run|"
    "holds no run"
)


def _ended(trial: Trial, result: Result, number: int) -> None:
    """Checks the end of a run that a signal came to, maybe too late."""
    killed = [-signal.SIGKILL] if number == signal.SIGKILL else [128 + number]
    # Where the interpreter has no handlers yet, or none any more.
    trial.expect(result, [0, *killed, -number], f"{_STOPPED}|stopped (at|while)")
    trial.count_lost()


def _signalled(number: int, *, saving: bool = False) -> Callable[[Trial], None]:
    def fault(trial: Trial) -> None:
        wait = trial.until_saving if saving else trial.until
        trial.worker.start(trial.line())
        wait(trial.worker, *trial.moment())
        trial.worker.signal(number)
        _ended(trial, trial.worker.result(), number)
        trial.finish()

    return fault


def a_signal_twice(trial: Trial) -> None:
    number, again = trial.rng.choices(GENTLE, k=2)
    trial.worker.start(trial.line())
    trial.until(trial.worker, *trial.moment())
    trial.worker.signal(number)
    time.sleep(trial.rng.uniform(0, 0.03))
    trial.worker.signal(again)
    result = trial.worker.result()
    either = [0, 128 + number, 128 + again, -number, -again]
    trial.expect(result, either, f"{_STOPPED}|stopped at once")
    trial.count_lost()
    trial.finish()


def a_command_of_its_own(trial: Trial) -> None:
    """Any signal at any moment of its life, while it imports and compiles too."""
    number = trial.rng.choice([*GENTLE, signal.SIGKILL])
    moment = trial.rng.uniform(0.1, trial.lab.life)
    process = spawn(trial.line(), trial.lab.env, trial.root)
    time.sleep(moment)
    process.signal(number)
    _ended(trial, process.result(), number)
    trial.finish()


def disk_full(trial: Trial) -> None:
    """A file takes all room but some kilobytes of the file system."""
    assert trial.lab.disk is not None
    trial.out = trial.lab.disk / "run"
    ballast = trial.lab.disk / "ballast"
    left = trial.rng.choice([0, 0, 1, 4, 16, 64, 128])
    try:
        trial.worker.start(trial.line())
        trial.until(trial.worker, *trial.moment())
        _fill(ballast, left)
        result = trial.worker.result()
        ballast.unlink()
        trial.refused = result.status != 0
        trial.expect(result, [0, 2], _FULL)
        trial.count_lost()
        trial.finish()
    finally:
        ballast.unlink(missing_ok=True)
        shutil.rmtree(trial.out, ignore_errors=True)


def _fill(ballast: Path, left: int) -> None:
    """Takes all room of a file system but ``left`` kilobytes."""
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() // 4096 * 4096 - 1024 * left))


def read_only(trial: Trial) -> None:
    """The folder of the run cannot be written to any more."""
    trial.out.mkdir()
    if not mount("--bind", trial.out, trial.out):
        raise Failed("mount --bind is not permitted")
    try:
        trial.worker.start(trial.line())
        trial.until(trial.worker, *trial.moment())
        while not mount("-o", "remount,ro,bind", trial.out):  # a file is open
            if trial.worker.done():
                break
        result = trial.worker.result()
        mount("-o", "remount,rw,bind", trial.out)
        trial.refused = result.status != 0
        trial.expect(result, [0, 2], _FULL)
        trial.count_lost()
        trial.finish()
    finally:
        subprocess.run(["umount", "-l", str(trial.out)], check=False)


def quota(trial: Trial) -> None:
    """No file of the process may be larger than some bytes (RLIMIT_FSIZE)."""
    most = int(10 ** trial.rng.uniform(1, 5.2))
    pid, which = trial.worker.pid, resource.RLIMIT_FSIZE
    before = resource.prlimit(pid, which)
    trial.worker.start(trial.line())
    trial.until(trial.worker, *trial.moment())
    resource.prlimit(pid, which, (most, before[1]))
    result = trial.worker.result()
    if trial.worker.popen.poll() is None:
        resource.prlimit(pid, which, before)
    trial.refused = result.status != 0
    trial.expect(result, [0, 2], _FULL)
    trial.count_lost()
    trial.finish()


def a_damaged_log(trial: Trial) -> None:
    """Bytes or lines of a log change, or are gone, or come twice."""
    path = _log(trial)
    lines = path.read_bytes().splitlines(keepends=True)
    at = trial.rng.randrange(len(lines))
    how = trial.rng.choice(["byte", "bytes", "gone", "twice", "foreign", "order"])
    if how == "byte":
        flip(path, trial.rng)
    elif how == "bytes":
        trial.rng.choice([garble, zero])(path, trial.rng)
    elif how == "gone":
        path.write_bytes(b"".join(lines[:at] + lines[at + 1 :]))
    elif how == "order":
        trial.rng.shuffle(lines)
        path.write_bytes(b"".join(lines))
    else:
        new = lines[at] if how == "twice" else b'{"tick": 3}\n'
        path.write_bytes(b"".join([*lines[:at], new, *lines[at:]]))
    _go_on_without(trial, path)


def a_truncated_log(trial: Trial) -> None:
    path = _log(trial)
    trial.rng.choice([truncate, truncate, truncate, extend, delete])(path, trial.rng)
    _go_on_without(trial, path)


def _log(trial: Trial) -> Path:
    trial.copied(trial.lab.stopped)
    return trial.out / trial.rng.choice(["ticks.jsonl", "events.jsonl"])


def _go_on_without(trial: Trial, path: Path) -> None:
    """Resumes; where the log is refused, does as the message says."""
    result = trial.resume()
    if result.status:
        trial.refused = True
        trial.expect(result, [2], f"{path.name} (is damaged|must be|cannot be read)")
        path.unlink()
        trial.finish()
    else:
        trial.check_words(result)
        trial.compare()


def a_damaged_step(trial: Trial) -> None:
    """A file of the newest checkpoint."""
    trial.copied(trial.lab.stopped)
    newest = trial.out / "checkpoints" / str(saved_in(trial.out)[-1])
    kinds = [flip, flip, garble, zero, truncate, extend, delete, foreign]
    files = [p for p in sorted(newest.rglob("*")) if p.is_file() and p.stat().st_size]
    trial.rng.choice(kinds)(trial.rng.choice(files), trial.rng)
    trial.count_lost(newest=-2)
    trial.finish()


def a_damaged_record(trial: Trial) -> None:
    """``config.json`` or ``run.json``; where that is told of, it is put back."""
    trial.copied(trial.lab.stopped)
    path = trial.out / trial.rng.choice(["config.json", "run.json"])
    before = path.read_bytes()
    kinds = [flip, flip, flip, garble, zero, truncate, extend, delete]
    trial.rng.choice(kinds)(path, trial.rng)
    result = trial.resume()
    if result.status:
        trial.refused = True
        trial.expect(result, [2], _RECORD)
        path.write_bytes(before)
        trial.finish()
    else:
        trial.check_words(result)
        trial.compare()


def two_starters(trial: Trial) -> None:
    """Two commands at about once; one of them may be killed."""
    resume = trial.rng.random() < 0.5
    other = trial.another()
    trial.worker.start(trial.line(resume=resume))
    late = trial.rng.choice([0, trial.rng.uniform(0, 0.1), trial.rng.uniform(0, 1)])
    time.sleep(late)
    other.start(trial.line(resume=resume))
    results = [trial.worker.result(), other.result()]
    for result in results:
        trial.expect(result, [0, 2], "is not empty|is being written to")
    if all(result.status for result in results):
        raise Failed(f"both were refused: {results}")
    trial.refused = any(result.status for result in results)
    trial.compare()
    trial.finish()


def odd_labels(trial: Trial) -> None:
    """Labels go bad while the run is stopped; then they are mended."""
    _bad_data(trial, ["-1", "10", "2000000000", "float", "fewer", "column"])
    trial.expect(trial.resume(), [2], "label|rows|data")
    (trial.root / "bad.json").unlink()
    trial.finish()


def rows_not_finite(trial: Trial) -> None:
    """A row with NaN or infinity; the governor goes back, then stops the run."""
    row = _bad_data(trial, ["nan", "inf"])
    result = trial.resume()
    if not result.status:  # no epoch that was left took the row: some are left out
        trial.check_words(result)
        trial.compare()
        return
    trial.expect(result, [2], f"row {row}\\b.*last good state is saved")
    trial.count_lost()
    (trial.root / "bad.json").unlink()
    trial.expect(trial.resume(), [0])
    mine = summary(trial.out)
    if mine["final_loss"] is None or not mine["rollbacks"]:
        raise Silent(f"a run of bad rows ended as if they were none: {mine}")


def _bad_data(trial: Trial, faults: list[str]) -> int:
    """Trains to about half, then makes a row bad; returns its number."""
    bad = trial.root / "bad.json"
    own = {"data.factory": "fault_data:digits", "data.file": str(bad)}
    trial.settings += [f"{key}={value}" for key, value in own.items()]
    if trial.rng.random() < 0.7:  # else it is bad from the beginning
        trial.worker.start(trial.line())
        trial.until(trial.worker, *trial.moment())
        trial.worker.signal(signal.SIGTERM)
        _ended(trial, trial.worker.result(), signal.SIGTERM)
    if trial.out.joinpath("summary.json").exists():
        shutil.rmtree(trial.out)
    row = trial.rng.randrange(300)
    content: dict[str, Any] = {"part": trial.rng.choice(["train", "held_out"])}
    content |= {"fault": trial.rng.choice(faults), "row": row}
    bad.write_text(json.dumps(content))
    trial.refused = True
    return row


def _reader(*words: str) -> Callable[[Trial], None]:
    """A reader beside the run: some are killed, the others must be right."""

    def fault(trial: Trial) -> None:
        other = trial.another()
        trial.worker.start(trial.line())
        trial.until(trial.worker, *trial.moment())
        read = [*words, trial.out]
        found = other.run(read)
        trial.expect(found, [0, 2], "holds no")
        if "damaged" in found.out:
            raise Silent(f"a false alarm: {found.out}")
        other.start(read)
        time.sleep(trial.rng.uniform(0, 0.3))
        other.signal(signal.SIGKILL)
        other.result()
        trial.expect(trial.worker.result(), [0])
        trial.compare()
        after = trial.worker.run(["evaluate", trial.out])
        trial.expect(after, [0])
        value = json.loads(after.out.splitlines()[-1])
        due = summary(trial.lab.reference)
        if (value["step"], value["loss"]) != (8 * TICKS, due["final_loss"]):
            raise Silent(f"evaluate says {value}")

    return fault


KINDS: dict[str, Callable[[Trial], None]] = {
    "SIGINT": _signalled(signal.SIGINT),
    "SIGTERM": _signalled(signal.SIGTERM),
    "SIGHUP": _signalled(signal.SIGHUP),
    "SIGKILL": _signalled(signal.SIGKILL),
    "SIGTERM in a save": _signalled(signal.SIGTERM, saving=True),
    "SIGKILL in a save": _signalled(signal.SIGKILL, saving=True),
    "two signals": a_signal_twice,
    "any signal, command alone": a_command_of_its_own,
    "disk full": disk_full,
    "read-only": read_only,
    "file size limit": quota,
    "log damaged": a_damaged_log,
    "log truncated": a_truncated_log,
    "checkpoint damaged": a_damaged_step,
    "config or record damaged": a_damaged_record,
    "two starters": two_starters,
    "odd labels": odd_labels,
    "rows not finite": rows_not_finite,
    "evaluate killed": _reader("evaluate"),
    "verify killed": _reader("checkpoint", "verify"),
}
"""Each kind of fault, by the name in the table."""
