"""When, where and what to grow: a heuristic over measured signals.

`decide` is a pure, jittable function that sees the seeds of all layers at once. It
asks; `lifecycle.transition` decides.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from esper_jax.lifecycle import Commands, LifecycleConfig, gates_pass
from esper_jax.signals import Signals
from esper_jax.stages import NO_REQUEST, Stage
from esper_jax.state import SeedState

__all__ = ["ControllerConfig", "ControllerMemory", "decide", "init_memory"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """Numbers of the heuristic; hashable.

    Args:
      patience: ticks without improvement of the held-out loss that make a plateau.
      threshold: relative improvement of the held-out loss that counts as one.
      max_training: seeds that may be in TRAINING (or waiting for it) at once.
      blueprint: index of the blueprint that germinates.
      waiting_limit: ticks in GERMINATED after which a seed whose turn has not come is
        cancelled.
      training_limit: ticks in TRAINING after which a seed that may not be grafted is
        culled.
      grafting_limit: ticks in GRAFTING after which a seed whose ramp has not ended is
        rolled back.
      evaluation_limit: ticks in EVALUATING after which a seed that is neither worth
        tuning nor bad enough to be culled is rolled back.
      tuning_limit: ticks in FINE_TUNING after which a seed that may not be kept is
        culled.
      enabled: if False, nothing germinates; what lives goes on.

    Raises:
      ValueError: naming the field that is out of its range.
    """

    patience: int = 10
    threshold: float = 0.01
    max_training: int = 1
    blueprint: int = 0
    waiting_limit: int = 200
    training_limit: int = 200
    grafting_limit: int = 400
    evaluation_limit: int = 200
    tuning_limit: int = 200
    enabled: bool = True

    def __post_init__(self) -> None:
        # A limit that epochs_in_stage (uint16) cannot hold would wrap when compared.
        for name, most in (
            ("patience", 2**31 - 1),
            ("max_training", 2**31 - 1),
            ("training_limit", 65535),
            ("grafting_limit", 65535),
            ("evaluation_limit", 65535),
            ("tuning_limit", 65535),
        ):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(
                    f"{name} must be at least 1 and at most {most}, "
                    f"got {getattr(self, name)}"
                )
        if not 0 <= self.threshold < 1:
            raise ValueError(
                f"threshold must be at least 0 and below 1, got {self.threshold}"
            )
        if not 0 <= self.blueprint < 127:
            raise ValueError(f"blueprint must be from 0 to 126, got {self.blueprint}")


@struct.dataclass
class ControllerMemory:
    """What the controller remembers between ticks."""

    best_loss: Float[Array, ""]
    """Lowest held-out loss since the last germination."""
    stale: Int[Array, ""]
    """Ticks since it last improved, int32."""


def init_memory() -> ControllerMemory:
    """Memory before the first tick."""
    return ControllerMemory(
        best_loss=jnp.asarray(jnp.inf, jnp.float32), stale=jnp.zeros((), jnp.int32)
    )


def decide(
    seeds: Mapping[str, SeedState],
    signals: Mapping[str, Signals],
    memory: ControllerMemory,
    config: ControllerConfig,
    lifecycle: LifecycleConfig,
) -> tuple[dict[str, Commands], ControllerMemory]:
    """Requests for the seeds of all layers.

    When the held-out loss has not improved for ``patience`` ticks, the least healthy
    dormant chunk of the model germinates. A seed is moved on as soon as its time and
    its gate allow, and culled or rolled back when they do not within its limit.

    Args:
      seeds: the seeds of each layer, by name, already aged by this tick.
      signals: this tick's measurements of each layer.
      memory: what was remembered.
      config: numbers of the heuristic.
      lifecycle: the gates, which the seeds are moved by.

    Returns:
      Commands for each layer, and the new memory.
    """
    targets = {
        name: _advance(state, signals[name], config, lifecycle)
        for name, state in seeds.items()
    }
    targets = _take_turns(seeds, targets, config)
    loss = next(iter(signals.values())).held_out_loss
    memory = _watch(memory, loss, config)
    busy = sum(
        _count(s, Stage.GERMINATED) + _count(s, Stage.TRAINING) for s in seeds.values()
    )
    wanted = (memory.stale >= config.patience) & (busy < config.max_training)
    born = _weakest(seeds, wanted & config.enabled)
    germinating = jnp.any(jnp.stack([jnp.any(b) for b in born.values()]))
    memory = ControllerMemory(
        best_loss=jnp.where(germinating, loss, memory.best_loss),
        stale=jnp.where(germinating, 0, memory.stale),
    )
    return {
        name: Commands(
            target=jnp.where(born[name], Stage.GERMINATED, target).astype(jnp.int8),
            blueprint=jnp.where(born[name], config.blueprint, NO_REQUEST).astype(
                jnp.int8
            ),
            strategy=jnp.full(target.shape, NO_REQUEST, jnp.int8),
        )
        for name, target in targets.items()
    }, memory


def _count(state: SeedState, stage: Stage) -> Array:
    return jnp.sum(state.stage == stage)


def _watch(
    memory: ControllerMemory, loss: Array, config: ControllerConfig
) -> ControllerMemory:
    """Plateau detection; a loss that was not measured counts as no improvement."""
    better = loss < memory.best_loss - config.threshold * jnp.abs(memory.best_loss)
    better |= jnp.isinf(memory.best_loss) & jnp.isfinite(loss)
    return ControllerMemory(
        best_loss=jnp.where(better, loss, memory.best_loss),
        stale=jnp.where(better, 0, memory.stale + 1),
    )


def _advance(
    state: SeedState,
    signals: Signals,
    config: ControllerConfig,
    lifecycle: LifecycleConfig,
) -> Int[Array, " S"]:
    """The next stage of each seed for which it is time, else -1. Not germination."""
    stage, epochs = state.stage, state.epochs_in_stage

    def ready(target: Stage) -> Array:
        return gates_pass(state, jnp.full(stage.shape, target), signals, lifecycle)

    def after(limit: int, late: Stage, otherwise: Any) -> Array:
        return jnp.where(epochs >= limit, late, otherwise)

    ramp_done = state.graft.alpha >= lifecycle.grafting.max_alpha
    judged = jnp.where(
        ready(Stage.FINE_TUNING),
        Stage.FINE_TUNING,
        jnp.where(
            ready(Stage.CULLED),
            Stage.CULLED,
            after(config.evaluation_limit, Stage.ROLLED_BACK, Stage.FINE_TUNING),
        ),
    )
    target = jnp.select(
        [stage == s for s in Stage],
        [
            jnp.full(stage.shape, NO_REQUEST),
            jnp.full(stage.shape, Stage.TRAINING),
            jnp.where(
                ready(Stage.GRAFTING),
                Stage.GRAFTING,
                after(config.training_limit, Stage.CULLED, Stage.GRAFTING),
            ),
            jnp.where(
                ramp_done,
                Stage.STABILIZATION,
                after(config.grafting_limit, Stage.ROLLED_BACK, NO_REQUEST),
            ),
            jnp.full(stage.shape, Stage.EVALUATING),
            judged,
            jnp.where(
                ready(Stage.FOSSILIZED),
                Stage.FOSSILIZED,
                after(config.tuning_limit, Stage.CULLED, Stage.FOSSILIZED),
            ),
            jnp.full(stage.shape, NO_REQUEST),
            jnp.full(stage.shape, Stage.DORMANT),
            jnp.full(stage.shape, Stage.DORMANT),
            jnp.full(stage.shape, Stage.DORMANT),
        ],
    )
    exempt = (target == Stage.CANCELLED) | (target == Stage.ROLLED_BACK)
    minimum = jnp.asarray(lifecycle.min_epochs, jnp.int32)[stage.astype(jnp.int32)]
    return jnp.where(exempt | (epochs >= minimum), target, NO_REQUEST)


def _take_turns(
    seeds: Mapping[str, SeedState],
    targets: Mapping[str, Int[Array, " S"]],
    config: ControllerConfig,
) -> dict[str, Int[Array, " S"]]:
    """Lets no more than ``max_training`` seeds into TRAINING, in order; cancels those
    that have waited too long."""
    room = config.max_training - sum(_count(s, Stage.TRAINING) for s in seeds.values())
    allowed = {}
    for name, target in targets.items():
        waiting = target == Stage.TRAINING
        turn = jnp.cumsum(waiting)
        late = seeds[name].epochs_in_stage >= config.waiting_limit
        instead = jnp.where(late, Stage.CANCELLED, NO_REQUEST)
        allowed[name] = jnp.where(waiting & (turn > room), instead, target)
        room = room - jnp.sum(waiting & (turn <= room))
    return allowed


def _weakest(seeds: Mapping[str, SeedState], wanted: Array) -> dict[str, Array]:
    """One-hot over all layers: the least healthy dormant chunk that has a free slot."""
    scores = []
    for state in seeds.values():
        usable = (state.stage == Stage.DORMANT) & jnp.any(state.seed_of_slot < 0)
        usable &= ~jnp.isnan(state.health)
        scores.append(jnp.where(usable, state.health, jnp.inf))
    flat = jnp.concatenate(scores)
    best = jnp.argmin(flat)
    chosen = (jnp.arange(flat.size) == best) & wanted & jnp.isfinite(flat[best])
    ends = np.cumsum([score.size for score in scores])[:-1]
    return dict(zip(seeds, jnp.split(chosen, ends), strict=True))
