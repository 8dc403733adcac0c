"""Which array of a layer's output grows, where a layer returns several."""

import copy
import dataclasses
import numbers
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

__all__ = ["Output", "check_output", "find_output", "with_output"]

Output = int | str | tuple[int | str, ...] | Callable[[Any], Any] | None
"""An index, a key or the name of a field; a path of them; a function from the output to
its array; None for the default."""


def check_output(output: Any) -> None:
    """Refuses what cannot choose an array of an output.

    Raises:
      TypeError: if it is no `Output`.
    """
    if callable(output):
        return
    path = output if isinstance(output, tuple) else (output,)
    whole = all(
        isinstance(k, str | numbers.Integral) and not isinstance(k, bool) for k in path
    )
    if output is not None and not (path and whole):
        raise TypeError(
            "output must be an index, a key, a tuple of them that leads to a nested "
            f"array, a function from the output to its array, or None; got {output!r}"
        )


def find_output(y: Any, output: Output, features: int, layer: str) -> tuple[Any, ...]:
    """The path of the array that grows: empty if ``y`` itself is the array.

    Args:
      y: what the layer returned.
      output: which array is asked for.
      features: width of the last axis that it must have.
      layer: name of the layer, for the error message.

    Raises:
      ValueError: if there is no such array, or it has another width.
    """
    if callable(output):
        found = _path_to(y, output(y))
        if found is None:
            raise ValueError(
                f"output must return an array that {layer} returned, not a new one; "
                f"{layer} returned {_words(y)}"
            )
        path = found
    elif output is not None:
        path = output if isinstance(output, tuple) else (output,)
    elif isinstance(y, tuple | list):
        fitting = [i for i, part in enumerate(y) if _fits(part, features)]
        path = tuple(fitting[:1])
    else:
        path = ()
    part = y
    for key in path:
        try:
            part = _child(part, key)
        except (LookupError, TypeError, AttributeError):
            raise ValueError(
                f"output={output!r} is not in what {layer} returned: {_words(y)}"
            ) from None
    if not _fits(part, features):
        advice = (
            "Pass the true width as features="
            if hasattr(part, "shape")
            else "Choose an array of it with output=, an index, a key or a path"
        )
        asked = "" if output is None else f" at output={output!r}"
        raise ValueError(
            f"base must return an array with {features} features on its last axis"
            f"{asked}; {layer} returned {_words(y)}. {advice}"
        )
    return path


def with_output(y: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """``y`` with ``change`` applied to the array at ``path``.

    Containers keep their types.
    """
    if not path:
        return change(y)
    key, rest = path[0], path[1:]
    new = with_output(_child(y, key), rest, change)
    if isinstance(y, tuple | list):
        kind: Any = type(y)
        index = key if isinstance(key, numbers.Integral) else kind._fields.index(key)
        parts = list(y)
        parts[index] = new
        return kind(*parts) if hasattr(y, "_fields") else kind(parts)
    if isinstance(y, MutableMapping):
        filled = copy.copy(y)  # keeps the order and what a subclass holds besides
        filled[key] = new
        return filled
    if isinstance(y, Mapping):
        mapping: Any = type(y)
        return mapping({k: new if k == key else value for k, value in y.items()})
    return dataclasses.replace(y, **{key: new})


def _path_to(y: Any, array: Any) -> tuple[Any, ...] | None:
    """The path at which ``y`` holds this very array; None if it does not."""
    if y is array:
        return ()
    if dataclasses.is_dataclass(y):
        keys: Any = [field.name for field in dataclasses.fields(y)]
    elif isinstance(y, Mapping):
        keys = list(y)
    else:
        keys = range(len(y)) if isinstance(y, tuple | list) else ()
    for key in keys:
        rest = _path_to(_child(y, key), array)
        if rest is not None:
            return (key, *rest)
    return None


def _child(y: Any, key: Any) -> Any:
    fields = hasattr(y, "_fields") or dataclasses.is_dataclass(y)
    if fields and isinstance(key, str):
        return getattr(y, key)
    if isinstance(y, tuple | list | Mapping):
        return y[key]
    raise TypeError


def _fits(y: Any, features: int) -> bool:
    return hasattr(y, "shape") and len(y.shape) >= 1 and y.shape[-1] == features


def _words(y: Any) -> str:
    """An output in words: shapes of arrays inside their containers."""
    if hasattr(y, "shape"):
        return str(tuple(y.shape))
    if isinstance(y, Mapping):
        return f"{{{', '.join(f'{k!r}: {_words(v)}' for k, v in y.items())}}}"
    if isinstance(y, tuple | list):
        parts = ", ".join(map(_words, y))
        return f"{type(y).__name__}({parts})"
    return type(y).__name__
