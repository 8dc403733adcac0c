"""Errors of blend's implementations against plain JAX in float32."""

import concurrent.futures
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from blend_calls import KERNELS, Run, blended, random_like, there_and_back

from esper_jax.kernels.blend.arg_specs import ArgSpec


def wide(x: Any) -> Any:
    """``x`` in float32, if it is floating point; an array, or only its shape."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return x.astype(jnp.float32)


def error_against(
    f: Callable[..., Any], exact: Callable[..., Any], args: tuple[Any, ...]
) -> float:
    """The worst ``|got - want| / |want|`` of all results; ``exact`` gets float32.

    NaN in either is infinite. Where nothing but 0 is expected, the error is absolute.
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


def error_against_reference(
    f: Callable[..., Any], exact: Callable[..., Any], args: tuple[Any, ...]
) -> float:
    """`error_against` ``exact`` at full precision."""
    with jax.default_matmul_precision("highest"):
        return error_against(f, jax.jit(exact), args)


def _mixed_error(spec: ArgSpec, name: str, precision: str, smoke: bool) -> float:
    """The worst error over mixtures of stages and blueprints, forward and backward."""
    small = spec.small(rows=500, seeds=12)

    def both(implementation: str) -> Callable[..., Any]:
        call = blended(small, implementation, smoke)
        return jax.jit(there_and_back(call, scaled=False))

    one, exact = both(name), both("xla")
    worst = []
    for seed in range(2):
        arrays = small.arrays(seed, mixed=True)
        y = arrays.pop("y")
        args = (y, random_like(small, y.shape, seed), arrays)
        with jax.default_matmul_precision(precision):
            got = one(*args)
        with jax.default_matmul_precision("highest"):
            worst.append(error_against(lambda *_, got=got: got, exact, args))
    return max(worst)


def errors_table(run: Run, specs: list[ArgSpec]) -> None:
    """Errors of every shape, for each kernel.

    In float32 as is, which is tf32 on a GPU, and with full precision asked for.
    """
    jobs = [(spec, name, "default") for spec in specs for name in KERNELS]
    jobs += [
        (spec, name, "highest")
        for spec in specs
        for name in KERNELS
        if spec.dtype == "float32"
    ]
    with concurrent.futures.ThreadPoolExecutor(1 if run.smoke else 12) as pool:
        futures = [pool.submit(_mixed_error, *job, run.smoke) for job in jobs]
        for (spec, name, precision), future in zip(jobs, futures, strict=True):
            label = {
                "spec": spec.name,
                "what": name,
                "dtype": spec.dtype,
                "precision": precision,
            }
            run.attempt(
                "errors", label, lambda f=future: {"error": f"{f.result():.1e}"}
            )
