"""Runs an arm of `change.py`: many whole runs as one program.

A training run is one scan; the program is that scan under `jax.vmap` over runs. Run
``i`` of every arm draws its host from the same key and sees the same rows in the same
order.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from change_arms import Arm
from change_operations import COUNTS, bed_options, run_operations, steps_per_tick
from change_tasks import Task, host_size
from flax import nnx

from esper_jax.blueprints import param_counts
from esper_jax.data import Dataset
from esper_jax.growth.state import TrainState
from esper_jax.optim import PerSlot, per_slot, scale_by_run_schedule
from esper_jax.train import Program, build, scan_fit, start_from

__all__ = ["Runner", "Runs", "last", "stopped"]


@dataclasses.dataclass(frozen=True)
class Runs:
    """What an arm's ``R`` runs did at each of ``T`` ticks."""

    accuracy: np.ndarray
    """Accuracy on held-out data, (R, T)."""
    loss: np.ndarray
    """Loss on held-out data, (R, T)."""
    test: np.ndarray
    """Accuracy on test data, (R, T)."""
    parameters: np.ndarray
    """Parameters of the host and of the blueprints that count, (R, T)."""
    operations: np.ndarray
    """Floating-point operations of the whole run, (R,)."""
    stages: dict[str, np.ndarray]
    """Stage of each seed by layer, (R, T, S)."""
    seconds: float
    """Wall time of all runs together, without compilation."""


def last(values: np.ndarray, task: Task) -> np.ndarray:
    """``values`` (R, T) at the last tick of each phase, averaged over phases: (R,)."""
    return values.reshape(len(values), task.phases, -1)[:, :, -1].mean(axis=1)


def stopped(runs: Runs, task: Task) -> np.ndarray:
    """Test accuracy at each phase's best held-out tick, averaged over phases: (R,)."""
    by_phase = (len(runs.test), task.phases, -1)
    best = runs.accuracy.reshape(by_phase).argmax(axis=2)[..., None]
    picked = np.take_along_axis(runs.test.reshape(by_phase), best, axis=2)
    return picked[..., 0].mean(axis=1)


class Runner:
    """The program of an arm.

    Args:
      task: what to learn.
      arm: how to learn it.
      data: the three-way split.
      count: runs at a time.
    """

    def __init__(self, task: Task, arm: Arm, data: Dataset, count: int) -> None:
        self.task, self.arm, self.count = task, arm, count
        self._data = data
        self._costs: dict[str, np.ndarray] = {}
        self._compiled: Any = None

    def compile(self) -> "Runner":
        """Compiles the program if that has not been done, and returns the runner."""
        if self._compiled is None:
            task, arm = self.task, self.arm
            options = bed_options(task, arm)

            def make(rngs: nnx.Rngs) -> nnx.Module:
                return task.make(rngs, arm.widths, **options)

            program = _program(task, arm, make(nnx.Rngs(0)), len(self._data.train[0]))
            self._costs = {
                name: param_counts(kinds, program.layouts[name].sizes)[0]
                for name, kinds in program.kinds.items()
            }
            recipe = _Recipe(task, arm, program, start_from(program, make))
            one = functools.partial(_one_run, recipe)
            jitted = jax.jit(jax.vmap(one, in_axes=(None, 0, 0, 0)))
            self._parts = jax.tree.map(jnp.asarray, tuple(self._data[:3]))
            n = self.count
            like = self._arguments(np.zeros(n), np.zeros(3), arm.extra(task, n))
            self._compiled = jitted.lower(self._parts, *like).compile()
        return self

    def _arguments(self, seeds: Any, points: Any, extra: Any) -> Any:
        n = self.count
        return (
            jnp.asarray(seeds, jnp.int32),
            jnp.broadcast_to(jnp.asarray(points, jnp.float32), (n, 3)),
            jax.tree.map(jnp.asarray, extra),
        )

    def __call__(
        self, seeds: Sequence[int] | np.ndarray, points: Any, extra: Any = None
    ) -> Runs:
        """Runs the program.

        Args:
          seeds: the random seed of each run.
          points: ``(rate, decay, share)`` of all runs, or one row for each run.
          extra: what the arm's ``begin`` takes, for each run; by default what its
            ``extra`` makes.
        """
        self.compile()
        if extra is None:
            extra = self.arm.extra(self.task, self.count)
        arguments = self._arguments(seeds, points, extra)
        begin = time.perf_counter()
        accuracy, loss, test, stages = jax.device_get(
            self._compiled(self._parts, *arguments)
        )
        seconds = time.perf_counter() - begin
        parameters = host_size(self.task, self.arm.widths) + sum(
            COUNTS[s] @ self._costs[n] for n, s in stages.items()
        )
        spent = run_operations(self.task, self.arm, self._data, stages, self._costs)
        return Runs(accuracy, loss, test, parameters, spent, stages, seconds)


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """What is fixed before a run is traced."""

    task: Task
    arm: Arm
    program: Program
    start: Callable[[jax.Array], TrainState]
    """First state of a random key."""


def _program(task: Task, arm: Arm, model: nnx.Module, rows: int) -> Program:
    budget = max(0, task.budget - host_size(task, arm.widths)) if task.budget else -1
    steps = arm.epochs * task.ticks_per_epoch * steps_per_tick(task, rows)
    return build(
        model,
        _optimizer(steps),
        _bank_optimizer(steps),
        lifecycle_config=task.gates,
        controller_config=dataclasses.replace(task.policy, budget=budget),
        decide=arm.decide,
        eval_batch=10_000,
    )


