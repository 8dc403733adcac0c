"""The arms of `growth.py`: ways to spend parameters on the same task, side by side.

Every arm is one program: a whole training run inside a scan, vmapped over runs. Run
``i`` of each arm draws its host from the same key and sees the same rows in the same
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
from flax import nnx, struct
from growth_tasks import Task, host_size, layer_names

from esper_jax import policy
from esper_jax.blueprints import operations, param_counts
from esper_jax.growth.state import TrainState
from esper_jax.layers.bed import SeedBed
from esper_jax.lifecycle.commands import no_commands
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.stages import LIVING, Stage
from esper_jax.lifecycle.state import SeedState
from esper_jax.optim import PerSlot, per_slot, scale_by_run_schedule
from esper_jax.policy.memory import Reason
from esper_jax.train.program import Program, build
from esper_jax.train.scan import ScanReport, scan_fit, start_from

__all__ = [
    "Arm",
    "Runner",
    "Runs",
    "chosen",
    "epoch_operations",
    "grown",
    "most_grown",
    "renewed",
    "replay",
    "static",
]

COUNTS = np.array([Stage.GRAFTING <= s <= Stage.FOSSILIZED for s in Stage])
"""``COUNTS[stage]``: whether the seed's blueprint is part of the model."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
      name: of the row in the table.
      widths: of the host's layers.
      grows: whether there is anything in it that can grow.
      begin: ``begin(state, extra) -> state`` before the first step.
      extra: ``extra(task, count) -> extra`` for each run where nobody gives another.
      decide: the policy.
      epochs: in each phase.
      judged: whether its seeds are judged by counterfactuals.
      gates: of the lifecycle; None for the task's.
      renews: whether its blueprints are drawn afresh when the data change.
    """

    name: str
    widths: tuple[int, ...]
    grows: bool
    begin: Callable[[TrainState, Any], TrainState]
    extra: Callable[[Task, int], Any]
    decide: Callable[..., Any]
    epochs: int
    judged: bool = False
    gates: LifecycleConfig | None = None
    renews: bool = False


@dataclasses.dataclass(frozen=True)
class Runs:
    """What an arm's ``R`` runs did at each of ``T`` ticks."""

    accuracy: np.ndarray
    """On held-out data, (R, T)."""
    loss: np.ndarray
    test: np.ndarray
    """Accuracy on test data, which nothing has read, (R, T)."""
    parameters: np.ndarray
    """Host and blueprints that count, (R, T)."""
    operations: np.ndarray
    """Floating-point operations of the whole run, (R,)."""
    stages: dict[str, np.ndarray]
    """By layer, (R, T, S)."""
    seconds: float
    """Wall time of all runs together, without compilation."""


@struct.dataclass
class _Nothing:
    reason: jax.Array


def _hold(seeds: Any, signals: Any, memory: Any, *_: Any) -> Any:
    """A policy that asks for nothing."""
    return {name: no_commands(s.num_seeds) for name, s in seeds.items()}, memory


def _held(state: TrainState) -> TrainState:
    memory = _Nothing(reason=jnp.asarray(Reason.DISABLED, jnp.int8))
    return dataclasses.replace(state, memory=memory)


def _alive(state: TrainState, where: dict[str, jax.Array]) -> TrainState:
    """The seeds of ``where`` (bool[S] by layer) learn and count from the start."""
    seeds = {}
    for name, layer in state.seeds.items():
        flags = where[name]
        slot = jnp.where(flags, jnp.arange(layer.num_seeds), -1).astype(jnp.int32)
        seeds[name] = dataclasses.replace(
            layer,
            stage=jnp.where(flags, Stage.FINE_TUNING, layer.stage).astype(jnp.int8),
            slot_of_seed=slot,
            seed_of_slot=slot,  # as many slots as seeds
        )
    return dataclasses.replace(state, seeds=seeds)


def _no_extra(task: Task, count: int) -> Any:
    return np.zeros(count)


def _every_seed(task: Task, count: int) -> dict[str, np.ndarray]:
    flags = np.ones((count, task.num_seeds), bool)
    return dict.fromkeys(layer_names(task), flags)


def _never(task: Task, count: int) -> dict[str, np.ndarray]:
    plan = np.full((count, task.num_seeds), -1, np.int32)
    return dict.fromkeys(layer_names(task), plan)


def grown(task: Task) -> Arm:
    """The controller decides."""
    return Arm(
        "grown",
        task.widths,
        True,
        lambda state, _: state,
        _no_extra,
        policy.decide,
        task.epochs,
        judged=True,
    )


def static(
    task: Task, name: str, widths: tuple[int, ...], epochs: int | None = None
) -> Arm:
    """A host in which nothing grows."""
    return Arm(
        name,
        widths,
        False,
        lambda s, _: _held(s),
        _no_extra,
        _hold,
        epochs or task.epochs,
    )


