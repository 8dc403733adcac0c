"""Times of two programs that take turns, and how sure their ratio is.

Absolute times of another day are of no use: the machine was busy otherwise, its clock
was another. Two programs that take turns within one run meet the same machine.
"""

import bisect
import glob
import gzip
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from scipy import stats

__all__ = [
    "Ratio",
    "Replay",
    "Times",
    "busy_of_marks",
    "device_times",
    "ratio_of",
    "take_turns",
]

_MARK = "esper-bench"
"""Name of a call in the profiler's trace."""

_LONGEST = 0.05
"""Seconds that a turn should take at most."""

_MOST_ON_DEVICE = 10
"""Calls of a turn under the profiler, whose traces have no end of events."""

Replay = Callable[[int], list[Callable[[], Any]]]
"""``replay(n)`` makes ``n`` calls ready, to be made one after the other, which take the
program through its first ``n`` steps. Each returns what to wait for."""


class Times(NamedTuple):
    """Seconds of each call; rounds first."""

    first: Float[np.ndarray, "rounds calls"]
    second: Float[np.ndarray, "rounds calls"]
    clock: str
    """``device``: what the GPU's kernels took; ``wall``: until the result was there."""


def take_turns(first: Replay, second: Replay, rounds: int) -> Times:
    """Times two programs in turns; the one that begins changes from round to round.

    Both are called before, and not timed then.
    """
    on_device = jax.default_backend() == "gpu" and device_times(first(2)) is not None
    clock = device_times if on_device else _wall_times
    slowest = max(min(_wall_times(replay(3))) for replay in (first, second))
    calls = max(1, min(20, int(_LONGEST / slowest)))
    if on_device:
        calls = min(calls, _MOST_ON_DEVICE)
    found: tuple[list[Any], list[Any]] = [], []
    for number in range(rounds):
        turns = [(first, found[0]), (second, found[1])]
        for replay, into in turns if number % 2 == 0 else turns[::-1]:
            into.append(clock(replay(calls)))
    return Times(
        np.array(found[0]), np.array(found[1]), "device" if on_device else "wall"
    )


def _wall_times(calls: Sequence[Callable[[], Any]]) -> list[float]:
    seconds = []
    for call in calls:
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return seconds


def device_times(calls: Sequence[Callable[[], Any]]) -> list[float] | None:
    """Time that a GPU was busy in each call, by the profiler; None if it saw none."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for call in calls:
                with jax.profiler.TraceAnnotation(_MARK):
                    jax.block_until_ready(call())
        [name] = glob.glob(f"{folder}/**/perfetto_trace.json.gz", recursive=True)
        with gzip.open(name) as file:
            events = json.load(file)["traceEvents"]
    return busy_of_marks(events, _MARK)


def busy_of_marks(events: Iterable[Mapping[str, Any]], mark: str) -> list[float] | None:
    """Seconds in which kernels ran in each marked call of a trace.

    A kernel belongs to the last call that began before its middle. Kernels that run at
    the same time count once.

    Args:
      events: ``traceEvents`` of the profiler's trace for Perfetto, times in us.
      mark: name of the annotation around each call.

    Returns:
      None if there is no kernel of a GPU.
    """
    events = list(events)
    processes = {
        e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"
    }
    threads = {
        (e["pid"], e["tid"]): e["args"]["name"]
        for e in events
        if e.get("name") == "thread_name"
    }
    whole = [e for e in events if e.get("ph") == "X"]
    starts = sorted(e["ts"] for e in whole if e["name"] == mark)
    kernels = sorted(
        (e["ts"], e["ts"] + e["dur"])
        for e in whole
        if "GPU" in processes.get(e["pid"], "")
        and "Stream" in threads.get((e["pid"], e["tid"]), "")
    )
    if not kernels or not starts:
        return None
    busy, ends = [0.0] * len(starts), 0.0
    for start, end in kernels:
        call = bisect.bisect_right(starts, (start + end) / 2) - 1
        if call >= 0:
            busy[call] += max(0.0, end - max(start, ends)) / 1e6
        ends = max(ends, end)
    return busy


class Ratio(NamedTuple):
    """How long the second program takes over the first, with an interval."""

    value: float
    low: float
    high: float


def ratio_of(times: Times, alpha: float = 0.01) -> Ratio:
    """The median over rounds of the ratio of both median times.

    A round's medians leave out calls that were interrupted, and the median over rounds
    leaves out rounds in which one turn was. The interval is that of the sign test: its
    ends are order statistics of the rounds' ratios, so it assumes no distribution, and
    the same program lies outside of it in at most ``alpha`` of all comparisons. With
    too few rounds it is infinite.

    Args:
      times: of both.
      alpha: error that the interval allows.
    """
    ratios = np.sort(np.median(times.second, axis=1) / np.median(times.first, axis=1))
    number = len(ratios)
    # Ratios below the end, if the true one lies exactly there: a fair coin each.
    left_out = int(stats.binom.ppf(alpha / 2, number, 0.5))
    if stats.binom.cdf(left_out, number, 0.5) > alpha / 2:
        left_out -= 1
    if left_out < 0:
        return Ratio(float(np.median(ratios)), 0.0, float("inf"))
    return Ratio(
        float(np.median(ratios)),
        float(ratios[left_out]),
        float(ratios[number - 1 - left_out]),
    )
