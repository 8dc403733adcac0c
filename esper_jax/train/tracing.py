"""How often a function was traced, and so compiled."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["count_recompiles", "counted"]

_T = TypeVar("_T")


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