def chosen(task: Task, name: str, epochs: int | None = None) -> Arm:
    """The seeds of ``extra`` (bool[S] by layer) learn and count from the first step to
    the last: all of them, or those of a grown run's final topology."""

    def begin(state: TrainState, extra: Any) -> TrainState:
        return _held(_alive(state, extra))

    return Arm(
        name, task.widths, True, begin, _every_seed, _hold, epochs or task.epochs
    )


def renewed(task: Task) -> Arm:
    """All seeds learn and count throughout, and begin afresh when the data change."""
    return dataclasses.replace(chosen(task, "renewed"), renews=True)


@struct.dataclass
class _Plan:
    memory: controller.ControllerMemory
    tick: jax.Array
    born: dict[str, jax.Array]
    """Tick at which each seed germinates, -1 for never."""

    @property
    def reason(self) -> jax.Array:
        return self.memory.reason


def replay(task: Task) -> Arm:
    """Seeds germinate when ``extra`` says (int32[S] by layer), and all are kept."""

    def begin(state: TrainState, extra: Any) -> TrainState:
        plan = _Plan(state.memory, jnp.zeros((), jnp.int32), extra)
        return dataclasses.replace(state, memory=plan)

    def decide(
        seeds: dict[str, SeedState],
        signals: Any,
        plan: _Plan,
        config: Any,
        gates: Any,
        costs: Any,
    ) -> Any:
        keep = dataclasses.replace(
            config,
            enabled=False,
            max_training=10**6,
            keep_tolerance=1e9,
            shift_tolerance=-1.0,
            training_limit=65535,
            evaluation_limit=65535,
            tuning_limit=65535,
        )
        # The controller asks for what it would ask for of a seed that is worth keeping.
        # One that is not is refused by the lifecycle's gate, and stays as it is.
        calm = {
            name: dataclasses.replace(
                s,
                performance_delta=jnp.ones_like(s.performance_delta),
                total_improvement=jnp.ones_like(s.total_improvement),
            )
            for name, s in signals.items()
        }
        commands, memory = policy.decide(seeds, calm, plan.memory, keep, gates, costs)
        commands = {
            name: dataclasses.replace(
                c,
                target=jnp.where(
                    plan.born[name] == plan.tick, Stage.GERMINATED, c.target
                ).astype(jnp.int8),
            )
            for name, c in commands.items()
        }
        return commands, _Plan(memory, plan.tick + 1, plan.born)

    gates = dataclasses.replace(task.gates, min_improvement=-1e9)
    return Arm(
        "random", task.widths, True, begin, _never, decide, task.epochs, True, gates
    )


def _cosine(steps: int) -> optax.Schedule:
    """From 1 to 0 over so many steps, and again."""
    once = optax.cosine_decay_schedule(1.0, steps)
    return lambda step: once(step % steps)


def _optimizer(steps: int) -> optax.GradientTransformation:
    """AdamW under a cosine schedule; its rate and decay are arrays in its state."""
    return optax.chain(_adamw(), optax.scale_by_schedule(_cosine(steps)))


def _bank_optimizer(steps: int) -> PerSlot:
    """The same in each slot, by the host's clock: all come to rest together. A newborn
    keeps the rate and the decay of its slot, which fresh state would set back to where
    they were when the program was built."""
    inner = per_slot(optax.chain(_adamw(), scale_by_run_schedule(_cosine(steps))))

    def reset(state: Any, params: Any, born: Any) -> Any:
        injected, *rest = inner.reset(state, params, born)
        return (injected._replace(hyperparams=state[0].hyperparams), *rest)

    return PerSlot(inner.init, inner.update, reset)


def _adamw() -> optax.GradientTransformation:
    return optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3, weight_decay=0.0)


def _tuned(state: TrainState, point: jax.Array) -> TrainState:
    """A state that trains at a grid point: rate, decay, and the blueprints' rate over
    the host's."""
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
    """A state whose optimizers have forgotten the gradients that they have seen."""

    def rest(opt_state: Any) -> Any:
        inner, *others = opt_state
        moments = jax.tree.map(jnp.zeros_like, inner.inner_state)
        return (inner._replace(inner_state=moments), *others)

    return dataclasses.replace(
        state,
        opt_state=rest(state.opt_state),
        bank_opt={name: rest(o) for name, o in state.bank_opt.items()},
    )


