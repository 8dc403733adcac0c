"""Whole runs of `growth.py` as one program.

A program is a host with parts, or without, and serves all arms with that host: what
differs between runs is traced. Run ``i`` of every arm draws its host from the same key
and sees the same rows in the same order.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from growth_tasks import Rows, Task, costs, host_size, layer_names, layer_sizes

from esper_jax.blueprints import operations
from esper_jax.growth.state import TrainState
from esper_jax.lifecycle import Stage
from esper_jax.optim import PerSlot, per_slot, scale_by_run_schedule
from esper_jax.policy import TrialConfig, trial, trial_lives
from esper_jax.train import Program, build, start_from

__all__ = ["Host", "Job", "Outcome"]

TRIAL = 0.08
"""Share of the steps for which parts are tried."""
JUDGED = 900
"""Rows, of those that are learned from, by which parts are judged."""


class Job(NamedTuple):
    """What differs between runs. Each leaf has a leading axis of runs."""

    seed: Any
    """Random seed of the host, the parts and the order of the rows."""
    rate: Any
    decay: Any
    """Of AdamW: peak learning rate and weight decay, of the host and of the parts."""
    rows: Any
    """How many rows are learned from; those after them are held out."""
    tries: Any
    """Whether a trial decides what is in the model."""
    kept: Any
    """Which parts are in the model from the first step on, bool[S] by layer."""


class Outcome(NamedTuple):
    """What became of each of ``R`` runs."""

    held_out: np.ndarray
    """Loss and accuracy on the last ``task.held_out`` rows, (R, 2)."""
    test: np.ndarray
    """Loss and accuracy on test data, (R, 2)."""
    kept: dict[str, np.ndarray]
    """Which parts are in the model in the end: bool (R, S) by layer."""
    asked: np.ndarray
    """Evaluations of the judged rows at each tick, (R, T)."""


class Host:
    """A host of the given widths, with parts or without, and its program.

    Args:
      task: what to learn.
      widths: of the host.
      grows: whether it has parts.
      rows: the data.
      count: runs that the program takes at a time.
      rent: of a trial.
    """

    def __init__(
        self,
        task: Task,
        widths: tuple[int, ...],
        grows: bool,
        rows: Rows,
        count: int,
        rent: float = 0.0,
    ) -> None:
        self.task, self.widths, self.grows, self.count = task, widths, grows, count
        self.rent = rent
        self.rows = len(rows.learned[1])
        self.size = host_size(task, widths)
        nothing = {name: np.zeros(1, int) for name in layer_names(task)}
        self.costs = costs(task) if grows else nothing
        self.peak = self.size + sum(int(np.sum(c)) for c in self.costs.values())
        self._rows = jax.tree.map(jnp.asarray, rows)

    def none(self, count: int) -> dict[str, np.ndarray]:
        """``kept`` of so many runs in which no part is in the model."""
        return {n: np.zeros((count, len(c)), bool) for n, c in self.costs.items()}

    @functools.cached_property
    def _compiled(self) -> Any:
        task = self.task

        def make(rngs: nnx.Rngs) -> nnx.Module:
            return task.make(rngs, self.widths, **task.options(self.grows))

        steps = self.steps
        schedule = _schedule(steps, task.warm_up)
        program = build(
            make(nnx.Rngs(0)),
            _host_optimizer(schedule),
            _bank_optimizer(schedule),
            lifecycle_config=trial_lives(cull_delta=min(self.rent, 0.0)),
            policy=trial(
                TrialConfig(
                    ticks=1, budget=max(0, task.budget - self.size), rent=self.rent
                )
            ),
            eval_batch=10_000,
        )
        recipe = _Recipe(task, program, start_from(program, make), steps, self.rests)
        run = jax.vmap(functools.partial(_run, recipe), in_axes=(None, 0))
        return jax.jit(run).lower(self._rows, self._jobs([0], 1.0, 0.0, 1)).compile()

    def compile(self) -> "Host":
        """Compiles the program if that has not been done."""
        _ = self._compiled
        return self

    @property
    def steps(self) -> int:
        """Of a run; as many while rows are held out, where an epoch repeats some."""
        return self.task.epochs * (self.rows // self.task.batch)

    @property
    def rests(self) -> tuple[int, ...]:
        """Steps before each tick of a run: parts are born, learn and count at once.

        A host without parts has no ticks.
        """
        if not self.grows:
            return ()
        tried = round(TRIAL * self.steps)
        return (0, 0, 0, tried, 0, 0, self.steps - tried)

    def _jobs(
        self, seeds: Any, rates: Any, decays: Any, rows: int, kept: Any = None
    ) -> Job:
        """Jobs of the program's width; those that are too few are filled up."""

        def wide(values: Any, dtype: Any) -> jax.Array:
            values = np.asarray(values, dtype)
            values = np.broadcast_to(values, (len(seeds), *values.shape[1:]))
            more = self.count - len(values)
            return jnp.asarray(np.concatenate([values, values[-1:].repeat(more, 0)]))

        tries = kept is None and self.grows
        kept = self.none(len(seeds)) if kept is None else kept
        return Job(
            wide(seeds, np.int32),
            wide(rates, np.float32),
            wide(decays, np.float32),
            wide(rows, np.int32),
            wide(tries, bool),
            {n: wide(flags, bool) for n, flags in kept.items()},
        )

    def __call__(
        self, seeds: Any, rates: Any, decays: Any, rows: int, kept: Any = None
    ) -> Outcome:
        """Any number of runs.

        Args:
          seeds: of each run.
          rates: of all runs, or of each; so are ``decays``.
          rows: how many rows are learned from.
          kept: which parts are in the model from the first step on, (R, S) by layer;
            None for a trial, or for a host without parts.
        """
        count = len(seeds)
        rates = np.broadcast_to(rates, count)
        decays = np.broadcast_to(decays, count)
        found = []
        for at in range(0, count, self.count):
            some = slice(at, at + self.count)
            flags = kept and {n: f[some] for n, f in kept.items()}
            jobs = self._jobs(seeds[some], rates[some], decays[some], rows, flags)
            found.append(jax.device_get(self._compiled(self._rows, jobs)))
        whole = jax.tree.map(lambda *a: np.concatenate(a)[:count], *found)
        return Outcome(*whole)

    def parameters(self, kept: dict[str, np.ndarray]) -> np.ndarray:
        """Of the host with those parts, (R,)."""
        return self.size + sum(kept[n] @ np.asarray(c) for n, c in self.costs.items())

    def forward(self, kept: dict[str, np.ndarray]) -> np.ndarray:
        """Operations of one row's forward pass through the host with those parts."""
        task = self.task
        sizes = layer_sizes(task, self.widths)
        row = sum(operations(p) * n for p, n in zip(sizes, task.positions, strict=True))
        for name, places in zip(layer_names(task), task.positions, strict=False):
            row = row + operations(kept[name] @ np.asarray(self.costs[name])) * places
        return row

    def spent(self, outcome: Outcome, tries: bool) -> np.ndarray:
        """Operations of each run, measuring and selecting included, (R,).

        A backward pass counts as two forward passes.
        """
        after = np.broadcast_to(self.forward(outcome.kept), len(outcome.test))
        row = 3 * self.task.batch
        if not tries:
            return row * self.steps * after
        every = {n: np.ones_like(k) for n, k in outcome.kept.items()}
        tried, whole = self.rests[3], self.forward(every)
        judged = min(JUDGED, self.rows)
        # Before the fourth tick nothing counts, after it what was kept.
        host = self.forward(self.none(len(after)))
        have = [host, host, host, whole, after, after, after]
        looks = (outcome.asked * np.stack(have, axis=1)).sum(axis=1)
        return row * (tried * whole + (self.steps - tried) * after) + judged * looks


