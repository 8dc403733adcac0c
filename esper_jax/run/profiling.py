"""Traces of JAX's profiler, of a few steps of a run.

Operations carry the names of the scopes that they stand in (``esper/blend``,
``esper/lifecycle``, ...), so that a trace tells growth from the model.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax

from esper_jax.run.session import Session

__all__ = ["Profile"]

_log = logging.getLogger(__name__)

_Run = TypeVar("_Run", bound=Session)


class Profile:
    """Records steps, and the ticks among them, after the first tick, which compiles.

    What goes wrong with it is logged, and training goes on. Process 0 records.

    Args:
      steps: to record; 0 for none.
      folder: that the trace is written into.
    """

    def __init__(self, steps: int, folder: Path) -> None:
        self._steps = 0 if jax.process_index() else steps
        self._folder = folder
        self._ready = self._begun = self._recording = False
        self._done = 0

    @contextlib.contextmanager
    def recording(self, session: _Run) -> Iterator[_Run]:
        """A session whose program is recorded."""
        if not self._steps:
            yield session
            return
        program = session.program
        recorded = program._replace(
            step=self._step(program.step),
            step_from=self._step(program.step_from),
            tick=self._tick(program.tick),
        )
        try:
            yield dataclasses.replace(session, program=recorded)
        finally:
            self._end()
            if self._done < self._steps:
                _log.warning(
                    "--profile: %d of %d steps were recorded: no more came after the "
                    "first tick, which is left out because it compiles",
                    self._done,
                    self._steps,
                )

    def _step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any) -> Any:
            if self._ready:
                self._begin()
            if not self._recording:
                return function(*args)
            with jax.profiler.StepTraceAnnotation("step", step_num=self._done):
                state = function(*args)
            self._done += 1
            if self._done == self._steps:
                jax.block_until_ready(state)
                self._end()
            return state

        return step

    def _tick(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def tick(*args: Any) -> Any:
            result = function(*args)
            self._ready = not self._begun
            return result

        return tick

    def _begin(self) -> None:
        self._ready, self._begun = False, True
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # its calls would hide all else
        with self._logged():
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._recording = True

    def _end(self) -> None:
        if self._recording:
            self._recording = False
            with self._logged():
                jax.profiler.stop_trace()

    @contextlib.contextmanager
    def _logged(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the profiler's own, or of the disk
            _log.warning("--profile: nothing is recorded: %s", error)