class Runner:
    """An arm's runs as one program.

    Args:
      task: what to learn.
      arm: how.
      data: the three-way split.
      count: runs at a time.
    """

    def __init__(self, task: Task, arm: Arm, data: Any, count: int) -> None:
        self.task, self.arm, self.count = task, arm, count
        self._data = data
        self._costs: dict[str, np.ndarray] = {}
        self._compiled: Any = None

    def compile(self) -> "Runner":
        """Compiles it, if that has not been done, and returns itself."""
        if self._compiled is None:
            task, arm = self.task, self.arm
            options = _options(task, arm)

            def make(rngs: nnx.Rngs) -> nnx.Module:
                return task.make(rngs, arm.widths, **options)

            program = _program(task, arm, make(nnx.Rngs(0)), len(self._data.train[0]))
            self._costs = {
                name: param_counts(kinds, program.layouts[name].sizes)[0]
                for name, kinds in program.kinds.items()
            }
            start = start_from(program, make)
            one = functools.partial(_one_run, task, arm, program, start)
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

    def __call__(self, seeds: Sequence[int], points: Any, extra: Any = None) -> Runs:
        """Runs it, each run at its grid point or all at one; ``extra`` is by default
        the arm's own."""
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
        spent = _operations(self.task, self.arm, self._data, stages, self._costs)
        return Runs(accuracy, loss, test, parameters, spent, stages, seconds)


def _options(task: Task, arm: Arm) -> dict[str, Any]:
    return {
        "num_seeds": task.num_seeds if arm.grows else 1,
        "capacity": task.num_seeds if arm.grows else 1,
        "blueprints": task.blueprints if arm.grows else ("noop",),
    }


def _program(task: Task, arm: Arm, model: nnx.Module, rows: int) -> Program:
    budget = max(0, task.budget - host_size(task, arm.widths)) if task.budget else -1
    steps = arm.epochs * task.ticks_per_epoch * _steps_per_tick(task, rows)
    return build(
        model,
        _optimizer(steps),
        _bank_optimizer(steps),
        lifecycle_config=arm.gates or task.gates,
        controller_config=dataclasses.replace(task.policy, budget=budget),
        decide=arm.decide,
        eval_batch=10_000,
    )


def _one_run(
    task: Task,
    arm: Arm,
    program: Program,
    start: Callable[..., TrainState],
    parts: Any,
    seed: Any,
    point: Any,
    extra: Any,
) -> Any:
    """A whole run: held-out accuracy and loss, test accuracy, stages, at each tick."""
    state = arm.begin(_tuned(start(jax.random.key(seed)), point), extra)
    drawn = jax.random.key(seed ^ 0x5EED)  # of the data, apart from the model's
    learned, held_out = _split(task, parts, drawn)
    rows = len(learned[1])
    each = _steps_per_tick(task, rows) * task.batch

    def phase(state: TrainState, number: jax.Array) -> tuple[TrainState, ScanReport]:
        now = [learned, held_out, parts[2]]
        key = jax.random.fold_in(drawn, number)
        first = None
        if task.change is not None:
            now = [task.change(key, part) for part in now]
            if arm.renews:
                state = dataclasses.replace(state, banks=start(key).banks)
            # What comes is looked at before anything is learned from it.
            seen = jnp.stack(program.evaluate(state, now[2])).astype(jnp.float32)
            state, report = program.tick(_rested(state), now[1])
            first = ScanReport(ticks=report, watched=seen)

        def tick(state: TrainState, at: jax.Array) -> tuple[TrainState, ScanReport]:
            epoch, place = jnp.divmod(at, task.ticks_per_epoch)
            order = jax.random.permutation(jax.random.fold_in(key, epoch), rows)
            some = jax.lax.dynamic_slice(order, (place * each,), (each,))
            part = jax.tree.map(lambda a: a[some], now[0])
            state, report = scan_fit(
                program,
                state,
                part,
                now[1],
                ticks=1,
                batch_size=task.batch,
                watched=now[2],
            )
            return state, jax.tree.map(lambda a: a[0], report)

        ticks = jnp.arange(arm.epochs * task.ticks_per_epoch)
        state, report = jax.lax.scan(tick, state, ticks)
        if first is not None:
            report = jax.tree.map(
                lambda a, b: jnp.concatenate([a[None], b]), first, report
            )
        return state, report

    _, report = jax.lax.scan(phase, state, jnp.arange(task.phases))
    report = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), report)
    ticks = report.ticks
    stages = {name: layer.stage for name, layer in ticks.layers.items()}
    return ticks.accuracy, ticks.loss, report.watched[:, 1], stages


def _num_ticks(task: Task, epochs: int) -> int:
    first = 0 if task.change is None else 1
    return task.phases * (epochs * task.ticks_per_epoch + first)


def _steps_per_tick(task: Task, rows: int) -> int:
    return rows // task.ticks_per_epoch // task.batch


