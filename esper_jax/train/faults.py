"""What can be wrong with a state after a tick, found on the device."""

import dataclasses
import enum
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from esper_jax.growth.reports import TickReport
from esper_jax.growth.state import LOSS_WINDOW, GovernorMemory, TrainState
from esper_jax.policy.memory import ControllerMemory
from esper_jax.trees import is_key

__all__ = [
    "Fault",
    "GovernorConfig",
    "first_wrong",
    "infinite_leaves",
    "inspect",
    "sound_values",
]


class Fault(enum.IntEnum):
    """What is wrong with a tick: the first fault that holds."""

    NONE = 0
    TRAIN_LOSS = 1
    """The loss of at least one step is NaN or infinite."""
    GRADIENTS = 2
    """The host's gradient in at least one step is NaN or infinite."""
    VALUES = 3
    """A value of the state is NaN or infinite."""
    HELD_OUT_LOSS = 4
    """The held-out loss is NaN or infinite."""
    JUMP = 5
    """The train or held-out loss is far above its median."""
    CHANCE = 6
    """The loss came back to the loss of guessing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GovernorConfig:
    """When to go back; hashable.

    Args:
      enabled: if False, nothing is checked.
      deviations: a loss this many robust deviations above its median is a jump. The
        deviation is 1.4826 times the median absolute deviation over the last 16 good
        ticks.
      min_deviation: smallest deviation, as a share of the first held-out loss.
      min_ticks: good ticks before the first look for a jump, 2 to 16.
      chance_tolerance: a loss within this share of ``ln(num_classes)`` is chance, if
        the lowest loss so far was at least twice as far below it, and if the held-out
        accuracy covers at most a quarter of the way from guessing to 1.
      max_rollbacks: rollbacks in a row that are allowed; the next fault stops the run.

    Raises:
      ValueError: naming the field that is out of its range.
    """

    enabled: bool = True
    deviations: float = 8.0
    min_deviation: float = 0.02
    min_ticks: int = 5
    chance_tolerance: float = 0.05
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        for name in ("deviations", "min_deviation"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be above 0 and finite, got {getattr(self, name)}"
                )
        if not 2 <= self.min_ticks <= LOSS_WINDOW:
            raise ValueError(
                f"min_ticks must be from 2 to {LOSS_WINDOW}, got {self.min_ticks}"
            )
        if not 0 <= self.chance_tolerance < 0.5:
            raise ValueError(
                "chance_tolerance must be at least 0 and below 0.5, "
                f"got {self.chance_tolerance}"
            )
        if self.max_rollbacks < 0:
            raise ValueError(
                f"max_rollbacks must be at least 0, got {self.max_rollbacks}"
            )


_Check = tuple[str, Any, Callable[[Array], Array], Array | None]
"""Name, values, what is wrong with one, and in which slots; None is everywhere."""


def _sound(
    tree: Any, wrong: Callable[[Array], Array], owned: Array | None
) -> Bool[Array, ""]:
    """Whether no value is ``wrong``; with ``owned``, only in those slots."""
    flags = [jnp.ones((), bool)]
    for leaf in jax.tree.leaves(tree):
        if not is_key(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact):
            bad = wrong(leaf)
            if owned is not None:
                bad &= owned.reshape(owned.shape + (1,) * (bad.ndim - 1))
            flags.append(~jnp.any(bad))
    return functools.reduce(jnp.logical_and, flags)


def _all_sound(checks: list[_Check]) -> Bool[Array, ""]:
    flags = [_sound(tree, wrong, owned) for _, tree, wrong, owned in checks]
    return functools.reduce(jnp.logical_and, flags)


def _not_finite(leaf: Array) -> Array:
    return ~jnp.isfinite(leaf)


def _no_minimum(leaf: Array) -> Array:
    """A lowest loss that no loss can be lower than; infinite is before the first."""
    return jnp.isnan(leaf) | jnp.isneginf(leaf)


def sound_values(
    state: TrainState, infinite: frozenset[str] = frozenset()
) -> Bool[Array, ""]:
    """Whether a state holds no value that can break training.

    Args:
      state: of the run.
      infinite: leaves of the optimizers and of the model's other variables that may
        hold infinity, as `infinite_leaves` names them. Some start from it.
    """
    return _all_sound(_values(state, infinite)) & _all_sound(_memories(state))


def infinite_leaves(state: TrainState) -> frozenset[str]:
    """Leaves that hold infinity and may: of the optimizers, and other variables."""
    trees = {"opt_state": state.opt_state, "rest": state.rest}
    trees |= {f"bank_opt[{name!r}]": opt for name, opt in state.bank_opt.items()}
    return frozenset(
        field + jax.tree_util.keystr(path)
        for field, tree in trees.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if not bool(_sound(leaf, jnp.isinf, None))
    )


def _values(state: TrainState, infinite: frozenset[str]) -> list[_Check]:
    """What the model computes with, and what its optimizers do."""

    def leaves(field: str, tree: Any, owned: Array | None) -> list[_Check]:
        named = (
            (field + jax.tree_util.keystr(path), leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        )
        return [
            (name, leaf, jnp.isnan if name in infinite else _not_finite, owned)
            for name, leaf in named
        ]

    checks: list[_Check] = [("params", state.params, _not_finite, None)]
    checks += leaves("opt_state", state.opt_state, None)
    checks += leaves("rest", state.rest, None)
    for name, seeds in state.seeds.items():
        owned = seeds.seed_of_slot >= 0
        checks += [(f"banks[{name!r}]", state.banks[name], _not_finite, owned)]
        checks += leaves(f"bank_opt[{name!r}]", state.bank_opt[name], owned)
    return checks


def _memories(state: TrainState) -> list[_Check]:
    """What later ticks compare with, and would never forget.

    NaN is "not measured yet" in most of it. Sums over a tick and what each tick
    measures anew are left out.
    """
    monitor, governor, memory = state.monitor, state.governor, state.memory
    sums = {name: getattr(monitor, name) for name in ("train_loss", "grad_norm")}
    moments: dict[str, Array] = {}
    for name in ("loss", "accuracy"):
        mean, spread = getattr(monitor, f"{name}_mean"), f"{name}_variance"
        moments[f"{name}_mean"] = jnp.where(jnp.isnan(mean), 0.0, mean)
        # Once there is a mean, a variance that is not finite stays so.
        unknown = jnp.isnan(mean)
        moments[spread] = jnp.where(unknown, 0.0, getattr(monitor, spread))
    checks: list[_Check] = [
        ("monitor.host_mean", monitor.host_mean, _not_finite, None),
        ("monitor", sums, _not_finite, None),
        ("monitor", moments, _not_finite, None),
        ("governor.losses", governor.losses, jnp.isinf, None),
        ("governor.best", governor.best, _no_minimum, None),
    ]
    for name, seeds in state.seeds.items():
        graft = seeds.graft
        ramp = {"alpha": graft.alpha, "velocity": graft.velocity}
        ramp |= {"stable_alpha": graft.stable_alpha}
        checks += [(f"seeds[{name!r}].graft", ramp, _not_finite, None)]
    if isinstance(memory, ControllerMemory):
        checks += [
            ("memory.best_loss", memory.best_loss, _no_minimum, None),
            ("memory.loss_mean", memory.loss_mean, jnp.isinf, None),
            ("memory.earned", memory.earned, _not_finite, None),
            ("memory.before", memory.before, jnp.isinf, None),
        ]
    return checks


def _jump(
    losses: Float[Array, " 2"],
    memory: GovernorMemory,
    scale: Float[Array, ""],
    config: GovernorConfig,
) -> Bool[Array, ""]:
    past = memory.losses
    median = jnp.nanmedian(past, axis=0)
    spread = 1.4826 * jnp.nanmedian(jnp.abs(past - median[None]), axis=0)
    deviation = jnp.maximum(spread, config.min_deviation * jnp.abs(scale))
    known = jnp.sum(~jnp.isnan(past), axis=0) >= config.min_ticks
    return jnp.any(known & (losses - median > config.deviations * deviation))


def _at_chance(
    losses: Float[Array, " 2"],
    accuracy: Float[Array, ""],
    memory: GovernorMemory,
    config: GovernorConfig,
    num_classes: int,
) -> Bool[Array, ""]:
    chance, tolerance = math.log(num_classes), config.chance_tolerance
    near = jnp.abs(losses - chance) <= tolerance * chance
    was_better = memory.best < (1 - 2 * tolerance) * chance
    guessing = accuracy <= 1 / num_classes + 0.25 * (1 - 1 / num_classes)
    return jnp.any(near & was_better) & guessing


def inspect(
    state: TrainState,
    report: TickReport,
    config: GovernorConfig,
    num_classes: int | None = None,
    infinite: frozenset[str] = frozenset(),
) -> tuple[Int[Array, ""], GovernorMemory]:
    """Checks the state after a tick. Pure and jittable.

    A gradient that is not finite in a single blueprint's slot is no fault. That slot
    skips the step, and the gates count its errors.

    Args:
      state: after `tick`.
      report: of that tick.
      config: the thresholds.
      num_classes: number of classes where the loss is `train.classification`; None
        leaves out the check for chance.
      infinite: as in `sound_values`.

    Returns:
      A `Fault`, and the memory that a sound state goes on with.
    """
    memory = state.governor
    losses = jnp.stack([report.train_loss, report.loss]).astype(jnp.float32)
    grad_norm = next(iter(report.layers.values())).signals.grad_norm
    checks = [
        (Fault.TRAIN_LOSS, _not_finite(report.train_loss)),
        (Fault.GRADIENTS, _not_finite(grad_norm)),
        (Fault.VALUES, ~_all_sound(_values(state, infinite))),
        (Fault.HELD_OUT_LOSS, _not_finite(report.loss)),
        # After the loss, whose infinity would be found here as well.
        (Fault.VALUES, ~_all_sound(_memories(state))),
        (Fault.JUMP, _jump(losses, memory, state.monitor.initial_loss, config)),
    ]
    if num_classes is not None and num_classes > 1:
        chance = _at_chance(losses, report.accuracy, memory, config, num_classes)
        checks.append((Fault.CHANCE, chance))
    fault = jnp.select(
        [flag for _, flag in checks],
        [jnp.int32(code) for code, _ in checks],
        jnp.int32(Fault.NONE),
    )
    return fault, GovernorMemory(
        losses=jnp.concatenate([losses[None], memory.losses[:-1]]),
        best=jnp.minimum(memory.best, losses),
        rollbacks=memory.rollbacks,
        consecutive=jnp.zeros_like(memory.consecutive),
    )


def first_wrong(state: TrainState, infinite: frozenset[str] = frozenset()) -> str:
    """Names the first value that can break training, if any; reads it on the host."""
    for field, tree, wrong, owned in [*_values(state, infinite), *_memories(state)]:
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not bool(_sound(leaf, wrong, owned)):
                return f"{field}{jax.tree_util.keystr(path)} holds NaN or infinity"
    return ""
