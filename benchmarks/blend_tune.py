"""Finds block sizes of the Triton kernels."""

import concurrent.futures
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
from blend_calls import (
    SETS,
    Run,
    activations,
    blended,
    rest_of,
    static,
    there_and_back,
)
from blend_times import median_time

from esper_jax.kernels.blend.arg_specs import ArgSpec
from esper_jax.kernels.blend.triton.blocks import Blocks, Config
from esper_jax.kernels.blend.triton.config import choose


def _options(rule: Config) -> dict[str, dict[str, tuple[Any, ...]]]:
    """What to try, for each kernel."""
    whole = rule.backward.across
    return {
        "forward": {
            "rows": (64, 128),
            "across": (rule.forward.across,),
            "warps": (4, 8),
            "stages": (2, 3, 4),
            "programs": (132, 264, 396, 528),
        },
        "backward": {
            "rows": (32, 64, 128),
            "across": (whole,) if rule.narrow else (whole, whole // 2),
            "warps": (4, 8),
            "stages": (2, 3, 4),
            "programs": (132, 264),
        },
        "statistics": {
            "rows": (2, 4, 8),
            "across": (256, 512, 1024),
            "warps": (4, 8),
            "programs": (264, 528, 1056),
        },
    }


def candidates(spec: ArgSpec, smoke: bool) -> list[tuple[str, Config]]:
    """The rule's blocks, and others in which one kernel differs."""
    s = dataclasses.replace(static(spec, smoke), statistics_rows=None)
    rule = choose(s, spec.rows, "rule")
    found: list[tuple[str, Config]] = [("rule", rule)]
    for kernel, options in _options(rule).items():
        old: Blocks = getattr(rule, kernel)
        for values in itertools.product(*options.values()):
            new = dict(zip(options, values, strict=True))
            if smoke:
                new["rows"] = min(new["rows"], old.rows)
            blocks = dataclasses.replace(old, **new)
            entry = (kernel, dataclasses.replace(rule, **{kernel: blocks}))
            if blocks != old and entry not in found:
                found.append(entry)
    return found[:4] if smoke else found


def tune(run: Run, specs: list[ArgSpec], budget: float) -> None:
    """Times every candidate, compiled in parallel, until the seconds are spent."""
    end = time.perf_counter() + budget
    for number, spec in enumerate(specs):
        share = (end - time.perf_counter()) / (len(specs) - number)
        tune_one(run, spec, time.perf_counter() + share)


def tune_one(run: Run, spec: ArgSpec, end: float) -> None:
    """Times the candidates of one shape, until ``end``."""
    xs = activations(spec)
    pairs = list(zip(xs[:SETS], xs[SETS:], strict=True))
    rests = {share: rest_of(spec, share) for share in (0.0, 0.1, 1.0)}

    def build(kernel: str, config: Config) -> Any:
        f = there_and_back(blended(spec, "triton", run.smoke, config))
        if kernel in ("forward", "statistics"):
            call = blended(spec, "triton", run.smoke, config)
            f = functools.partial(_scaled_forward, call)
        return jax.jit(f).lower(*pairs[0], rests[1.0]).compile()

    def measure(future: Any) -> Any:
        f = future.result(timeout=120)
        got = {}
        for share, rest in rests.items():
            us = median_time(f, [(*pair, rest) for pair in pairs])
            got[f"us at {share:.0%}"] = round(us, 1)
        return got

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
            label = {
                "spec": spec.name,
                "kernel": kernel,
                "blocks": dataclasses.asdict(getattr(config, kernel)),
                "rule": config == rule,
            }
            run.attempt("tune", label, lambda future=future: measure(future))


def _scaled_forward(call: Callable[..., Any], x: Any, gx: Any, rest: Any) -> Any:
    y = jax.lax.optimization_barrier(x * 1.5)
    return call(y, rest)


def best_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rule's blocks, and the four best."""
    kept = []
    groups = dict.fromkeys((r["spec"], r["kernel"]) for r in rows)
    for group in groups:
        mine = [r for r in rows if (r["spec"], r["kernel"]) == group]
        good = [r for r in mine if "us at 100%" in r]
        good.sort(key=_merit)
        kept += [r for r in mine if r["rule"]] + good[:4]
    return kept


def _merit(row: dict[str, Any]) -> float:
    """Less is better. The statistics' kernel reads dormant columns alone."""
    if row["kernel"] == "statistics":
        return row["us at 0%"]
    return row["us at 100%"] * row["us at 10%"]