def _split(task: Task, parts: Any, key: jax.Array) -> tuple[Any, Any]:
    """Training and held-out data of a run, drawn from both together."""
    if not task.pooled:
        return parts[0], parts[1]
    rows = len(parts[0][1])
    pool = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), parts[0], parts[1])
    order = jax.random.permutation(key, len(pool[1]))
    return (
        jax.tree.map(lambda a: a[order[:rows]], pool),
        jax.tree.map(lambda a: a[order[rows:]], pool),
    )


def most_grown(task: Task, data: Any) -> tuple[int, float]:
    """The parameters that a grown model comes to at most, and the operations of a run
    in which all of that lives from the first tick to the last and the gates and the
    controller read held-out data at each."""
    host = host_size(task, task.widths)
    room = task.budget - host if task.budget else np.inf
    total, stages, costs = host, {}, _costs(task)
    for name, cost in reversed(costs.items()):
        fits = np.cumsum(cost) <= room
        room -= (cost * fits).sum()
        total += int((cost * fits).sum())
        living = np.where(fits, Stage.FINE_TUNING, Stage.DORMANT)
        shape = (1, _num_ticks(task, task.epochs), len(living))
        stages[name] = np.broadcast_to(living, shape)
    return total, float(_operations(task, grown(task), data, stages, costs)[0])


def epoch_operations(task: Task, arm: Arm, data: Any) -> float:
    """Operations of an epoch, in every phase, of an arm whose seeds, if it has any, all
    learn, and that decides nothing."""
    costs = _costs(task)
    living = Stage.FINE_TUNING if arm.grows else Stage.DORMANT
    shape = (1, _num_ticks(task, 1))
    stages = {name: np.full((*shape, len(c)), living) for name, c in costs.items()}
    return float(_operations(task, arm, data, stages, costs)[0])


def _costs(task: Task) -> dict[str, np.ndarray]:
    """Parameters of the first blueprint on each chunk, by layer."""
    model = nnx.eval_shape(
        lambda: task.make(nnx.Rngs(0), task.widths, **_options(task, grown(task)))
    )
    beds = [n for _, n in nnx.iter_graph(model) if isinstance(n, SeedBed)]
    return {
        name: param_counts(bed.blueprints, bed.layout.sizes)[0]
        for name, bed in zip(layer_names(task), beds, strict=True)
    }


def _operations(
    task: Task,
    arm: Arm,
    data: Any,
    stages: dict[str, np.ndarray],
    costs: dict[str, np.ndarray],
) -> np.ndarray:
    """Floating-point operations of each run: training and, in arms that decide by them,
    evaluations of held-out data and counterfactuals.

    A backward pass counts as two forward ones. A living seed counts in full, whether it
    incubates, learns or is frozen.
    """
    gates = arm.gates or task.gates
    sizes = _layer_sizes(task, arm.widths)
    row = sum(operations(p) * n for p, n in zip(sizes, task.positions, strict=True))
    forward = np.full(next(iter(stages.values())).shape[:2], float(row))
    asked = np.zeros_like(forward)
    for (name, stage), places in zip(
        sorted(stages.items()), task.positions, strict=False
    ):
        forward += operations(LIVING[stage] @ costs[name]) * places
        tuned = stage == Stage.FINE_TUNING
        # A tick measures what was there before its transitions, one tick younger.
        age = _ages(tuned) - 1
        early = age + gates.worth_window < gates.min_epochs[Stage.FINE_TUNING]
        asked += (COUNTS[stage] & (stage != Stage.FOSSILIZED) & ~(tuned & early)).sum(
            axis=-1
        )
    rows = np.full(forward.shape[1], _steps_per_tick(task, len(data.train[0])))
    if task.change is not None:  # looked at before anything is learned from it
        rows[:: len(rows) // task.phases] = 0
    spent = 3 * task.batch * rows * forward
    if arm.judged:
        spent += len(data.held_out[0]) * forward * (1 + asked)
    return spent.sum(axis=1)


def _ages(flags: np.ndarray) -> np.ndarray:
    """For how many ticks, this one included, each of ``flags`` (R, T, S) has been set;
    0 where it is not."""
    ages = np.zeros(flags.shape, int)
    for tick in range(flags.shape[1]):
        before = ages[:, tick - 1] if tick else 0
        ages[:, tick] = np.where(flags[:, tick], before + 1, 0)
    return ages


def _layer_sizes(task: Task, widths: Sequence[int]) -> list[int]:
    """Parameters of each layer of the host, the readout last; embeddings are read and
    not multiplied."""

    def values() -> Any:
        model = task.make(
            nnx.Rngs(0), widths, num_seeds=1, capacity=1, blueprints=("noop",)
        )
        model = getattr(model, "mlp", model)
        layers = [nnx.state(layer.base, nnx.Param) for layer in model.layers]
        return [*layers, nnx.state(model.readout, nnx.Param)]

    return [
        sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(layer))
        for layer in jax.eval_shape(values)
    ]
