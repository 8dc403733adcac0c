"""What the benchmarks of blend call: its implementations, their inputs, and a run."""

import dataclasses
import json
import pathlib
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from esper_jax.kernels.blend import vjp
from esper_jax.kernels.blend.arg_specs import ArgSpec
from esper_jax.kernels.blend.registry import backends
from esper_jax.kernels.blend.static import Read, Slots, Static
from esper_jax.kernels.blend.triton.blocks import Config
from esper_jax.kernels.blend.triton.config import of_groups

IMPLEMENTATIONS = tuple(reversed(backends()))
"""Every backend, plain JAX first."""
KERNELS = tuple(name for name in IMPLEMENTATIONS if name != "xla")
SETS = 3
"""Sets of inputs that calls rotate among; together they are larger than the cache."""
_SLOTS = ("alpha", "beta", "blueprint", "seed_of_slot")


@dataclasses.dataclass
class Run:
    """Options and results of one run of the script."""

    smoke: bool
    out: pathlib.Path | None
    grouped: bool = False
    """Whether slots share tiles, whatever their width."""
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


def static(spec: ArgSpec, smoke: bool, config: Any = None) -> Static:
    """What is fixed of a call of blend; kernels are interpreted if ``smoke``."""
    return Static(**spec.options, dtype=spec.dtype, config=config, interpret=smoke)


def config_of(spec: ArgSpec, run: Run) -> Config | None:
    """Block sizes, where the run does not leave them to the kernels."""
    if not run.grouped:
        return None
    return of_groups(static(spec, run.smoke), spec.rows, jax.devices()[0].device_kind)


def blended(
    spec: ArgSpec, implementation: str, smoke: bool, config: Any = None
) -> Callable[..., Any]:
    """``(y, rest) -> out, statistics, reconstruction``."""
    backend, s = backends()[implementation], static(spec, smoke, config)

    def call(y: Any, rest: dict[str, Any]) -> Any:
        slots = Slots(**{name: rest[name] for name in _SLOTS})
        bias = rest.get("bias")
        if bias is not None:
            bias = bias.astype(y.dtype)
        return vjp.blend(backend, s, Read(y, None), rest["bank"], slots, bias=bias)

    return call


def dormant(y: Any, rest: dict[str, Any]) -> Any:
    """The layer that does not grow."""
    if "bias" in rest:
        y = y + rest["bias"].astype(y.dtype)
    return y, None, None


def there_and_back(call: Callable[..., Any], scaled: bool = True) -> Callable[..., Any]:
    """Forward and backward of blend alone.

    As in a training step, its inputs are the results of other work, so that it may
    overwrite them; here that is a scaling, which the base has too.
    """

    def f(x: Any, gx: Any, rest: dict[str, Any]) -> Any:
        y, g = x, gx
        if scaled:
            y, g = jax.lax.optimization_barrier((x * 1.5, gx * 0.5))

        names = [name for name in ("bank", "alpha", "bias") if name in rest]

        def g_of(y: Any, *given: Any) -> Any:
            out, *aside = call(y, {**rest, **dict(zip(names, given, strict=True))})
            return out, aside

        given = (rest[name] for name in names)
        out, pull, aside = jax.vjp(g_of, y, *given, has_aux=True)
        # The next layer needs the output before it can tell its gradient.
        out, g = jax.lax.optimization_barrier((out, g))
        return out, aside, pull(g)

    return f


def random_like(spec: ArgSpec, shape: tuple[int, ...], seed: int) -> Any:
    """Random numbers in the dtype of the spec; a weight is LeCun-normal."""
    scale = shape[0] ** -0.5 if shape[0] == spec.features else 1.0
    x = scale * jax.random.normal(jax.random.key(seed), shape, jnp.float32)
    return x.astype(spec.dtype)


def rest_of(spec: ArgSpec, living: float) -> dict[str, Any]:
    """The arguments of blend besides ``y``, with a share of the slots living."""
    arrays = dataclasses.replace(spec, rows=1).arrays(1, living=living)
    return {name: x for name, x in arrays.items() if name != "y"}


def activations(spec: ArgSpec) -> list[Any]:
    """`SETS` activations, and as many cotangents."""
    return [random_like(spec, (spec.rows, spec.features), i) for i in range(2 * SETS)]
