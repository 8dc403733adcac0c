"""Blend as fused GPU kernels: Pallas on its Triton backend.

The forward kernel divides the living slots evenly among about as many programs as the
device holds, so that its work follows the living slots alone. It overwrites their
chunks in place, keeps hidden activations on the chip, and saves the chunks for the
backward pass. The backward kernel computes the hidden activations again, and overwrites
the cotangent in place with the gradient of ``y``. A bias of ``y`` that comes apart is
added where chunks are read, and what is written lacks it. Each program leaves partial
sums over its rows; a last kernel adds them up in a fixed order, so that results are
reproducible bit for bit.

Chunks of a few features (``Config.narrow``) share tiles: each program is a group of
neighbours, and their weights are blocks on the diagonal of one matrix. Of wider chunks
each program is one slot.

`product` has the products of adapters, which write the whole layer; what they compute
is added in place.
"""

import dataclasses
import warnings
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from esper_jax.blueprints import Bank, Custom
from esper_jax.kernels.blend.activations import ACTIVATIONS
from esper_jax.kernels.blend.backend import Backend
from esper_jax.kernels.blend.static import Slots, Static
from esper_jax.kernels.blend.triton import matrix, narrow
from esper_jax.kernels.blend.triton.config import choose
from esper_jax.kernels.blend.triton.product import PRODUCTS
from esper_jax.kernels.blend.triton.static import TritonStatic
from esper_jax.lifecycle.signals import Statistics

__all__ = ["BACKEND", "MAX_WIDTH"]

MAX_WIDTH = 512
"""Widest chunk that the kernels take."""

_FAST_WIDTH = 128
_DEPRECATED = "The Pallas Triton backend is deprecated"
_DTYPES = ("float32", "bfloat16", "float16")


def _refusal(s: Static, rows: int, slots: int) -> str | None:
    for b in s.blueprints:
        if isinstance(b, Custom):
            return f"blueprint {b.name!r} is Custom, and only Dense ones are supported"
    for b in s.blueprints:
        if not isinstance(b, Custom) and b.activation not in ACTIVATIONS:
            return f"activation {b.activation!r} has no kernel"
    if s.incubation == "bounded":
        return "incubation 'bounded' has no kernel"
    if s.dtype not in _DTYPES:
        return f"dtype {s.dtype} is none of {', '.join(_DTYPES)}"
    if s.width > MAX_WIDTH and not s.adapters_alone:
        return f"chunks of {s.width} features are wider than {MAX_WIDTH}"
    if not rows or not slots:
        return "there are no rows or no slots"
    return None


def _slow(s: Static, rows: int, slots: int) -> bool:
    # The weights of wide chunks do not fit on the chip, and XLA's matrix products are
    # faster there, forward and backward together: benchmarks/RESULTS.md has numbers.
    return s.width > _FAST_WIDTH and not s.adapters_alone


def _prepare(s: Static, rows: int) -> TritonStatic:
    # JAX warns while lowering, after the call has returned: a context around it would
    # not catch that. Done at each call, since a kernel is not always traced again.
    warnings.filterwarnings("ignore", message=_DEPRECATED, category=DeprecationWarning)
    config = s.config
    if config is None:
        config = choose(s, rows, jax.devices()[0].device_kind)
    sampled = s.statistics_rows
    if sampled is not None and sampled >= rows:
        sampled = None
    values = {f.name: getattr(s, f.name) for f in dataclasses.fields(Static)}
    return TritonStatic(**values | {"config": config, "statistics_rows": sampled})


def _passes(s: TritonStatic) -> ModuleType:
    return narrow if s.config.narrow else matrix


def _forward(
    s: TritonStatic,
    save: bool,
    y: Array,
    bias: Array | None,
    bank: Bank,
    slots: Slots,
) -> tuple[Array, Statistics, Array, Any]:
    return _passes(s).forward_pass(s, save, y, bias, bank, slots)


def _backward(
    s: TritonStatic,
    g: Array,
    total: Array | None,
    saved: Array,
    bank: Bank,
    slots: Slots,
) -> tuple[Array, Array | None, Bank, Array]:
    backward_pass = _passes(s).backward_pass
    dy, d_bias, leaves, d_alpha = backward_pass(s, g, total, saved, bank, slots)
    leaves = {
        name: leaf.astype(getattr(bank, name).dtype) for name, leaf in leaves.items()
    }
    d_bank = dataclasses.replace(jax.tree.map(jnp.zeros_like, bank), **leaves)
    return dy, d_bias, d_bank, d_alpha.astype(slots.alpha.dtype)


BACKEND = Backend(
    name="triton",
    preference=1,
    platforms=("gpu", "cuda"),
    refusal=_refusal,
    slow=_slow,
    prepare=_prepare,
    forward=_forward,
    backward=_backward,
    takes_bias=True,
    products=PRODUCTS,
)
"""The kernels: Dense blueprints, chunks of up to `MAX_WIDTH` features."""
