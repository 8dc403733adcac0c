"""What our own loop trains and grows a model by."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from esper_jax.growth.recipe import Recipe
from esper_jax.growth.state import TrainState
from esper_jax.train.calls import called
from esper_jax.train.losses import Result, common_rows, read_loss, read_objective
from esper_jax.train.shown import EvalParams

__all__ = ["AT_ONCE", "Batch", "Loss", "Objective", "TrainRecipe"]

AT_ONCE = 4
"""Counterfactuals that are evaluated side by side, which bounds their memory."""

Batch = Any
"""``(x, y)``, rows first; any pytree for an `Objective`."""

Loss = Callable[[Any, Any], Any]
"""``loss(outputs, y)`` returns the loss, or ``(loss, score)``; see `read_loss`."""

Objective = Callable[[Any, Any], Any]
"""``objective(model, batch)`` returns the loss, or ``(loss, aux)``; see
`read_objective`."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TrainRecipe(Recipe):
    """A `Recipe`, and what else our own loop is fixed by.

    Args:
      loss: of the outputs and the labels.
      objective: of the model and the batch; None for that of ``loss``.
      optimizer: of the host's parameters.
      eval_params: the parameters to evaluate, of the optimizer's state and those that
        train; None for the latter.
      eval_batch: rows that are evaluated at once.
      at_once: counterfactuals that are evaluated side by side.
      axis_name: the mapped axis that the rows are divided along, if there is one.
      debug: whether each tick compares the states of all devices along that axis.
    """

    loss: Loss
    objective: Objective | None = None
    optimizer: optax.GradientTransformationExtraArgs
    eval_params: EvalParams | None = None
    eval_batch: int
    at_once: int = AT_ONCE
    axis_name: str | None = None
    debug: bool = False

    def result(self, model: Any, batch: Batch) -> Result:
        """Loss and score of a batch.

        Raises:
          ValueError: if the loss has a shape or dtype that cannot be used.
        """
        if self.objective is not None:
            return read_objective(self.objective(model, batch), self.rows(batch))
        x, y = batch
        return read_loss(self.loss(called(model, x), y), self.rows(batch))

    def shown(self, state: TrainState) -> TrainState:
        """The state with the parameters to evaluate in place of those that train."""
        if self.eval_params is None:
            return state
        params = self.eval_params(state.opt_state, state.params)
        return dataclasses.replace(state, params=params)

    def rows(self, batch: Batch) -> int | None:
        """Rows of a batch, or None where its arrays share no first axis.

        Of ``(x, y)``, the labels count: ``x`` may be a graph.
        """
        if self.objective is not None:
            return common_rows(batch)
        x, y = batch
        rows = common_rows(y)
        return common_rows(x) if rows is None else rows
