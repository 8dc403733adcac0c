"""Instructions of NVIDIA GPUs that Pallas has no neutral name for."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from esper_jax.kernels.blend.activations import Functions, gelu_gate

__all__ = ["DOUBLE", "FAST", "packed_double"]

# One instruction each, good to 5e-4.
FAST = Functions(
    sigmoid_of_double=lambda x: 0.5 + 0.5 * plgpu.approx_tanh(x),
    tanh=plgpu.approx_tanh,
)
"""Approximations that are good enough in half precision."""


def _double_gelu(x: Array) -> Array:
    return x + x * plgpu.approx_tanh(gelu_gate(x, x * x))


def _double_silu(x: Array) -> Array:
    return x + x * plgpu.approx_tanh(0.5 * x)


DOUBLE: dict[str, Callable[[Array], Array]] = {
    "gelu": _double_gelu,
    "silu": _double_silu,
}
"""Twice the activation, by name, for one instruction less than the activation.

Whoever uses it halves the weights that follow.
"""

_PACKED = {
    "gelu": (
        """
        fma.rn.TYPE u, x, x, zero;
        fma.rn.TYPE u, u, cube, line;
        fma.rn.TYPE u, u, x, zero;
        """,
        {"line": np.sqrt(2.0 / np.pi), "cube": 0.044715 * np.sqrt(2.0 / np.pi)},
    ),
    "silu": ("fma.rn.TYPE u, x, half, zero;", {"half": 0.5}),
}
"""Assembly for what goes into tanh, two halves at once, and the constants in it."""


def packed_double(name: str, x: Array, dtype: str) -> Array:
    """Twice the activation, two values an instruction.

    Each step rounds by about as much as the cast before the next product.

    Args:
      name: key of `DOUBLE`.
      x: what enters the activation, float32.
      dtype: ``"bfloat16"`` or ``"float16"``, which the result has.
    """
    steps, constants = _PACKED[name]
    constants = {"zero": -0.0, **constants}  # x * y - 0 is x * y, for any sign.
    lines = ["cvt.rn.TYPE.f32 x, $2, $1;"]
    lines += [f"mov.b32 {k}, {_twice(v, dtype)};" for k, v in constants.items()]
    lines += [steps, "tanh.approx.TYPE t, u;", "fma.rn.TYPE $0, x, t, x;"]
    registers = ", ".join(["x", "u", "t", *constants])
    body = "\n".join([f".reg .b32 {registers};", *lines])
    (out,) = plgpu.elementwise_inline_asm(
        "{" + body.replace("TYPE", "f16x2" if dtype == "float16" else "bf16x2") + "}",
        args=[x],
        constraints="=r,f,f",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype))],
    )
    return out


def _twice(value: float, dtype: str) -> str:
    """A constant, twice in one register, as assembly."""
    bits = int(np.asarray(value, jnp.dtype(dtype)).view(np.uint16))
    return f"0x{bits:04x}{bits:04x}"
