"""Layers of several axes as one matrix product of each row of their input."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jaxtyping import Array, Float

__all__ = [
    "PLAIN",
    "MatrixForm",
    "check_equation",
    "form_over",
    "kernel_form",
    "matrix_form",
]


@dataclasses.dataclass(frozen=True)
class MatrixForm:
    """How a layer is the product of rows of ``D`` inputs and a kernel (D, F).

    Args:
      contracted: axes of the input that are summed. ``D`` runs over them in the order
        in which the input has them.
      features: axes of the output that come from the kernel; likewise ``F``.
      kernel: the kernel's own axes, counted from its last, in the order of ``D``, then
        ``F``. () if the kernel has its features on the last axis already.
      sizes: of these axes.
    """

    contracted: tuple[int, ...]
    features: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()

    @property
    def inputs(self) -> int:
        """``D``."""
        return math.prod(self.sizes[: len(self.contracted)])

    @property
    def outputs(self) -> int:
        """``F``."""
        return math.prod(self.sizes[len(self.contracted) :])

    def input_rows(self, x: Any) -> Any:
        """The layer's input as rows, (*B, D)."""
        return _rows(x, self.contracted)

    def input_from(self, rows: Any) -> Any:
        """The layer's input, of which the rows are given."""
        return _from_rows(rows, self.contracted, self.sizes[: len(self.contracted)])

    def output_rows(self, y: Any) -> Any:
        """The layer's output as rows, (*B, F)."""
        return _rows(y, self.features)

    def output_from(self, rows: Any) -> Any:
        """The layer's output, of which the rows are given."""
        return _from_rows(rows, self.features, self.sizes[len(self.contracted) :])

    def matrix(self, kernel: Array) -> Float[Array, "*L F"]:
        """The kernel with its features on the last axis, (D, F) if `kernel` tells.

        Axes of a stack stay in front.
        """
        if not self.kernel:
            return kernel
        order = self._order(kernel.ndim)
        lead = kernel.shape[: kernel.ndim - len(self.kernel)]
        return kernel.transpose(order).reshape(*lead, self.inputs, self.outputs)

    def kernel_from(self, matrix: Float[Array, "*L F"]) -> Array:
        """The inverse of `matrix`."""
        if not self.kernel:
            return matrix
        split = matrix.reshape(*matrix.shape[:-2], *self.sizes)
        return split.transpose(np.argsort(self._order(split.ndim)))

    def vector(self, bias: Array) -> Float[Array, "*L F"]:
        """The bias with its features on one axis, the last."""
        if not self.kernel:
            return bias
        lead = bias.shape[: bias.ndim - len(self.features)]
        return bias.reshape(*lead, self.outputs)

    def _order(self, ndim: int) -> tuple[int, ...]:
        lead = range(ndim - len(self.kernel))
        return (*lead, *(ndim + axis for axis in self.kernel))


PLAIN = MatrixForm((-1,), (-1,))
"""Rows are what lies on the last axis of input and output."""


def matrix_form(base: Any, x: Any = None) -> MatrixForm | None:
    """How a layer that may have several axes is one matrix product.

    - ``LinearGeneral``, ``DenseGeneral`` without batch axes: over any axes of the
      input, to any number of axes;
    - ``Einsum`` whose equation sums each axis of the input with the kernel's or keeps
      it, the kept ones in the same order, and likewise each axis of the kernel, without
      an ellipsis there: ``"btnh,nhd->btd"``, ``"btd,sndh->sbtnh"``. An axis that input,
      kernel and output share is a product for each of its places, and so is none.

    Args:
      base: any layer, of NNX or Linen.
      x: its argument, for layers of Linen, which do not know their input before.

    Returns:
      The form; None for every other layer.
    """
    match base:
        case nnx.LinearGeneral() if not base.batch_axis:
            return _general(base.axis, base.in_features, base.out_features)
        case nn.DenseGeneral() if not base.batch_dims:
            axis, features = _tuple(base.axis), _tuple(base.features)
            ndim = getattr(x, "ndim", 0)
            if any(not -ndim <= a < ndim for a in axis):
                return None
            sizes = tuple(x.shape[a] for a in _in_order(axis, ndim))
            return _general(axis, sizes, features)
        case nnx.Einsum() if isinstance(base.einsum_str, str):
            return _of_equation(base.einsum_str, base.kernel_shape)
    return None


