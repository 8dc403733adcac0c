"""What test_soak.py measures, and what its command line's config names.

The command line is given data of one's own, which measure the process they are in.
"""

import ctypes
import ctypes.util
import itertools
import json
import os
import resource
import threading
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from esper_jax.data import Dataset

CLASSES, BATCH, STEPS = 3, 16, 4
BROKEN_EVERY = 100
"""Ticks between two that break training."""

TRIMMED_EVERY = 10

_compiled = []
_trimming = 0.0


def _count(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(seconds)


jax.monitoring.register_event_duration_secs_listener(_count)


_c = ctypes.CDLL(ctypes.util.find_library("c"))
_calls = itertools.count()


def measured():
    """Memory in MB, open files, threads, compilations and seconds of CPU time.

    What is freed stays with the process, in the heaps that glibc keeps for Orbax's
    threads. It is asked to give that back every ten ticks; the time is not counted.
    """
    global _trimming
    if next(_calls) % TRIMMED_EVERY == 0 and hasattr(_c, "malloc_trim"):
        start = time.process_time()
        _c.malloc_trim(0)
        _trimming += time.process_time() - start
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory": pages * resource.getpagesize() / 2**20,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "python threads": threading.active_count(),
        "compilations": len(_compiled),
        "cpu": time.process_time() - _trimming,
    }


def rows(count, seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, count).astype(np.int32)
    x = rng.normal(size=(count, 6)) + 3.0 * np.eye(6)[y]
    return x.astype(np.float32), y


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(6, 8, rngs=rngs)
        self.out = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


def model(rngs):
    return Net(rngs)


class Loader:
    """Batches without end that write down a measurement before each tick.

    One batch in some hundred ticks is NaN.
    """

    def __init__(self, samples):
        self.at, self.samples = 0, samples
        x, y = rows(BATCH * STEPS, 1)
        cut = range(0, len(x), BATCH)
        self.batches = [(x[i : i + BATCH], y[i : i + BATCH]) for i in cut]

    def __iter__(self):
        return self

    def __next__(self):
        tick, step = divmod(self.at, STEPS)
        if not step:
            with Path(self.samples).open("a") as file:
                file.write(json.dumps(measured()) + "\n")
        x, y = self.batches[step]
        self.at += 1
        return (x * np.nan if tick % BROKEN_EVERY == 30 and step == 2 else x, y)

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def data(samples):
    held_out = [rows(32, 2)]
    return Dataset(Loader(samples), held_out, held_out, CLASSES)
