"""Damages checkpoints, and times saves and restores.

    python benchmarks/durability.py [--damages 200] [--seed 0]

Damage: each trial copies three saved steps of the training state of ``configs/
digits.toml``, damages one file of the newest step and restores. Half of the trials
choose the file by its size, so that large files are hit more often. *found*: the damage
was named and the step before came back bit for bit. *harmless*: the newest step came
back bit for bit. *wrong*: anything else came back. *crashed*: an error, although two
sound steps were left. The last columns run the same trial with Orbax alone, which has
only the newest step; *refused* is any error.

Time: "held up" is until `Checkpointer.save` returns, when the state has been copied to
the host. "On disk" is until it has been written, synced, read back and compared.
"Orbax" is `save` of the same arrays, which blocks. All are medians.
"""

import argparse
import collections
import contextlib
import logging
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
from orbax.checkpoint import v1 as ocp

from esper_jax.checkpoint.checkpointer import Checkpointer
from esper_jax.checkpoint.host_leaves import to_host
from esper_jax.data import DATASETS
from esper_jax.run.config import load_config
from esper_jax.run.run import build_run
from esper_jax.trees import is_key

CONFIG = Path(__file__).parents[1] / "configs" / "digits.toml"


def digits_state() -> Any:
    """The training state of the digits run before its first step."""
    config = load_config(CONFIG)
    program = build_run(config, DATASETS[config.data.name](config.data.seed))
    return program.init(jax.random.key(config.seed))


def wide_state(megabytes: int) -> Any:
    """Float32 noise in 16 arrays."""
    keys = jax.random.split(jax.random.key(0), 16)
    rows = megabytes * 1024 * 1024 // (16 * 4 * 1024)
    return {str(i): jax.random.normal(key, (rows, 1024)) for i, key in enumerate(keys)}


def shifted(state: Any, by: int) -> Any:
    """The state with other values in every float."""

    def one(leaf: Any) -> Any:
        number = not is_key(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf + by if number else leaf

    return jax.tree.map(one, state)


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def garble(path: Path, rng: random.Random) -> None:
    """Overwrites up to 64 bytes."""
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.randrange(1, 65))
    data[start:end] = rng.randbytes(end - start)
    path.write_bytes(data)


def zero(path: Path, rng: random.Random) -> None:
    """Zeroes a page, as a lost write leaves it."""
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data)) // 4096 * 4096
    end = min(len(data), start + 4096)
    data[start:end] = bytes(end - start)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def extend(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 65)))


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def foreign(path: Path, rng: random.Random) -> None:
    (path.parent / f"{path.name}.copy").write_bytes(path.read_bytes())


def older(path: Path, rng: random.Random) -> None:
    """Overwrites the file with the one of the same name or folder in step 2."""
    folder = path
    while folder.name != "3":
        folder = folder.parent
    inside = path.relative_to(folder)
    other = folder.parent / "2" / inside
    if not other.exists():
        files = sorted(p for p in other.parent.iterdir() if p.is_file())
        other = rng.choice(files)
    path.write_bytes(other.read_bytes())


DAMAGES = [flip, flip, flip, garble, zero, truncate, extend, delete, foreign, older]


