"""What blend adds to a layer: time and memory, by implementation, on one GPU.

    PYTHONPATH=. python3 benchmarks/blend.py --out DIR          # all tables, 5 minutes
    PYTHONPATH=. python3 benchmarks/blend.py --tune --out DIR   # block sizes
    PYTHONPATH=. python3 benchmarks/blend.py --smoke            # tiny, on a CPU

Every time is a median over rounds of calls whose inputs rotate among sets that together
are larger than the cache. Every variant is first compared with the plain JAX reference
in float32 at full precision. All ratios are of one run.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_jax.blueprints import hidden_width, resolve
from esper_jax.kernels.blend import reference, triton
from esper_jax.kernels.blend.arg_specs import ARG_SPECS, ArgSpec
from esper_jax.kernels.blend.config import Blocks, Config, choose

LIVING = (0.0, 0.1, 0.5, 1.0)
WIDTHS = (64, 128, 16, 2, 8, 32, 4, 256, 512)
SAMPLE = 256
SETS = 3
CHAIN = 20
NAMES = ("bank", "alpha", "beta", "blueprint", "seed_of_slot")


@dataclasses.dataclass
class Run:
    """Options and results of one run of the script."""

    smoke: bool
    out: pathlib.Path | None
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def attempt(self, table: str, label: dict[str, Any], f: Callable[[], Any]) -> Any:
        """``f()`` as a row; if it raises, the error is the row."""
        start = time.perf_counter()
        try:
            row = {**label, **f()}
        except Exception as error:
            print(traceback.format_exc(limit=-4))
            lines = str(error).strip().splitlines() or [type(error).__name__]
            row = {**label, "error": lines[0][:160]}
        row = {"table": table, **row}
        self.rows.append(row)
        took = time.perf_counter() - start
        print(f"[{took:6.1f} s]", json.dumps(row), flush=True)
        if self.out:
            text = "".join(json.dumps(r) + "\n" for r in self.rows)
            (self.out / "blend.jsonl").write_text(text)
        return row


# Functions to time.


def blended(
    spec: ArgSpec, implementation: str, config: Config | None, interpret: bool
) -> Callable[..., Any]:
    """``(y, rest) -> out, statistics, reconstruction``."""
    o = spec.options
    static = (o["layout"], o["blueprints"], o["incubation"], o["statistics_rows"])

    def call(y: Any, rest: dict[str, Any]) -> Any:
        arrays = [rest[name] for name in NAMES]
        if implementation == "xla":
            return reference.blend(y, *arrays, *static)
        return triton.blend(y, *arrays, *static, config=config, interpret=interpret)

    return call


def dormant(y: Any, rest: dict[str, Any]) -> Any:
    """The layer that does not grow."""
    return y, None, None


def over_dense(call: Callable[..., Any]) -> Callable[..., Any]:
    """The layer's forward pass over its dense base."""

    def f(x: Any, w: Any, rest: dict[str, Any]) -> Any:
        return call(x @ w, rest)

    return f


def there_and_back(call: Callable[..., Any], scaled: bool = True) -> Callable[..., Any]:
    """Forward and backward of blend alone.

    As in a training step, its inputs are the results of other work, so that it may
    overwrite them; here that is a scaling, which the base has too.
    """

    def f(x: Any, gx: Any, rest: dict[str, Any]) -> Any:
        y, g = x, gx
        if scaled:
            y, g = jax.lax.optimization_barrier((x * 1.5, gx * 0.5))

        def g_of(y: Any, bank: Any, alpha: Any) -> Any:
            out, *aside = call(y, {**rest, "bank": bank, "alpha": alpha})
            return out, aside

        out, pull, aside = jax.vjp(g_of, y, rest["bank"], rest["alpha"], has_aux=True)
        # The next layer needs the output before it can tell its gradient.
        out, g = jax.lax.optimization_barrier((out, g))
        return out, aside, pull(g)

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


