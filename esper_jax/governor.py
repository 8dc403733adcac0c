"""The governor: keeps the last good state, notices when training breaks, and goes back.

`inspect` and `retreat` are pure and jitted; `Governor` holds the snapshot between them.
Once a tick, after all its steps, the state is checked. If it is sound, it is blessed: a
copy of it stays on the device. If not, training goes back to the copy, which is exact,
and leaves it on another way:

- the seeds that were active become ROLLED_BACK and wait for their embargo, those in
  GERMINATED become CANCELLED; FOSSILIZED ones stay;
- the random key is folded with the number of rollbacks, and `train.fit` shuffles the
  rows anew with it, so that the failed epoch is not replayed step by step.

More rollbacks in a row than the limit stop the run with `TrainingStopped`.
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from esper_jax import lifecycle
from esper_jax.functional import (
    LOSS_WINDOW,
    GovernorMemory,
    TrainState,
    copy_state,
    is_key,
)
from esper_jax.lifecycle import Commands, LifecycleConfig
from esper_jax.signals import Signals
from esper_jax.stages import NO_REQUEST, Stage
from esper_jax.state import SeedState
from esper_jax.tick import Batch, TickReport

if TYPE_CHECKING:
    from esper_jax.train import Program

__all__ = [
    "Fault",
    "Governor",
    "GovernorConfig",
    "LayerRetreat",
    "Rollback",
    "TrainingStopped",
    "inspect",
    "retreat",
    "sound_values",
]


class Fault(enum.IntEnum):
    """What is wrong with a tick; where several are, the first."""

    NONE = 0
    TRAIN_LOSS = 1
    """The loss of at least one of its steps is NaN or infinite."""
    GRADIENTS = 2
    """The host's gradient in at least one of its steps is NaN or infinite."""
    VALUES = 3
    """A value of the state is NaN or infinite."""
    HELD_OUT_LOSS = 4
    """The held-out loss is NaN or infinite."""
    JUMP = 5
    """The train or held-out loss is far above its median."""
    CHANCE = 6
    """The loss came back to that of guessing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GovernorConfig:
    """When to go back; hashable.

    Args:
      enabled: if False, nothing is checked.
      deviations: a loss this many robust deviations above its median is a jump. The
        deviation is 1.4826 times the median absolute deviation, over the last 16 good
        ticks.
      min_deviation: it is at least this share of the first held-out loss.
      min_ticks: good ticks before a jump is looked for, 2 to 16.
      chance_tolerance: a loss within this share of ``ln`` of the number of classes is
        chance, if the lowest so far was at least twice as far below and the held-out
        accuracy covers no more than a quarter of the way from guessing to 1.
      max_rollbacks: this many rollbacks in a row are allowed; the next fault stops.

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


@struct.dataclass
class LayerRetreat:
    """What a rollback did to the seeds of one layer, each field one entry a seed."""

    source: Int[Array, " S"]
    target: Int[Array, " S"]
    """The stage requested, -1 for none."""
    outcome: Int[Array, " S"]
    slot: Int[Array, " S"]
    epochs: Int[Array, " S"]
    errors: Int[Array, " S"]


@dataclasses.dataclass(frozen=True)
class Rollback:
    """One return to the last good state."""

    number: int
    """Counted from the beginning of the run, from 1."""
    failed_tick: int
    tick: int
    """The tick that training went back to."""
    fault: Fault
    reason: str
    layers: dict[str, LayerRetreat]
    """Host arrays, by layer."""


class TrainingStopped(RuntimeError):
    """Rollbacks did not help.

    Attributes:
      state: the last good state, its active seeds rolled back; to be saved. It may go
        on from there, with rows in another order.
      rollback: the last one.
    """

    def __init__(self, message: str, state: TrainState, rollback: Rollback) -> None:
        super().__init__(message)
        self.state = state
        self.rollback = rollback


def _sound(
    tree: Any, wrong: Callable[[Array], Array], owned: Array | None
) -> Bool[Array, ""]:
    """Whether no value is ``wrong``; where ``owned``, in the slots of living seeds."""
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
    """Whether parameters and the blueprints of living seeds are finite, and nothing in
    the optimizer or the model's other variables is NaN. (Some start from infinity.)"""
    flags = [_sound(tree, wrong, owned) for _, tree, wrong, owned in _checks(state)]
    return functools.reduce(jnp.logical_and, flags)


