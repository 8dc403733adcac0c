"""How alpha rises while a seed is grafted: seven strategies, one vectorised update.

Under calm signals every strategy is the linear ramp. They differ in what makes them
wait, hurry or step back. A strategy is a branch-free function over all seeds that
returns the step it would take and the memory it would leave; `update` selects among
them.

To add a strategy, add its code to `Strategy` and its function to ``_STRATEGIES``.
"""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, UInt

from esper_jax.lifecycle.signals import Signals

__all__ = ["READS", "GraftConfig", "GraftMemory", "Strategy", "begin", "update"]


class Strategy(enum.IntEnum):
    """Grafting strategies. The codes are part of the checkpoint format."""

    LINEAR = 0
    DRIFT_CONTROLLED = 1
    MOMENTUM = 2
    ADAPTIVE = 3
    STABILITY = 4
    PERFORMANCE_LINKED = 5
    GRAD_NORM_GATED = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraftConfig:
    """Numbers of the grafting strategies; hashable.

    A field may also be an array with one value per seed: the update is elementwise.

    Args:
      ramp_duration: epochs from ``min_alpha`` to 1 under calm signals.
      min_alpha: alpha in the first epoch of GRAFTING.
      max_alpha: the ramp ends here.
      drift_threshold: relative drift of the host's weights above which to pause.
      pause_duration: length of a pause, in epochs.
      momentum_factor: decay of the velocity, in [0, 1).
      stability_window: epochs between two stability checks.
      max_loss_variance: the host is stable while the loss variance is below this,
      max_grad_norm: the gradient norm is below this,
      max_accuracy_variance: and the accuracy variance is below this.
      performance_gain: how much a falling reconstruction loss speeds up the ramp.
      grad_norm_lower: the gradient-norm gate is open from this norm
      grad_norm_upper: up to this one, both included.
    """

    ramp_duration: int = 50
    min_alpha: float = 0.0
    max_alpha: float = 1.0
    drift_threshold: float = 0.125
    pause_duration: int = 10
    momentum_factor: float = 0.875
    stability_window: int = 5
    max_loss_variance: float = 0.1
    max_grad_norm: float = 10.0
    max_accuracy_variance: float = 0.05
    performance_gain: float = 0.5
    grad_norm_lower: float = 0.1
    grad_norm_upper: float = 1.0

    def __post_init__(self) -> None:
        def require(ok: Any, name: str, expected: str) -> None:
            if not np.all(ok):
                raise ValueError(
                    f"{name} must be {expected}, got {getattr(self, name)!r}"
                )

        require(np.asarray(self.ramp_duration) >= 1, "ramp_duration", "at least 1")
        window = np.asarray(self.stability_window)
        require((window >= 1) & (window <= 65535), "stability_window", "1 to 65535")
        pause = np.asarray(self.pause_duration)
        require((pause >= 0) & (pause <= 65535), "pause_duration", "from 0 to 65535")
        low, high = np.asarray(self.min_alpha), np.asarray(self.max_alpha)
        require((low >= 0) & (low <= 1), "min_alpha", "from 0 to 1")
        require((high >= low) & (high <= 1), "max_alpha", "from min_alpha to 1")
        decay = np.asarray(self.momentum_factor)
        require((decay >= 0) & (decay < 1), "momentum_factor", "at least 0, below 1")
        for name in (
            "drift_threshold",
            "max_loss_variance",
            "max_grad_norm",
            "max_accuracy_variance",
            "performance_gain",
            "grad_norm_lower",
        ):
            require(np.asarray(getattr(self, name)) >= 0, name, "at least 0")
        require(
            np.asarray(self.grad_norm_upper) >= np.asarray(self.grad_norm_lower),
            "grad_norm_upper",
            "at least grad_norm_lower",
        )


