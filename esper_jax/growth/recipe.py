"""What a model is grown by: all that is fixed before the first step."""

import dataclasses

import numpy as np
from jaxtyping import Int

from esper_jax.growth.parts import ModelParts
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.optim import PerSlot
from esper_jax.policy.interface import Policy, PolicyFactory, Setting, made

__all__ = ["Recipe", "policy_for"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Recipe:
    """The fixed part of growth; pure functions of arrays are closed over it.

    Hashable by identity, so that it can be a static argument.

    Args:
      parts: the model, taken apart.
      bank_optimizer: of the banks, slot by slot.
      gates: minimum ages and gates of the lifecycle.
      policy: what asks for transitions.
    """

    parts: ModelParts
    bank_optimizer: PerSlot
    gates: LifecycleConfig
    policy: Policy

    def costs(self) -> dict[str, Int[np.ndarray, "N S"]]:
        """Parameters of each blueprint on each chunk, by layer."""
        return {name: layer.costs for name, layer in self.parts.shapes().items()}


def policy_for(
    parts: ModelParts, gates: LifecycleConfig, policy: Policy | PolicyFactory
) -> Policy:
    """The policy for a model.

    Args:
      parts: the model.
      gates: minimum ages and gates of the lifecycle.
      policy: a policy, or what makes one.

    Raises:
      TypeError: if it is neither.
      ValueError: by what makes it, if it does not suit the model.
    """
    return made(policy, Setting(layers=parts.shapes(), gates=gates))
