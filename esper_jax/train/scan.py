"""A whole run on the device: training, ticks and growth inside one `jax.lax.scan`.

Nothing leaves the device until the run ends. You can therefore jit a run as one program
and vmap it: over random seeds, over the model's values, over any array of its
`TrainState`. Thousands of small runs then train side by side on one GPU.
"""

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float, Int, Key

from esper_jax.growth.parts import values_of
from esper_jax.growth.reports import TickReport
from esper_jax.growth.state import Arrays, TrainState
from esper_jax.train.loop import epoch_order
from esper_jax.train.program import Program
from esper_jax.train.recipe import Batch

__all__ = ["ScanReport", "scan_fit", "start_from"]


@struct.dataclass
class ScanReport:
    """What happened in a run. Every array has a leading axis of ticks."""

    ticks: Annotated[TickReport, "with a leading axis"]
    watched: Float[Array, "ticks 2"]
    """Loss and score on the watched data, of the same model as the tick's held-out
    loss, float32; NaN without watched data. Nothing in the run reads them."""


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

    Rows come in the same order as in `fit`, and steps and ticks are the same, so stages
    and slots are identical to those of `fit`, and floats agree to rounding. Jit it, and
    donate the state:

        run = jax.jit(functools.partial(scan_fit, program, ticks=100, batch_size=64))

    `jax.vmap` makes `jax.lax.cond` compute both branches, so under it a free slot costs
    as much as a living one.

    Args:
      program: made by `train.build`.
      state: must be at the beginning of an epoch, as after `Program.init` or a tick.
      data: arrays to train on, rows first.
      held_out: what the gates and the controller read: arrays, or a list of batches.
      ticks: number of ticks to run from this state.
      batch_size: rows per step.
      seed: seed for the order of the rows; may be traced.
      watched: the like, to evaluate before each tick, for the report only.

    Returns:
      The state after the last tick, and the report of all ticks.

    Raises:
      ValueError: if ``ticks`` is below 1, ``batch_size`` is below 1 or above the number
        of rows, or the data do not fit the program. Traced labels have no values yet,
        so those out of range give a loss of NaN instead.
    """
    program.check("data", data, True)
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
    """A function from a random key to a first state, with a model drawn from that key.

    `Program.init` starts every run with the values that the model had when the program
    was built. A sweep over random seeds needs new values for each run:

        states = jax.vmap(start_from(program, make))(jax.random.split(key, 100))

    Args:
      program: built from a model that ``make`` returned.
      make: ``make(rngs) -> model``. Shapes must not depend on the key.

    Returns:
      ``start(key) -> state``, jitted.
    """

    @jax.jit
    def start(key: Key[Array, ""]) -> TrainState:
        drawn, run = jax.random.split(key)
        values: Arrays = values_of(make(nnx.Rngs(drawn)))
        return program.init(run, values)

    return start
