"""Runs of many candidates on many tasks, side by side: one program for a family.

A run trains a small host from scratch, with the lifecycle, ticks and all, inside one
scan; the program is that scan under `jax.vmap` over candidates and tasks.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from esper_jax.blueprints import param_counts
from esper_jax.growth.state import TrainState
from esper_jax.hosts import MLP, ConvNet
from esper_jax.layers.bed import SeedBed
from esper_jax.learning.config import Family
from esper_jax.learning.tasks import CLASSES, INPUTS, Task, changed
from esper_jax.lifecycle.commands import Commands
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import Stage
from esper_jax.lifecycle.state import SeedState
from esper_jax.policy.interface import LayerShape, Policy, PolicyFactory, Setting, made
from esper_jax.policy.learned import LearnedConfig, learned, learned_lives
from esper_jax.policy.network import Weights
from esper_jax.train import build, scan_fit, start_from

__all__ = [
    "Episodes",
    "Player",
    "Result",
    "growing_nothing",
    "host_of",
    "host_parameters",
    "plays",
]

Player = Callable[[Any, Int[Array, ""], int], PolicyFactory]
"""``player(numbers, budget, ticks) -> policy``: from a candidate's numbers, an int32
budget (both traced) and the length of a run."""


class Result(NamedTuple):
    """What came of runs."""

    accuracy: Float[Array, "*runs"]
    """On test data, at the end."""
    loss: Float[Array, "*runs"]
    """The same."""
    parameters: Float[Array, "*runs"]
    """Of the seeds that are alive at the end, over the host's."""
    births: Int[Array, "*runs"]
    """Seeds that were born."""
    stage: Int[Array, "*runs T P"]
    """Of each place after each tick, int8."""
    blueprint: Int[Array, "*runs T P"]
    """The same, int8."""
    held_out: Float[Array, "*runs T"]
    """Accuracy on held-out data at each tick."""


def plays(weights: Weights, budget: Int[Array, ""], ticks: int) -> PolicyFactory:
    """A network as a `Player`; its numbers are its weights."""
    make = learned(weights, LearnedConfig(budget=budget, ticks=ticks))

    def with_weights(setting: Setting) -> Policy:
        inner = make(setting)

        def decide(seeds: Any, signals: Any, memory: Any) -> Any:
            mine = dataclasses.replace(memory, weights=dict(weights))
            return inner.decide(seeds, signals, mine)

        return inner._replace(decide=decide)

    return with_weights


def growing_nothing(weights: Weights) -> dict[str, Array]:
    """The same weights, under which nothing is ever born."""
    bias = weights["say_bias"].at[Stage.GERMINATED].set(-1e9)
    return {**weights, "say_bias": bias}


class Episodes:
    """The runs of a family of hosts.

    Args:
      family: of hosts.
      player: makes the policy of a candidate from its numbers.
      numbers: of any candidate, for their shapes.
      gates: of the lifecycle; `learned_lives` by default.
    """

    def __init__(
        self,
        family: Family,
        player: Player,
        numbers: Any,
        gates: LifecycleConfig | None = None,
    ) -> None:
        self.family = family
        program = build(
            host_of(family, nnx.Rngs(0)),
            _adamw(),
            _adamw(),
            lifecycle_config=gates or learned_lives(),
            policy=_carried(player, numbers, family.ticks),
            eval_batch=max(family.held_out, family.test),
        )
        self._program = program
        self._start = start_from(program, lambda rngs: host_of(family, rngs))
        self._costs = {
            name: param_counts(kinds, program.layouts[name].sizes)
            for name, kinds in program.kinds.items()
        }
        every = np.concatenate([c.mean(axis=0) for c in self._costs.values()])
        self.full = float(every.sum())
        """Parameters that a seed in every place has in the mean."""
        self.host = host_parameters(family)
        """Parameters of the host."""

    def __call__(self, numbers: Any, tasks: Task) -> Result:
        """Runs each candidate on each task; jit it.

        Args:
          numbers: of each candidate, along a leading axis.
          tasks: stacked.

        Returns:
          Results with two leading axes: candidates and tasks.
        """
        of_tasks = jax.vmap(self.one, in_axes=(None, 0))
        return jax.vmap(of_tasks, in_axes=(0, None))(numbers, tasks)

    def one(self, numbers: Any, task: Task) -> Result:
        """The run of a candidate on a task."""
        budget = jnp.where(task.budget < 0, -1, task.budget * self.full)
        state = self._start(task.key)
        memory = (state.memory[0], numbers, budget.astype(jnp.int32))
        state = dataclasses.replace(state, memory=memory)

        def tick(state: TrainState, number: Array) -> tuple[TrainState, Any]:
            return self._tick(task, state, number)

        state, told = jax.lax.scan(tick, state, jnp.arange(self.family.ticks))
        test = changed(task, task.test, jnp.asarray(self.family.ticks))
        loss, accuracy = self._program.evaluate(state, test)
        stage, blueprint, held_out = told
        before = jnp.concatenate([jnp.zeros_like(stage[:1]), stage[:-1]])
        born = (stage == Stage.GERMINATED) & (before == Stage.DORMANT)
        return Result(
            accuracy=accuracy,
            loss=loss,
            parameters=self._living(state) / self.host,
            births=jnp.sum(born),
            stage=stage,
            blueprint=blueprint,
            held_out=held_out,
        )

    def _tick(
        self, task: Task, state: TrainState, number: Array
    ) -> tuple[TrainState, Any]:
        family = self.family
        fade = 0.5 * (1 + jnp.cos(np.pi * number / family.ticks))
        frozen = (task.change == 2) & (number >= task.change_at)
        rate = task.rate * fade
        state = _at_rate(state, jnp.where(frozen, 0.0, rate), rate * task.share)
        state, report = scan_fit(
            self._program,
            state,
            changed(task, task.train, number),
            changed(task, task.held_out, number),
            ticks=1,
            batch_size=family.batch,
            seed=jax.random.bits(task.key, (), jnp.uint32).astype(jnp.int32),
        )
        layers = report.ticks.layers.values()
        stage = jnp.concatenate([layer.stage[0] for layer in layers])
        kind = jnp.concatenate([layer.blueprint[0] for layer in layers])
        return state, (stage, kind, report.ticks.accuracy[0])

    def _living(self, state: TrainState) -> Float[Array, ""]:
        total = jnp.zeros(())
        for name, seeds in state.seeds.items():
            costs = jnp.asarray(self._costs[name], jnp.float32)
            kind = jnp.clip(seeds.blueprint.astype(jnp.int32), 0, len(costs) - 1)
            own = costs[kind, jnp.arange(kind.size)]
            total += jnp.sum(jnp.where(seeds.slot_of_seed >= 0, own, 0.0))
        return total


