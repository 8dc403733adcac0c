"""The governor keeps the last good state and returns to it when training breaks.

`inspect` and `retreat` are pure and jitted; `Governor` holds the snapshot between them.
It checks the state once a tick, after all steps. A sound state is blessed: a copy of it
stays on the device. After a fault, training goes back to that copy, which is exact, and
leaves it on another way:

- active seeds become ROLLED_BACK and wait for their embargo, seeds in GERMINATED become
  CANCELLED, and FOSSILIZED ones stay;
- the random key is folded with the number of rollbacks, and `fit` shuffles the rows
  anew, so that the failed epoch is not replayed step by step.

More rollbacks in a row than the limit stop the run with `TrainingStopped`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from esper_jax.growth.reports import TickReport
from esper_jax.growth.state import TrainState
from esper_jax.train.diagnosis import bad_rows, explain_fault
from esper_jax.train.faults import (
    Fault,
    GovernorConfig,
    first_wrong,
    infinite_leaves,
    inspect,
    sound_values,
)
from esper_jax.train.program import Program
from esper_jax.train.recipe import Batch
from esper_jax.train.retreat import Rollback, TrainingStopped, retreat
from esper_jax.trees import copy_state

__all__ = ["Governor"]

_inspect = jax.jit(inspect, static_argnums=(2, 3, 4))
_retreat = jax.jit(retreat, static_argnums=3, donate_argnums=0)
_sound_values = jax.jit(sound_values, static_argnums=1)


class Governor:
    """Holds the last good state of a run on its device, and returns to it.

    Args:
      program: of the run.
      config: the thresholds.
      num_classes: number of classes, for the check for chance; None leaves it out.
      on_rollback: called with each `Rollback`.
    """

    def __init__(
        self,
        program: Program,
        config: GovernorConfig | None = None,
        *,
        num_classes: int | None = None,
        on_rollback: Callable[[Rollback], None] | None = None,
    ) -> None:
        self.config = config or GovernorConfig()
        self._num_classes = num_classes
        self._on_rollback = on_rollback
        self._evaluate = program.evaluate
        self._gates = program.gates
        self._good: TrainState | None = None
        self._infinite: frozenset[str] = frozenset()

    @jax.debug_nans(False)  # NaN is what was not measured
    def start(self, state: TrainState) -> None:
        """Takes the state that a run begins with, or goes on from, as good.

        Raises:
          ValueError: if it holds values that are not finite. Optimizers and other
            variables of the model may hold infinity, and may go on to.
        """
        self._infinite = infinite_leaves(state)
        if not bool(_sound_values(state, self._infinite)):
            raise ValueError(
                "state must hold finite values for a governor to start from; "
                f"{first_wrong(state, self._infinite)}. Start from an older checkpoint"
            )
        self._good = copy_state(state)

    def sound(self, state: TrainState) -> TrainState:
        """The state, if it holds no value that can break training; else the last good.

        Args:
          state: after any step.
        """
        sound = bool(_sound_values(state, self._infinite))
        return state if sound else self.restore()

    def restore(self) -> TrainState:
        """A copy of the last good state, with the same `state_hash`.

        Raises:
          RuntimeError: if there is none yet.
        """
        if self._good is None:
            raise RuntimeError("there is no good state yet: call start(state) first")
        return copy_state(self._good)

    @jax.debug_nans(False)
    def review(
        self,
        state: TrainState,
        report: TickReport,
        data: Batch | None,
        held_out: Batch,
    ) -> tuple[TrainState, Rollback | None]:
        """Blesses the state after a tick, or goes back to the last good one.

        Waits for the tick to end, as reading its report does.

        Args:
          state: after the tick; do not use it again.
          report: of the tick, on the device.
          data: arrays that were trained on, to say what is wrong with them; None for
            an iterable of batches.
          held_out: data that the losses are watched on.

        Returns:
          The state to go on with, and the rollback if there was one.

        Raises:
          TrainingStopped: if there were more rollbacks in a row than allowed.
        """
        code, memory = _inspect(
            state, report, self.config, self._num_classes, self._infinite
        )
        fault = Fault(int(code))
        if fault == Fault.NONE:
            state = dataclasses.replace(state, governor=memory)
            self._good = copy_state(state)
            return state, None
        in_a_row = int(state.governor.consecutive) + 1
        state, rollback = self._go_back(state, report, fault, held_out)
        if self._on_rollback is not None:
            self._on_rollback(rollback)
        if in_a_row > self.config.max_rollbacks:
            raise TrainingStopped(
                f"training stopped in tick {rollback.failed_tick}: {rollback.reason}. "
                f"{self.config.max_rollbacks} rollbacks in a row to tick "
                f"{rollback.tick} did not help"
                f"{bad_rows(data, 'training')}{bad_rows(held_out, 'held-out')}",
                # Whoever goes on from here has the full number of attempts again.
                _remember(state, consecutive=jnp.zeros((), jnp.int32)),
                rollback,
            )
        return state, rollback

    def allow_for(
        self, state: TrainState, report: TickReport, held_out: Batch
    ) -> TrainState:
        """The state after parts were taken out on purpose, which may raise the loss.

        The losses that are remembered are raised by as much, as after a rollback, so
        that the next tick is not taken for a jump.

        Args:
          state: after a tick that `review` found good.
          report: of that tick.
          held_out: data that the losses are watched on.
        """
        state = self._raised(state, report.loss, held_out)
        self._good = copy_state(state)
        return state

    def _raised(self, state: TrainState, known: Array, held_out: Batch) -> TrainState:
        higher = self._evaluate(state, held_out)[0] - known
        higher = jnp.where(jnp.isfinite(higher), jnp.maximum(higher, 0.0), 0.0)
        return _remember(state, losses=state.governor.losses + higher)

    def _go_back(
        self, failed: TrainState, report: TickReport, fault: Fault, held_out: Batch
    ) -> tuple[TrainState, Rollback]:
        """The last good state, on another way, and what was done."""
        good = self.restore()
        known = good.governor.losses[0, 1]
        number = int(failed.governor.rollbacks) + 1
        in_a_row = int(failed.governor.consecutive) + 1
        tick = int(good.ticks)
        state, layers = _retreat(
            good, jnp.int32(number), jnp.int32(in_a_row), self._gates
        )
        # Without the seeds that counted the loss may be higher. That is no new jump.
        state = self._raised(state, known, held_out)
        return state, Rollback(
            number=number,
            failed_tick=int(report.tick),
            tick=tick,
            fault=fault,
            reason=explain_fault(
                fault, failed, report, self.config, self._num_classes, self._infinite
            ),
            layers=jax.device_get(layers),
        )


def _remember(state: TrainState, **changes: Array) -> TrainState:
    """The state with other values in the governor's memory."""
    memory = dataclasses.replace(state.governor, **changes)
    return dataclasses.replace(state, governor=memory)
