"""Random faults over a real run, each followed by the same command line to the end.

    PYTHONPATH=. python3 benchmarks/faults.py [--faults 300] [--seed 0] [--kind NAME]

The run is ``configs/smoke.toml`` with 24 ticks of 8 steps and a save every 4 ticks. A
trial starts it, lets one fault happen at a random moment, resumes it with ``--resume``
and compares the state's hash, the summary and the logs with those of an undisturbed
run. Faults come in turn, each with its own random numbers from the seed; the moment of
a signal is a tick and some milliseconds, so it differs a little each time. Ctrl-C ends
early, with the table of what was done.

Signals go to processes that run the command line's own `main`, as real ones. They stay
warm between trials; "command alone" starts ``python -m esper_jax`` and hits it at any
moment of its life, imports included.

"disk full" fills a small tmpfs, "read-only" remounts the run's folder. Both need mount,
which an unprivileged user has in a user namespace of his own: the benchmark enters one
with ``unshare --user --map-root-user --mount``. Where that is not permitted, they are
left out, and a limit on the size of files (RLIMIT_FSIZE) is all there is.

*as undisturbed*: ended so. *told*: a clear sentence refused the fault or named what is
lost; after it was mended as the sentence says, the run ended. Both have survived.
*failed*: neither. *silently wrong*: another result without a word. *traceback*: any
line on standard error that is no sentence of ``esper-jax``. *lost*: ticks that had to
be done again, over the trials of the kind.
"""

import argparse
import collections
import contextlib
import dataclasses
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import jax
from fault_kinds import KINDS
from fault_trials import CONFIG, SETTINGS, Failed, Lab, Silent, Trial, mount, summary
from fault_workers import Pool, Worker, environment, spawn

COLUMNS = ["as undisturbed", "told", "failed", "silently wrong", "traceback"]
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
MOUNTED = "ESPER_JAX_FAULTS_MAY_MOUNT"
"""Set inside of the namespace."""


@dataclasses.dataclass
class Row:
    """What became of the trials of a kind."""

    counts: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )
    lost: list[float] = dataclasses.field(default_factory=list)

    def cells(self) -> str:
        trials = sum(self.counts.values())
        numbers = [trials, *(self.counts[name] for name in COLUMNS)]
        mean, most = (f(self.lost or [0.0]) for f in (statistics.fmean, max))
        return " | ".join([*map(str, numbers), f"{mean:.2f}", f"{most:.1f}"])


def enter_namespace() -> None:
    """Goes on as a process that may mount, if that is permitted."""
    probe = [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", tempfile.gettempdir()]
    if MOUNTED in os.environ or not shutil.which("unshare"):
        return
    if not subprocess.run(probe, capture_output=True).returncode:
        os.environ[MOUNTED] = "1"
        line = [*NAMESPACE, sys.executable, *sys.argv]
        os.execvp(line[0], line)


def laboratory(root: Path) -> Lab:
    """An undisturbed run, one that was stopped, and warm workers."""
    cache, disk = root / "cache", root / "disk"
    disk.mkdir()
    mounted = MOUNTED in os.environ and mount("-t", "tmpfs", "-o", "size=8m", "x", disk)
    env = environment(cache)
    reference, stopped = root / "reference", root / "stopped"

    def train(out: Path) -> list[str | Path]:
        return ["train", CONFIG, "--out", out, "--resume", "--set", *SETTINGS]

    for out in (root / "first", reference):  # the first one fills the cache
        start = time.monotonic()
        result = spawn(train(out), env, root).result()
        if result.status:
            raise SystemExit(f"the undisturbed run fails: {result.err}")
    life = time.monotonic() - start
    process = spawn(train(stopped), env, root)
    while not (stopped / "checkpoints" / "96").exists():
        time.sleep(0.001)
    process.signal(signal.SIGTERM)
    process.result()
    number = iter(range(10**6))

    def warm(worker: Worker) -> None:
        out = root / f"warm-{next(number)}"
        shutil.copytree(stopped, out)
        worker.start(train(out), ["evaluate", out], ["checkpoint", "verify", out])

    pool = Pool(3, lambda: Worker(env, root), warm)
    return Lab(root, disk if mounted else None, pool, env, life, reference, stopped)


def outcome(lab: Lab, kind: str, number: int, seed: int, row: Row) -> None:
    """Runs one trial and counts it; prints what went wrong."""
    trial = Trial(lab, number, random.Random(f"{seed} {number}"))
    found, why = "", ""
    try:
        KINDS[kind](trial)
        found = "told" if trial.refused else "as undisturbed"
    except Silent as error:
        found, why = "silently wrong", str(error)
    except Failed as error:
        why = str(error)
        found = "traceback" if why.startswith("traceback") else "failed"
    except Exception:
        found, why = "failed", traceback.format_exc()
    row.counts[found] += 1
    row.lost.append(trial.lost)
    if why:
        print(f"trial {number}, {kind}: {found}: {why}", file=sys.stderr, flush=True)
    trial.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=KINDS, help="only these")
    arguments = parser.parse_args()
    enter_namespace()
    # Commands get them as from a terminal, even if this was started in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with tempfile.TemporaryDirectory(prefix="esper-jax-faults-") as name:
        root, start = Path(name), time.monotonic()
        lab = laboratory(root)
        kinds = arguments.kind or list(KINDS)
        if lab.disk is None:
            kinds = [kind for kind in kinds if kind not in ("disk full", "read-only")]
            print("mount is not permitted: no full disk and no read-only folder\n")
        print(
            f"{jax.devices()[0].device_kind}, {platform.machine()}, Python "
            f"{platform.python_version()}, jax {jax.__version__}; "
            f"{len(os.sched_getaffinity(0))} cores; undisturbed: state "
            f"{summary(lab.reference)['state_hash'][:8]}, {lab.life:.1f} s alone\n",
            flush=True,
        )
        rows: dict[str, Row] = {kind: Row() for kind in kinds}
        ready = time.monotonic()
        with contextlib.suppress(KeyboardInterrupt):
            for number in range(arguments.faults):
                kind = kinds[number % len(kinds)]
                outcome(lab, kind, number, arguments.seed, rows[kind])
        took = time.monotonic() - ready
        lab.pool.close()
        if lab.disk is not None:
            subprocess.run(["umount", str(lab.disk)], check=False)
        print(f"| fault | trials | {' | '.join(COLUMNS)} | lost mean | lost max |")
        print("|---" * (len(COLUMNS) + 4) + "|")
        for kind, row in rows.items():
            print(f"| {kind} | {row.cells()} |")
        total = Row(
            sum((row.counts for row in rows.values()), collections.Counter()),
            [lost for row in rows.values() for lost in row.lost],
        )
        print(f"| all | {total.cells()} |")
        done = sum(total.counts.values())
        print(f"\n{done} faults in {took:.0f} s, after {ready - start:.0f} s to begin")


if __name__ == "__main__":
    main()