def host_of(family: Family, rngs: nnx.Rngs) -> nnx.Module:
    """A host of a family."""
    options: dict[str, Any] = {
        "num_seeds": family.num_seeds,
        "capacity": family.num_seeds,
        "blueprints": family.blueprints,
        "rngs": rngs,
    }
    if family.host == "conv":
        strides = [1] + [2] * (len(family.hidden) - 1)
        return ConvNet(family.hidden, CLASSES, strides=strides, **options)
    return MLP(INPUTS, family.hidden, CLASSES, activation="gelu", **options)


def host_parameters(family: Family) -> int:
    """Parameters of a family's host, without what grows."""

    def values() -> Any:
        host = host_of(family, nnx.Rngs(0))
        beds = [p for p, node in nnx.iter_graph(host) if isinstance(node, SeedBed)]

        def of_host(path: Any, value: Any) -> bool:
            return not any(path[: len(bed)] == bed for bed in beds)

        return nnx.state(host, nnx.All(nnx.Param, of_host))

    leaves = jax.tree.leaves(jax.eval_shape(values))
    return sum(int(np.prod(leaf.shape)) for leaf in leaves)


def _carried(player: Player, numbers: Any, ticks: int) -> PolicyFactory:
    """The policy of a candidate, whose numbers and budget are in its memory."""

    def make(setting: Setting) -> Policy:
        fixed = made(player(numbers, jnp.asarray(-1, jnp.int32), ticks), setting)

        def init(shapes: Mapping[str, LayerShape], key: Any) -> Any:
            like = jax.tree.map(jnp.asarray, numbers)
            return fixed.init(shapes, key), like, jnp.asarray(-1, jnp.int32)

        def decide(
            seeds: Mapping[str, SeedState], signals: Mapping[str, Signals], memory: Any
        ) -> tuple[dict[str, Commands], Any]:
            inner, own, budget = memory
            policy = made(player(own, budget, ticks), setting)
            commands, inner = policy.decide(seeds, signals, inner)
            return commands, (inner, own, budget)

        return fixed._replace(init=init, decide=decide)

    return make


def _adamw() -> optax.GradientTransformation:
    """AdamW that holds its rate as an array in its state, for `_at_rate`."""
    return optax.inject_hyperparams(optax.adamw, static_args=("weight_decay",))(
        learning_rate=0.0, weight_decay=0.01
    )


def _at_rate(state: TrainState, host: Array, blueprints: Array) -> TrainState:
    """The state with other learning rates, set before each tick's steps."""

    def put(opt_state: Any, rate: Array) -> Any:
        old = opt_state.hyperparams
        new = jnp.broadcast_to(rate, old["learning_rate"].shape).astype(jnp.float32)
        return opt_state._replace(hyperparams={**old, "learning_rate": new})

    return dataclasses.replace(
        state,
        opt_state=put(state.opt_state, host),
        bank_opt={name: put(o, blueprints) for name, o in state.bank_opt.items()},
    )
