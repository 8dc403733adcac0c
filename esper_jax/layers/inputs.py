"""Which layers' inputs blueprints can read."""

import inspect
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from esper_jax.blueprints import Adapter, bound, resolve
from esper_jax.layers.matrix_form import PLAIN, MatrixForm, matrix_form

__all__ = [
    "check_readers",
    "features_read",
    "first_argument",
    "input_of",
    "input_width",
]


def input_width(base: Any, features: int | None = None, x: Any = None) -> int | None:
    """Width of a layer's input, if each row of the output comes from one row of it.

    - ``Linear``, Linen's ``Dense``: its features;
    - ``LinearGeneral``, ``DenseGeneral``, ``Einsum`` where they have a `matrix_form`:
      the axes that they sum, flattened, if all their features grow as one axis;
    - ``Conv`` with a kernel of 1, strides of 1, one group and no padding: its channels;
    - ``Embed``: the number of its ids.

    Args:
      base: any layer, of NNX or Linen.
      features: width that grows; by default that of all features.
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
    form = matrix_form(base, x)
    whole = form is not None and features in (None, form.outputs)
    return form.inputs if form is not None and whole else None


def features_read(base: Any, blueprints: Any, x: Any = None) -> int | None:
    """Width of all features of a layer that has several axes of them, flattened.

    Args:
      base: any layer, of NNX or Linen.
      blueprints: that grow there.
      x: as for `input_width`.

    Returns:
      The width; None if the layer has no `matrix_form`, or none reads its input.
    """
    form = matrix_form(base, x)
    return form.outputs if form is not None and _readers(blueprints) else None


def input_of(
    base: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dtype: Any,
    form: MatrixForm = PLAIN,
) -> Any:
    """The input of a layer as blueprints read it: the rows of its first argument.

    Integers are ids for ``Embed`` alone; other layers compute with them as numbers.

    Args:
      base: the layer.
      args: of its call.
      kwargs: of its call.
      dtype: of its output.
      form: how the layer's input is cut into rows.
    """
    x: Any = first_argument(base, args, kwargs)
    if isinstance(base, nnx.Embed | nn.Embed) or not hasattr(x, "dtype"):
        return x
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = jnp.asarray(x, dtype)
    return form.input_rows(x)


def first_argument(base: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a call gives for the first parameter of a layer.

    If it is called by keywords, and the signature does not tell which that is, the
    first keyword is taken for it.
    """
    if args:
        return args[0]
    named = list(inspect.signature(base).parameters)[:1]
    return next((kwargs[n] for n in (*named, *kwargs) if n in kwargs), None)


def check_readers(blueprints: Any, inputs: int | None, base: Any) -> None:
    """Refuses blueprints that read the input of a layer where that is not possible.

    Raises:
      ValueError: if ``inputs`` is None and a blueprint needs it.
    """
    if inputs is not None:
        return
    for b in _readers(blueprints):
        if b.inputs is None:
            raise ValueError(
                f"blueprints: {b.name!r} reads the input of its layer, and that of "
                f"{type(base).__name__} as it is here cannot be read: it can for "
                "Linear, Conv with a kernel of 1 and no padding, Embed, and for "
                "LinearGeneral without batch axes and Einsum that sums or keeps each "
                "axis of input and kernel, the kept ones of the input in their order "
                "('btnh,nhd->btd'; not 'bhd,hdf->bhf', which does both with h), if "
                "features= is left out or all of theirs. For a layer of your own, each "
                "row of whose output comes from one row of its first argument, pass "
                "inputs=, the width of that. Or choose blueprints that read the output "
                "('group')"
            )


def _readers(blueprints: Any) -> list[Adapter]:
    """The blueprints that read the input of their layer."""
    found = bound(resolve(blueprints), None) if blueprints else ()
    return [b for b in found if isinstance(b, Adapter) and b.reads == "input"]


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
