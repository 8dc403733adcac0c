"""Data that come in batches: what is held out, and what `fit` trains on."""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

__all__ = ["Batches", "DataError", "Feed", "Passes", "cut", "is_iterable", "stack"]


class DataError(ValueError):
    """Data that a program cannot use; the message says what to do."""


@struct.dataclass
class Batches:
    """Batches as one pytree, those of equal shapes stacked."""

    groups: tuple[Any, ...]
    """Pytrees of arrays with a leading axis of batches."""


def is_iterable(data: Any) -> bool:
    """Whether data are an iterable of batches, and not a pytree of arrays.

    A list is one. So is what JAX knows nothing of and Python can iterate over, or a
    function that returns such a thing.
    """
    if isinstance(data, list):
        return True
    unknown = jax.tree_util.all_leaves([data]) and not hasattr(data, "shape")
    can_iterate = callable(data) or hasattr(data, "__iter__")
    return unknown and can_iterate and not isinstance(data, str | bytes)


def stack(
    name: str,
    data: Iterable[Any] | Callable[[], Iterable[Any]],
    check: Callable[[str, Any, bool], None],
) -> Batches:
    """Reads an iterable of batches once, to its end.

    Args:
      name: the argument's, for the error message.
      data: batches of any pytree, or a function that returns an iterable of them.
      check: called with the name of each batch, the batch and False; see `Checks`.

    Raises:
      DataError: if there are none, or ``check`` refuses one.
    """
    groups: dict[Any, list[Any]] = collections.defaultdict(list)
    for number, batch in enumerate(data() if callable(data) else data):
        check(f"batch {number} of {name}", batch, False)
        batch = jax.tree.map(_array, batch)
        leaves, tree = jax.tree.flatten(batch)
        groups[tree, tuple((x.shape, str(x.dtype)) for x in leaves)].append(batch)
    if not groups:
        raise DataError(
            f"{name} must hold at least one batch; got none. An iterator gives its "
            "batches once: make a list of them"
        )
    return Batches(tuple(jax.tree.map(_stacked, *group) for group in groups.values()))


def cut(data: Any, size: int) -> Batches:
    """Arrays as batches of ``size`` rows, and one of the rows that are left over.

    Each batch has rows from everywhere, so that every device has a part of each where
    the rows are divided.
    """
    rows = jax.tree.leaves(data)[0].shape[0]
    whole = rows // size * size

    def batched(a: Any) -> Any:
        a = jnp.asarray(a)[:whole]
        return jnp.swapaxes(a.reshape(size, whole // size, *a.shape[1:]), 0, 1)

    groups = [jax.tree.map(batched, data)] if whole else []
    if whole < rows:
        groups.append(jax.tree.map(lambda a: jnp.asarray(a)[None, whole:], data))
    return Batches(tuple(groups))


class Passes:
    """Batches without end, pass after pass, with a position that can be saved.

    Give it to `fit`, with ``steps_per_tick``, and to ``Checkpointer.save(data=...)``
    where a pass of a list or a loader may be left in its middle. Going to a position
    begins that pass anew: an iterator with ``get_state`` and ``set_state`` is sent to
    its place, of any other the batches before it are read again. So each pass must give
    the same batches when it is begun again.

    Args:
      data: a list, a loader, or a function that returns an iterator for each pass; not
        an iterator, which gives its batches once.

    Raises:
      TypeError: if it is an iterator.
    """

    def __init__(self, data: Any) -> None:
        if not callable(data) and iter(data) is data:
            raise TypeError(
                "data must begin anew for each pass: a list, a loader, or a function "
                f"that returns an iterator; got an iterator, {type(data).__name__}"
            )
        self._data = data
        self._pass: Any = iter(())
        self._number = 0
        self._done = 0

    def __iter__(self) -> "Passes":
        return self

    def __next__(self) -> Any:
        for _ in range(2):
            for batch in self._pass:
                self._done += 1
                return batch
            self._begin(self._number + 1)
        raise StopIteration  # a pass without batches

    def get_state(self) -> dict[str, Any]:
        """The number of the pass, the batches given of it, and its iterator's own."""
        own = self._pass.get_state() if _has_position(self._pass) else None
        return {"pass": self._number, "done": self._done, "own": own}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was called."""
        if not state["pass"]:
            self._pass, self._number, self._done = iter(()), 0, 0
            return
        self._begin(state["pass"])
        if state["own"] is not None and _has_position(self._pass):
            self._pass.set_state(state["own"])
        else:
            collections.deque(itertools.islice(self._pass, state["done"]), maxlen=0)
        self._done = state["done"]

    def _begin(self, number: int) -> None:
        again = self._data() if callable(self._data) else self._data
        self._pass, self._number, self._done = iter(again), number, 0


def _has_position(batches: Any) -> bool:
    """Whether an iterator can both say where it is and go there."""
    return hasattr(batches, "get_state") and hasattr(batches, "set_state")


class Feed:
    """Gives an iterable's batches, tick by tick.

    Args:
      data: a list, a loader, an iterator, or a function that returns one of them and
        is called for each pass.
      steps_per_tick: batches in each tick; None for one pass.
    """

    def __init__(self, data: Any, steps_per_tick: int | None) -> None:
        self._data = data
        self._steps = steps_per_tick
        self._pass: Iterator[Any] = iter(())
        self._given = 0

    def tick(self, done: int, since: int) -> Iterator[Any]:
        """The batches of a tick, or those that are left of it.

        Args:
          done: steps that the state has done since the beginning of the run.
          since: steps that it has done since its last tick.

        Raises:
          DataError: if they run out.
        """
        if self._steps is None:
            self._pass = self._again()
            if not since:
                yield self._next()
            elif self._pass is not self._data:  # an iterator goes on by itself
                collections.deque(itertools.islice(self._pass, since), maxlen=0)
            for batch in self._pass:
                self._given += 1
                yield batch
            return
        for _ in range(self._steps - done % self._steps):
            yield self._next()

    def _again(self) -> Iterator[Any]:
        return iter(self._data() if callable(self._data) else self._data)

    def _next(self) -> Any:
        for batch in self._pass:
            self._given += 1
            return batch
        self._pass = self._again()
        for batch in self._pass:
            self._given += 1
            return batch
        raise DataError(
            f"data must hold batches for all ticks, but ended after {self._given}. An "
            "iterator gives its batches once: give a list, a loader, or a function "
            "that returns a new iterator, or fewer ticks"
        )


def _array(x: Any) -> Any:
    return x if isinstance(x, jax.Array) else np.asarray(x)


def _stacked(*leaves: Any) -> Any:
    if any(isinstance(x, jax.Array) for x in leaves):
        return jnp.stack(leaves)
    return np.stack(leaves)
