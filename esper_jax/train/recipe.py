"""What our own loop trains and grows a model by."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax
from jaxtyping import Array

from esper_jax.growth.recipe import Recipe

__all__ = ["AT_ONCE", "Batch", "Loss", "TrainRecipe"]

AT_ONCE = 4
"""Counterfactuals that are evaluated side by side, which bounds their memory."""

Batch = tuple[Any, Any]
"""``(x, y)``, rows first."""

Loss = Callable[[Any, Any], tuple[Array, Array]]
"""``loss(outputs, y) -> (loss, score)``, one float of each for every row."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TrainRecipe(Recipe):
    """A `Recipe`, and what else our own loop is fixed by.

    Args:
      loss: of the outputs and the labels, row by row.
      optimizer: of the host's parameters.
      eval_batch: rows that are evaluated at once.
      at_once: counterfactuals that are evaluated side by side.
      axis_name: the mapped axis that the rows are divided along, if there is one.
      debug: whether each tick compares the states of all devices along that axis.
    """

    loss: Loss
    optimizer: optax.GradientTransformation
    eval_batch: int
    at_once: int = AT_ONCE
    axis_name: str | None = None
    debug: bool = False
