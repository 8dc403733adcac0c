"""A whole run without the host: training, ticks and growth inside one `jax.lax.scan`.

Nothing leaves the device until the run has ended, so a run can be jitted as one program
and vmapped: over random seeds, over values of the model, over anything that is an array
in its `TrainState`. Thousands of small runs then train side by side on one GPU.
"""

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float, Int, Key

from esper_jax.growth.parts import values_of
from esper_jax.growth.recipe import Batch
from esper_jax.growth.reports import TickReport
from esper_jax.growth.state import Arrays, TrainState
from esper_jax.train.loop import epoch_order
from esper_jax.train.program import Program

__all__ = ["ScanReport", "scan_fit", "start_from"]


@struct.dataclass
class ScanReport:
    """What a run did, each field with a leading axis of its ticks."""

    ticks: Annotated[TickReport, "with a leading axis"]
    watched: Float[Array, "ticks 2"]
    """Loss and score on the data that nobody reads, of the same model as the tick's
    held-out loss; NaN where there is none."""


def scan_fit(
    program: Program,
    state: TrainState,
    data: Batch,
    held_out: Batch,
    *,
    ticks: int,
    batch_size: int,
    seed: int | Int[Array, ""] = 0,
    watched: Batch | None = None,
) -> tuple[TrainState, ScanReport]:
    """`train.fit` for ``ticks`` more ticks as one traced function, without a governor.

    The same rows in the same order, the same steps, the same ticks: stages and slots
    are those of `fit`, and floats agree to rounding. Jit it, and donate the state:

        run = jax.jit(functools.partial(scan_fit, program, ticks=100, batch_size=64))

    Under `jax.vmap` a `jax.lax.cond` computes both of its branches, so that every slot
    costs what a living one does.

    Args:
      program: as `train.build` makes it.
      state: at the beginning of an epoch, as after `Program.init` or a tick.
      data: ``(x, y)`` to train on, rows first.
      held_out: ``(x, y)`` that the gates and the controller read.
      ticks: how many to do, counted from the state.
      batch_size: rows a step.
      seed: of the order of the rows; may be traced.
      watched: ``(x, y)`` that is evaluated with each tick and read by nothing.

    Returns:
      The state after the last tick, and what happened at each.

    Raises:
      ValueError: if ``ticks`` is below 1 or the rows do not fill a batch.
    """
    rows = jax.tree.leaves(data)[0].shape[0]
    if ticks < 1:
        raise ValueError(f"ticks must be at least 1, got {ticks}")
    if not 1 <= batch_size <= rows:
        raise ValueError(
            f"batch_size must be from 1 to the {rows} rows of data, got {batch_size}"
        )

    def epoch(state: TrainState, _: None) -> tuple[TrainState, ScanReport]:
        order = epoch_order(seed, state.ticks, state.governor.rollbacks, rows)

        def step(state: TrainState, _: None) -> tuple[TrainState, None]:
            return program.step_from(state, data, order, batch_size), None

        state, _ = jax.lax.scan(step, state, None, length=rows // batch_size)
        seen = jnp.full(2, jnp.nan, jnp.float32)
        if watched is not None:
            seen = jnp.stack(program.evaluate(state, watched)).astype(jnp.float32)
        state, report = program.tick(state, held_out)
        return state, ScanReport(ticks=report, watched=seen)

    return jax.lax.scan(epoch, state, None, length=ticks)


def start_from(
    program: Program, make: Callable[[nnx.Rngs], nnx.Module]
) -> Callable[[Key[Array, ""]], TrainState]:
    """A first state for each random key, with a model freshly drawn from it.

    `Program.init` gives every run the values that the model had when it was built. This
    draws others, as a sweep over random seeds wants it:

        states = jax.vmap(start_from(program, make))(jax.random.split(key, 100))

    Args:
      program: built from a model that ``make`` made.
      make: ``make(rngs) -> model``, of the same shapes whatever the key.
    """

    @jax.jit
    def start(key: Key[Array, ""]) -> TrainState:
        drawn, run = jax.random.split(key)
        values: Arrays = values_of(make(nnx.Rngs(drawn)))
        return program.init(run, values)

    return start
