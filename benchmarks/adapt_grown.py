"""The arms of `adapt.py` that grow: trials and placement by the package's policies."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from adapt_runs import WARM_UP, Arm, Outcome, Run, batch_of, schedule, split
from adapt_tasks import SIZE, Parts, Task
from flax import nnx

from esper_jax import make_growable
from esper_jax.blueprints import lora, param_counts
from esper_jax.growth.state import TrainState
from esper_jax.lifecycle import Stage
from esper_jax.optim import PerSlot, per_slot, scale_by_run_schedule
from esper_jax.policy import Policy, TrialConfig, trial, trial_lives
from esper_jax.policy.interface import PolicyFactory, Setting
from esper_jax.train import Program, build

__all__ = ["ANY_BUDGET", "grown_arms"]

Judge = Literal["worth", "gradient", "random"]
SEEDS, AIM, TRIAL = 8, 10, 50
"""Seeds of a layer; steps that newborns collect the gradient; steps of a trial."""

ANY_BUDGET = (
    "grown by trial",
    "grown by placement",
    "random places",
    "grown by trial, all learn",
    "grown by trial, random start",
)
"""Arms whose budget is an argument of their program."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What grows, and when it is looked at.

    Args:
      config: of the trial.
      seeds: of a layer.
      rank: of each part, by the path of its layer; 0 for none.
      start: of each part.
      rests: steps before each tick.
      least: worth above which what is kept learns on.
    """

    config: TrialConfig
    seeds: int
    rank: Any
    start: Literal["random", "gradient"] = "gradient"
    rests: tuple[int, ...]
    least: float = 0.0


def grown_arms(task: Task, budget: int) -> dict[str, Callable[[], Arm]]:
    """Arms that grow, and the same parts where nothing has chosen the places.

    Those of `ANY_BUDGET` are the same program at every budget.
    """
    trying = (0, AIM, 0, TRIAL, 0, 0)
    placed = (0, AIM, 0)  # born, aimed and placed, counting

    def everywhere(path: str) -> int:
        return 1

    def plan(judge: Judge, rests: tuple[int, ...]) -> _Plan:
        config = TrialConfig(judge=judge, budget=0, ticks=1, rent=-math.inf)
        rests = (*rests, task.steps - sum(rests))
        return _Plan(config=config, seeds=SEEDS, rank=everywhere, rests=rests)

    plans = {
        "grown by trial": plan("worth", trying),
        "grown by placement": plan("gradient", placed),
        "random places": plan("random", placed),
        "uniform, same start": dataclasses.replace(
            plan("random", placed),
            config=TrialConfig(judge="random", ticks=1),
            seeds=1,
            rank=functools.partial(task.uniform, budget),
        ),
        "grown by trial, all learn": dataclasses.replace(
            plan("worth", trying), least=-math.inf
        ),
        "grown by trial, random start": dataclasses.replace(
            plan("worth", trying), start="random"
        ),
    }
    return {n: functools.partial(_arm, task, plan) for n, plan in plans.items()}


def _make(task: Task, plan: _Plan, rngs: nnx.Rngs) -> Any:
    model = task.make(rngs)
    found = [
        ("/".join(map(str, path)), layer)
        for path, layer in nnx.iter_graph(model)
        if isinstance(layer, nnx.Linear | nnx.Embed)
    ]
    for path, _ in found:
        if rank := plan.rank(path):
            make_growable(
                model,
                path,
                plan.seeds,
                capacity=plan.seeds,
                blueprints=[lora(rank=rank, start=plan.start)],
                stack=SIZE.blocks if path.startswith("trunk") else None,
                rngs=rngs,
            )
    return model


def _arm(task: Task, plan: _Plan) -> Arm:
    def make(rngs: nnx.Rngs) -> Any:
        return _make(task, plan, rngs)

    program = build(
        make(nnx.Rngs(0)),
        optax.identity(),
        _bank_optimizer(task.steps),
        objective=lambda model, batch: _scored(task, model, batch),
        wrt=None,
        policy=_budgeted(plan.config),
        lifecycle_config=trial_lives(cull_delta=-math.inf, min_worth=plan.least),
    )
    costs = {
        name: np.asarray(param_counts(kinds, program.layouts[name].sizes)[0])
        for name, kinds in program.kinds.items()
    }
    peak = sum(int(c.sum()) for c in costs.values())
    tried = sum(c.size for c in costs.values())
    return Arm(
        run=functools.partial(_run, program, plan, costs),
        peak=peak,
        evaluations=len(plan.rests) + (tried if plan.config.judge == "worth" else 0),
    )


def _budgeted(config: TrialConfig) -> PolicyFactory:
    """A trial whose budget is remembered beside its memory, for `_tuned` to set."""

    def make(setting: Setting) -> Policy:
        fixed = trial(config)(setting)

        def init(shapes: Any, key: Any) -> Any:
            return fixed.init(shapes, key), jnp.asarray(config.budget, jnp.int32)

        def decide(seeds: Any, signals: Any, memory: Any) -> Any:
            inner, budget = memory
            policy = trial(dataclasses.replace(config, budget=budget))(setting)
            commands, inner = policy.decide(seeds, signals, inner)
            return commands, (inner, budget)

        return fixed._replace(init=init, decide=decide)

    return make


def _scored(task: Task, model: Any, batch: Any) -> Any:
    loss, score = task.loss(model, batch)
    return loss, {"score": score}


def _run(
    program: Program,
    plan: _Plan,
    costs: dict[str, np.ndarray],
    task: Task,
    parts: Parts,
    run: Run,
) -> Outcome:
    state = _tuned(_begun(program, task, run), run)

    def step(i: jax.Array, state: TrainState) -> TrainState:
        batch = batch_of(task, parts.learned, run.key, state.step)
        return program.step(state, batch)

    def segment(state: TrainState, rest: jax.Array) -> tuple[TrainState, Any]:
        state = jax.lax.fori_loop(0, rest, step, state)
        return program.tick(state, parts.judged)[0], None

    # The last tick comes after the last step, and removes nothing.
    state, _ = jax.lax.scan(segment, state, jnp.asarray(plan.rests))
    held_out, test = (jnp.stack(program.evaluate(state, part)) for part in parts[2:])
    places = {
        name: jnp.sum(jnp.where(_counts(seeds.stage), costs[name], 0))
        for name, seeds in state.seeds.items()
    }
    total = sum(places.values(), jnp.zeros((), jnp.int32))
    return Outcome(held_out, test, total, places)


def _counts(stage: jax.Array) -> jax.Array:
    return (stage >= Stage.GRAFTING) & (stage <= Stage.FOSSILIZED)


def _begun(program: Program, task: Task, run: Run) -> TrainState:
    """The first state of a run, with its own host and its own draws."""
    state = program.init(jax.random.fold_in(run.key, task.steps))
    _, host = split(task, nnx.Rngs(0))
    rest = dict(state.rest)
    for name in host:
        layer, _, leaf = name.rpartition("/")
        put = name if name in rest else f"{layer}/base/{leaf}"
        rest[put] = run.host[name].astype(rest[put].dtype)
    return dataclasses.replace(state, rest=rest)


def _bank_optimizer(steps: int) -> PerSlot:
    """Adam in each slot: a warm-up of its own age, under the run's schedule."""
    inner = per_slot(
        optax.chain(
            optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
            optax.scale_by_schedule(optax.linear_schedule(0.0, 1.0, WARM_UP)),
            scale_by_run_schedule(schedule(steps)),
        )
    )

    def reset(state: Any, params: Any, born: Any) -> Any:
        injected, *rest = inner.reset(state, params, born)
        return (injected._replace(hyperparams=state[0].hyperparams), *rest)

    return PerSlot(inner.init, inner.update, reset)


def _tuned(state: TrainState, run: Run) -> TrainState:
    """``state`` with a run's peak rate of the bank's optimizer, and its budget."""

    def put(moments: Any) -> Any:
        inner, *rest = moments
        old = inner.hyperparams
        new = {"learning_rate": jnp.broadcast_to(run.rate, old["learning_rate"].shape)}
        return (inner._replace(hyperparams={**old, **new}), *rest)

    tuned = {name: put(m) for name, m in state.bank_opt.items()}
    memory = (state.memory[0], run.budget)
    return dataclasses.replace(state, bank_opt=tuned, memory=memory)
