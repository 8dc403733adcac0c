"""Which layers' inputs blueprints can read."""

import inspect
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from esper_jax.blueprints import Adapter, bound, resolve

__all__ = ["check_readers", "input_of", "input_width"]


def input_width(base: Any, x: Any = None) -> int | None:
    """Width of a layer's input, if each row of the output comes from one row of it.

    - ``Linear``, Linen's ``Dense``: its features;
    - ``LinearGeneral``, ``DenseGeneral`` from the last axis to one axis: the same;
    - ``Conv`` with a kernel of 1, strides of 1, one group and no padding: its channels;
    - ``Embed``: the number of its ids.

    Args:
      base: any layer, of NNX or Linen.
      x: its argument, for layers of Linen, which do not know their input before.

    Returns:
      The width; None for every other layer.
    """
    width = x.shape[-1] if getattr(x, "ndim", 0) else None
    match base:
        case nnx.Linear():
            return int(base.in_features)
        case nnx.Embed() | nn.Embed():
            return int(base.num_embeddings)
        case nn.Dense():
            return width
        case nnx.Conv() if _by_position(base):
            return int(base.in_features)
        case nn.Conv() if _by_position(base):
            return width
        case nnx.LinearGeneral() if _one_axis(base, base.batch_axis):
            return int(base.in_features[0]) if len(base.in_features) == 1 else None
        case nn.DenseGeneral() if _one_axis(base, base.batch_dims):
            return width
    return None


def input_of(
    base: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], dtype: Any
) -> Any:
    """The input of a layer as blueprints read it: its first argument.

    Integers are ids for ``Embed`` alone; other layers compute with them as numbers.

    Args:
      base: the layer.
      args: of its call.
      kwargs: of its call.
      dtype: of its output.
    """
    x: Any = args[0] if args else _first(base, kwargs)
    if isinstance(base, nnx.Embed | nn.Embed) or not hasattr(x, "dtype"):
        return x
    return x if jnp.issubdtype(x.dtype, jnp.floating) else jnp.asarray(x, dtype)


def _first(base: Any, kwargs: Mapping[str, Any]) -> Any:
    """What a call by keywords gives for the first parameter of a layer.

    If the signature does not tell which that is, the first keyword is taken for it.
    """
    named = list(inspect.signature(base).parameters)[:1]
    return next((kwargs[n] for n in (*named, *kwargs) if n in kwargs), None)


def check_readers(blueprints: Any, inputs: int | None, base: Any) -> None:
    """Refuses blueprints that read the input of a layer where that is not possible.

    Raises:
      ValueError: if ``inputs`` is None and a blueprint needs it.
    """
    if inputs is not None or not blueprints:
        return
    readers = [b for b in bound(resolve(blueprints), None) if b.reads == "input"]
    for b in readers:
        if isinstance(b, Adapter) and b.inputs is None:
            raise ValueError(
                f"blueprints: {b.name!r} reads the input of its layer, and that of "
                f"{type(base).__name__} as it is here cannot be read: it can for "
                "Linear, LinearGeneral over the last axis, Conv with a kernel of 1 and "
                "no padding, and Embed. For a layer of your own, each row of whose "
                "output comes from one row of its first argument, pass inputs=, the "
                "width of that. Or choose blueprints that read the output ('group')"
            )


def _one_axis(base: Any, batch: Any) -> bool:
    """Whether a product is over the last axis, to one axis."""
    features = getattr(base, "out_features", None) or base.features
    one = isinstance(features, int) or len(features) == 1
    return one and not batch and base.axis in (-1, (-1,), [-1])


def _by_position(base: Any) -> bool:
    """Whether a convolution is one matrix product at each position."""
    ones = (base.kernel_size, base.strides, base.input_dilation, base.kernel_dilation)
    alone = all(
        n == 1
        for each in ones
        for n in ([each] if each is None or isinstance(each, int) else each)
        if n is not None
    )
    padding = base.padding
    # By name, a kernel of 1 is never padded; by number, 0 or pairs of 0 are none.
    padded = not isinstance(padding, str) and np.any(np.asarray(padding) != 0)
    return alone and base.feature_group_count == 1 and not padded