def _one_run(recipe: _Recipe, parts: Any, seed: Any, point: Any, extra: Any) -> Any:
    """A whole run.

    Returns:
      Held-out accuracy, held-out loss and test accuracy, (T,), and the stages of each
      layer, (T, S).
    """
    arm, task = recipe.arm, recipe.task
    state = arm.begin(_tuned(recipe.start(jax.random.key(seed)), point), extra)
    drawn = jax.random.key(seed ^ 0x5EED)  # the data's key, apart from the model's
    learned, held_out = _split(parts, drawn)
    phase = functools.partial(_phase, recipe, (learned, held_out, parts[2]), drawn)
    _, report = jax.lax.scan(phase, state, jnp.arange(task.phases))
    ticks, watched = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), report)
    stages = {name: layer.stage for name, layer in ticks.layers.items()}
    return ticks.accuracy, ticks.loss, watched[:, 1], stages


def _phase(
    recipe: _Recipe, parts: Any, drawn: jax.Array, state: TrainState, number: jax.Array
) -> tuple[TrainState, Any]:
    """A phase: what each of its ticks reports, and the loss and accuracy on test data.

    The first tick looks at the new data before the model learns anything from them.
    """
    task, arm, program = recipe.task, recipe.arm, recipe.program
    key = jax.random.fold_in(drawn, number)
    parts = [task.change(key, part) for part in parts]
    if arm.renews:
        state = dataclasses.replace(state, banks=recipe.start(key).banks)
    seen = jnp.stack(program.evaluate(state, parts[2])).astype(jnp.float32)
    state, first = program.tick(_rested(state), parts[1])
    tick = functools.partial(_tick, recipe, parts, key)
    ticks = jnp.arange(arm.epochs * task.ticks_per_epoch)
    state, reports = jax.lax.scan(tick, state, ticks)
    join = functools.partial(jax.tree.map, lambda a, b: jnp.concatenate([a[None], b]))
    return state, join((first, seen), reports)


def _tick(
    recipe: _Recipe, parts: Any, key: jax.Array, state: TrainState, number: jax.Array
) -> tuple[TrainState, Any]:
    """The steps of the phase's ``number``-th tick, and the tick."""
    task = recipe.task
    learned, held_out, test = parts
    rows = len(learned[1])
    each = steps_per_tick(task, rows) * task.batch
    epoch, place = jnp.divmod(number, task.ticks_per_epoch)
    order = jax.random.permutation(jax.random.fold_in(key, epoch), rows)
    some = jax.lax.dynamic_slice(order, (place * each,), (each,))
    state, report = scan_fit(
        recipe.program,
        state,
        jax.tree.map(lambda a: a[some], learned),
        held_out,
        ticks=1,
        batch_size=task.batch,
        watched=test,
    )
    return state, jax.tree.map(lambda a: a[0], (report.ticks, report.watched))


def _split(parts: Any, key: jax.Array) -> tuple[Any, Any]:
    """Training and held-out data of a run, drawn from both together."""
    rows = len(parts[0][1])
    pool = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), parts[0], parts[1])
    order = jax.random.permutation(key, len(pool[1]))
    return (
        jax.tree.map(lambda a: a[order[:rows]], pool),
        jax.tree.map(lambda a: a[order[rows:]], pool),
    )


def _cosine(steps: int) -> optax.Schedule:
    """From 1 to 0 over so many steps, and again."""
    once = optax.cosine_decay_schedule(1.0, steps)
    return lambda step: once(step % steps)


def _adamw() -> optax.GradientTransformation:
    """AdamW that holds its rate and its decay as arrays in its state."""
    return optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3, weight_decay=0.0)


def _optimizer(steps: int) -> optax.GradientTransformation:
    """AdamW under a cosine schedule."""
    return optax.chain(_adamw(), optax.scale_by_schedule(_cosine(steps)))


def _bank_optimizer(steps: int) -> PerSlot:
    """AdamW in each slot, under the host's schedule.

    Late-born slots reach a zero rate together with the host. A newborn keeps its slot's
    rate and decay: fresh optimizer state would set them back to the values from before
    `_tuned`.
    """
    inner = per_slot(optax.chain(_adamw(), scale_by_run_schedule(_cosine(steps))))

    def reset(state: Any, params: Any, born: Any) -> Any:
        injected, *rest = inner.reset(state, params, born)
        return (injected._replace(hyperparams=state[0].hyperparams), *rest)

    return PerSlot(inner.init, inner.update, reset)


def _tuned(state: TrainState, point: jax.Array) -> TrainState:
    """``state`` with a grid point's rate, decay and share of the rate."""
    rate, decay, share = point

    def put(opt_state: Any, rate: jax.Array) -> Any:
        inner, *rest = opt_state
        new = {"learning_rate": rate, "weight_decay": decay}
        old = inner.hyperparams
        put = {k: jnp.broadcast_to(v, old[k].shape) for k, v in new.items()}
        return (inner._replace(hyperparams={**old, **put}), *rest)

    return dataclasses.replace(
        state,
        opt_state=put(state.opt_state, rate),
        bank_opt={name: put(o, share * rate) for name, o in state.bank_opt.items()},
    )


def _rested(state: TrainState) -> TrainState:
    """``state`` with the moments of all optimizers at 0."""

    def rest(opt_state: Any) -> Any:
        inner, *others = opt_state
        moments = jax.tree.map(jnp.zeros_like, inner.inner_state)
        return (inner._replace(inner_state=moments), *others)

    return dataclasses.replace(
        state,
        opt_state=rest(state.opt_state),
        bank_opt={name: rest(o) for name, o in state.bank_opt.items()},
    )
