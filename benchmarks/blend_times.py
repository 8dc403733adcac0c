"""Times and memory of blend's implementations."""

import concurrent.futures
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from blend_calls import (
    IMPLEMENTATIONS,
    KERNELS,
    SETS,
    Run,
    activations,
    blended,
    config_of,
    dormant,
    random_like,
    rest_of,
    there_and_back,
)
from blend_errors import error_against, error_against_reference, wide

from esper_jax.kernels.blend.arg_specs import ArgSpec

LIVING = (0.0, 0.1, 0.5, 1.0)
SAMPLE = 256
CHAIN = 20

LIMITS: dict[str, Callable[[Any], Any]] = {
    "copy": lambda y: y * jnp.asarray(1.5, y.dtype),
    "read, sum": lambda y: jnp.sum(y, dtype=jnp.float32),
    "read, row sums": lambda y: jnp.sum(y, axis=1, dtype=jnp.float32),
    "read, column sums": lambda y: jnp.sum(y, axis=0, dtype=jnp.float32),
}
"""Least work on an activation: one read and one write, and one read alone."""


# Functions to time.


def over_dense(call: Callable[..., Any]) -> Callable[..., Any]:
    """The layer's forward pass over its dense base."""

    def f(x: Any, w: Any, rest: dict[str, Any]) -> Any:
        return call(x @ w, rest)

    return f


def train_step(call: Callable[..., Any]) -> Callable[..., Any]:
    """Gradients of a dense layer, blend, and another dense layer."""

    def f(x: Any, w: Any, v: Any, rest: dict[str, Any]) -> Any:
        def loss(w: Any, v: Any, bank: Any) -> Any:
            out, *aside = call(x @ w, {**rest, "bank": bank})
            return jnp.mean(jnp.square((out @ v).astype(jnp.float32))), aside

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(w, v, rest["bank"])

    return f


def chained(call: Callable[..., Any]) -> Callable[..., Any]:
    """A loop of layers, for work too short to be timed by the call."""

    def f(x: Any, w: Any, rest: dict[str, Any]) -> Any:
        def body(_: Any, carry: Any) -> Any:
            x, sums = carry
            out, stats, _ = call(x @ w, rest)
            if stats is not None:
                sums = sums + stats.total
            return out, sums

        zero = jnp.zeros(0)
        if call is not dormant:
            zero = jax.eval_shape(call, x, rest)[1].total
            zero = jnp.zeros(zero.shape)
        return jax.lax.fori_loop(0, CHAIN, body, (x, zero))

    return f


