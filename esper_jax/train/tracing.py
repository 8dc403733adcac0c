"""A program's functions, jitted; and how often each was traced, and so compiled."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from esper_jax.train.checks import checked

__all__ = ["compiled", "count_recompiles", "counted", "unmeasured_is_nan"]

_T = TypeVar("_T")


_DATA = {
    "step": "batch",
    "step_with_aux": "batch",
    "step_from": "data",
    "tick": "held_out",
    "evaluate": "data",
}
"""What a function calls its data, by the function's name."""


def compiled(
    check: Callable[[str, Any, bool], None], **functions: Callable[..., Any]
) -> dict[str, Callable[..., Any]]:
    """Functions of a program by name, jitted.

    They check their data first. All but ``evaluate`` donate the state, and their
    compilations are counted by ``recompiles``, which is returned too.

    Args:
      check: as `Checks`.
      **functions: ``function(state, data, ...)`` by the program's name for it.
    """
    traces: Counter[str] = Counter()

    def made(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        whole = name == "step_from"
        jitted = (
            jax.jit(function)
            if name == "evaluate"
            else jax.jit(
                counted(traces, function),
                donate_argnums=0,
                static_argnums=3 if whole else None,
            )
        )
        return checked(check, _DATA[name], unmeasured_is_nan(jitted), whole)

    made_of = {name: made(name, function) for name, function in functions.items()}
    return {**made_of, "recompiles": functools.partial(count_recompiles, traces)}


def unmeasured_is_nan(function: Callable[..., _T]) -> Callable[..., _T]:
    """Makes a function of a state run under ``jax_debug_nans``.

    NaN stands for what was not measured, so the flag is off inside. The host's
    parameters in the result are looked at instead.
    """

    @functools.wraps(function)
    def wrapper(*args: Any) -> _T:
        if not jax.config.jax_debug_nans:  # type: ignore[attr-defined]
            return function(*args)
        with jax.debug_nans(False):
            result = function(*args)
            first: Any = result[0] if isinstance(result, tuple) else result
            for name, value in getattr(first, "params", {}).items():
                _refuse_nan(name, value)
        return result

    return wrapper


def _refuse_nan(name: str, value: Any) -> None:
    """Raises as ``jax_debug_nans`` would, where values are known."""
    if isinstance(value, jax.core.Tracer):
        return
    if any(bool(jnp.any(jnp.isnan(leaf))) for leaf in jax.tree.leaves(value)):
        raise FloatingPointError(
            f"jax_debug_nans: the host's parameter {name!r} became NaN. To find the "
            "operation, differentiate the loss of that batch alone, outside the program"
        )


def counted(traces: Counter[str], function: Callable[..., _T]) -> Callable[..., _T]:
    """Wraps a function so that its calls are counted by name.

    Inside `jax.jit` that is how often it was traced, and so compiled.
    """

    @functools.wraps(function)
    def wrapper(*args: Any) -> _T:
        traces[function.__name__] += 1
        return function(*args)

    return wrapper


def count_recompiles(traces: Counter[str]) -> int:
    """How often the counted functions were traced again after their first time."""
    return sum(n - 1 for n in traces.values())
