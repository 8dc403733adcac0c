"""The derivative rule of blend, shared by all backends."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from esper_jax.blueprints import Bank
from esper_jax.kernels.blend.backend import Backend, Results
from esper_jax.kernels.blend.static import Slots, Static

__all__ = ["blend"]


def blend(
    backend: Backend, s: Static, y: Float[Array, "N F"], bank: Bank, slots: Slots
) -> Results:
    """The public `blend` by one backend, on arguments that its `refusal` takes.

    Args:
      backend: what computes it.
      s: what is fixed while tracing; a ``config`` of None lets the backend choose.
      y: the activation, with one batch axis.
      bank: parameters of the blueprints.
      slots: coefficients, kinds and owners.
    """
    return _jitted(backend, backend.prepare(s, y.shape[0]), y, bank, slots)


def _once(backend: Backend, f: Callable[..., Any]) -> Callable[..., Any]:
    """``f``, with an error that explains itself where it is differentiated again."""
    if backend.differentiable:
        return f

    def refuse(*_: Any) -> Any:
        raise NotImplementedError(
            f"blend with implementation={backend.name!r} has no second derivative; "
            "pass implementation='xla'"
        )

    once = jax.custom_vjp(f)
    once.defvjp(refuse, refuse)
    return once


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blend(backend: Backend, s: Static, y: Array, bank: Bank, slots: Slots) -> Results:
    forward = _once(backend, functools.partial(backend.forward, s, False))
    out, statistics, reconstruction, _ = forward(y, bank, slots)
    return out, statistics, reconstruction


def _forward(
    backend: Backend, s: Static, y: Array, bank: Bank, slots: Slots
) -> tuple[Results, Any]:
    if backend.differentiable:
        # By the same rule, so that a second derivative knows alpha and beta too.
        return _blend(backend, s, y, bank, slots), (y, bank, slots)
    forward = _once(backend, functools.partial(backend.forward, s, True))
    out, statistics, reconstruction, saved = forward(y, bank, slots)
    return (out, statistics, reconstruction), (saved, bank, slots)


def _backward(
    backend: Backend, s: Static, kept: Any, cotangents: Any
) -> tuple[Array, Bank, Slots]:
    saved, bank, slots = kept
    backward = _once(backend, functools.partial(backend.backward, s))
    dy, d_bank, d_alpha = backward(cotangents[0], saved, bank, slots)
    # beta has no gradient; None stands for those of integers.
    none: Any = None
    return dy, d_bank, Slots(d_alpha, jnp.zeros_like(slots.beta), none, none)


_blend.defvjp(_forward, _backward)

# Without this, each call outside of a jitted function would compile its branches anew.
_jitted = jax.jit(_blend, static_argnums=(0, 1), inline=True)