def in_one_call(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f`` of several sets of arguments, so that the host's part is hidden."""
    return jax.jit(lambda sets: [f(*args) for args in sets])


# Measuring.


def median_time(f: Callable[..., Any], inputs: list[tuple[Any, ...]]) -> float:
    """Microseconds of one call."""
    for args in inputs:
        jax.block_until_ready(f(*args))
    start = time.perf_counter()
    jax.block_until_ready(f(*inputs[0]))
    once = max(time.perf_counter() - start, 1e-6)
    calls = len(inputs) * max(1, round(min(30, 0.02 / once) / len(inputs)))
    rounds = []
    for _ in range(7):
        start = time.perf_counter()
        for i in range(calls):
            last = f(*inputs[i % len(inputs)])
        jax.block_until_ready(last)
        rounds.append((time.perf_counter() - start) / calls)
    return statistics.median(rounds) * 1e6


def added_time(
    f: Callable[..., Any], base: Callable[..., Any], sets: list[tuple[Any, ...]]
) -> tuple[float, float]:
    """Microseconds of `in_one_call` of the base, and what ``f`` takes more, per set.

    They take turns, because the clocks of a device drift.
    """
    times: dict[Any, list[float]] = {f: [], base: []}
    calls = 1
    for g in (f, base):
        jax.block_until_ready(g(sets))
        start = time.perf_counter()
        jax.block_until_ready(g(sets))
        once = max(time.perf_counter() - start, 1e-6)
        calls = max(1, round(min(20, 0.02 / once)))
    for _ in range(9):
        for g, mine in times.items():
            start = time.perf_counter()
            for _ in range(calls):
                last = g(sets)
            jax.block_until_ready(last)
            mine.append((time.perf_counter() - start) / calls / len(sets) * 1e6)
    more = [a - b for a, b in zip(times[f], times[base], strict=True)]
    return statistics.median(times[base]), statistics.median(more)


def memory(compiled: Any) -> int:
    """Bytes on the device at the peak of a program."""
    m = compiled.memory_analysis()
    peak = getattr(m, "peak_memory_in_bytes", 0)
    return int(peak or m.temp_size_in_bytes + m.output_size_in_bytes)


# Forward.


def forward_table(run: Run, spec: ArgSpec) -> None:
    """What the forward pass adds over its dense base."""
    xs = activations(spec)[:SETS]
    w = random_like(spec, (spec.features, spec.features), 99)
    base = in_one_call(over_dense(dormant))
    sets = [(x, w, rest_of(spec, 0.0)) for x in xs]

    def base_time() -> float:
        return added_time(base, base, sets)[0]

    run.attempt(
        "forward", {"what": "dense base"}, lambda: {"us": round(base_time(), 1)}
    )

    def limit(call: Callable[..., Any]) -> Any:
        alone = in_one_call(call)
        us = added_time(alone, alone, [(x,) for x in xs * 4])[0]
        return {"adds": round(us, 1), "percent": round(100 * us / base_time(), 1)}

    for name, call in LIMITS.items():
        label = {"what": f"device {name}"}
        run.attempt("forward", label, lambda call=call: limit(call))
    for rows in (None, SAMPLE if not run.smoke else 4):
        sampled = dataclasses.replace(spec, statistics_rows=rows)
        for name in IMPLEMENTATIONS:
            _forward_rows(run, sampled, name, base, [(x, w) for x in xs])


def _forward_rows(
    run: Run, spec: ArgSpec, name: str, base: Any, pairs: list[tuple[Any, Any]]
) -> None:
    """One implementation's forward pass, for every share of living slots."""
    call, exact = blended(spec, name, run.smoke), blended(spec, "xla", run.smoke)
    f, one = in_one_call(over_dense(call)), jax.jit(call)

    def measure(living: float) -> Any:
        rest = rest_of(spec, living)
        error = error_against_reference(one, exact, (pairs[0][0], rest))
        us, more = added_time(f, base, [(*pair, rest) for pair in pairs])
        return {
            "us": round(us + more, 1),
            "adds": round(more, 1),
            "percent": round(100 * more / us, 1),
            "error": f"{error:.1e}",
        }

    for living in LIVING:
        rows = spec.statistics_rows or "all"
        label = {"what": name, "living": living, "statistics": rows}
        run.attempt("forward", label, lambda living=living: measure(living))


# Forward and backward.


@dataclasses.dataclass
class BothWays:
    """What is timed of a shape, forward and backward, as futures of programs."""

    base: Any
    exact: Any
    calls: dict[str, Any]
    alone: dict[str, Any]


def _compile_both(
    run: Run, spec: ArgSpec, sets: int, pool: concurrent.futures.Executor
) -> BothWays:
    """Compiles what is timed of a shape, in the pool."""

    def start(f: Callable[..., Any], *args: Any) -> concurrent.futures.Future[Any]:
        return pool.submit(jax.jit(f).lower(*args).compile)

    def in_one(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda sets: [there_and_back(call)(*args) for args in sets]

    y = jax.ShapeDtypeStruct((spec.rows, spec.features), spec.dtype)
    args = (y, y, jax.eval_shape(lambda: rest_of(spec, 1.0)))
    many = [args] * sets
    configs = {name: config_of(spec, run) for name in KERNELS}
    calls = {
        name: blended(spec, name, run.smoke, configs.get(name))
        for name in IMPLEMENTATIONS
    }
    alone = {name: there_and_back(call, scaled=False) for name, call in calls.items()}
    with jax.default_matmul_precision("highest"):
        exact = start(alone["xla"], *jax.tree.map(wide, args))
    return BothWays(
        start(in_one(dormant), many),
        exact,
        {name: start(in_one(call), many) for name, call in calls.items()},
        {name: start(call, *args) for name, call in alone.items()},
    )


def compile_both_ways(
    run: Run, specs: list[ArgSpec], sets: int
) -> dict[str, concurrent.futures.Future[BothWays]]:
    """Compiles the functions of all shapes at once: timing would wait for it."""
    pool = concurrent.futures.ThreadPoolExecutor(1 if run.smoke else 12)
    found: dict[str, Any] = {}
    for spec in specs:
        future: concurrent.futures.Future[BothWays] = concurrent.futures.Future()
        try:
            future.set_result(_compile_both(run, spec, sets, pool))
        except Exception as error:
            future.set_exception(error)
        found[spec.name] = future
    pool.shutdown()
    return found


def both_ways_table(
    run: Run, specs: list[ArgSpec], living: tuple[float, ...], sets: int = 1
) -> None:
    """Forward and backward of blend alone, per shape.

    One set is enough: it is larger than the cache, and takes longer than a call.
    """
    compiled = compile_both_ways(run, specs, sets)
    for spec in specs:
        _both_ways_rows(run, spec, compiled[spec.name], living, sets)


def _both_ways_rows(
    run: Run, spec: ArgSpec, compiled: Any, living: tuple[float, ...], sets: int
) -> None:
    """One shape, forward and backward."""
    xs = activations(spec)
    pairs = list(zip(xs[:sets], xs[SETS : SETS + sets], strict=True))
    times: dict[float, float] = {}

    def base() -> Any:
        f = compiled.result().base.result()
        inputs = [(*pair, rest_of(spec, 0.0)) for pair in pairs]
        return {"us": round(added_time(f, f, inputs)[0], 1)}

    def measure(name: str, share: float) -> Any:
        rest, of = rest_of(spec, share), compiled.result()
        one, exact = of.alone[name].result(), of.exact.result()
        error = error_against(one, exact, (*pairs[0], rest))
        inputs = [(*pair, rest) for pair in pairs]
        _, us = added_time(of.calls[name].result(), of.base.result(), inputs)
        if name == "xla":
            times[share] = us
        ratio = us / times.get(share, float("nan"))
        return {"us": round(us, 1), "to xla": round(ratio, 3), "error": f"{error:.1e}"}

    run.attempt("both ways", {"spec": spec.name, "what": "base"}, base)
    for name in IMPLEMENTATIONS:
        for share in living:
            label = {"spec": spec.name, "what": name, "living": share}
            run.attempt(
                "both ways", label, lambda name=name, share=share: measure(name, share)
            )


# Memory, and a small batch.


def memory_table(run: Run, spec: ArgSpec) -> None:
    """Peak memory that blend adds to a training step; nothing runs."""
    struct = jax.eval_shape(lambda: random_like(spec, (spec.rows, spec.features), 0))
    square = jax.ShapeDtypeStruct((spec.features, spec.features), struct.dtype)

    def peak(call: Callable[..., Any], own: ArgSpec) -> int:
        rest = jax.eval_shape(lambda: rest_of(own, 1.0))
        f = jax.jit(train_step(call))
        return memory(f.lower(struct, square, square, rest).compile())

    def measure(own: ArgSpec) -> Any:
        base = peak(dormant, own)
        adds = {
            name: peak(blended(own, name, run.smoke), own) - base
            for name in IMPLEMENTATIONS
        }
        row = {"base MiB": round(base / 2**20, 1)}
        row |= {f"{name} adds MiB": round(n / 2**20, 1) for name, n in adds.items()}
        xla = adds["xla"]
        for name in KERNELS:
            row[f"{name} to xla"] = round(adds[name] / xla, 3) if xla else None
        return row

    for capacity in sorted({spec.slots, min(8, spec.slots)}, reverse=True):
        own = dataclasses.replace(spec, capacity=capacity)
        label = {"spec": spec.name, "slots": capacity}
        run.attempt("memory", label, lambda own=own: measure(own))


def small_table(run: Run, spec: ArgSpec) -> None:
    """A small batch over very many seeds: time per layer in a loop of layers."""
    x = random_like(spec, (spec.rows, spec.features), 1)
    w = random_like(spec, (spec.features, spec.features), 2)
    base_f = jax.jit(chained(dormant))
    inputs = [(x, w, rest_of(spec, 0.0))]
    base = run.attempt(
        "small batch",
        {"what": "dense base"},
        lambda: {"us": round(median_time(base_f, inputs) / CHAIN, 2)},
    ).get("us", float("nan"))

    def measure(f: Any, one: Any, exact: Any, rest: Any) -> Any:
        error = error_against_reference(one, exact, (x, rest))
        us = median_time(f, [(x, w, rest)]) / CHAIN
        return {
            "us": round(us, 2),
            "adds": round(us - base, 2),
            "error": f"{error:.1e}",
        }

    for rows in (None, 8):
        own = dataclasses.replace(spec, statistics_rows=rows)
        for name in IMPLEMENTATIONS:
            call, exact = blended(own, name, run.smoke), blended(own, "xla", run.smoke)
            compiled = (jax.jit(chained(call)), jax.jit(call), exact)
            for living in (0.0, 1.0):
                rest = rest_of(spec, living)
                label = {"what": name, "living": living, "statistics": rows or "all"}
                run.attempt(
                    "small batch", label, lambda c=compiled, r=rest: measure(*c, r)
                )