@struct.dataclass
class GraftMemory:
    """What the strategies remember.

    All strategies share it, so a seed can change its strategy in the middle of a ramp.
    """

    alpha: Float[Array, "*S"]
    """Position on the ramp, in [min_alpha, max_alpha] while in GRAFTING."""
    velocity: Float[Array, "*S"]
    stable_alpha: Float[Array, "*S"]
    """Alpha at the last stable check (`STABILITY`)."""
    previous_loss: Float[Array, "*S"]
    """Reconstruction loss one epoch ago; NaN for none."""
    pause: UInt[Array, "*S"]
    """Epochs left to wait (uint16)."""
    unstable_checks: UInt[Array, "*S"]
    """Unstable checks in a row (uint8), at most 2."""


def begin(memory: GraftMemory, entered: Any, config: GraftConfig) -> GraftMemory:
    """Starts the memory of the seeds that enter GRAFTING: ``entered``, bool[S]."""

    def fill(old: Array, new: Any) -> Array:
        return jnp.where(entered, jnp.asarray(new, old.dtype), old)

    return GraftMemory(
        alpha=fill(memory.alpha, config.min_alpha),
        velocity=fill(memory.velocity, 0),
        stable_alpha=fill(memory.stable_alpha, config.min_alpha),
        previous_loss=fill(memory.previous_loss, jnp.nan),
        pause=fill(memory.pause, 0),
        unstable_checks=fill(memory.unstable_checks, 0),
    )


# A strategy maps (memory, signals, epochs since entry, config) to (step, new memory).
# It may move `memory.alpha` (STABILITY steps back); `update` then adds the step.
_Update = tuple[Any, GraftMemory]


def _base(config: GraftConfig) -> Any:
    return 1.0 / jnp.asarray(config.ramp_duration, jnp.float32)


def _linear(m: GraftMemory, s: Signals, epochs: Any, c: GraftConfig) -> _Update:
    return _base(c), m


def _drift_controlled(
    m: GraftMemory, s: Signals, epochs: Any, c: GraftConfig
) -> _Update:
    paused = m.pause > 0
    drifting = s.drift > c.drift_threshold
    counted = m.pause - paused.astype(m.pause.dtype)
    started = jnp.where(
        drifting, jnp.asarray(c.pause_duration, m.pause.dtype), jnp.zeros_like(m.pause)
    )
    step = jnp.where(paused | drifting, 0.0, _base(c))
    return step, dataclasses.replace(m, pause=jnp.where(paused, counted, started))


def _momentum(m: GraftMemory, s: Signals, epochs: Any, c: GraftConfig) -> _Update:
    # A delta that was not measured, or is infinite, adds nothing to the velocity.
    gain = jnp.where(jnp.isfinite(s.worth), s.worth, 0.0)
    velocity = c.momentum_factor * m.velocity + 0.01 * gain
    velocity = jnp.where(jnp.isfinite(velocity), velocity, m.velocity)
    return jnp.maximum(0.0, _base(c) + velocity), dataclasses.replace(
        m, velocity=velocity
    )


def _adaptive(m: GraftMemory, s: Signals, epochs: Any, c: GraftConfig) -> _Update:
    wary = (m.pause > 0) | (s.drift > 0.5 * jnp.asarray(c.drift_threshold))
    improving = s.worth > 0.01
    return _select(
        jnp.where(wary, 0, jnp.where(improving, 1, 2)),
        [f(m, s, epochs, c) for f in (_drift_controlled, _momentum, _linear)],
    )


def _stability(m: GraftMemory, s: Signals, epochs: Any, c: GraftConfig) -> _Update:
    check = epochs % jnp.asarray(c.stability_window, epochs.dtype) == 0
    stable = (
        (s.loss_variance < c.max_loss_variance)
        & (s.grad_norm < c.max_grad_norm)
        & (s.accuracy_variance < c.max_accuracy_variance)
    )
    count = jnp.where(check, jnp.where(stable, 0, m.unstable_checks + 1), 0)
    count = jnp.where(check, count, m.unstable_checks)
    revert = count >= 3
    step = jnp.where(revert, 0.0, jnp.where(count > 0, 0.5, 1.0) * _base(c))
    return step, dataclasses.replace(
        m,
        alpha=jnp.where(revert, m.stable_alpha, m.alpha),
        stable_alpha=jnp.where(check & stable, m.alpha, m.stable_alpha),
        unstable_checks=jnp.where(revert, 0, count).astype(m.unstable_checks.dtype),
    )


