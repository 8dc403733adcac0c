"""Kernels that a program runs on a GPU, by JAX's profiler."""

import glob
import gzip
import json
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

__all__ = ["kernels_of"]


def kernels_of(program: Callable[[], Any]) -> dict[str, tuple[int, float]]:
    """Runs a program once under the profiler.

    Also written to the folder that the environment variable ``OUT`` names, if any.

    Args:
      program: blocks until its work is done.

    Returns:
      Number and time in us of the kernels of each name, numbers at its end dropped.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            program()
        name = glob.glob(f"{folder}/**/perfetto_trace.json.gz", recursive=True)[0]
        with gzip.open(name) as file:
            events = json.load(file)["traceEvents"]
    processes, threads = {}, {}
    for event in events:
        if event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    found: dict[str, tuple[int, float]] = {}
    for event in events:
        thread = threads.get((event.get("pid"), event.get("tid")), "")
        on_device = "GPU" in processes.get(event.get("pid"), "") and "Stream" in thread
        if event.get("ph") == "X" and on_device:
            kind = event["name"].rstrip("0123456789").rstrip("_.")
            count, total = found.get(kind, (0, 0.0))
            found[kind] = count + 1, total + event["dur"]
    if folder := os.environ.get("OUT"):
        with open(f"{folder}/kernels-{time.time_ns()}.txt", "w") as file:
            for kind, (count, total) in sorted(found.items(), key=lambda x: -x[1][1]):
                print(f"{count:6d} {total / 1e3:9.3f} ms  {kind}", file=file)
    return found
