"""Messages between the processes of one program, and arrays gathered from all of them.

`jax.distributed.initialize` joins several processes. With a single process nothing is
sent. All processes must call every function here, in the same order.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

__all__ = ["exchange", "together", "whole"]

_Result = TypeVar("_Result")


_UNIT = 1024
"""Bytes. Texts are padded to a multiple of it, since each new length compiles anew."""


def exchange(text: str) -> list[str]:
    """The text that each process passed, in order of process index."""
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
    """Runs ``work`` in every process. If it fails in one, it raises in all.

    Args:
      work: may differ between processes, but must not run a collective (wait for other
        processes) in only some of them.
      failure: raised in the processes whose work succeeded, with the index and the
        message of the first one that failed.

    Returns:
      What ``work`` returned in this process.

    Raises:
      Exception: what ``work`` raised, in the process where it failed.
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

    An array that is spread over several processes is gathered; each of their devices
    must have room for all of it. Any other array is returned unchanged.
    """
    if array.is_fully_addressable or array.is_fully_replicated:
        return array
    return multihost_utils.process_allgather(array, tiled=True)
