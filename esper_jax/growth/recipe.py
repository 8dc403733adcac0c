"""What a model is trained and grown by: all that is fixed before the first step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import optax
from jaxtyping import Array, Int

from esper_jax.blueprints import param_counts
from esper_jax.growth.parts import ModelParts
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.optim import PerSlot
from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.heuristic import Decide

__all__ = ["Batch", "Loss", "Recipe"]

Batch = tuple[Any, Any]
"""``(x, y)``, rows first."""

Loss = Callable[[Any, Any], tuple[Array, Array]]
"""``loss(outputs, y) -> (loss, score)``, one float of each for every row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The fixed part of a run; functions of a `TrainState` are closed over it.

    Args:
      parts: the model, taken apart.
      loss: of the outputs and the labels, row by row.
      optimizer: of the host's parameters.
      bank_optimizer: of the banks, slot by slot.
      gates: minimum ages and gates of the lifecycle.
      policy: numbers of the policy.
      decide: what asks for transitions.
      eval_batch: rows that are evaluated at once.
      at_once: counterfactuals that are evaluated side by side, which bounds their
        memory.
      axis_name: the mapped axis that the rows are divided along, if there is one.
      debug: whether each tick compares the states of all devices along that axis.
    """

    parts: ModelParts
    loss: Loss
    optimizer: optax.GradientTransformation
    bank_optimizer: PerSlot
    gates: LifecycleConfig
    policy: ControllerConfig
    decide: Decide
    eval_batch: int
    at_once: int
    axis_name: str | None = None
    debug: bool = False

    def costs(self) -> dict[str, Int[np.ndarray, "N S"]]:
        """Parameters of each blueprint on each chunk, by layer."""
        return {
            name: param_counts(kinds, self.parts.layouts[name].sizes)
            for name, kinds in self.parts.kinds.items()
        }
