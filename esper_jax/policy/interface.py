"""What a policy is: a pair of pure functions, as an optax transformation is."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Int, Key

from esper_jax.lifecycle.commands import Commands
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.state import SeedState

__all__ = ["LayerShape", "Policy", "PolicyFactory", "Setting", "made"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LayerShape:
    """What is fixed of a layer that can grow.

    Args:
      num_seeds: ``S``.
      capacity: ``K``.
      costs: parameters of each of its ``N`` blueprints on each chunk.
    """

    num_seeds: int
    capacity: int
    costs: Int[np.ndarray, "N S"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """What is fixed of the model that a policy is for.

    Args:
      layers: by name.
      gates: minimum ages and gates of the lifecycle.
    """

    layers: Mapping[str, LayerShape]
    gates: LifecycleConfig


class Policy(NamedTuple):
    """When, where, what and how to grow.

    Attributes:
      init: ``init(shapes, key) -> memory``: a pytree of arrays, given the `LayerShape`
        of each layer and a random key.
      decide: ``decide(seeds, signals, memory) -> commands, memory``: pure and
        jittable. ``seeds`` (already aged by this tick) and ``signals`` are by layer, as
        the commands must be. A memory with a field ``reason`` (int8) has it reported.
    """

    init: Callable[[Mapping[str, LayerShape], Key[Array, ""]], Any]
    decide: Callable[
        [Mapping[str, SeedState], Mapping[str, Signals], Any],
        tuple[dict[str, Commands], Any],
    ]


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
    return result
