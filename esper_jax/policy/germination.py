"""Whether something germinates at a tick, what and where; and if not, why not."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from esper_jax.blueprints import living_parameters
from esper_jax.groups import Groups
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import Stage
from esper_jax.lifecycle.state import SeedState
from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.memory import ControllerMemory, Reason
from esper_jax.policy.places import Limits, choose, choose_blueprint, cost_of, scores

__all__ = ["Costs", "Seen", "germinate"]

Costs = Mapping[str, Int[np.ndarray, "N S"]]
"""Parameters of each blueprint on each chunk, by layer or group."""


class Seen(NamedTuple):
    """What the heuristic sees of all layers, by group, stacked."""

    groups: Groups
    seeds: Mapping[str, SeedState]
    signals: Mapping[str, Signals]
    costs: Costs
    """Parameters of each blueprint on each chunk of a group's layers."""

    def common(self, name: str) -> Array:
        """A signal that all seeds share, of shape ()."""
        return getattr(next(iter(self.signals.values())), name).reshape(-1)[0]


def germinate(
    seen: Seen, memory: ControllerMemory, config: ControllerConfig
) -> tuple[Int[Array, ""], dict[str, Bool[Array, "L S"]], ControllerMemory]:
    """Which blueprint germinates and where, if anything does; and the new memory."""
    groups, seeds, signals, costs = seen
    key, chance, places = jax.random.split(memory.key, 3)
    time = {
        "plateau": memory.stale >= config.patience,
        "period": memory.since >= config.period,
        "random": jax.random.uniform(chance) < 1 / config.period,
    }[config.when]
    waiting = sum(
        jnp.sum((s.stage == Stage.GERMINATED) | (s.stage == Stage.TRAINING))
        for s in seeds.values()
    )
    kind = choose_blueprint(config, memory, groups, costs)
    score, next_turn = scores(config.where, groups, seeds, signals, memory.turn, places)
    chosen = choose(
        groups,
        seeds,
        score,
        {name: cost_of(kind, cost) for name, cost in costs.items()},
        Limits(
            births=config.births,
            at_once=config.max_training - waiting,
            room=config.budget - _spent(seen) if _limited(config) else jnp.inf,
        ),
    )
    reason = _first_reason(
        [
            (jnp.asarray(not config.enabled), Reason.DISABLED),
            (_target_met(seen.common("held_out_accuracy"), config), Reason.TARGET_MET),
            (jnp.asarray(config.budget == 0), Reason.BUDGET_SPENT),
            (~time, Reason.NOT_YET),
            (jnp.asarray(waiting >= config.max_training), Reason.BUSY),
            *_no_place(seeds, score, chosen),
        ]
    )
    grows = reason == Reason.GERMINATED
    born = {name: flags & grows for name, flags in chosen.items()}
    loss = seen.common("held_out_loss")
    # Infinity, so that the next finite loss becomes the best one.
    best = jnp.where(jnp.isfinite(loss), loss, jnp.inf)
    memory = dataclasses.replace(
        memory,
        best_loss=jnp.where(grows, best, memory.best_loss),
        stale=jnp.where(grows, 0, memory.stale),
        since=jnp.where(grows, 0, memory.since),
        turn=jnp.where(grows, next_turn(born), memory.turn),
        key=key,
        reason=reason,
        tried=memory.tried.at[kind].add(sum(jnp.sum(b) for b in born.values())),
    )
    return kind, born, memory


def _limited(config: ControllerConfig) -> bool:
    """Whether there is a budget. One that is traced, as when it is tuned, is one."""
    return not isinstance(config.budget, int) or config.budget >= 0


def _spent(seen: Seen) -> Int[Array, ""]:
    """Parameters of all living seeds."""
    total = jnp.zeros((), jnp.int32)
    for name, state in seen.seeds.items():
        count = functools.partial(living_parameters, seen.costs[name])
        own = jax.vmap(count)(state.blueprint, state.slot_of_seed >= 0)
        total += jnp.sum(own)
    return total


def _target_met(accuracy: Array, config: ControllerConfig) -> Bool[Array, ""]:
    if config.target_accuracy < 0:
        return jnp.asarray(False)
    return accuracy >= config.target_accuracy


def _no_place(
    seeds: Mapping[str, SeedState],
    score: Mapping[str, Array],
    chosen: Mapping[str, Array],
) -> list[tuple[Bool[Array, ""], Reason]]:
    """What may be wrong with all places."""
    dormant = {n: s.stage == Stage.DORMANT for n, s in seeds.items()}
    usable = {
        n: d & jnp.any(seeds[n].seed_of_slot < 0, axis=-1, keepdims=True)
        for n, d in dormant.items()
    }
    resting = {n: s.stage >= Stage.CULLED for n, s in seeds.items()}
    known = {n: u & jnp.isfinite(score[n]) for n, u in usable.items()}

    def some(flags: Mapping[str, Array]) -> Array:
        return jnp.any(jnp.stack([jnp.any(f) for f in flags.values()]))

    return [
        (~some(dormant) & some(resting), Reason.EMBARGOED),
        (~some(dormant), Reason.FULL),
        (~some(usable), Reason.NO_SLOT),
        (~some(known), Reason.UNMEASURED),
        (~some(chosen), Reason.BUDGET_SPENT),
    ]


def _first_reason(cases: list[tuple[Bool[Array, ""], Reason]]) -> Int[Array, ""]:
    """The reason of the first case that holds, else GERMINATED; int8."""
    holds, reasons = zip(*cases, strict=True)
    return jnp.select(
        list(holds), [jnp.int8(r) for r in reasons], jnp.int8(Reason.GERMINATED)
    )
