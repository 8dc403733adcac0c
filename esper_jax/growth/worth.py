"""What each seed is worth by a held-out loss that is the user's own function."""

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from esper_jax.growth.recipe import Recipe

__all__ = ["AT_ONCE", "FEW", "Measure", "read_measured", "worth_of"]

_log = logging.getLogger(__name__)

AT_ONCE = 8
"""Counterfactuals that are evaluated side by side, which bounds their memory."""

Measure = Callable[[Mapping[str, Any]], Any]
"""``measure(probes)``: what the user's ``evaluate`` returns with arrays added to the
alphas of beds, by path."""

FEW = 4
"""With fewer, each is evaluated by itself, by the program of the loss as it is."""

_ONE_BY_ONE: weakref.WeakSet[Recipe] = weakref.WeakSet()
"""Recipes of which an evaluation could not be vmapped: it is not tried again."""

_Slot = tuple[str, tuple[int, ...]]
"""Path of a bed, and the index of a slot in its arrays."""


def worth_of(
    recipe: Recipe,
    asked: Mapping[
        str, tuple[Float[np.ndarray, "*stack K"], Bool[np.ndarray, "*stack K"]]
    ],
    measure: Measure,
    loss: float,
) -> dict[str, Float[np.ndarray, "*stack K"]]:
    """Worth of the seed in each slot, by bed; NaN where none is asked for.

    The losses are vmapped, `AT_ONCE` at a time, all layers together, so that one
    program more is compiled; where fewer than `FEW` are left, none. Where ``evaluate``
    does what cannot be vmapped (it reads values on the host, or loops over a loader and
    adds up floats), each is evaluated by itself, which the log tells once.

    Args:
      recipe: what the model is grown by.
      asked: of each bed, alpha of each slot, and whether its seed is asked.
      measure: see `Measure`.
      loss: as it is.
    """
    alphas = {path: alpha for path, (alpha, _) in asked.items()}
    slots: list[_Slot] = [
        (path, tuple(map(int, slot)))
        for path, (_, which) in asked.items()
        for slot in zip(*np.nonzero(which), strict=True)
    ]
    worth = {
        path: np.full(alpha.shape, np.nan, np.float32) for path, alpha in alphas.items()
    }
    for (path, slot), without in zip(
        slots, _losses(recipe, alphas, slots, measure), strict=True
    ):
        worth[path][slot] = without - loss
    return worth


def _losses(
    recipe: Recipe,
    alphas: Mapping[str, Float[np.ndarray, "*stack K"]],
    slots: Sequence[_Slot],
    measure: Measure,
) -> list[float]:
    """The loss without each of the slots."""
    losses: list[float] = []
    while (left := len(slots) - len(losses)) and recipe not in _ONE_BY_ONE:
        if left < FEW:
            break
        try:
            some = slots[len(losses) : len(losses) + AT_ONCE]
            losses += _side_by_side(alphas, some, measure)
        except Exception as error:  # evaluate is the user's, and worked without vmap
            _ONE_BY_ONE.add(recipe)
            _log.info(
                "evaluate cannot be vmapped (%s), so what each part is worth is "
                "evaluated by itself",
                (str(error).splitlines() or [""])[0] or type(error).__name__,
            )
    for path, slot in slots[len(losses) :]:
        probe = jnp.asarray(_without(alphas[path], slot))
        losses.append(read_measured(measure({path: probe}))[0])
    return losses


def _side_by_side(
    alphas: Mapping[str, Float[np.ndarray, "*stack K"]],
    slots: Sequence[_Slot],
    measure: Measure,
) -> list[float]:
    """The same of at most `AT_ONCE` slots, in one call."""

    def without(probes: Mapping[str, Any]) -> Array:
        return jnp.asarray(_loss_of(measure(probes)))

    # Filled up with probes of 0: one shape, compiled once.
    probes = {p: np.zeros((AT_ONCE, *a.shape), a.dtype) for p, a in alphas.items()}
    for i, (path, slot) in enumerate(slots):
        probes[path][i] = _without(alphas[path], slot)
    found = np.asarray(jax.vmap(without)(probes))
    return [float(loss) for loss in found[: len(slots)]]


def _without(
    alpha: Float[np.ndarray, "*stack K"], slot: tuple[int, ...]
) -> Float[np.ndarray, "*stack K"]:
    """The probe with which a slot does not count."""
    probe = np.zeros_like(alpha)
    probe[slot] = -alpha[slot]
    return probe


def read_measured(result: Any) -> tuple[float, float]:
    """Held-out loss and score, NaN for none, of what ``evaluate`` returned.

    Raises:
      ValueError: if it is not one or two single numbers.
    """
    pair = result if isinstance(result, tuple) else (result, np.nan)
    if any(isinstance(x, jax.core.Tracer) for x in pair):
        raise ValueError(
            "tick must be called between steps, outside of jax.jit and nnx.jit, since "
            "it runs on the host; evaluate returned a number that is being traced"
        )
    if len(pair) != 2 or not all(map(_is_number, pair)):
        several = isinstance(result, tuple)
        count = f"{len(pair)} values: " if several else ""
        got = ", ".join(map(_kind, pair if several else (result,)))
        raise ValueError(
            "evaluate must return the held-out loss, or (loss, score), each a single "
            f"number; got {count}{got}. Take means over the rows, and leave anything "
            "else out"
        )
    return float(pair[0]), float(pair[1])


def _is_number(x: Any) -> bool:
    return (
        not isinstance(x, str | bytes)
        and np.ndim(x) == 0
        and np.issubdtype(np.asarray(x).dtype, np.number)
    )


def _kind(x: Any) -> str:
    shape = getattr(x, "shape", None)
    return type(x).__name__ if shape is None else f"an array of shape {shape}"


def _loss_of(result: Any) -> Any:
    """The held-out loss of what ``evaluate`` returned, traced or not."""
    return result[0] if isinstance(result, tuple) else result
