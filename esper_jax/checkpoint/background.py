"""Work in the background that is never lost in silence.

The interpreter waits for it before it ends, however the main thread ended. A failure is
raised by the next call; if there is none, it is printed.
"""

import atexit
import contextlib
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable

__all__ = ["Background", "settle"]

_log = logging.getLogger(__name__)


_WAITS = (3, 12) <= sys.version_info < (3, 12, 2)
"""These start no threads once the main one has ended (CPython, gh-113964), and Orbax
cannot write without: work that goes on by then would be lost."""


class Background:
    """Does one piece of work at a time in a thread, which some Pythons wait for."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._done.set()
        self._failure: BaseException | None = None
        self._work: Callable[[], None] | None = None
        _all.add(self)

    def __del__(self) -> None:
        if self._failure is not None:
            _log.error("%s", self._failure)

    @property
    def done(self) -> bool:
        """Whether no work goes on."""
        return self._done.is_set()

    def start(self, work: Callable[[], None]) -> None:
        """Starts ``work``, once what was started before has been joined.

        Raises:
          RuntimeError: if no thread can be started.
        """
        _wait_at_exit()
        self._done.clear()
        self._work = work
        thread = threading.Thread(target=self._run, name="esper-jax-save", daemon=False)
        try:
            thread.start()
        except BaseException:
            self._done.set()
            raise
        if _WAITS:
            self.finish()

    def join(self) -> None:
        """Waits for the work. If interrupted, it can be called again.

        Raises:
          BaseException: what the work raised; once.
        """
        # No Thread.join(): before Python 3.13 an interrupted one marks the thread as
        # stopped. The next join, and the interpreter's end, would not wait for it.
        self._done.wait()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def forget(self) -> None:
        """In a forked child, which has no such thread: leaves the work to the parent.

        A new event, because the thread may have held the lock of the old one.
        """
        self._done = threading.Event()
        self._done.set()
        self._failure = None

    def _run(self) -> None:
        try:
            assert self._work is not None
            self._work()
        except BaseException as error:
            # Without its stack, which would keep alive what the work held.
            error.__context__ = None
            self._failure = error.with_traceback(None)
        finally:
            self._work = None
            self._done.set()

    def finish(self) -> None:
        """Waits for the work, and leaves its failure to `join`."""
        self._done.wait()


def settle() -> None:
    """Waits for all work of this process that goes on."""
    for each in list(_all):
        each.finish()


_all: "weakref.WeakSet[Background]" = weakref.WeakSet()
_waits_at_exit = False


def _finish() -> None:
    for each in list(_all):
        try:
            each.join()
        except Exception as error:
            with contextlib.suppress(AttributeError, OSError, ValueError):
                print(f"esper_jax: {error}", file=sys.__stderr__, flush=True)


def _wait_at_exit() -> None:
    """Makes the interpreter's end wait for the work.

    Functions of `atexit` run too late: by then no executor takes work any more, and
    Orbax writes through executors. Those of `threading` run in the reverse order of
    their registration, so before the one of `concurrent.futures`, which Orbax has
    imported. The name is private; without it `atexit` at least tells of a failure.
    """
    global _waits_at_exit
    if not _waits_at_exit:
        getattr(threading, "_register_atexit", atexit.register)(_finish)
        _waits_at_exit = True


def _forget_all() -> None:
    for each in list(_all):
        each.forget()


os.register_at_fork(after_in_child=_forget_all)
