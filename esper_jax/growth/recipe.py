"""What a model is grown by: all that is fixed before the first step."""

import dataclasses

import numpy as np
from jaxtyping import Int

from esper_jax.blueprints import param_counts
from esper_jax.growth.parts import ModelParts
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.optim import PerSlot
from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.heuristic import Decide

__all__ = ["Recipe"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Recipe:
    """The fixed part of growth; pure functions of arrays are closed over it.

    Hashable by identity, so that it can be a static argument.

    Args:
      parts: the model, taken apart.
      bank_optimizer: of the banks, slot by slot.
      gates: minimum ages and gates of the lifecycle.
      policy: numbers of the policy.
      decide: what asks for transitions.

    Raises:
      ValueError: if the policy's blueprint is not one of every layer's.
    """

    parts: ModelParts
    bank_optimizer: PerSlot
    gates: LifecycleConfig
    policy: ControllerConfig
    decide: Decide

    def __post_init__(self) -> None:
        for name, kinds in self.parts.kinds.items():
            if self.policy.blueprint >= len(kinds):
                raise ValueError(
                    f"controller blueprint must be an index into the {len(kinds)} "
                    f"blueprints of layer {name!r}, got {self.policy.blueprint}"
                )

    def costs(self) -> dict[str, Int[np.ndarray, "N S"]]:
        """Parameters of each blueprint on each chunk, by layer."""
        return {
            name: param_counts(kinds, self.parts.layouts[name].sizes)
            for name, kinds in self.parts.kinds.items()
        }