def content(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def same(a: Any, b: Any) -> bool:
    one, two = to_host(a), to_host(b)
    return one.keys() == two.keys() and all(
        one[n].kind == two[n].kind and one[n].array.tobytes() == two[n].array.tobytes()
        for n in one
    )


def trial(folder: Path, states: dict[int, Any]) -> str:
    """What the checkpointer restores when the newest step is damaged."""
    try:
        found = Checkpointer(folder).restore(states[1])
    except Exception:  # even a CheckpointError: two sound steps are left
        return "crashed"
    if not same(found.state, states[found.step]):
        return "wrong"
    return "found" if found.damaged else "harmless"


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Hides stderr: a failing Orbax prints thousands of lines, also from C++."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        time.sleep(0.05)  # its threads
        os.dup2(kept, 2)
        os.close(kept)


def orbax_trial(folder: Path, expected: dict[str, np.ndarray]) -> str:
    """What Orbax alone reads from the damaged step."""
    try:
        with silence():
            found = ocp.load(folder / "3" / "state")
        equal = found.keys() == expected.keys() and all(
            np.asarray(found[n]).tobytes() == expected[n].tobytes() for n in expected
        )
    except Exception:
        return "Orbax refused"
    return "Orbax harmless" if equal else "Orbax wrong"


def damage(count: int, seed: int) -> None:
    states = {step: shifted(digits_state(), step) for step in (1, 2, 3)}
    expected = {
        name: leaf.array for name, leaf in to_host(states[3]).items() if leaf.array.size
    }
    rng = random.Random(seed)
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(
        collections.Counter
    )
    with tempfile.TemporaryDirectory() as name:
        sound = Path(name) / "sound"
        with Checkpointer(sound) as checkpoints:
            for step, state in states.items():
                checkpoints.save(step, state)
        for number in range(count):
            work = Path(name) / "work"
            shutil.copytree(sound, work)
            kind = DAMAGES[number % len(DAMAGES)]
            files = [
                path
                for path in sorted((work / "3").rglob("*"))
                if path.is_file() and (path.stat().st_size or kind in (delete, extend))
            ]
            # Half of the trials weigh files by size: few files hold most bytes.
            sizes = [path.stat().st_size for path in files]
            [path] = rng.choices(files, sizes if rng.random() < 0.5 else None)
            before = content(work)
            kind(path, rng)
            while content(work) == before:  # the new bytes happen to be the old ones
                kind(rng.choice(files), rng)
            counts[kind.__name__][trial(work, states)] += 1
            counts[kind.__name__][orbax_trial(work, expected)] += 1
            shutil.rmtree(work)
    columns = ["found", "harmless", "wrong", "crashed"]
    columns += ["Orbax refused", "Orbax harmless", "Orbax wrong"]
    print("| damage | trials | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    total = sum(counts.values(), collections.Counter())
    for kind_name, row in [*counts.items(), ("all", total)]:
        cells = [sum(row[c] for c in columns[:4]), *(row[c] for c in columns)]
        print(f"| {kind_name} | " + " | ".join(map(str, cells)) + " |")
    print()


def times(rounds: int) -> None:
    print("| state | bytes | held up ms | on disk ms | Orbax ms | restore ms | disk |")
    print("|---|---|---|---|---|---|---|")
    for title, state in [("digits", digits_state()), ("128 MB", wide_state(128))]:
        leaves = to_host(state)
        size = sum(leaf.array.nbytes for leaf in leaves.values())
        arrays = {n: leaf.array for n, leaf in leaves.items() if leaf.array.size}
        held, written, plain, restored = [], [], [], []
        with tempfile.TemporaryDirectory() as name:
            checkpoints = Checkpointer(Path(name) / "steps")
            for step in range(rounds):
                jax.block_until_ready(state)
                start = time.perf_counter()
                checkpoints.save(step, state)
                held.append(time.perf_counter() - start)
                checkpoints.wait()
                written.append(time.perf_counter() - start)
                start = time.perf_counter()
                ocp.save(Path(name) / f"orbax-{step}", arrays)
                plain.append(time.perf_counter() - start)
                start = time.perf_counter()
                jax.block_until_ready(checkpoints.restore(state).state)
                restored.append(time.perf_counter() - start)
            checkpoints.close()
            newest = Path(name) / "steps" / str(rounds - 1)
            disk = sum(p.stat().st_size for p in newest.rglob("*") if p.is_file())
        cells = [f"{1e3 * statistics.median(x):.1f}" for x in (held, written, plain)]
        back = f"{1e3 * statistics.median(restored):.1f}"
        print(
            f"| {title} | {size:,} | {' | '.join(cells)} | {back} | {disk / size:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--damages", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.getLogger("esper_jax").setLevel(logging.CRITICAL)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    print(
        f"{jax.devices()[0].device_kind}, {platform.machine()}, Python "
        f"{platform.python_version()}, jax {jax.__version__}, "
        f"orbax-checkpoint {orbax.checkpoint.__version__}\n"
    )
    damage(arguments.damages, arguments.seed)
    times(arguments.rounds)


if __name__ == "__main__":
    main()
