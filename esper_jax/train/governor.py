"""The governor: keeps the last good state, notices when training breaks, and goes back.

`inspect` and `retreat` are pure and jitted; `Governor` holds the snapshot between them.
Once a tick, after all its steps, the state is checked. If it is sound, it is blessed: a
copy of it stays on the device. If not, training goes back to the copy, which is exact,
and leaves it on another way:

- the seeds that were active become ROLLED_BACK and wait for their embargo, those in
  GERMINATED become CANCELLED; FOSSILIZED ones stay;
- the random key is folded with the number of rollbacks, and `train.fit` shuffles the
  rows anew with it, so that the failed epoch is not replayed step by step.

More rollbacks in a row than the limit stop the run with `TrainingStopped`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from esper_jax.growth.recipe import Batch
from esper_jax.growth.reports import TickReport
from esper_jax.growth.state import TrainState
from esper_jax.train.faults import (
    Fault,
    GovernorConfig,
    bad_rows,
    first_wrong,
    inspect,
    sound_values,
)
from esper_jax.train.program import Program
from esper_jax.train.retreat import Rollback, TrainingStopped, retreat
from esper_jax.trees import copy_state

__all__ = ["Governor"]

_inspect = jax.jit(inspect, static_argnums=(2, 3))


_retreat = jax.jit(retreat, static_argnums=3, donate_argnums=0)


_sound_values = jax.jit(sound_values)


class Governor:
    """Holds the last good state of a run on its device, and returns to it.

    Args:
      program: of the run.
      config: the thresholds.
      num_classes: for the check for chance; None leaves it out.
      on_rollback: called with each `Rollback`.
    """

    def __init__(
        self,
        program: "Program",
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

    def start(self, state: TrainState) -> None:
        """Takes the state that a run begins with, or goes on from, as the first good
        one.

        Raises:
          ValueError: if it holds values that are not finite.
        """
        if not bool(_sound_values(state)):
            raise ValueError(
                f"state must hold finite values to start from; {first_wrong(state)}. "
                "Start from an older checkpoint"
            )
        self._good = copy_state(state)

    def restore(self) -> TrainState:
        """A copy of the last good state: its `state_hash` is the one that it had.

        Raises:
          RuntimeError: if there is none yet.
        """
        if self._good is None:
            raise RuntimeError("there is no good state yet: call start(state) first")
        return copy_state(self._good)

    def review(
        self, state: TrainState, report: TickReport, data: Batch, held_out: Batch
    ) -> tuple[TrainState, Rollback | None]:
        """Blesses the state after a tick, or goes back to the last good one.

        Waits for the tick to end, as reading its report does.

        Args:
          state: after the tick; not to be used again.
          report: of the tick, on the device.
          data: what was trained on, to say what is wrong with it.
          held_out: the data that the losses are watched on.

        Returns:
          The state to go on with, and the rollback if there was one.

        Raises:
          TrainingStopped: if there were more rollbacks in a row than allowed.
        """
        code, memory = _inspect(state, report, self.config, self._num_classes)
        fault = Fault(int(code))
        if fault == Fault.NONE:
            state = dataclasses.replace(state, governor=memory)
            self._good = copy_state(state)
            return state, None

        good = self.restore()
        known = good.governor.losses[0, 1]
        rollback = Rollback(
            number=int(state.governor.rollbacks) + 1,
            failed_tick=int(report.tick),
            tick=int(good.ticks),
            fault=fault,
            reason=self._reason(fault, state, report),
            layers={},
        )
        in_a_row = int(state.governor.consecutive) + 1
        state, layers = _retreat(
            good, jnp.int32(rollback.number), jnp.int32(in_a_row), self._gates
        )
        rollback = dataclasses.replace(rollback, layers=jax.device_get(layers))
        # Without the seeds that counted the loss may be higher. That is no new jump.
        higher = self._evaluate(state, held_out)[0] - known
        higher = jnp.where(jnp.isfinite(higher), jnp.maximum(higher, 0.0), 0.0)
        state = self._remember(state, state.governor.losses + higher)
        if self._on_rollback is not None:
            self._on_rollback(rollback)
        if in_a_row > self.config.max_rollbacks:
            # Whoever goes on from here has the full number of attempts again.
            calm = dataclasses.replace(
                state.governor, consecutive=jnp.zeros((), jnp.int32)
            )
            raise TrainingStopped(
                f"training stopped in tick {rollback.failed_tick}: {rollback.reason}. "
                f"{self.config.max_rollbacks} rollbacks in a row to tick "
                f"{rollback.tick} did not help{bad_rows(data)}",
                dataclasses.replace(state, governor=calm),
                rollback,
            )
        return state, rollback

    @staticmethod
    def _remember(state: TrainState, losses: Float[Array, "W 2"]) -> TrainState:
        memory = dataclasses.replace(state.governor, losses=losses)
        return dataclasses.replace(state, governor=memory)

    def _reason(self, fault: Fault, state: TrainState, report: TickReport) -> str:
        """The fault in words, with its numbers."""
        train, held_out = float(report.train_loss), float(report.loss)
        if fault == Fault.TRAIN_LOSS:
            return f"the train loss is {train:g}"
        if fault == Fault.GRADIENTS:
            return "the host's gradient is not finite"
        if fault == Fault.VALUES:
            return first_wrong(state)
        if fault == Fault.HELD_OUT_LOSS:
            return f"the held-out loss is {held_out:g}"
        if fault == Fault.JUMP:
            median = np.nanmedian(np.asarray(state.governor.losses), axis=0)
            return (
                f"the loss jumped by more than {self.config.deviations:g} deviations: "
                f"train {train:.4g} (median {median[0]:.4g}), "
                f"held-out {held_out:.4g} (median {median[1]:.4g})"
            )
        best = np.asarray(state.governor.best)
        return (
            f"the loss fell back to chance, ln {self._num_classes}: "
            f"train {train:.4g} (lowest {best[0]:.4g}), "
            f"held-out {held_out:.4g} (lowest {best[1]:.4g})"
        )
