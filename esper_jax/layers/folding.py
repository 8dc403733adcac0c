"""Folds linear corrections of a layer's output into the layer's weights."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.linen import dtypes as linen_dtypes
from flax.nnx.nn import dtypes
from jaxtyping import Array

from esper_jax.blueprints import Adapter, Blueprint, Custom
from esper_jax.layers.inputs import input_width
from esper_jax.layers.matrix_form import PLAIN, MatrixForm, form_over, kernel_form

__all__ = [
    "LinearPart",
    "Product",
    "fold_branch",
    "fold_into",
    "linen_product",
    "product_of",
    "references_in",
    "takes_corrections",
    "wide_dtype",
]


@dataclasses.dataclass(frozen=True)
class LinearPart:
    """A correction without an activation, of one chunk.

    Args:
      at: index of the layer in its stack; () without one.
      start: first feature of the chunk.
      width: features of the chunk, ``C``.
      alpha: how much the correction counts.
      params: arrays of the common form that it uses, each without further axes.
    """

    at: tuple[int, ...]
    start: int
    width: int
    alpha: float
    params: Mapping[str, Array]


def references_in(nodes: Iterable[Any]) -> Mapping[int, int]:
    """How many places of a model hold each module and variable, by id.

    Args:
      nodes: of the model's graph.
    """
    counts: collections.Counter[int] = collections.Counter()
    for node in nodes:
        if isinstance(node, list | tuple):
            counts.update(map(id, node))
        elif isinstance(node, dict):
            counts.update(map(id, node.values()))
        elif isinstance(node, nnx.Pytree):
            counts.update(id(child) for _, child in nnx.iter_children(node))
    return counts


def takes_corrections(
    base: Any, features: int, stack: tuple[int, ...], references: Mapping[int, int]
) -> bool:
    """Whether a layer's output is linear in weights that nothing else uses.

    Args:
      base: the layer.
      features: width that grows.
      stack: leading axes that its variables should have.
      references: how many places of the model hold each module and variable, by id.
    """
    product: tuple[Any, Any]
    match base:
        case nnx.Linear() if type(base) is nnx.Linear:
            own, product = 2, (base.dot_general, jax.lax.dot_general)
        case nnx.Conv() if type(base) is nnx.Conv:
            own = len(base.kernel_shape)
            product = base.conv_general_dilated, jax.lax.conv_general_dilated
        case nnx.LinearGeneral() if type(base) is nnx.LinearGeneral:
            if base.batch_axis or base.dot_general_cls is not None:
                return False
            own = len(base.in_features) + len(base.out_features)
            product = base.dot_general or jax.lax.dot_general, jax.lax.dot_general
        case nnx.Einsum() if type(base) is nnx.Einsum:
            if form_over(base, features) is PLAIN:
                return False
            own, product = len(base.kernel_shape), (base.einsum_op, jnp.einsum)
        case _:
            return False
    plain = product[0] is product[1] and base.promote_dtype is dtypes.promote_dtype
    weights = [w for w in (base.kernel, base.bias) if w is not None]
    return (
        plain
        and all(isinstance(w, nnx.Variable) for w in weights)
        and all(jnp.issubdtype(w.dtype, jnp.floating) for w in weights)
        and base.kernel.ndim == len(stack) + own
        and base.kernel.shape[: len(stack)] == stack
        and all(references[id(part)] == 1 for part in (base, *weights))
    )


@dataclasses.dataclass(frozen=True)
class Product:
    """What decides which corrections the weights of a layer can take.

    Args:
      inputs: width of the input, if each row of the output comes from one row of it;
        else None.
      mixes: whether every feature is computed from the same inputs. Groups of a
        convolution and masks keep them apart.
      bias: whether there is a bias.
      form: how kernel and bias have their features on one axis.
    """

    inputs: int | None
    mixes: bool
    bias: bool
    form: MatrixForm = PLAIN

    def takes(self, blueprint: Blueprint) -> bool:
        """Whether the weights can take the corrections of a blueprint."""
        if isinstance(blueprint, Custom):
            return False
        if isinstance(blueprint, Adapter) and (
            blueprint.reads == "layer" or self.inputs != blueprint.inputs
        ):
            return False
        hidden = isinstance(blueprint, Adapter) or blueprint.expansion  # mixes features
        if hidden and not (self.mixes and blueprint.activation == "identity"):
            return False
        return self.bias or not blueprint.bias


def product_of(base: Any, features: int) -> Product:
    """What a layer computes, which `takes_corrections`.

    Args:
      base: the layer.
      features: width that grows.
    """
    own = _product(base, input_width(base, features), base.bias is not None)
    return dataclasses.replace(own, form=form_over(base, features))


def linen_product(base: Any, features: int, kernel: Any, bias: bool) -> Product | None:
    """What a layer of Linen computes; None if its weights take no corrections.

    Args:
      base: the layer.
      features: width that grows.
      kernel: its kernel, or a shape.
      bias: whether it has a bias.
    """
    product: tuple[Any, Any, Any]
    form = None
    match base:
        case nn.Dense() if type(base) is nn.Dense:
            own = base.dot_general, base.dot_general_cls
            product = *own, jax.lax.dot_general
        case nn.Conv() if type(base) is nn.Conv:
            own = base.conv_general_dilated, base.conv_general_dilated_cls
            product = *own, jax.lax.conv_general_dilated
        case nn.DenseGeneral() if type(base) is nn.DenseGeneral:
            form = kernel_form(base, kernel.shape)
            if form is None or form.outputs != features:
                return None
            product = base.dot_general, base.dot_general_cls, jax.lax.dot_general
        case _:
            return None
    given, made, plain = product
    if given not in (None, plain) or made is not None:
        return None
    if base.promote_dtype is not linen_dtypes.promote_dtype:
        return None
    if form is not None:
        return Product(form.inputs, mixes=True, bias=bias, form=form)
    x = jax.ShapeDtypeStruct(kernel.shape[-2:-1], kernel.dtype)
    return _product(base, input_width(base, x=x), bias)


def _product(base: Any, inputs: int | None, bias: bool) -> Product:
    one = getattr(base, "feature_group_count", 1) == 1
    return Product(inputs, one and getattr(base, "mask", None) is None, bias)


def fold_into(base: Any, parts: list[LinearPart], form: MatrixForm) -> None:
    """Changes kernel and bias so that the layer's output has the corrections in it.

    Computes in float32, or float64 for weights of that dtype, and rounds once.

    Args:
      base: a layer that `takes_corrections`, or a stack of them.
      parts: of disjoint chunks.
      form: how kernel and bias have their features on one axis.
    """
    kernel, bias = _weights(base, form)
    for part in parts:
        columns = (*part.at, ..., slice(part.start, part.start + part.width))
        matrix, offset = _affine(part, kernel.dtype)
        own = kernel[columns]
        more = jnp.matmul(own, matrix, precision="highest")
        kernel = kernel.at[columns].set(own + more)
        if bias is not None:
            own = bias[columns]
            more = jnp.matmul(own, matrix, precision="highest") + offset
            bias = bias.at[columns].set(own + more)
    _put(base, kernel, bias, form)


def fold_branch(base: Any, params: Mapping[str, Array], form: MatrixForm) -> None:
    """Adds ``W2 (W1 x + b1) + b2`` of a layer's input to its kernel and bias.

    Args:
      base: a layer that `takes_corrections` and whose input has a width, or a stack of
        them.
      params: ``w1`` (D, N), ``w2`` (N, F), and ``b1``, ``b2`` if there are; with the
        axes of the stack before that.
      form: how kernel and bias have their features on one axis.
    """
    p = {name: _wide(leaf) for name, leaf in params.items()}
    kernel, bias = _weights(base, form)
    more = jnp.matmul(p["w1"], p["w2"], precision="highest")
    kernel = kernel + more.reshape(kernel.shape)
    if "b1" in p:
        own = jnp.einsum("...n,...nf->...f", p["b1"], p["w2"], precision="highest")
        bias = bias + own + p["b2"]
    _put(base, kernel, bias, form)


def _weights(base: Any, form: MatrixForm) -> tuple[Array, Any]:
    """Kernel and bias, each with its features on the last axis, to compute with."""
    kernel = form.matrix(_wide(base.kernel.get_value()))
    if base.bias is None:
        return kernel, None
    return kernel, form.vector(_wide(base.bias.get_value()))


def _put(base: Any, kernel: Array, bias: Any, form: MatrixForm) -> None:
    """Gives a layer what `_weights` had."""
    old = base.kernel
    old.set_value(form.kernel_from(kernel).astype(old.dtype))
    if bias is not None:
        base.bias.set_value(bias.reshape(base.bias.shape).astype(base.bias.dtype))


def wide_dtype(dtype: Any) -> Any:
    """Float32, or ``dtype`` where that is wider. Strict promotion allows it."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)


def _wide(x: Array) -> Array:
    return x.astype(wide_dtype(x.dtype))


def _affine(part: LinearPart, dtype: Any) -> tuple[Array, Array]:
    """The correction ``alpha r(y)`` as ``y @ matrix + offset``."""
    p = {name: leaf.astype(dtype) for name, leaf in part.params.items()}
    matrix = jnp.zeros((part.width, part.width), dtype)
    offset = jnp.zeros(part.width, dtype)
    if "w1" in p:
        matrix = jnp.matmul(p["w1"], p["w2"], precision="highest")
        if "b1" in p:
            offset = jnp.matmul(p["b1"], p["w2"], precision="highest")
    if "b2" in p:
        offset = offset + p["b2"]
    if "scale" in p:
        matrix = matrix + jnp.diag(p["scale"])
    return part.alpha * matrix, part.alpha * offset
