"""`fit`: the loop around step and tick."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from esper_jax.growth.reports import TickReport
from esper_jax.growth.state import TrainState
from esper_jax.parallel.replicas import check_replicas
from esper_jax.train.governor import Governor
from esper_jax.train.program import Program
from esper_jax.train.recipe import Batch

__all__ = ["epoch_order", "fit"]


def fit(
    program: Program,
    state: TrainState,
    data: Batch,
    held_out: Batch,
    *,
    ticks: int,
    batch_size: int,
    seed: int = 0,
    on_tick: Callable[[TrainState, TickReport], None] | None = None,
    governor: Governor | None = None,
) -> TrainState:
    """Trains until the state has seen ``ticks`` ticks, one after each epoch.

    The order of the rows in an epoch depends only on ``seed``, the epoch's number and
    the number of rollbacks, so a restored state continues where it stopped. Each epoch
    leaves out the last rows if they do not fill a batch.

    Args:
      program: made by `build`.
      state: where to start; donated.
      data: ``(x, y)`` to train on, rows first.
      held_out: ``(x, y)`` that the gates and the policy read.
      ticks: number of the tick to stop at, counted from the beginning of the run.
      batch_size: rows per step. Continue a restored state with the batch size it had:
        its position in the data is counted in steps.
      seed: seed for the order of the rows.
      on_tick: called after each tick with the state and the report on the host. Read
        the state but do not keep it: the next step donates it. Not called for a tick
        that the governor undid.
      governor: checks each tick and undoes it if training broke.

    Returns:
      The state after the last tick.

    Raises:
      ValueError: if ``x`` and ``y`` have different numbers of rows, if
        ``batch_size`` is below 1 or above the number of rows, if the devices do not
        divide the rows, or (in debug mode) if the devices hold different states.
      TrainingStopped: if the governor gives up.
    """
    data = _checked(program, "data", data, False)
    held_out = _checked(program, "held_out", held_out, True)
    rows = jax.tree.leaves(data)[0].shape[0]
    if not 1 <= batch_size <= rows:
        raise ValueError(
            f"batch_size must be from 1 to the {rows} rows of data, got {batch_size}"
        )
    per_epoch = rows // batch_size

    key = jax.random.key(seed)
    if governor is not None:
        governor.start(state)
    while (epoch := int(state.ticks)) < ticks:
        rollbacks = np.int32(state.governor.rollbacks)
        order = _jitted_order(key, np.int32(epoch), rollbacks, rows)
        order = program.place("order", order, False)
        for _ in range(per_epoch - int(state.step) % per_epoch):
            state = program.step_from(state, data, order, batch_size)
        state, report = program.tick(state, held_out)
        if not bool(report.replicas_agree):
            check_replicas(state)
            raise ValueError(
                "state must be the same on all devices, but differed before tick "
                f"{int(report.tick)}. Start all replicas from one state"
            )
        if governor is not None:
            state, rollback = governor.review(state, report, data, held_out)
            if rollback is not None:
                continue
        if on_tick is not None:
            on_tick(state, jax.device_get(report))
    return state


def epoch_order(
    seed: int | Int[Array, ""],
    epoch: Int[Array, ""],
    rollbacks: Int[Array, ""],
    rows: int,
) -> Int[Array, " rows"]:
    """The order of the rows in an epoch.

    It changes after a rollback; otherwise the same step would fail again.

    Args:
      seed: seed for the order of the rows; may be traced.
      epoch: number of the epoch.
      rollbacks: number of rollbacks since the beginning of the run.
      rows: number of rows.
    """
    return _order(jax.random.key(seed), epoch, rollbacks, rows)


def _order(key: Key[Array, ""], epoch: Array, rollbacks: Array, rows: int) -> Array:
    stream = epoch.astype(jnp.uint32) + (rollbacks.astype(jnp.uint32) << 24)
    return jax.random.permutation(jax.random.fold_in(key, stream), rows)


_jitted_order = jax.jit(_order, static_argnums=3)
"""Compiled once for each number of rows, whatever the seed."""


def _checked(program: Program, name: str, data: Batch, divided: bool) -> Batch:
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(data)]
    counts = {shape[:1] for shape in shapes}
    if len(counts) != 1 or counts & {(), (0,)}:
        raise ValueError(
            f"{name} must be (x, y) with the same number of rows, at least one, on the "
            f"first axis; got {shapes}"
        )
    return program.place(name, data, divided)
