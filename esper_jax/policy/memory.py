"""What the heuristic remembers between ticks, and the reasons it gives."""

import dataclasses
import enum
import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

__all__ = [
    "FELL_BACK",
    "ControllerMemory",
    "Reason",
    "init_memory",
    "not_heard",
    "warn_of_fallback",
]

_log = logging.getLogger(__name__)

FELL_BACK = (
    "the learned policy",
    "the heuristic",
    "the network said something that is not finite",
)
"""What has decided until a fallback, what decides from then on, and why."""


class Reason(enum.IntEnum):
    """Why something germinated at a tick, or why not: the first reason that holds.

    The codes are part of the checkpoint format.
    """

    GERMINATED = 0
    DISABLED = 1
    TARGET_MET = 2
    NOT_YET = 3
    """No plateau, or the period is not over."""
    BUSY = 4
    """``max_training`` seeds are in TRAINING or wait for it."""
    EMBARGOED = 5
    """No chunk is dormant, and some are under an embargo."""
    FULL = 6
    """No chunk is dormant: a seed lives in each."""
    NO_SLOT = 7
    """No layer with a dormant chunk has a free slot."""
    UNMEASURED = 8
    """What places are chosen by was not measured."""
    BUDGET_SPENT = 9
    """The budget of parameters does not cover another seed."""
    SETTLED = 10
    """Nothing will be born any more: free slots can be given back."""
    FELL_BACK = 11
    """A learned policy said something that is not finite: from now on the heuristic
    decides."""


@struct.dataclass
class ControllerMemory:
    """What the heuristic remembers between ticks."""

    OF_BIRTHS: ClassVar = ("best_loss", "stale", "since", "turn", "tried")
    """See `not_heard`."""

    best_loss: Float[Array, ""]
    """Lowest held-out loss since the last germination; infinity before the first."""
    stale: Int[Array, ""]
    """Ticks since ``best_loss`` last improved, int32."""
    loss_mean: Float[Array, ""]
    """Running mean of the held-out loss; NaN before the first one."""
    since: Int[Array, ""]
    """Ticks since the last germination, int32."""
    turn: Int[Array, ""]
    """Chunk at which the round robin goes on, counted over all layers, int32."""
    key: Key[Array, ""]
    """Random key of random choices."""
    reason: Int[Array, ""]
    """`Reason` of the last tick, int8."""
    tried: Int[Array, " N"]
    """Seeds that germinated with each blueprint, int32."""
    kept: Int[Array, " N"]
    """How many of them became fossils, int32."""
    earned: Float[Array, " N"]
    """Mean worth of those fossils, summed."""
    before: dict[str, Float[Array, " S"]]
    """``loss_mean`` when each seed's grafting began; NaN if it has not begun."""


def init_memory(
    num_seeds: Mapping[str, int] | None = None,
    *,
    key: Key[Array, ""] | None = None,
    blueprints: int = 1,
) -> ControllerMemory:
    """Memory before the first tick.

    Args:
      num_seeds: seeds of each layer, by name.
      key: of random choices; ``jax.random.key(0)`` if None.
      blueprints: number of blueprints; the fewest that any layer has.
    """

    def count() -> Array:
        return jnp.zeros((), jnp.int32)

    return ControllerMemory(
        best_loss=jnp.asarray(jnp.inf, jnp.float32),
        stale=count(),
        loss_mean=jnp.asarray(jnp.nan, jnp.float32),
        since=count(),
        turn=count(),
        key=jax.random.key(0) if key is None else key,
        reason=jnp.asarray(Reason.NOT_YET, jnp.int8),
        tried=jnp.zeros(blueprints, jnp.int32),
        kept=jnp.zeros(blueprints, jnp.int32),
        earned=jnp.zeros(blueprints, jnp.float32),
        before={
            name: jnp.full(s, jnp.nan, jnp.float32)
            for name, s in (num_seeds or {}).items()
        },
    )


def not_heard(unheard: Bool[Array, ""], new: Any, old: Any) -> Any:
    """What a policy remembers of a tick whose germination was not heard.

    A policy remembers a germination when it asks for one. The fields that do, which its
    memory names as ``OF_BIRTHS``, stay as they were before: it asks again at the next
    tick. Memories that name none are not known, and stay as they are.

    Args:
      unheard: whether something should have germinated and did not.
      new: memory after the tick.
      old: memory before it.
    """
    names = getattr(new, "OF_BIRTHS", None)
    if names is None:
        return new
    kept: dict[str, Any] = {
        name: jnp.where(unheard, getattr(old, name), getattr(new, name))
        for name in names
    }
    reason = jnp.where(unheard, jnp.int8(Reason.DISABLED), new.reason)
    return dataclasses.replace(new, **kept, reason=reason)


def warn_of_fallback(reason: Any, tick: Any) -> None:
    """Logs a warning if the reason of a tick is that another policy has taken over."""
    if int(reason) == Reason.FELL_BACK:
        before, after, why = FELL_BACK
        _log.warning(
            "tick %d: %s decides no longer, since %s; %s does from now on. Check the "
            "policy's file, and that losses and weights are finite",
            int(tick),
            before,
            why,
            after,
        )