def in_one_call(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f`` of several sets of arguments, so that the host's part is hidden."""
    return jax.jit(lambda sets: [f(*args) for args in sets])


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


def wide(x: Any) -> Any:
    """``x`` in float32, if it is floating point; an array, or only its shape."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return x.astype(jnp.float32)


def error_against_reference(
    f: Callable[..., Any], exact: Callable[..., Any], args: tuple[Any, ...]
) -> float:
    """As `error_against` ``exact``, in float32 at full precision."""
    with jax.default_matmul_precision("highest"):
        return error_against(f, jax.jit(exact), args)


def error_against(
    f: Callable[..., Any], exact: Callable[..., Any], args: tuple[Any, ...]
) -> float:
    """The worst ``|got - want| / |want|`` of all results; ``exact`` gets float32.

    NaN in either is infinite. Leaves of which nothing is expected count as they are.
    """
    got = jax.tree.leaves(f(*args))
    want = jax.tree.leaves(exact(*jax.tree.map(wide, args)))
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(wide(a), np.float64), np.asarray(b, np.float64)
        norm = float(np.linalg.norm(b))
        error = float(np.linalg.norm(a - b)) / (norm or 1.0)
        worst = max(worst, error if np.isfinite(error) else np.inf)
    return worst


def random_like(spec: ArgSpec, shape: tuple[int, ...], seed: int) -> Any:
    scale = shape[0] ** -0.5 if shape[0] == spec.features else 1.0
    x = scale * jax.random.normal(jax.random.key(seed), shape, jnp.float32)
    return x.astype(spec.dtype)


def rest_of(spec: ArgSpec, living: float) -> dict[str, Any]:
    arrays = dataclasses.replace(spec, rows=1).arrays(1, living=living)
    return {name: arrays[name] for name in NAMES}


def activations(spec: ArgSpec) -> list[Any]:
    return [random_like(spec, (spec.rows, spec.features), i) for i in range(2 * SETS)]


def memory(compiled: Any) -> int:
    """Bytes on the device at the peak of a program."""
    m = compiled.memory_analysis()
    peak = getattr(m, "peak_memory_in_bytes", 0)
    return int(peak or m.temp_size_in_bytes + m.output_size_in_bytes)


# Tables.


LIMITS: dict[str, Callable[[Any], Any]] = {
    "copy": lambda y: y * jnp.asarray(1.5, y.dtype),
    "read, sum": lambda y: jnp.sum(y, dtype=jnp.float32),
    "read, row sums": lambda y: jnp.sum(y, axis=1, dtype=jnp.float32),
    "read, column sums": lambda y: jnp.sum(y, axis=0, dtype=jnp.float32),
}
"""Least work on an activation: one read and one write, and one read alone."""


def forward_table(run: Run, spec: ArgSpec) -> None:
    """What the forward pass adds over its dense base."""
    xs = activations(spec)[:SETS]
    w = random_like(spec, (spec.features, spec.features), 99)
    none = rest_of(spec, 0.0)
    base_f = in_one_call(over_dense(dormant))
    sets = [(x, w, none) for x in xs]
    run.attempt(
        "forward",
        {"what": "dense base"},
        lambda: {"us": round(added_time(base_f, base_f, sets)[0], 1)},
    )
    for name, call in LIMITS.items():
        alone = in_one_call(call)

        def limit(alone: Any = alone) -> Any:
            us = added_time(alone, alone, [(x,) for x in xs * 4])[0]
            base = added_time(base_f, base_f, sets)[0]
            return {"adds": round(us, 1), "percent": round(100 * us / base, 1)}

        run.attempt("forward", {"what": f"device {name}"}, limit)
    for rows in (None, SAMPLE if not run.smoke else 4):
        sampled = dataclasses.replace(spec, statistics_rows=rows)
        for name in ("xla", "triton"):
            call = blended(sampled, name, None, run.smoke)
            exact = blended(sampled, "xla", None, run.smoke)
            f, one = in_one_call(over_dense(call)), jax.jit(call)
            for living in LIVING:
                rest = rest_of(spec, living)

                def measure(
                    f: Any = f, one: Any = one, exact: Any = exact, rest: Any = rest
                ) -> Any:
                    error = error_against_reference(one, exact, (xs[0], rest))
                    base, more = added_time(f, base_f, [(x, w, rest) for x in xs])
                    return {
                        "us": round(base + more, 1),
                        "adds": round(more, 1),
                        "percent": round(100 * more / base, 1),
                        "error": f"{error:.1e}",
                    }

                label = {"what": name, "living": living, "statistics": rows or "all"}
                run.attempt("forward", label, measure)


@dataclasses.dataclass
class BothWays:
    """What is timed of a shape, forward and backward, compiled."""

    base: Any
    exact: Any
    calls: dict[str, Any]
    alone: dict[str, Any]


def compile_both_ways(
    run: Run, specs: list[ArgSpec], sets: int
) -> dict[str, concurrent.futures.Future[BothWays]]:
    """Compiles the functions of all shapes at once: timing would wait for it."""
    pool = concurrent.futures.ThreadPoolExecutor(1 if run.smoke else 12)

    def start(f: Callable[..., Any], *args: Any) -> concurrent.futures.Future[Any]:
        return pool.submit(jax.jit(f).lower(*args).compile)

    def both(spec: ArgSpec) -> BothWays:
        y = jax.ShapeDtypeStruct((spec.rows, spec.features), spec.dtype)
        args = (y, y, jax.eval_shape(lambda: rest_of(spec, 1.0)))
        many = [args] * sets

        def in_one(call: Callable[..., Any]) -> Callable[..., Any]:
            return lambda sets: [there_and_back(call)(*args) for args in sets]

        calls = {n: blended(spec, n, None, run.smoke) for n in ("xla", "triton")}
        with jax.default_matmul_precision("highest"):
            exact = start(
                there_and_back(calls["xla"], scaled=False), *jax.tree.map(wide, args)
            )
        return BothWays(
            start(in_one(dormant), many),
            exact,
            {name: start(in_one(call), many) for name, call in calls.items()},
            {
                name: start(there_and_back(call, scaled=False), *args)
                for name, call in calls.items()
            },
        )

    found: dict[str, Any] = {}
    for spec in specs:
        future: concurrent.futures.Future[BothWays] = concurrent.futures.Future()
        try:
            future.set_result(both(spec))
        except Exception as error:
            future.set_exception(error)
        found[spec.name] = future
    pool.shutdown()
    return found


def both_ways_table(
    run: Run, specs: list[ArgSpec], living: tuple[float, ...], sets: int = 1
) -> None:
    """Forward and backward of blend alone, per shape."""
    compiled = compile_both_ways(run, specs, sets)
    for spec in specs:
        xs = activations(spec)
        # One set is enough: it is larger than the cache, and takes longer than a call.
        pairs = list(zip(xs[:sets], xs[SETS : SETS + sets], strict=True))
        none = rest_of(spec, 0.0)
        get = compiled[spec.name]

        def base(get: Any = get, pairs: Any = pairs, none: Any = none) -> Any:
            f = get.result().base.result()
            return {"us": round(added_time(f, f, [(*p, none) for p in pairs])[0], 1)}

        run.attempt("both ways", {"spec": spec.name, "what": "base"}, base)
        times: dict[float, float] = {}
        for name in ("xla", "triton"):
            for share in living:

                def measure(
                    get: Any = get,
                    name: str = name,
                    share: float = share,
                    pairs: Any = pairs,
                    times: dict[float, float] = times,
                    spec: ArgSpec = spec,
                ) -> Any:
                    rest, of = rest_of(spec, share), get.result()
                    one, exact = of.alone[name].result(), of.exact.result()
                    error = error_against(one, exact, (*pairs[0], rest))
                    inputs = [(*p, rest) for p in pairs]
                    f, base = of.calls[name].result(), of.base.result()
                    _, us = added_time(f, base, inputs)
                    if name == "xla":
                        times[share] = us
                    ratio = us / times.get(share, float("nan"))
                    return {
                        "us": round(us, 1),
                        "to xla": round(ratio, 3),
                        "error": f"{error:.1e}",
                    }

                label = {"spec": spec.name, "what": name, "living": share}
                run.attempt("both ways", label, measure)


def memory_table(run: Run, spec: ArgSpec) -> None:
    """Peak memory that blend adds to a training step; nothing runs."""
    struct = jax.eval_shape(lambda: random_like(spec, (spec.rows, spec.features), 0))
    square = jax.ShapeDtypeStruct((spec.features, spec.features), struct.dtype)

    def peak(call: Callable[..., Any], capacity: int) -> int:
        rest = jax.eval_shape(
            lambda: rest_of(dataclasses.replace(spec, capacity=capacity), 1.0)
        )
        f = jax.jit(train_step(call))
        return memory(f.lower(struct, square, square, rest).compile())

    for capacity in sorted({spec.slots, min(8, spec.slots)}, reverse=True):
        own = dataclasses.replace(spec, capacity=capacity)

        def measure(own: ArgSpec = own, capacity: int = capacity) -> Any:
            base = peak(dormant, capacity)
            xla = peak(blended(own, "xla", None, run.smoke), capacity) - base
            ours = peak(blended(own, "triton", None, run.smoke), capacity) - base
            return {
                "base MiB": round(base / 2**20, 1),
                "xla adds MiB": round(xla / 2**20, 1),
                "triton adds MiB": round(ours / 2**20, 1),
                "to xla": round(ours / xla, 3) if xla else None,
            }

        run.attempt("memory", {"spec": spec.name, "slots": capacity}, measure)


def small_table(run: Run, spec: ArgSpec) -> None:
    """A small batch over very many seeds: time per layer in a loop of layers."""
    x = random_like(spec, (spec.rows, spec.features), 1)
    w = random_like(spec, (spec.features, spec.features), 2)
    none = rest_of(spec, 0.0)
    base_f = jax.jit(chained(dormant))
    base = run.attempt(
        "small batch",
        {"what": "dense base"},
        lambda: {"us": round(median_time(base_f, [(x, w, none)]) / CHAIN, 2)},
    ).get("us", float("nan"))
    for rows in (None, 8):
        own = dataclasses.replace(spec, statistics_rows=rows)
        for name in ("xla", "triton"):
            call = blended(own, name, None, run.smoke)
            f = jax.jit(chained(call))
            one, exact = jax.jit(call), blended(own, "xla", None, run.smoke)
            for living in (0.0, 1.0):
                rest = rest_of(spec, living)

                def measure(
                    f: Any = f, one: Any = one, exact: Any = exact, rest: Any = rest
                ) -> Any:
                    error = error_against_reference(one, exact, (x, rest))
                    us = median_time(f, [(x, w, rest)]) / CHAIN
                    return {
                        "us": round(us, 2),
                        "adds": round(us - base, 2),
                        "error": f"{error:.1e}",
                    }

                label = {"what": name, "living": living, "statistics": rows or "all"}
                run.attempt("small batch", label, measure)


def errors_table(run: Run, specs: list[ArgSpec]) -> None:
    """Errors of mixtures of stages and blueprints, forward and backward.

    In float32 as is, which is tf32 on a GPU, and with full precision asked for.
    """

    def errors(spec: ArgSpec, precision: str) -> dict[str, Any]:
        small = spec.small(rows=500, seeds=12)

        def both(implementation: str) -> Callable[..., Any]:
            call = blended(small, implementation, None, run.smoke)
            return jax.jit(there_and_back(call, scaled=False))

        one, exact = both("triton"), both("xla")
        worst = []
        for seed in range(2):
            arrays = small.arrays(seed, mixed=True)
            y = arrays.pop("y")
            args = (y, random_like(small, y.shape, seed), arrays)
            with jax.default_matmul_precision(precision):
                got = one(*args)
            with jax.default_matmul_precision("highest"):
                worst.append(error_against(lambda *_, got=got: got, exact, args))
        return {"error": f"{max(worst):.1e}"}

    jobs = [(spec, "default") for spec in specs]
    jobs += [(spec, "highest") for spec in specs if spec.dtype == "float32"]
    with concurrent.futures.ThreadPoolExecutor(1 if run.smoke else 12) as pool:
        futures = [pool.submit(errors, *job) for job in jobs]
        for (spec, precision), future in zip(jobs, futures, strict=True):
            label = {"spec": spec.name, "dtype": spec.dtype, "precision": precision}
            run.attempt("errors", label, future.result)


# Tuning.


def candidates(spec: ArgSpec, smoke: bool) -> list[tuple[str, Config]]:
    """The rule's blocks, and others in which one kernel differs."""
    hidden = hidden_width(resolve(spec.blueprints), spec.layout.width)
    rule = choose(
        spec.rows, spec.features, spec.layout.width, hidden, spec.dtype, "rule", None
    )
    found: list[tuple[str, Config]] = [("rule", rule)]

    def vary(kernel: str, options: dict[str, tuple[Any, ...]]) -> None:
        old: Blocks = getattr(rule, kernel)
        for values in itertools.product(*options.values()):
            new = dict(zip(options, values, strict=True))
            if smoke:
                new["rows"] = min(new["rows"], old.rows)
            blocks = dataclasses.replace(old, **new)
            entry = (kernel, dataclasses.replace(rule, **{kernel: blocks}))
            if blocks != old and entry not in found:
                found.append(entry)

    narrow = rule.narrow
    whole = rule.backward.across
    vary(
        "forward",
        {
            "rows": (4, 8, 16) if narrow else (64, 128),
            "across": (32, 64, 128) if narrow else (rule.forward.across,),
            "warps": (1, 2, 4) if narrow else (4, 8),
            "stages": (2,) if narrow else (2, 3, 4),
            "programs": (512, 2048) if narrow else (132, 264, 396, 528),
        },
    )
    vary(
        "backward",
        {
            "rows": (2, 4) if narrow else (32, 64, 128),
            "across": (32, 64, 128) if narrow else (whole, whole // 2),
            "warps": (1, 4, 8) if narrow else (4, 8),
            "stages": (2,) if narrow else (2, 3, 4),
            "programs": (256, 512, 1024) if narrow else (132, 264),
        },
    )
    vary(
        "statistics",
        {
            "rows": (2, 4, 8),
            "across": (256, 512, 1024),
            "warps": (4, 8),
            "programs": (264, 528, 1056),
        },
    )
    return found[:4] if smoke else found


def tune(run: Run, specs: list[ArgSpec], budget: float) -> None:
    """Times every candidate, compiled in parallel, until the seconds are spent."""
    end = time.perf_counter() + budget
    for number, spec in enumerate(specs):
        share = (end - time.perf_counter()) / (len(specs) - number)
        tune_one(run, spec, time.perf_counter() + share)


def tune_one(run: Run, spec: ArgSpec, end: float) -> None:
    xs = activations(spec)
    pairs = list(zip(xs[:SETS], xs[SETS:], strict=True))
    rests = {share: rest_of(spec, share) for share in (0.0, 0.1, 1.0)}

    def build(kernel: str, config: Config) -> Any:
        call = blended(spec, "triton", config, run.smoke)
        if kernel in ("forward", "statistics"):
            scaled = functools.partial(_scaled_forward, call)
            return jax.jit(scaled).lower(*pairs[0], rests[1.0]).compile()
        return jax.jit(there_and_back(call)).lower(*pairs[0], rests[1.0]).compile()

    found = candidates(spec, run.smoke)
    rule = found[0][1]
    jobs = [("forward", rule), ("backward", rule), *found[1:]]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        futures = [pool.submit(build, *job) for job in jobs]
        # Timing while others compile would time the host.
        concurrent.futures.wait(futures, timeout=end - time.perf_counter())
        end += 60
        for (kernel, config), future in zip(jobs, futures, strict=True):
            if time.perf_counter() > end:
                future.cancel()
                continue
            blocks = getattr(config, kernel)
            label = {
                "spec": spec.name,
                "kernel": kernel,
                "blocks": {k: v for k, v in dataclasses.asdict(blocks).items()},
                "rule": config == rule,
            }

            def measure(future: Any = future) -> Any:
                f = future.result(timeout=120)
                got = {}
                for share, rest in rests.items():
                    us = median_time(f, [(*p, rest) for p in pairs])
                    got[f"us at {share:.0%}"] = round(us, 1)
                return got

            run.attempt("tune", label, measure)


def _scaled_forward(call: Callable[..., Any], x: Any, gx: Any, rest: Any) -> Any:
    y = jax.lax.optimization_barrier(x * 1.5)
    return call(y, rest)


# Printing.


def print_tables(rows: list[dict[str, Any]]) -> None:
    for table in dict.fromkeys(row["table"] for row in rows):
        mine = [{k: v for k, v in r.items() if k != "table"} for r in rows]
        mine = [m for m, r in zip(mine, rows, strict=True) if r["table"] == table]
        if table == "tune":
            mine = best_of(mine)
        columns = list(dict.fromkeys(k for row in mine for k in row))
        text = [[str(row.get(c, "")) for c in columns] for row in mine]
        widths = [
            max(len(c), *(len(t[i]) for t in text)) for i, c in enumerate(columns)
        ]
        print(f"\n{table}")
        for line in [columns, ["-" * w for w in widths], *text]:
            print(" | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)))


def _merit(row: dict[str, Any]) -> float:
    """Less is better: dormant columns are all that the statistics' kernel reads."""
    if row["kernel"] == "statistics":
        return row["us at 0%"]
    return row["us at 100%"] * row["us at 10%"]


def best_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rule's blocks, and the three best."""
    kept = []
    groups = dict.fromkeys((r["spec"], r["kernel"]) for r in rows)
    for group in groups:
        mine = [r for r in rows if (r["spec"], r["kernel"]) == group]
        good = [r for r in mine if "us at 100%" in r]
        good.sort(key=_merit)
        kept += [r for r in mine if r["rule"]] + good[:4]
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="directory for details")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, any device")
    parser.add_argument("--tune", action="store_true", help="sweep block sizes")
    parser.add_argument(
        "--errors", action="store_true", help="errors of every shape, and no times"
    )
    parser.add_argument(
        "--specs",
        nargs="*",
        help="shapes to tune, or to time both ways and nothing else",
    )
    parser.add_argument("--budget", type=float, default=420, help="seconds to tune for")
    options = parser.parse_args()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    run = Run(options.smoke, options.out)
    device = jax.devices()[0]
    print(
        f"{device.device_kind}, jax {jax.__version__}, {len(jax.devices())} device(s)"
    )
    if device.platform != "gpu" and not run.smoke:
        parser.error("there is no GPU here; --smoke runs anywhere")
    specs = dict(ARG_SPECS)
    widths = WIDTHS
    if run.smoke:
        specs = {name: spec.small() for name, spec in specs.items()}
        widths = (16,)
    if options.tune:
        names = options.specs or [f"width_{w}" for w in (64, 16, 128)]
        if run.smoke:
            names = names[:1]
        tune(run, [specs[name] for name in names], options.budget)
    elif options.errors:
        errors_table(run, list(specs.values()))
    elif options.specs:
        both_ways_table(run, [specs[name] for name in options.specs], (0.1, 1.0))
    else:
        both_ways_table(run, [specs["width_64"]], (0.0, 0.1, 0.5, 1.0), SETS)
        forward_table(run, specs["width_64"])
        memory_table(run, specs["width_64"])
        small_table(run, specs["small_batch"])
        errors_table(run, [s for n, s in specs.items() if "width" not in n])
        names = [f"width_{w}" for w in widths if w != 64]
        both_ways_table(run, [specs[name] for name in names], (0.1, 1.0))
    print_tables(run.rows)


if __name__ == "__main__":
    main()
