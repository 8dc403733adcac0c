"""`fit`: the loop around step and tick."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from esper_jax.growth.outside import Outside
from esper_jax.growth.reports import TickReport
from esper_jax.growth.state import TrainState
from esper_jax.parallel.replicas import check_replicas
from esper_jax.policy.memory import warn_of_fallback
from esper_jax.train.batches import DataError, Feed, is_iterable, stack
from esper_jax.train.checks import Checks
from esper_jax.train.diagnosis import explain_loss
from esper_jax.train.governor import Governor
from esper_jax.train.program import Program
from esper_jax.train.stop import Interrupted, Stop

__all__ = ["epoch_order", "fit"]

_log = logging.getLogger(__name__)


def fit(
    program: Program,
    state: TrainState,
    data: Any,
    held_out: Any,
    *,
    ticks: int,
    batch_size: int | None = None,
    steps_per_tick: int | None = None,
    seed: int = 0,
    on_tick: Callable[[TrainState, TickReport], None] | None = None,
    commands: Callable[[TrainState], Outside] | None = None,
    governor: Governor | None = None,
    stop: Stop | None = None,
) -> TrainState:
    """Trains until the state has seen ``ticks`` ticks, by default one after each epoch.

    The order of the rows of arrays in an epoch depends only on ``seed``, the epoch's
    number and the number of rollbacks, so a restored state continues where it stopped.
    Each epoch leaves out the last rows if they do not fill a batch.

    Batches of an iterable come as it gives them, in each pass anew, and none is read
    ahead. The state does not hold its position: after a rollback it goes on as it is.
    An iterator with ``get_state`` and ``set_state``, as grain's have, has its position
    in checkpoints: ``save(step, state, data=iterator)`` in ``on_tick``, and
    ``restore(like, data=iterator)``. An iterator without, such as a generator, has
    none, and a resumed run sees other batches. A list or a loader goes on where a tick
    was left, if a tick is a pass; with ``steps_per_tick`` it begins a new pass, unless
    it is given as `Passes`. Each new shape of a batch compiles the step once more.

    Once the policy lets nothing be born any more, as after a trial, the slots that are
    free are given back (`Program.shrink`): no value changes, and step and tick compile
    once more.

    A signal ends training after the step in hand. Where several processes hold the
    state, a signal to one of them ends all of them after the tick in hand.

    Args:
      program: made by `build`.
      state: where to start; donated.
      data: arrays to train on, rows first: ``(x, y)``, or any pytree if the program has
        an objective. Or an iterable of batches: a list, a loader, an iterator, or a
        function that returns one and is called for each pass. A list is always taken
        for batches.
      held_out: what the gates and the policy read: arrays, or an iterable of batches.
        It is read once, to its end, and kept on the device. Each batch counts by its
        rows.
      ticks: number of the tick to stop at, counted from the beginning of the run.
      batch_size: rows per step, for arrays. Continue a restored state with the batch
        size it had: its position in the data is counted in steps. An iterable's batches
        have their own; if given, none may have more rows.
      steps_per_tick: steps before each tick, for an iterable; by default a tick comes
        after each pass.
      seed: seed for the order of the rows.
      on_tick: called after each tick with the state and the report on the host. Read
        the state but do not keep it: the next step donates it. Not called for a tick
        that the governor undid.
      commands: called before each tick with the state; returns what is asked from
        outside at that tick, of all layers. Several processes must return the same.
      governor: checks each tick and undoes it if training broke.
      stop: signals to end for, in place of SIGINT; entered by the caller. Where the
        program has a handler of its own for SIGINT, it is left alone.

    Returns:
      The state after the last tick.

    Raises:
      ValueError: if the data do not fit the program (rows, labels, shape of the loss),
        if ``batch_size`` is below 1 or above the number of rows, if an iterable ends
        before the last tick, if the devices do not divide the rows, or (in debug mode)
        if the devices hold different states.
      TrainingStopped: if the governor gives up.
      Interrupted: if a signal came.
    """
    steps = _epochs(program, data, batch_size, steps_per_tick, seed)
    held_out = _held_out(program, state, held_out)
    seen = None if is_iterable(data) else data
    told = False
    state, _ = program.shrink(state)  # restored into more slots than it was saved with
    if governor is not None:
        governor.start(state)
    with _stopping(stop, governor) as asked:
        while int(state.ticks) < ticks:
            asked.check(state)
            state = steps(state, asked.check_step)
            outside = () if commands is None else (commands(state),)
            state, report = program.tick(state, held_out, *outside)
            _check_agreement(state, report)
            warn_of_fallback(report.reason, report.tick)
            state, changed = program.shrink(state)
            if governor is not None:
                state, rollback = governor.review(state, report, seen, held_out)
                if rollback is not None:
                    continue
                if changed:
                    state = governor.allow_for(state, report, held_out)
            elif not told:
                told = _tell_if_broken(state, report, seen, held_out)
            if changed:
                _tell_of_slots(report, changed)
            if on_tick is not None:
                on_tick(state, jax.device_get(report))
        asked.check(state)
    return state


@contextlib.contextmanager
def _stopping(stop: Stop | None, governor: Governor | None) -> Iterator[Stop]:
    """Signals as a flag; a governor vouches for the state that a stop carries."""
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(Stop())
        stack.enter_context(stop.held())
        try:
            yield stop
        except Interrupted as stopped:
            if governor is not None:
                stopped.state = governor.sound(stopped.state)
            raise


def _check_agreement(state: TrainState, report: TickReport) -> None:
    if not bool(report.replicas_agree):
        check_replicas(state)
        raise ValueError(
            "state must be the same on all devices, but differed before tick "
            f"{int(report.tick)}. Start all replicas from one state"
        )


def _tell_of_slots(report: TickReport, changed: Mapping[str, tuple[int, int]]) -> None:
    """Logs which slots were given back."""
    freed = sum(before - after for before, after in changed.values())
    _log.info(
        "tick %d: nothing germinates any more, so %d free slots in %d layers are given "
        "back; the step compiles once more",
        int(report.tick),
        freed,
        len(changed),
    )


def _tell_if_broken(
    state: TrainState, report: TickReport, data: Any, held_out: Any
) -> bool:
    """Logs what is known where a loss is not finite, and says whether it is."""
    if np.isfinite(report.train_loss) and np.isfinite(report.loss):
        return False
    _log.warning(
        "tick %d: %s. Training goes on, but the model may be lost. Mend the data or "
        "the learning rate and start from an earlier state; with "
        "fit(..., governor=Governor(program)) such a tick is undone",
        int(report.tick),
        explain_loss(state, report, data, held_out),
    )
    return True


_Check = Callable[[TrainState], None]
_Epoch = Callable[[TrainState, _Check], TrainState]


def _epochs(
    program: Program,
    data: Any,
    batch_size: int | None,
    steps_per_tick: int | None,
    seed: int,
) -> _Epoch:
    """The steps before a tick: a function of the state, and of what checks each."""
    if is_iterable(data):
        if steps_per_tick is not None and steps_per_tick < 1:
            raise ValueError(f"steps_per_tick must be at least 1, got {steps_per_tick}")
        return _from_batches(program, data, steps_per_tick, batch_size)
    if steps_per_tick is not None:
        raise ValueError(
            "steps_per_tick is for an iterable of batches; arrays have one tick an "
            f"epoch, got {steps_per_tick}. Leave it out, or give batches"
        )
    program.check("data", data, True)
    rows = jax.tree.leaves(data)[0].shape[0]
    if batch_size is None or not 1 <= batch_size <= rows:
        raise ValueError(
            f"batch_size must be from 1 to the {rows} rows of data, got {batch_size}"
        )
    return _from_arrays(program, program.place("data", data, False), batch_size, seed)


def _from_arrays(program: Program, data: Any, batch_size: int, seed: int) -> _Epoch:
    rows = jax.tree.leaves(data)[0].shape[0]
    per_epoch = rows // batch_size
    key = jax.random.key(seed)

    def epoch(state: TrainState, check: _Check) -> TrainState:
        number, rollbacks = np.int32(state.ticks), np.int32(state.governor.rollbacks)
        order = _jitted_order(key, number, rollbacks, rows)
        order = program.place("order", order, False)
        for _ in range(per_epoch - int(state.step) % per_epoch):
            # Not after the last: a state that waits for its tick looks as if it began
            # an epoch.
            check(state)
            state = program.step_from(state, data, order, batch_size)
        return state

    return epoch


def _from_batches(
    program: Program, data: Any, steps_per_tick: int | None, batch_size: int | None
) -> _Epoch:
    feed = Feed(data, steps_per_tick)

    def epoch(state: TrainState, check: _Check) -> TrainState:
        done = int(state.step)
        batches = feed.tick(done, int(state.monitor.steps))
        # Counted here: to read the step from the state would wait for the device.
        for number, batch in enumerate(batches, done + 1):
            program.check("a batch of data", batch, False)
            rows = jax.tree.leaves(batch)[0].shape[:1]
            if batch_size is not None and rows and rows[0] > batch_size:
                raise DataError(
                    f"batch_size must be at least the {rows[0]} rows of a batch of "
                    f"data, got {batch_size}. Leave it out: batches have their own size"
                )
            placed = program.place("a batch of data", batch, True)
            if isinstance(program.check, Checks):
                program.check.vouch(placed)
            state = program.step(state, placed)
            if steps_per_tick is None or number % steps_per_tick:
                check(state)
        return state

    return epoch


def _held_out(program: Program, state: TrainState, data: Any) -> Any:
    """The held-out data on the devices, after a look at what the loss makes of them."""
    if is_iterable(data):
        data = stack("held_out", data, program.check)
    program.check("held_out", data, False)
    data = program.place("held_out", data, True)
    jax.eval_shape(program.evaluate, state, data)
    return data


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
