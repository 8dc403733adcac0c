"""The derivative rules of blend, shared by all backends."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from esper_jax.blueprints import Bank
from esper_jax.kernels.blend import adapters, reference
from esper_jax.kernels.blend.adapters import Read
from esper_jax.kernels.blend.backend import (
    Backend,
    Results,
    once_differentiable,
)
from esper_jax.kernels.blend.static import Slots, Static

__all__ = ["blend", "forward_mode_explained"]


def blend(
    backend: Backend,
    s: Static,
    read: Read,
    bank: Bank,
    slots: Slots,
    forward_mode: bool = False,
    bias: Float[Array, " F"] | None = None,
) -> Results:
    """The public `blend` by one backend, on arguments that its `refusal` takes.

    Args:
      backend: what computes it.
      s: what is fixed while tracing; a ``config`` of None lets the backend choose.
      read: the activation, with one batch axis, and the layer's input, the same.
      bank: parameters of the blueprints.
      slots: coefficients, kinds and owners.
      forward_mode: as for `blend`.
      bias: as for `blend`, in the dtype of ``y``.

    Raises:
      TypeError: by forward-mode derivatives without ``forward_mode``.
    """
    if bias is not None and not backend.takes_bias:
        read, bias = read._replace(bias=bias).whole(), None
    s = dataclasses.replace(s, biased=bias is not None)
    s = backend.prepare(s, read.y.shape[0])
    if forward_mode and backend.tangent is not None:
        return _jitted_both(backend, s, read, bank, slots)
    with forward_mode_explained(backend, forward_mode):
        return _jitted(backend, s, read, bias, bank, slots)


@contextlib.contextmanager
def forward_mode_explained(backend: Backend, forward_mode: bool) -> Iterator[None]:
    """Says what to do where JAX refuses forward-mode derivatives.

    Args:
      backend: what was chosen.
      forward_mode: whether they were asked for, as in evaluation mode.

    Raises:
      TypeError: in place of JAX's own.
    """
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            "forward-mode derivatives (jax.jvp, jacfwd, hessian, linearize) of a layer "
            "that can grow need evaluation mode and plain JAX: call model.eval() or "
            "nnx.view(model, deterministic=True), and give the layer "
            f"implementation='xla'. Got implementation {backend.name!r}"
            + ("" if forward_mode else " in training mode")
        ) from error


@functools.cache
def _once(backend: Backend, rule: str, *static: Any) -> Callable[..., Any]:
    """A backend's ``forward`` or ``backward`` with its static arguments.

    One that cannot be differentiated says so where it is, and is one function for all
    calls of the same shapes, which JAX traces and lowers once for a whole model.
    """
    f = functools.partial(getattr(backend, rule), *static)
    if backend.differentiable:
        return f

    return jax.jit(once_differentiable(f, backend.name))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blend(
    backend: Backend, s: Static, read: Read, bias: Any, bank: Bank, slots: Slots
) -> Results:
    return _results(backend, s, (read, bias, bank, slots), False)[0]


def _results(
    backend: Backend, s: Static, arguments: Any, save: bool
) -> tuple[Results, Any]:
    """The results, and what the backend saves of them."""
    read, bias, bank, slots = arguments
    if s.adapters_alone:
        out, saved, reconstruction = read.y, None, jnp.zeros_like(slots.alpha)
        y = _biased(read.y, bias)
        statistics = reference.statistics(y, s.layout, s.statistics_rows)
    else:
        forward = _once(backend, "forward", s, save)
        chunks = adapters.of_chunks(s, bank, slots)
        out, statistics, reconstruction, saved = forward(read.y, bias, *chunks)
    if s.adapters:
        given = read._replace(bias=bias)
        out, more = adapters.forward(backend, s, out, given, bank, slots)
        reconstruction += more
    return (_biased(out, bias), statistics, reconstruction), saved


def _biased(out: Array, bias: Array | None) -> Array:
    """The output with its bias: plain JAX, which XLA fuses with what follows."""
    return out if bias is None else out + bias[None, :]


def _forward(
    backend: Backend, s: Static, read: Read, bias: Any, bank: Bank, slots: Slots
) -> tuple[Results, Any]:
    kept = adapters.read_of(s, read._replace(bias=bias)), bank, slots
    if backend.differentiable:
        # By the same rule, so that a second derivative knows alpha and beta too.
        return _blend(backend, s, read, bias, bank, slots), (read.y, *kept)
    results, saved = _results(backend, s, (read, bias, bank, slots), True)
    return results, (saved, *kept)


def _backward(
    backend: Backend, s: Static, kept: Any, cotangents: Any
) -> tuple[Read, Array | None, Bank, Slots]:
    saved, given, bank, slots = kept
    g, total = cotangents[0], None
    if s.biased:
        # As JAX differentiates a bias that is added: the same bits while seeds sleep.
        total = jax.lax.reduce_sum(g, (0,))
    theirs, own = adapters.of_chunks(s, bank, slots)
    if s.adapters_alone:
        none = jax.tree.map(jnp.zeros_like, (theirs, own.alpha))
        dy, d_bias, (d_bank, d_alpha) = g, total, none
    else:
        backward = _once(backend, "backward", s)
        dy, d_bias, d_bank, d_alpha = backward(g, total, saved, theirs, own)
    to_read = Read(dy, None)
    if s.adapters:
        known = g, dy, d_bias
        to_read, d_bias, more, d_more = adapters.backward(
            backend, s, known, given, bank, slots
        )
        d_bank = dataclasses.replace(d_bank, custom={**d_bank.custom, **more})
        d_alpha = d_alpha + d_more
    # beta has no gradient; None stands for those of integers.
    ids: Any = None
    d_slots = Slots(d_alpha, jnp.zeros_like(slots.beta), ids, ids)
    return to_read, d_bias, d_bank, d_slots


_blend.defvjp(_forward, _backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _blend_both(
    backend: Backend, s: Static, read: Read, bank: Bank, slots: Slots
) -> Results:
    """`_blend` with derivatives in both modes.

    A custom_vjp has no forward mode. The rule is the same, but written as a tangent,
    which JAX transposes. So it keeps more than ``y`` for the backward pass, and its
    gradients differ by rounding.
    """
    return _results(backend, s, (read, None, bank, slots), False)[0]


def _tangents(
    backend: Backend, s: Static, primals: Any, tangents: Any
) -> tuple[Results, Results]:
    assert backend.tangent is not None
    read, bank, slots = primals
    results = _blend_both(backend, s, read, bank, slots)
    read_dot, bank_dot, slots_dot = tangents
    dots = _known(read_dot.y), _known(bank_dot), _known(slots_dot.alpha)
    theirs, own = adapters.of_chunks(s, bank, slots)
    without = dots[1] and adapters.of_chunks(s, dots[1], slots)[0]
    out_dot = backend.tangent(s, read.y, theirs, own, (dots[0], without, dots[2]))
    if s.adapters:
        of_read = Read(dots[0], _known(read_dot.x))
        of_all = of_read, dots[1], dots[2]
        out_dot += adapters.tangent(s, read, bank, slots, of_all)
    return results, (out_dot, *jax.tree.map(jnp.zeros_like, results[1:]))


def _known(tangent: Any) -> Any:
    """A tangent as arrays; None if all of it is 0 for sure."""
    zeros = [
        isinstance(leaf, SymbolicZero) or leaf.dtype == jax.dtypes.float0
        for leaf in jax.tree.leaves(tangent)
    ]
    if all(zeros):
        return None
    return jax.tree.map(
        lambda leaf: (
            jnp.zeros(leaf.shape, leaf.dtype)
            if isinstance(leaf, SymbolicZero)
            else leaf
        ),
        tangent,
    )


_blend_both.defjvp(_tangents, symbolic_zeros=True)

# Without this, each call outside of a jitted function would compile its branches anew.
_jitted = jax.jit(_blend, static_argnums=(0, 1), inline=True)
_jitted_both = jax.jit(_blend_both, static_argnums=(0, 1), inline=True)
