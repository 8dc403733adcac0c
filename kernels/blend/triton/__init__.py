"""Blend as fused GPU kernels: Pallas on its Triton backend.

The living slots are divided evenly among as many programs as the device holds, so that
the work follows them alone. The forward kernel overwrites their chunks in place, with
hidden activations that never leave the chip, and keeps those chunks for the backward
pass. That one computes the hidden activations again, and overwrites the cotangent in
place with the gradient of ``y``. Sums over rows leave each program as partial sums,
added up in a fixed order, so that results are reproducible bit for bit.

Chunks of a few features (`Config.narrow`) share tiles, a slot a lane, and loop over
their features; wider ones are multiplied as matrices, a slot a program.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from esper_jax.blueprints import Bank, Blueprint, Custom, Dense, hidden_width
from esper_jax.chunks import ChunkLayout
from esper_jax.kernels.blend.config import Config, choose
from esper_jax.kernels.blend.triton.launch import backward_pass, forward_pass
from esper_jax.kernels.blend.triton.static import ACTIVATIONS, Static
from esper_jax.lifecycle.signals import Statistics
from esper_jax.lifecycle.stages import Incubation

__all__ = ["MAX_WIDTH", "blend", "refusal", "slow"]

MAX_WIDTH = 512
"""Widest chunk that the kernels take."""

_FAST_WIDTH = 128
_DTYPES = ("float32", "bfloat16", "float16")


def refusal(
    y: Array, alpha: Array, layout: ChunkLayout, blueprints: tuple[Blueprint, ...]
) -> str | None:
    """Why the kernels do not take these arguments; None if they do."""
    custom = [b.name for b in blueprints if isinstance(b, Custom)]
    if custom:
        return f"blueprint {custom[0]!r} is Custom, and only Dense ones are supported"
    for b in blueprints:
        if isinstance(b, Dense) and b.activation not in ACTIVATIONS:
            return f"activation {b.activation!r} has no kernel"
    if jnp.dtype(y.dtype).name not in _DTYPES:
        return f"dtype {y.dtype} is none of {', '.join(_DTYPES)}"
    if layout.width > MAX_WIDTH:
        return f"chunks of {layout.width} features are wider than {MAX_WIDTH}"
    if y.size == 0 or alpha.size == 0:
        return "there are no rows or no slots"
    return None


def slow(
    y: Array, alpha: Array, layout: ChunkLayout, blueprints: tuple[Blueprint, ...]
) -> bool:
    """Whether plain JAX is faster, forward and backward together.

    The weights of wide chunks do not fit on the chip, and its matrix products are
    better at that: ``benchmarks/RESULTS.md`` has the numbers.
    """
    return layout.width > _FAST_WIDTH


def _once(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f``, with an error that says so where it is differentiated again."""

    def refuse(*_: Any) -> Any:
        raise NotImplementedError(
            "blend with implementation='triton' has no second derivative; pass "
            "implementation='xla'"
        )

    once = jax.custom_vjp(f)
    once.defvjp(refuse, refuse)
    return once


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blend(s: Static, *arrays: Any) -> Any:
    return _once(functools.partial(forward_pass, s, False))(*arrays)


def _blend_forward(s: Static, *arrays: Any) -> tuple[Any, Any]:
    *out, saved = _once(functools.partial(forward_pass, s, True))(*arrays)
    return tuple(out), (saved, *arrays[1:])


def _blend_backward(s: Static, kept: Any, cotangents: Any) -> tuple[Any, ...]:
    dy, d_bank, d_alpha = _once(functools.partial(backward_pass, s))(
        cotangents[0], *kept
    )
    beta = kept[3]
    return dy, d_bank, d_alpha, jnp.zeros_like(beta), None, None


_blend.defvjp(_blend_forward, _blend_backward)


def blend(
    y: Float[Array, "N F"],
    bank: Bank,
    alpha: Float[Array, " K"],
    beta: Float[Array, " K"],
    blueprint: Int[Array, " K"],
    seed_of_slot: Int[Array, " K"],
    layout: ChunkLayout,
    blueprints: tuple[Blueprint, ...],
    incubation: Incubation,
    statistics_rows: int | None = None,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "N F"], Statistics, Float[Array, " K"]]:
    """The public `blend` on arguments that `refusal` takes, with one batch axis.

    Args:
      config: block sizes; by default `esper_jax.kernels.blend.config.choose`'s.
      interpret: runs the kernels as plain JAX, on any device, to test them.
    """
    if config is None:
        config = choose(
            y.shape[0],
            layout.features,
            layout.width,
            hidden_width(blueprints, layout.width),
            jnp.dtype(y.dtype).name,
            jax.devices()[0].device_kind,
            statistics_rows,
        )
    dtype = jnp.dtype(y.dtype).name
    if statistics_rows is not None and statistics_rows >= y.shape[0]:
        statistics_rows = None
    s = Static(
        layout, blueprints, incubation, statistics_rows, config, interpret, dtype
    )
    return _blend(s, y, bank, alpha, beta, blueprint, seed_of_slot)