def _checks(
    state: TrainState,
) -> list[tuple[str, Any, Callable[[Array], Array], Array | None]]:
    """What is looked at: its name, the values, what is wrong there, and which slots."""
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
    spread = 1.4826 * jnp.nanmedian(jnp.abs(past - median), axis=0)
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

    A gradient that is not finite in one blueprint's slot alone is no fault: that slot
    waits (`train`), and its errors are counted for the gates.

    Args:
      state: after `tick`.
      report: of that tick.
      config: the thresholds.
      num_classes: of a classification with `train.classification` as its loss; None
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


def retreat(
    state: TrainState,
    rollbacks: Int[Array, ""],
    consecutive: Int[Array, ""],
    gates: LifecycleConfig,
) -> tuple[TrainState, dict[str, LayerRetreat]]:
    """Leaves a good state on another way than the one that failed. Pure and jittable.

    Args:
      state: the good state.
      rollbacks: how many there were in all, this one included.
      consecutive: how many in a row, this one included.
      gates: of the lifecycle.

    Returns:
      The state with its active seeds rolled back and another random key, and what
      became of the seeds of each layer.
    """
    seeds, report = {}, {}
    for name, layer in state.seeds.items():
        seeds[name], report[name] = _roll_back(layer, gates)
    return dataclasses.replace(
        state,
        rng=jax.random.fold_in(state.rng, rollbacks),
        seeds=seeds,
        governor=dataclasses.replace(
            state.governor, rollbacks=rollbacks, consecutive=consecutive
        ),
    ), report


def _roll_back(
    layer: SeedState, gates: LifecycleConfig
) -> tuple[SeedState, LayerRetreat]:
    active = (layer.stage >= Stage.TRAINING) & (layer.stage <= Stage.FINE_TUNING)
    waiting = layer.stage == Stage.GERMINATED
    nothing = jnp.full(layer.stage.shape, NO_REQUEST, jnp.int8)
    target = jnp.where(active, jnp.int8(Stage.ROLLED_BACK), nothing)
    target = jnp.where(waiting, jnp.int8(Stage.CANCELLED), target)
    after, outcome = lifecycle.transition(
        layer,
        Commands(target=target, blueprint=nothing, strategy=nothing),
        Signals.unmeasured(),
        gates,
    )
    return after, LayerRetreat(
        source=layer.stage,
        target=target,
        outcome=outcome,
        slot=layer.slot_of_seed,
        epochs=layer.epochs_in_stage,
        errors=layer.error_count,
    )


_inspect = jax.jit(inspect, static_argnums=(2, 3))
_retreat = jax.jit(retreat, static_argnums=3, donate_argnums=0)
_sound_values = jax.jit(sound_values)