def _performance_linked(
    m: GraftMemory, s: Signals, epochs: Any, c: GraftConfig
) -> _Update:
    gain = (m.previous_loss - s.reconstruction_loss) / m.previous_loss
    known = (m.previous_loss > 0) & jnp.isfinite(gain)
    gain = jnp.where(known, jnp.clip(gain, 0.0, 1.0), 0.0)
    return _base(c) * (1.0 + c.performance_gain * gain), m


def _grad_norm_gated(
    m: GraftMemory, s: Signals, epochs: Any, c: GraftConfig
) -> _Update:
    is_open = (s.grad_norm >= c.grad_norm_lower) & (s.grad_norm <= c.grad_norm_upper)
    return jnp.where(is_open, _base(c), 0.0), m


_STRATEGIES: dict[Strategy, Callable[..., _Update]] = {
    Strategy.LINEAR: _linear,
    Strategy.DRIFT_CONTROLLED: _drift_controlled,
    Strategy.MOMENTUM: _momentum,
    Strategy.ADAPTIVE: _adaptive,
    Strategy.STABILITY: _stability,
    Strategy.PERFORMANCE_LINKED: _performance_linked,
    Strategy.GRAD_NORM_GATED: _grad_norm_gated,
}
assert list(_STRATEGIES) == list(Strategy), "a strategy has no function"

READS: dict[Strategy, frozenset[str]] = {
    strategy: frozenset() for strategy in Strategy
} | {
    Strategy.DRIFT_CONTROLLED: frozenset({"drift"}),
    Strategy.ADAPTIVE: frozenset({"drift"}),
    Strategy.STABILITY: frozenset({"grad_norm"}),
    Strategy.GRAD_NORM_GATED: frozenset({"grad_norm"}),
}
"""Signals of the host's weights and gradients that each strategy reads."""


def _select(index: Any, updates: list[_Update]) -> _Update:
    """For each seed, the update at ``index``. Fields that no update touched stay."""
    step, memory = updates[-1]
    step = jnp.asarray(step)
    for i, (other_step, other) in enumerate(updates[:-1]):
        chosen = index == i
        step = jnp.where(chosen, other_step, step)
        memory = GraftMemory(
            **{
                f.name: (
                    getattr(memory, f.name)
                    if getattr(other, f.name) is getattr(memory, f.name)
                    else jnp.where(
                        chosen, getattr(other, f.name), getattr(memory, f.name)
                    )
                )
                for f in dataclasses.fields(GraftMemory)
            }
        )
    return step, memory


def update(
    memory: GraftMemory,
    strategy: Int[Array, "*S"],
    signals: Signals,
    epochs: Int[Array, "*S"] | UInt[Array, "*S"],
    config: GraftConfig,
) -> GraftMemory:
    """One epoch of grafting for every seed, as if all were in GRAFTING.

    `begin` does the entry epoch; this does each later one.

    Args:
      memory: memory of all seeds.
      strategy: each seed's `Strategy` code; an unknown code acts as ``LINEAR``.
      signals: this epoch's measurements. NaN is "not measured": it fails every
        comparison, and never reaches the memory.
      epochs: epochs since the entry, not counting the entry; 1 at the first call.
      config: numbers of the strategies.

    Returns:
      The new memory. ``alpha`` is clipped to ``[min_alpha, max_alpha]`` and does not
      decrease, except where `Strategy.STABILITY` steps back.
    """
    known = (strategy >= 0) & (strategy < len(_STRATEGIES))
    index = jnp.where(known, strategy, Strategy.LINEAR)
    step, new = _select(
        index, [f(memory, signals, epochs, config) for f in _STRATEGIES.values()]
    )
    alpha = jnp.clip(new.alpha + step, config.min_alpha, config.max_alpha)
    measured = jnp.isfinite(signals.reconstruction_loss)
    return dataclasses.replace(
        new,
        alpha=alpha.astype(memory.alpha.dtype),
        previous_loss=jnp.where(
            measured, signals.reconstruction_loss, memory.previous_loss
        ).astype(memory.previous_loss.dtype),
    )
