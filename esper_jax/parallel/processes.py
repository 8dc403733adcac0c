"""Several processes of one program: what they tell each other, and whole arrays.

A program has several after `jax.distributed.initialize`. With one, nothing here sends
anything. Every function must be called by all processes, in the same order.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

__all__ = ["exchange", "together", "whole"]

_Result = TypeVar("_Result")


_UNIT = 1024
"""Texts are filled up to a multiple of it: each length is one more to compile."""


def exchange(text: str) -> list[str]:
    """The text of each process, by its index."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([data.size], np.int32))
    room = _UNIT * (1 + int(sizes.max()) // _UNIT)
    rows = multihost_utils.process_allgather(np.pad(data, (0, room - data.size)))
    return [
        bytes(row[:size]).decode()
        for row, size in zip(np.asarray(rows), np.ravel(sizes), strict=True)
    ]


def together(work: Callable[[], _Result], failure: type[Exception]) -> _Result:
    """Does ``work`` in every process; where it fails in one, it fails in all.

    Args:
      work: may do different things in different processes, but must not wait for
        others in some of them alone.
      failure: raised, with the index and the words of the one that failed, in those
        that did not.

    Raises:
      Exception: the work's own, in the process that it is of.
    """
    if jax.process_count() == 1:
        return work()
    error: Exception | None = None
    try:
        result = work()
    except Exception as raised:
        error = raised
    said = exchange("" if error is None else str(error) or repr(error))
    if error is not None:
        raise error
    for index, text in enumerate(said):
        if text:
            raise failure(f"process {index}: {text}")
    return result


def whole(array: jax.Array) -> Any:
    """An array with all its values in this process.

    One that is spread over several processes is gathered, for which each of their
    devices must have room. Any other is returned as it is.
    """
    if array.is_fully_addressable or array.is_fully_replicated:
        return array
    return multihost_utils.process_allgather(array, tiled=True)