class _Recipe(NamedTuple):
    """What is fixed before a run is traced."""

    task: Task
    program: Program
    start: Any
    """First state of a random key."""
    steps: int
    rests: tuple[int, ...]


def _run(recipe: _Recipe, rows: Rows, job: Job) -> Any:
    """A whole run."""
    task, program = recipe.task, recipe.program
    key = jax.random.key(job.seed)
    state = _tuned(_begun(recipe.start(key), job), job)
    drawn = jax.random.fold_in(key, 0x5EED)  # the data's key, apart from the model's
    count = len(rows.learned[1])
    places = jnp.arange(count)
    if task.pooled:
        places = jax.random.permutation(drawn, count)
    own = jax.tree.map(lambda a: a[places], rows.learned)
    judged = jax.tree.map(lambda a: a[:JUDGED], own)
    held_out = jax.tree.map(lambda a: a[-task.held_out :], own)
    each = count // task.batch

    def shuffled(epoch: jax.Array) -> jax.Array:
        lots = jax.random.uniform(jax.random.fold_in(drawn, epoch), (count,))
        return jnp.argsort(jnp.where(jnp.arange(count) < job.rows, lots, 2.0))

    orders = jax.vmap(shuffled)(jnp.arange(task.epochs))

    def step(_: Any, state: TrainState) -> TrainState:
        epoch, place = jnp.divmod(state.step, each)
        at = (place * task.batch + jnp.arange(task.batch)) % job.rows
        some = orders[epoch, at]
        return program.step(state, jax.tree.map(lambda a: a[some], own))

    def segment(state: TrainState, rest: jax.Array) -> tuple[TrainState, Any]:
        state = jax.lax.fori_loop(0, rest, step, state)
        # Parts that count and are on probation are evaluated without, one by one.
        asked = [
            jnp.sum((s.stage >= Stage.GRAFTING) & (s.stage <= Stage.EVALUATING))
            for s in state.seeds.values()
        ]
        state, _ = program.tick(state, judged)
        return state, 1 + sum(asked)

    if recipe.rests:  # the last tick comes after the last step, and removes nothing
        state, asked = jax.lax.scan(segment, state, jnp.asarray(recipe.rests))
    else:
        state = jax.lax.fori_loop(0, recipe.steps, step, state)
        asked = jnp.zeros(0, int)
    seen = (jnp.stack(program.evaluate(state, part)) for part in (held_out, rows.test))
    kept = {
        n: (s.stage >= Stage.GRAFTING) & (s.stage <= Stage.FOSSILIZED)
        for n, s in state.seeds.items()
    }
    return (*seen, kept, asked)


