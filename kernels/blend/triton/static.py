"""What is known of a call of blend when its kernels are traced."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from esper_jax.blueprints import Blueprint, Dense, hidden_width
from esper_jax.chunks import ChunkLayout
from esper_jax.kernels.blend.config import Config, power_of_two
from esper_jax.lifecycle.stages import Incubation

__all__ = ["ACTIVATIONS", "Static"]


def _sigmoid_of_double(x: Array, fast: bool) -> Array:
    """``sigmoid(2 x)``."""
    if not fast:
        return jax.nn.sigmoid(2.0 * x)
    # One instruction, good to 5e-4: there is no neutral call for it.
    return 0.5 + 0.5 * plgpu.approx_tanh(x)


def _gelu_gate(x: Array, square: Array) -> Array:
    c = np.sqrt(2.0 / np.pi).astype(np.float32)
    return x * (c + (0.044715 * c) * square)


def _gelu(x: Array, fast: bool) -> tuple[Array, Array]:
    # The tanh form of jax.nn.gelu, by tanh(u) = 2 * sigmoid(2 u) - 1.
    c = np.sqrt(2.0 / np.pi).astype(np.float32)
    square = x * x
    gate = _sigmoid_of_double(_gelu_gate(x, square), fast)
    out = x * gate
    slope = gate + (out - out * gate) * (2.0 * c + (0.26829 * c) * square)
    return out, slope


def _silu(x: Array, fast: bool) -> tuple[Array, Array]:
    gate = _sigmoid_of_double(0.5 * x, fast)
    out = x * gate
    return out, gate + out * (1.0 - gate)


def _tanh(x: Array, fast: bool) -> tuple[Array, Array]:
    out = plgpu.approx_tanh(x) if fast else jnp.tanh(x)
    return out, 1.0 - out * out


def _relu(x: Array, fast: bool) -> tuple[Array, Array]:
    return jnp.maximum(x, 0.0), jnp.where(x > 0.0, 1.0, 0.0)


def _identity(x: Array, fast: bool) -> tuple[Array, Array]:
    return x, jnp.ones_like(x)


ACTIVATIONS: dict[str, Callable[[Array, bool], tuple[Array, Array]]] = {
    "gelu": _gelu,
    "relu": _relu,
    "silu": _silu,
    "tanh": _tanh,
    "identity": _identity,
}
"""Value and derivative of each activation that kernels know; by approximate
instructions of the GPU, as good as half precision asks for, if the flag is set."""


def _double_gelu(x: Array) -> Array:
    return x + x * plgpu.approx_tanh(_gelu_gate(x, x * x))


def _double_silu(x: Array) -> Array:
    return x + x * plgpu.approx_tanh(0.5 * x)


_DOUBLE = {"gelu": _double_gelu, "silu": _double_silu}
"""Twice the value, for one instruction less: the weights after it are halved."""

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
"""What tanh is taken of, for two halves at once, and the constants of that."""


def _packed_double(name: str, x: Array, dtype: str) -> Array:
    """As `_DOUBLE`, in half precision, two values an instruction.

    The rounding of each step is of the size of that before the next product.
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
    """Two of a constant in one register."""
    bits = int(np.asarray(value, jnp.dtype(dtype)).view(np.uint16))
    return f"0x{bits:04x}{bits:04x}"


@dataclasses.dataclass(frozen=True)
class Static:
    """All that is known when a kernel is traced."""

    layout: ChunkLayout
    blueprints: tuple[Blueprint, ...]
    incubation: Incubation
    statistics_rows: int | None
    config: Config
    interpret: bool
    dtype: str

    @property
    def width(self) -> int:
        return self.layout.width

    @property
    def columns(self) -> int:
        """Columns of a tile that holds one chunk; a dot takes no fewer than 16."""
        return max(16, power_of_two(self.layout.width))

    @property
    def hidden(self) -> int:
        return hidden_width(self.blueprints, self.layout.width)

    @property
    def own_statistics(self) -> bool:
        """Whether the forward kernel takes the living chunks' statistics."""
        return self.statistics_rows is None and not self.config.narrow

    @property
    def samples(self) -> bool:
        """Whether the last launch takes statistics of a sample of the rows."""
        return bool(self.statistics_rows) and not self.config.narrow

    def sampled(self, rows: int) -> tuple[int, int]:
        """Rows that statistics are taken over, and the step from one to the next."""
        if self.statistics_rows is None:
            return rows, 1
        if not self.statistics_rows:
            return 0, 1
        step = max(1, -(-rows // self.statistics_rows))
        return -(-rows // step), step

    def uses(self, field: str) -> bool:
        """Whether any blueprint has this part."""
        return any(getattr(b, field) for b in self.blueprints)

    def of_kind(self, kind: Array, field: str) -> Any:
        """A property of a blueprint by its run-time index; a constant if all agree."""
        values = [getattr(b, field) for b in self.blueprints]
        if field == "hidden":
            values = [hidden(self.width) for hidden in values]
        if len(set(values)) == 1:
            return values[0]
        out = jnp.full_like(kind, int(values[0]))
        for i, value in enumerate(values):
            out = jnp.where(kind == i, int(value), out)
        return out != 0 if isinstance(values[0], bool) else out

    @property
    def fast(self) -> bool:
        """Whether approximate instructions of the GPU are good enough."""
        return self.dtype != "float32" and not self.interpret

    @property
    def double(self) -> Callable[[Array], Array] | None:
        """Twice the activation, if it is known while tracing and cheaper so."""
        names = {
            b.activation
            for b in self.blueprints
            if isinstance(b, Dense) and b.expansion > 0
        }
        if not self.fast or len(names) != 1 or min(names) not in _DOUBLE:
            return None
        if self.config.packed:
            return functools.partial(_packed_double, min(names), dtype=self.dtype)
        return _DOUBLE[min(names)]

    def activate(self, kind: Array, x: Array) -> tuple[Array, Array]:
        """Value and derivative of the activation that ``kind`` has; one per column
        where ``kind`` is no scalar.

        All that may be meant are computed: XLA 0.11 fails to compile a branch within a
        loop that it pipelines.
        """
        fast = self.fast
        names = [b.activation for b in self.blueprints if isinstance(b, Dense)]
        used = [
            b.activation
            for b in self.blueprints
            if isinstance(b, Dense) and b.expansion > 0
        ]
        # A blueprint without a hidden layer may take any: its units are 0.
        distinct = list(dict.fromkeys(used)) or ["identity"]
        if len(distinct) == 1:
            return ACTIVATIONS[distinct[0]](x, fast)
        index = jnp.full_like(kind, 0)
        for i, name in enumerate(names):
            if name in distinct:
                index = jnp.where(kind == i, distinct.index(name), index)
        out = ACTIVATIONS[distinct[0]](x, fast)
        for i, name in enumerate(distinct[1:], start=1):
            other = ACTIVATIONS[name](x, fast)
            chosen = jnp.broadcast_to(index == i, x.shape)
            out = (
                jnp.where(chosen, other[0], out[0]),
                jnp.where(chosen, other[1], out[1]),
            )
        return out
