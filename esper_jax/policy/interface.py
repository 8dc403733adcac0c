"""What a policy is: a pair of pure functions, as an optax transformation is."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from esper_jax.groups import Groups
from esper_jax.lifecycle.commands import Commands
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import NO_REQUEST, Stage
from esper_jax.lifecycle.state import SeedState
from esper_jax.policy.memory import not_heard

__all__ = [
    "SAMPLED",
    "LayerShape",
    "Policy",
    "PolicyFactory",
    "Setting",
    "barren",
    "check_reads",
    "idle",
    "made",
]

SAMPLED = frozenset({"chunk_gradient", "drift", "grad_norm", "gradient_ratio"})
"""Signals that cost a pass over the host's gradients or weights."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LayerShape:
    """What is fixed of a layer that can grow.

    Args:
      num_seeds: ``S``.
      capacity: ``K``.
      costs: parameters of each of its ``N`` blueprints on each chunk.
      aims: which of them start in the gradient's direction, and so have to wait for a
        gradient; empty for none.
    """

    num_seeds: int
    capacity: int
    costs: Int[np.ndarray, "N S"]
    aims: tuple[bool, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """What is fixed of the model that a policy is for.

    Args:
      layers: by name.
      gates: minimum ages and gates of the lifecycle.
      groups: which layers have the same shape; by default none.
    """

    layers: Mapping[str, LayerShape]
    gates: LifecycleConfig
    groups: Groups | None = None


class Policy(NamedTuple):
    """When, where, what and how to grow.

    Attributes:
      init: ``init(shapes, key) -> memory``: a pytree of arrays, given the `LayerShape`
        of each layer and a random key.
      decide: ``decide(seeds, signals, memory) -> commands, memory``: pure and
        jittable. ``seeds`` (already aged by this tick) and ``signals`` are by layer, as
        the commands must be. A memory with a field ``reason`` (int8) has it reported.
      reads: which of the signals `SAMPLED` it reads. Others may be NaN: they are
        measured only if something else reads them. None stands for all of them.
      stacked: whether ``seeds``, ``signals`` and commands are by group of
        ``Setting.groups`` instead, stacked along a leading axis of layers, which keeps
        compile time independent of their number.
    """

    init: Callable[[Mapping[str, LayerShape], Key[Array, ""]], Any]
    decide: Callable[
        [Mapping[str, SeedState], Mapping[str, Signals], Any],
        tuple[dict[str, Commands], Any],
    ]
    reads: frozenset[str] | None = None
    stacked: bool = False


PolicyFactory = Callable[[Setting], Policy]
"""Makes a policy that has to know the gates, or what blueprints cost."""


def made(policy: Policy | PolicyFactory, setting: Setting) -> Policy:
    """The policy for a model.

    Raises:
      TypeError: if ``policy`` is neither a `Policy` nor a function that makes one.
    """
    result = policy(setting) if callable(policy) else policy
    if not isinstance(result, Policy):
        raise TypeError(
            "policy must be a Policy(init, decide), or a function of the Setting that "
            f"returns one, such as policy.heuristic(config); got {result!r}"
        )
    check_reads("Policy(reads=...)", result.reads or ())
    return result


def idle(policy: Policy | PolicyFactory) -> PolicyFactory:
    """The same policy, with the same memory, whose requests are all dropped."""
    return _without(policy, lambda target: jnp.ones(target.shape, bool))


def barren(policy: Policy | PolicyFactory) -> PolicyFactory:
    """The same policy, with the same memory, under which nothing germinates."""
    return _without(policy, lambda target: target == Stage.GERMINATED)


def _without(
    policy: Policy | PolicyFactory, which: Callable[[Array], Array]
) -> PolicyFactory:
    """The same policy without the requests that ``which`` finds by their targets.

    What it remembers of germinations that are dropped is as if it had not asked.
    """

    def make(setting: Setting) -> Policy:
        asked = made(policy, setting)

        def decide(
            seeds: Mapping[str, SeedState], signals: Mapping[str, Signals], memory: Any
        ) -> tuple[dict[str, Commands], Any]:
            commands, new = asked.decide(seeds, signals, memory)
            births = [jnp.any(c.target == Stage.GERMINATED) for c in commands.values()]
            heard = {name: _kept(c, ~which(c.target)) for name, c in commands.items()}
            return heard, not_heard(jnp.any(jnp.stack(births)), new, memory)

        return asked._replace(decide=decide)

    return make


def _kept(commands: Commands, where: Bool[Array, "*S"]) -> Commands:
    """Commands with the requests for some seeds alone."""

    def keep(x: Array) -> Array:
        return jnp.where(where, x, jnp.asarray(NO_REQUEST, x.dtype))

    return jax.tree.map(keep, commands)


def check_reads(name: str, signals: Collection[str]) -> None:
    """Refuses names that are none of `SAMPLED`.

    Raises:
      ValueError: naming the argument ``name`` and what is unknown.
    """
    if isinstance(signals, str) or set(signals) - SAMPLED:
        raise ValueError(
            f"{name} must be names out of {', '.join(sorted(SAMPLED))}: the signals "
            f"that cost a pass over the host's gradients; got {signals!r}"
        )
