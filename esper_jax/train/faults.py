"""What can be wrong with a state after a tick."""

import dataclasses
import enum
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from esper_jax.growth.reports import TickReport
from esper_jax.growth.state import LOSS_WINDOW, GovernorMemory, TrainState
from esper_jax.train.recipe import Batch
from esper_jax.trees import is_key

__all__ = [
    "Fault",
    "GovernorConfig",
    "bad_rows",
    "explain_fault",
    "first_wrong",
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


def _not_finite(leaf: Array) -> Array:
    return ~jnp.isfinite(leaf)


def sound_values(state: TrainState) -> Bool[Array, ""]:
    """Whether a state holds no value that breaks training.

    Parameters and the blueprints of living seeds must be finite. The optimizer's state
    and the model's other variables must not be NaN; some of them start from infinity.
    """
    flags = [_sound(tree, wrong, owned) for _, tree, wrong, owned in _checks(state)]
    return functools.reduce(jnp.logical_and, flags)


def _checks(
    state: TrainState,
) -> list[tuple[str, Any, Callable[[Array], Array], Array | None]]:
    """What is checked: name, values, what is wrong there, and in which slots."""
    checks: list[tuple[str, Any, Callable[[Array], Array], Array | None]] = [
        ("params", state.params, _not_finite, None),
        ("opt_state", state.opt_state, jnp.isnan, None),
        ("rest", state.rest, jnp.isnan, None),
    ]
    for name, seeds in state.seeds.items():
        owned = seeds.seed_of_slot >= 0
        checks += [
            (f"banks[{name!r}]", state.banks[name], _not_finite, owned),
            (f"bank_opt[{name!r}]", state.bank_opt[name], jnp.isnan, owned),
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

    Returns:
      A `Fault`, and the memory that a sound state goes on with.
    """
    memory = state.governor
    losses = jnp.stack([report.train_loss, report.loss]).astype(jnp.float32)
    grad_norm = next(iter(report.layers.values())).signals.grad_norm
    checks = [
        (Fault.TRAIN_LOSS, _not_finite(report.train_loss)),
        (Fault.GRADIENTS, _not_finite(grad_norm)),
        (Fault.VALUES, ~sound_values(state)),
        (Fault.HELD_OUT_LOSS, _not_finite(report.loss)),
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


def explain_fault(
    fault: Fault,
    state: TrainState,
    report: TickReport,
    config: GovernorConfig,
    num_classes: int | None,
) -> str:
    """The fault in words, with its numbers; reads the state on the host."""
    train, held_out = float(report.train_loss), float(report.loss)
    if fault == Fault.TRAIN_LOSS:
        return f"the train loss is {train:g}"
    if fault == Fault.GRADIENTS:
        return "the host's gradient is not finite"
    if fault == Fault.VALUES:
        return first_wrong(state)
    if fault == Fault.HELD_OUT_LOSS:
        return f"the held-out loss is {held_out:g}"
    if fault == Fault.JUMP:
        median = np.nanmedian(np.asarray(state.governor.losses), axis=0)
        return (
            f"the loss jumped by more than {config.deviations:g} deviations: "
            f"train {train:.4g} (median {median[0]:.4g}), "
            f"held-out {held_out:.4g} (median {median[1]:.4g})"
        )
    best = np.asarray(state.governor.best)
    return (
        f"the loss fell back to chance, ln {num_classes}: "
        f"train {train:.4g} (lowest {best[0]:.4g}), "
        f"held-out {held_out:.4g} (lowest {best[1]:.4g})"
    )


def first_wrong(state: TrainState) -> str:
    """Names the first value that is not finite; reads the state on the host."""
    for field, tree, wrong, owned in _checks(state):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not bool(_sound(leaf, wrong, owned)):
                return f"{field}{jax.tree_util.keystr(path)} holds NaN or infinity"
    return "a value is not finite"


def bad_rows(data: Batch | None) -> str:
    """Says which rows of arrays hold values that are not finite, if any."""
    if data is None:
        return ""
    bad = np.zeros(jax.tree.leaves(data)[0].shape[0], bool)
    for leaf in map(np.asarray, jax.tree.leaves(data)):
        if np.issubdtype(leaf.dtype, np.inexact):
            bad |= ~np.isfinite(leaf.reshape(len(leaf), -1)).all(axis=1)
    if not bad.any():
        return ""
    return (
        f". The training data holds NaN or infinity in {int(bad.sum())} rows, the "
        f"first is row {int(np.argmax(bad))}: remove them"
    )
