"""Signals that stop training between two steps."""

import contextlib
import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

from esper_jax import _early
from esper_jax.growth.state import TrainState
from esper_jax.parallel.processes import exchange

__all__ = ["Interrupted", "Stop"]


_REPLACED = (signal.SIG_DFL, signal.default_int_handler, _early.leave)
"""Handlers that no program has chosen."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped `fit` between two steps. Nothing is lost: save the state.

    Attributes:
      state: after the last whole step; the last good one if there is a governor and
        that step broke training. `fit` goes on from it.
      number: of the signal.
    """

    def __init__(self, state: TrainState, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"training was stopped by {name} after step {state.step}")
        self.state = state
        self.number = number


class _Stopped(KeyboardInterrupt):
    """Raised by a signal.

    Where C code runs a string of Python, as many imports do, CPython takes exactly a
    `KeyboardInterrupt` for the end of the program: it then ends ``python -m`` as by
    SIGINT, even if it was caught and another status was asked for.
    """


class Stop:
    """Turns signals into a flag. A context manager.

    A handler that raises is not safe: JAX swallows what is raised in its callbacks, and
    a save may be cut in two. So inside of `held` the first signal only sets ``number``,
    which the loop reads between steps. Elsewhere it raises `KeyboardInterrupt` too. The
    second signal always ends what is going on.

    Signals that the program ignores or handles itself are left alone, and so are all of
    them outside of the main thread. The handlers from before come back in the end.

    Args:
      *numbers: the signals; by default SIGINT, which Ctrl-C sends.
      again: called with the number of a second signal; should not return. By default
        `KeyboardInterrupt` is raised.

    Attributes:
      number: of the first signal that came; None before.
    """

    def __init__(
        self, *numbers: int, again: Callable[[int], None] | None = None
    ) -> None:
        self.number: int | None = None
        self._numbers = numbers or (signal.SIGINT,)
        self._again = again
        self._held = False
        self._before: dict[int, Any] = {}
        self._hooks: tuple[Any, Any] | None = None

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers:
                if signal.getsignal(number) in _REPLACED:
                    self._before[number] = signal.signal(number, self._received)
        if self._before:
            before = sys.unraisablehook
            self._hooks = before, _quieter(before)
            sys.unraisablehook = self._hooks[1]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Another hook may have come over this one meanwhile, which then stays below it.
        if self._hooks is not None and sys.unraisablehook is self._hooks[1]:
            sys.unraisablehook = self._hooks[0]
        while self._before:
            signal.signal(*self._before.popitem())

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the first signal raises nothing."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    def check(self, state: TrainState) -> None:
        """Ends training if a signal has come.

        If several processes hold the state, all must call this, and a signal to one of
        them ends all. They wait for each other, so do it once a tick.

        Raises:
          Interrupted: with ``state``, which a step or a tick has just returned.
        """
        came = self.number or 0
        if _several(state):
            came = next(filter(None, map(int, exchange(str(came)))), 0)
        if came:
            self.number = self.number or came
            raise Interrupted(state, came)

    def check_step(self, state: TrainState) -> None:
        """The same between steps; does nothing if several processes hold the state.

        They may be at different steps, and one that stops alone leaves the others
        waiting.
        """
        if not _several(state):
            self.check(state)

    def _received(self, number: int, frame: FrameType | None) -> None:
        first = self.number is None
        if first:
            self.number = number
        elif self._again is not None:
            self._again(number)
        if not (first and self._held):
            raise _Stopped


def _quieter(before: Any) -> Any:
    """A `sys.unraisablehook` that prints no exception of a signal.

    A destructor or a callback of a weak reference swallows it. The signal is remembered
    all the same, and the loop ends for it.
    """

    @functools.wraps(before)  # with the marks that other hooks know each other by
    def hook(raised: "sys.UnraisableHookArgs") -> None:
        if raised.exc_type is not _Stopped:
            before(raised)

    return hook


def _several(state: TrainState) -> bool:
    """Whether the state is spread over several processes."""
    return not getattr(state.step, "is_fully_addressable", True)
