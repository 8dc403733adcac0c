"""The arms of `policy.py` as one player: a network, the heuristic, or a plan.

All arms are one program: a run's numbers say which of the three decides.
"""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_jax.groups import Groups
from esper_jax.learning.episodes import plays
from esper_jax.lifecycle import Stage
from esper_jax.lifecycle.commands import Commands
from esper_jax.policy import Policy, decide, learned_lives
from esper_jax.policy.interface import Setting
from esper_jax.policy.memory import init_memory

__all__ = [
    "KINDS",
    "NUMBERS",
    "everywhere",
    "heuristic_plays",
    "nothing_tuned",
    "numbers_of",
    "played",
    "random_plan",
]

KINDS = 3
"""Blueprints of a layer."""

NUMBERS = {
    "period": np.float32(0.7),
    "max_training": np.float32(2.0),
    "training_limit": np.float32(1.5),
    "evaluation_limit": np.float32(2.0),
    "keep_tolerance": np.float32(0.0),
    "shift_tolerance": np.float32(0.0),
    "blueprint": np.zeros(KINDS, np.float32),
    "grows": np.float32(0.0),
}
"""The heuristic's numbers before they are tuned: logarithms, and a logit of each
blueprint. It grows at all unless the last is far below 0."""


def nothing_tuned(numbers: Any) -> Any:
    """The heuristic's numbers with which nothing grows."""
    return {**numbers, "grows": jnp.full_like(numbers["grows"], -1e9)}


def heuristic_plays(numbers: Any, budget: Any, ticks: int) -> Any:
    """The heuristic with numbers that are traced, as a `Player`.

    It decides as the best settings of `growth_tasks.py` do: early, where the gradient
    is largest; and what is kept goes on learning to the end (no fossils).
    """
    period, most, training, evaluating, keep, shift = (
        jnp.exp(numbers[name])
        for name in (
            "period",
            "max_training",
            "training_limit",
            "evaluation_limit",
            "keep_tolerance",
            "shift_tolerance",
        )
    )
    never = jnp.where(numbers["grows"] < -1e6, 0, 2**30)
    config: Any = types.SimpleNamespace(
        when="period",
        period=jnp.round(period),
        where="gradient",
        what="fixed",
        blueprint=jnp.argmax(numbers["blueprint"]).astype(jnp.int32),
        how="fixed",
        births=64,
        max_training=jnp.round(most).astype(jnp.int32),
        budget=jnp.minimum(jnp.where(budget < 0, 2**30, budget), never),
        target_accuracy=-1.0,
        rent_per_parameter=0.0,
        rent_per_operation=0.0,
        keep_tolerance=keep,
        shift_tolerance=shift,
        require_gain=False,
        waiting_limit=200,
        training_limit=jnp.round(training),
        grafting_limit=400,
        evaluation_limit=jnp.round(evaluating),
        tuning_limit=65535,
        enabled=True,
        patience=10,
        threshold=0.01,
    )

    def make(setting: Setting) -> Policy:
        epochs = list(setting.gates.min_epochs)
        epochs[Stage.GRAFTING], epochs[Stage.FINE_TUNING] = 4, 65535
        gates = learned_lives(min_epochs=tuple(epochs), cull_delta=-0.05)
        groups = setting.groups or Groups.alone(tuple(setting.layers))
        costs = {name: layer.costs for name, layer in setting.layers.items()}

        def init(shapes: Any, key: Any) -> Any:
            sizes = {name: layer.num_seeds for name, layer in shapes.items()}
            return init_memory(sizes, key=key, blueprints=KINDS)

        def by_group(seeds: Any, signals: Any, memory: Any) -> Any:
            given = groups.split(seeds), groups.split(signals)
            commands, memory = decide(*given, memory, config, gates, costs)
            return groups.stack(commands), memory

        reads = frozenset({"chunk_gradient"})
        return Policy(init, by_group, reads=reads, stacked=True)

    return make