def _begun(state: TrainState, job: Job) -> TrainState:
    """``state`` with the job's parts in FINE_TUNING, and a trial to come or not."""
    seeds = {}
    for name, layer in state.seeds.items():
        flags = job.kept[name]
        slot = jnp.where(flags, jnp.arange(layer.num_seeds), -1).astype(jnp.int32)
        seeds[name] = dataclasses.replace(
            layer,
            stage=jnp.where(flags, Stage.FINE_TUNING, layer.stage).astype(jnp.int8),
            slot_of_seed=slot,
            seed_of_slot=slot,  # as many slots as seeds
        )
    memory = dataclasses.replace(state.memory, begun=~job.tries, judged=~job.tries)
    return dataclasses.replace(state, seeds=seeds, memory=memory)


def _schedule(steps: int, warm_up: float) -> optax.Schedule:
    """A line from 0 to 1 over the warm-up, times a cosine from 1 to 0 over all."""
    rising = round(warm_up * steps) if warm_up < 1 else round(warm_up)
    line = optax.linear_schedule(0.0, 1.0, max(1, rising))
    cosine = optax.cosine_decay_schedule(1.0, steps)
    return lambda step: line(step) * cosine(step)


def _adamw() -> optax.GradientTransformation:
    """AdamW that holds its rate and its decay as arrays in its state."""
    return optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3, weight_decay=0.0)


def _host_optimizer(schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(_adamw(), optax.scale_by_schedule(schedule))


def _bank_optimizer(schedule: optax.Schedule) -> PerSlot:
    """The same in each slot, under the host's schedule.

    A newborn keeps its slot's rate and decay: fresh optimizer state would set them back
    to the values from before `_tuned`.
    """
    inner = per_slot(optax.chain(_adamw(), scale_by_run_schedule(schedule)))

    def reset(state: Any, params: Any, born: Any) -> Any:
        injected, *rest = inner.reset(state, params, born)
        return (injected._replace(hyperparams=state[0].hyperparams), *rest)

    return PerSlot(inner.init, inner.update, reset)


def _tuned(state: TrainState, job: Job) -> TrainState:
    """``state`` with a job's rate and decay."""

    def put(moments: Any) -> Any:
        inner, *rest = moments
        old = inner.hyperparams
        new = {"learning_rate": job.rate, "weight_decay": job.decay}
        new = {k: jnp.broadcast_to(v, old[k].shape) for k, v in new.items()}
        return (inner._replace(hyperparams={**old, **new}), *rest)

    return dataclasses.replace(
        state,
        opt_state=put(state.opt_state),
        bank_opt={name: put(o) for name, o in state.bank_opt.items()},
    )
