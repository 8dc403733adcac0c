"""Optimizer for banks: it treats each slot separately, and only while it learns."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

__all__ = ["PerSlot", "per_slot", "scale_by_run_schedule"]


class PerSlot(NamedTuple):
    """An optimizer over trees whose leaves have a leading axis of ``K`` slots.

    Attributes:
      init: ``init(params) -> state``.
      update: ``update(grads, state, params, *, active, born=None, **extra) ->
        updates, state`` with ``active`` and ``born`` bool[K].
      reset: ``reset(state, params, born) -> state`` with ``born`` bool[K]. Slots where
        ``born`` is True get fresh state.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    reset: Callable[[Any, Any, Any], Any]


def per_slot(inner: optax.GradientTransformation) -> PerSlot:
    """Runs ``inner`` in every slot separately, as if each had its own optimizer.

    - A slot that is not ``active`` gets updates of 0 and keeps its state bit for bit,
      whatever its gradient (NaN included).
    - A slot that is ``born`` gets a fresh state before the update.
    - Schedules count the slot's own active steps. To follow the run's steps instead,
      use `scale_by_run_schedule`.
    - Norms, as in `optax.clip_by_global_norm`, are taken over one slot.

    ``active`` and ``born`` are run-time values: changing them does not recompile.
    ``update`` passes any other keyword to ``inner``; training passes ``step``, the
    run's step.

    Args:
      inner: any optax optimizer.

    Returns:
      The optimizer. It is not an `optax.GradientTransformation`: without ``active``, an
      update would be silently wrong.

    Raises:
      TypeError: if ``inner`` is not an optax optimizer.
      ValueError: by ``update`` and ``reset``, if ``active`` or ``born`` does not have
        one entry for each slot.
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"inner must be an optax optimizer, got {inner!r}")
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        return jax.vmap(inner.init)(params)

    def reset(state: Any, params: Any, born: Bool[Array, " K"]) -> Any:
        _check_slots("born", born, params)
        return _where(born, init(params), state)

    def update(
        grads: Any,
        state: Any,
        params: Any,
        *,
        active: Bool[Array, " K"],
        born: Bool[Array, " K"] | None = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        _check_slots("active", active, params)
        if born is not None:
            state = reset(state, params, born)
        # vmap does not map `extra`: every slot gets the same values.
        updates, new = jax.vmap(lambda g, s, p: inner.update(g, s, p, **extra))(
            grads, state, params
        )
        # Adding -0.0 leaves every number bit-identical; adding 0.0 turns -0.0 into 0.0.
        nothing = jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates)
        return _where(active, updates, nothing), _where(active, new, state)

    return PerSlot(init, update, reset)


def scale_by_run_schedule(
    schedule: optax.Schedule,
) -> optax.GradientTransformationExtraArgs:
    """Scales updates by ``schedule`` at the run's step, not at the slot's own step.

    Late-born slots reach a zero rate together with the host. With
    `optax.scale_by_schedule`, which counts the slot's own steps, a late-born slot would
    still be early in its decay when the run ends.

    Args:
      schedule: maps the run's step to a factor.

    Returns:
      A transformation for use inside `per_slot`.

    Raises:
      TypeError: by ``update``, if it gets no ``step``.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, step: Array, **_: Any
    ) -> tuple[Any, Any]:
        factor = schedule(step)
        return jax.tree.map(lambda u: (factor * u).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _where(condition: Array, new: Any, old: Any) -> Any:
    """Per slot, ``new`` or ``old``. Selects, since multiplying by 0 would keep NaN."""

    def select(a: Array, b: Array) -> Array:
        return jnp.where(condition.reshape(condition.shape + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(select, new, old)


def _check_slots(name: str, flags: Array, params: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.ndim < 1 or flags.shape != leaf.shape[:1]:
            raise ValueError(
                f"{name} must have one entry for each slot, the first axis of every "
                f"parameter: params{jax.tree_util.keystr(path)} has shape {leaf.shape},"
                f" {name} has {flags.shape}"
            )