def _plan_plays(plan: Any, budget: Any, ticks: int) -> Any:
    """Births by a plan: what is born is never removed, and learns to the end."""

    def make(setting: Setting) -> Policy:
        groups = setting.groups or Groups.alone(tuple(setting.layers))

        def init(shapes: Any, key: Any) -> Any:
            return jnp.zeros((), jnp.int32)

        def by_group(seeds: Any, signals: Any, tick: Any) -> Any:
            widths = {name: s.num_seeds for name, s in seeds.items()}
            born = groups.unflat(plan["tick"] == tick, widths)
            kind = groups.unflat(plan["kind"], widths)
            commands = {}
            for name, state in seeds.items():
                goal = jnp.full(state.stage.shape, -1, jnp.int8)
                next_of = {
                    Stage.GERMINATED: Stage.TRAINING,
                    Stage.TRAINING: Stage.GRAFTING,
                }
                for stage, following in next_of.items():
                    goal = jnp.where(state.stage == stage, following, goal)
                birth = born[name] & (state.stage == Stage.DORMANT)
                goal = jnp.where(birth, Stage.GERMINATED, goal).astype(jnp.int8)
                blueprint = jnp.where(birth, kind[name], -1).astype(jnp.int8)
                commands[name] = Commands(
                    target=goal,
                    blueprint=blueprint,
                    strategy=jnp.full_like(goal, -1),
                )
            return commands, tick + 1

        return Policy(init, by_group, reads=frozenset(), stacked=True)

    return make


def played(numbers: Any, budget: Any, ticks: int) -> Any:
    """All arms: ``numbers["which"]`` is 0 for the network, 1 for the heuristic, 2 for
    the plan."""
    makers = (
        plays(numbers["weights"], budget, ticks),
        heuristic_plays(numbers["heuristic"], budget, ticks),
        _plan_plays(numbers["plan"], budget, ticks),
    )

    def make(setting: Setting) -> Policy:
        policies = [maker(setting) for maker in makers]

        def init(shapes: Any, key: Any) -> Any:
            return tuple(policy.init(shapes, key) for policy in policies)

        def by_group(seeds: Any, signals: Any, memory: Any) -> Any:
            asked, new = zip(
                *(
                    policy.decide(seeds, signals, own)
                    for policy, own in zip(policies, memory, strict=True)
                ),
                strict=True,
            )
            which = numbers["which"]
            picked = jax.tree.map(lambda *c: jnp.stack(c)[which], *asked)
            return picked, new

        return Policy(init, by_group, reads=policies[0].reads, stacked=True)

    return make


def everywhere(weights: Any) -> Any:
    """Weights that grow in every place at the first tick, as far as the budget goes.

    The dearest blueprint that fits; what is born counts and learns to the end.
    """
    bias = np.zeros(weights["say_bias"].shape, np.float32)
    bias[[Stage.GERMINATED, Stage.TRAINING, Stage.GRAFTING]] = 1.0
    bias[[*range(Stage.STABILIZATION, Stage.ROLLED_BACK + 1)]] = -1.0
    bias[-4] = 1.0
    silent = jax.tree.map(np.zeros_like, dict(weights))
    return {**silent, "say_bias": bias}


def numbers_of(weights: Any, heuristic: Any, places: int, which: int = 0) -> Any:
    """The numbers of a run by `played`."""
    nobody = {"tick": np.full(places, -1, np.int32), "kind": np.zeros(places, np.int32)}
    return {
        "weights": jax.tree.map(np.asarray, dict(weights)),
        "heuristic": jax.tree.map(np.asarray, dict(heuristic)),
        "plan": nobody,
        "which": np.int32(which),
    }


def random_plan(
    rng: np.random.Generator, births: int, kinds: np.ndarray, places: int, ticks: int
) -> Any:
    """As many births as a run of the network had, at random.

    Args:
      rng: draws when and where.
      births: how many; no place twice.
      kinds: the blueprints that the network's run had born, of which as many of each.
      places: of all layers.
      ticks: the last but three may have a birth.
    """
    plan = {"tick": np.full(places, -1, np.int32), "kind": np.zeros(places, np.int32)}
    where = rng.permutation(places)[:births]
    plan["tick"][where] = rng.integers(0, max(1, ticks - 3), len(where))
    plan["kind"][where] = rng.permutation(kinds)[: len(where)]
    return plan