def kernel_form(base: nn.DenseGeneral, shape: tuple[int, ...]) -> MatrixForm | None:
    """The form of a layer of Linen by the shape of its kernel.

    Returns:
      The form; None if the layer has batch axes, or the kernel is of another shape.
    """
    axis, features = _tuple(base.axis), _tuple(base.features)
    inputs = shape[: len(axis)]
    if base.batch_dims or shape != (*inputs, *features):
        return None
    return _general(axis, inputs, features)


def form_over(base: Any, features: int, x: Any = None) -> MatrixForm:
    """The form in which a layer grows over all its features; else `PLAIN`.

    Args:
      base: as for `matrix_form`.
      features: width that grows. That of the last axis alone, where there are several,
        means that each place of the other axes is a row: `PLAIN`.
      x: as for `matrix_form`.
    """
    form = matrix_form(base, x)
    return PLAIN if form is None or form.outputs != features else form


def check_equation(
    base: Any,
    form: MatrixForm,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    reads_input: bool,
) -> None:
    """Refuses a call of an ``Einsum`` by another equation than its own.

    Raises:
      ValueError: if there is one, and the rows of input or output follow from its own.
    """
    needed = form.features != (-1,) or (reads_input and form is not PLAIN)
    if not needed or not isinstance(base, nnx.Einsum):
        return
    given = args[1] if len(args) > 1 else kwargs.get("einsum_str")
    if given is not None and given.replace(" ", "") != base.einsum_str:
        raise ValueError(
            f"einsum_str must be {base.einsum_str!r}, that of the layer, by which what "
            f"has grown reads its input; got {given!r}. Make a layer of each equation"
        )


def _general(axis: Any, inputs: Any, outputs: Any) -> MatrixForm:
    axes = tuple(int(a) for a in axis)
    own = len(axes) + len(outputs)
    return MatrixForm(
        axes,
        tuple(range(-len(outputs), 0)),
        tuple(range(-own, 0)),
        tuple(int(n) for n in (*inputs, *outputs)),
    )


def _of_equation(equation: str, shape: Any) -> MatrixForm | None:
    """The form of an explicit equation of two operands, of which the second is ours."""
    factors, result = equation.replace(" ", "").replace("...", ".").split("->")
    given, kernel = factors.split(",")
    summed = [a for a in given if a in kernel]
    features = [a for a in result if a in kernel]
    kept = [a for a in given if a not in kernel]
    if (
        "." in kernel
        or any(len(set(axes)) != len(axes) for axes in (given, kernel, result))
        or set(summed) & set(features)
        or kept != [a for a in result if a not in kernel]
        or sorted(kernel) != sorted(summed + features)
        or not (summed and features)
        or len(kernel) != len(shape)
    ):
        return None
    return MatrixForm(
        tuple(_place(given, a) for a in summed),
        tuple(_place(result, a) for a in features),
        tuple(kernel.index(a) - len(kernel) for a in summed + features),
        tuple(int(shape[kernel.index(a)]) for a in summed + features),
    )


def _place(axes: str, axis: str) -> int:
    """Index of an axis: from the last, or from the first if an ellipsis follows it."""
    index = axes.index(axis)
    return index if "." in axes[index:] else index - len(axes)


def _tuple(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _rows(x: Any, axes: tuple[int, ...]) -> Any:
    if axes == (-1,):
        return x
    x = jnp.moveaxis(x, _in_order(axes, x.ndim), range(-len(axes), 0))
    cut = x.ndim - len(axes)
    return x.reshape(*x.shape[:cut], math.prod(x.shape[cut:]))


def _from_rows(rows: Any, axes: tuple[int, ...], sizes: tuple[int, ...]) -> Any:
    if axes == (-1,):
        return rows
    x = rows.reshape(*rows.shape[:-1], *sizes)
    return jnp.moveaxis(x, range(-len(axes), 0), _in_order(axes, x.ndim))


def _in_order(axes: tuple[int, ...], ndim: int) -> list[int]:
    """Axes as the array has them, which is how Flax takes those of a product."""
    return sorted(axis % ndim for axis in axes)