class Governor:
    """Holds the last good state of a run on its device, and returns to it.

    Args:
      program: of the run.
      config: the thresholds.
      num_classes: for the check for chance; None leaves it out.
      on_rollback: called with each `Rollback`.
    """

    def __init__(
        self,
        program: "Program",
        config: GovernorConfig | None = None,
        *,
        num_classes: int | None = None,
        on_rollback: Callable[[Rollback], None] | None = None,
    ) -> None:
        self.config = config or GovernorConfig()
        self._num_classes = num_classes
        self._on_rollback = on_rollback
        self._evaluate = program.evaluate
        self._gates = program.gates
        self._good: TrainState | None = None

    def start(self, state: TrainState) -> None:
        """Takes the state that a run begins with, or goes on from, as the first good
        one.

        Raises:
          ValueError: if it holds values that are not finite.
        """
        if not bool(_sound_values(state)):
            raise ValueError(
                f"state must hold finite values to start from; {_first_wrong(state)}. "
                "Start from an older checkpoint"
            )
        self._good = copy_state(state)

    def restore(self) -> TrainState:
        """A copy of the last good state: its `state_hash` is the one that it had.

        Raises:
          RuntimeError: if there is none yet.
        """
        if self._good is None:
            raise RuntimeError("there is no good state yet: call start(state) first")
        return copy_state(self._good)

    def review(
        self, state: TrainState, report: TickReport, data: Batch, held_out: Batch
    ) -> tuple[TrainState, Rollback | None]:
        """Blesses the state after a tick, or goes back to the last good one.

        Waits for the tick to end, as reading its report does.

        Args:
          state: after the tick; not to be used again.
          report: of the tick, on the device.
          data: what was trained on, to say what is wrong with it.
          held_out: the data that the losses are watched on.

        Returns:
          The state to go on with, and the rollback if there was one.

        Raises:
          TrainingStopped: if there were more rollbacks in a row than allowed.
        """
        code, memory = _inspect(state, report, self.config, self._num_classes)
        fault = Fault(int(code))
        if fault == Fault.NONE:
            state = dataclasses.replace(state, governor=memory)
            self._good = copy_state(state)
            return state, None

        good = self.restore()
        known = good.governor.losses[0, 1]
        rollback = Rollback(
            number=int(state.governor.rollbacks) + 1,
            failed_tick=int(report.tick),
            tick=int(good.ticks),
            fault=fault,
            reason=self._reason(fault, state, report),
            layers={},
        )
        in_a_row = int(state.governor.consecutive) + 1
        state, layers = _retreat(
            good, jnp.int32(rollback.number), jnp.int32(in_a_row), self._gates
        )
        rollback = dataclasses.replace(rollback, layers=jax.device_get(layers))
        # Without the seeds that counted the loss may be higher. That is no new jump.
        higher = self._evaluate(state, held_out)[0] - known
        higher = jnp.where(jnp.isfinite(higher), jnp.maximum(higher, 0.0), 0.0)
        state = self._remember(state, state.governor.losses + higher)
        if self._on_rollback is not None:
            self._on_rollback(rollback)
        if in_a_row > self.config.max_rollbacks:
            # Whoever goes on from here has the full number of attempts again.
            calm = dataclasses.replace(
                state.governor, consecutive=jnp.zeros((), jnp.int32)
            )
            raise TrainingStopped(
                f"training stopped in tick {rollback.failed_tick}: {rollback.reason}. "
                f"{self.config.max_rollbacks} rollbacks in a row to tick "
                f"{rollback.tick} did not help{_bad_rows(data)}",
                dataclasses.replace(state, governor=calm),
                rollback,
            )
        return state, rollback

    @staticmethod
    def _remember(state: TrainState, losses: Float[Array, "W 2"]) -> TrainState:
        memory = dataclasses.replace(state.governor, losses=losses)
        return dataclasses.replace(state, governor=memory)

    def _reason(self, fault: Fault, state: TrainState, report: TickReport) -> str:
        """The fault in words, with its numbers."""
        train, held_out = float(report.train_loss), float(report.loss)
        if fault == Fault.TRAIN_LOSS:
            return f"the train loss is {train:g}"
        if fault == Fault.GRADIENTS:
            return "the host's gradient is not finite"
        if fault == Fault.VALUES:
            return _first_wrong(state)
        if fault == Fault.HELD_OUT_LOSS:
            return f"the held-out loss is {held_out:g}"
        if fault == Fault.JUMP:
            median = np.nanmedian(np.asarray(state.governor.losses), axis=0)
            return (
                f"the loss jumped by more than {self.config.deviations:g} deviations: "
                f"train {train:.4g} (median {median[0]:.4g}), "
                f"held-out {held_out:.4g} (median {median[1]:.4g})"
            )
        best = np.asarray(state.governor.best)
        return (
            f"the loss fell back to chance, ln {self._num_classes}: "
            f"train {train:.4g} (lowest {best[0]:.4g}), "
            f"held-out {held_out:.4g} (lowest {best[1]:.4g})"
        )


def _first_wrong(state: TrainState) -> str:
    """Where the first value that is not finite stands; reads the state on the host."""
    for field, tree, wrong, owned in _checks(state):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not bool(_sound(leaf, wrong, owned)):
                return f"{field}{jax.tree_util.keystr(path)} holds NaN or infinity"
    return "a value is not finite"


def _bad_rows(data: Batch) -> str:
    """Says so if the data itself holds values that are not finite."""
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
