"""The parameters that are evaluated, where they are not those that train."""

from collections.abc import Callable
from typing import Any

import jax
import optax
import optax.contrib

from esper_jax.growth.state import Arrays

__all__ = ["EvalParams", "averaged_by", "check_eval_params"]

EvalParams = Callable[[Any, Any], Any]
"""``eval_params(opt_state, params) -> params`` of the same names and shapes."""


def averaged_by(
    optimizer: optax.GradientTransformation, params: Arrays
) -> EvalParams | None:
    """What an optimizer says should be evaluated in place of what it trains.

    Returns:
      The averages of `optax.contrib.schedule_free` if its state holds one anywhere;
      else None.
    """
    state = jax.eval_shape(optimizer.init, params)
    return _schedule_free_params if _schedule_free(state) else None


def _schedule_free_params(opt_state: Any, params: Arrays) -> Arrays:
    """The averages of `optax.contrib.schedule_free`, wherever its state stands.

    Parameters that it does not train (`optax.masked`, `optax.partition`) stay.

    Source: A. Defazio et al., The Road Less Scheduled, arXiv:2405.15682.
    """
    for state in _schedule_free(opt_state):
        params = jax.tree.map(
            lambda y, z, b1=state.b1: (
                y
                if isinstance(z, optax.MaskedNode)
                else ((y - (1.0 - b1) * z) / b1).astype(y.dtype)
            ),
            params,
            state.z,
        )
    return params


def check_eval_params(
    function: EvalParams, optimizer: optax.GradientTransformation, params: Arrays
) -> None:
    """Refuses a function that returns other parameters than there are.

    Raises:
      ValueError: if so; it names the first one that differs.
    """
    state = jax.eval_shape(optimizer.init, params)
    expected = {k: _described(v) for k, v in params.items()}
    shown = jax.eval_shape(function, state, params)
    got = (
        {k: _described(v) for k, v in shown.items()} if isinstance(shown, dict) else {}
    )
    for name in [*expected, *got]:
        if expected.get(name) != got.get(name):
            raise ValueError(
                "eval_params must return all parameters by name, in the shapes and "
                f"dtypes that they have; for {name!r} expected {expected.get(name)}, "
                f"got {got.get(name)}. Return the tree that it is given as params, "
                "with other values"
            )


def _schedule_free(state: Any) -> list[Any]:
    kind = optax.contrib.ScheduleFreeState
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


def _described(tree: Any) -> str:
    return str(jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree))
