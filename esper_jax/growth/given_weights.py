"""Weights that a user hands in, for fossils to be folded into."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_jax.growth.beds import Bed
from esper_jax.growth.folds import Fold, linear_kinds
from esper_jax.growth.parts import ModelParts
from esper_jax.growth.state import Arrays
from esper_jax.layers.folding import Product
from esper_jax.layers.matrix_form import PLAIN, MatrixForm

__all__ = ["ProductOf", "put_back", "stated_product", "weights_given"]

ProductOf = Callable[[str, Any, bool], Product]
"""``product_of(bed, kernel, bias)``: what the layer of a bed computes with a kernel and
a bias or none. It raises ValueError if the weights take no corrections."""

_NAMES = ("kernel", "bias")


def stated_product(bed: str, kernel: Any, bias: bool) -> Product:
    """A product ``x @ kernel + bias``, which whoever hands in the kernel vouches for.

    Args:
      bed: path of the bed.
      kernel: without the axes of a stack.
      bias: whether there is one.
    """
    one_row = all(n == 1 for n in kernel.shape[:-2])
    return Product(int(kernel.shape[-2]) if one_row else None, True, bias)


def weights_given(
    parts: ModelParts, weights: Any, product_of: ProductOf
) -> tuple[dict[str, Fold], Arrays]:
    """Where fossils are folded, by layer, and the arrays there by name.

    Args:
      parts: the layers.
      weights: of each layer (all of a stack) by its path: ``kernel`` and, if there is
        one, ``bias``. Other entries are left alone.
      product_of: what the layers compute.

    Raises:
      TypeError, ValueError: if the weights do not fit the layers, or can take nothing
        that may grow there; naming the layer.
    """
    owners: dict[str, list[str]] = {}
    for name, bed in parts.beds.items():
        owners.setdefault(bed.owner, []).append(name)
    known = ", ".join(map(repr, owners))
    if not isinstance(weights, Mapping) or not weights:
        raise TypeError(
            "weights must hold the kernel and bias of at least one layer, as in "
            f"{{{next(iter(owners))!r}: {{'kernel': kernel, 'bias': bias}}}}; got "
            f"{type(weights).__name__}{'' if weights else ' without any'}"
        )
    folds: dict[str, Fold] = {}
    arrays: Arrays = {}
    seen: dict[int, str] = {}
    for owner, given in weights.items():
        if owner not in owners:
            raise ValueError(
                f"weights: there is no layer {owner!r}; the layers that can grow are "
                f"{known}. One path names all layers of a stack"
            )
        layers = owners[owner]
        bed = parts.beds[layers[0]]
        features = parts.layouts[layers[0]].features
        found = _arrays(owner, given)
        for array in found.values():
            if seen.setdefault(id(array), owner) != owner:
                raise ValueError(
                    f"weights of the layers {seen[id(array)]!r} and {owner!r} must be "
                    "arrays of their own: a fold into weights that another layer uses "
                    "would change that, too"
                )
        kernel = found["kernel"]
        own = jax.ShapeDtypeStruct(kernel.shape[len(bed.stack) :], kernel.dtype)
        if own.ndim < 2:
            _check_shapes(owner, found, bed, features, PLAIN)
        try:
            product = product_of(bed.path, own, "bias" in found)
        except ValueError as error:
            raise ValueError(f"layer {owner!r}: {error}") from None
        _check_shapes(owner, found, bed, features, product.form)
        kinds = linear_kinds(product, parts.kinds[layers[0]])
        if not kinds:
            blueprints = ", ".join(repr(kind.name) for kind in parts.kinds[layers[0]])
            raise ValueError(
                f"layer {owner!r}: nothing that grows there can be folded into its "
                "weights. Blueprints must be linear (lora, affine, low_rank), with a "
                "bias only where the layer has one, an adapter as wide as the kernel's "
                "input, and without others beside them that read what would change; "
                f"got {blueprints} for a kernel of shape {own.shape} "
                f"{'with' if 'bias' in found else 'without'} a bias"
            )
        names = {name: f"{owner}/{name}" for name in found}
        arrays |= {names[name]: array for name, array in found.items()}
        fold = Fold(kinds, names["kernel"], names.get("bias"), product.form)
        folds |= dict.fromkeys(layers, fold)
    return folds, arrays


def put_back(weights: Mapping[str, Any], arrays: Arrays) -> dict[str, dict[str, Any]]:
    """The weights as they were handed in, with new arrays by name."""
    return {
        owner: {name: arrays.get(f"{owner}/{name}", of) for name, of in given.items()}
        for owner, given in weights.items()
    }


def _arrays(owner: str, given: Any) -> Arrays:
    """Kernel and bias of a layer, which are arrays."""
    if not isinstance(given, Mapping) or given.get("kernel") is None:
        got = f"{', '.join(map(repr, given))}" if isinstance(given, Mapping) else ""
        raise TypeError(
            f"weights[{owner!r}] must be a dictionary with 'kernel' and, if the layer "
            f"has one, 'bias'; got {got or type(given).__name__}"
        )
    found: Arrays = {}
    for name in _NAMES:
        if (array := given.get(name)) is None:
            continue
        is_array = isinstance(array, jax.Array | np.ndarray)
        if not is_array or not jnp.issubdtype(array.dtype, jnp.floating):
            got = str(array.dtype) if is_array else type(array).__name__
            raise TypeError(
                f"weights[{owner!r}][{name!r}] must be an array of floating point; got "
                f"{got}. Take it out of what is around it (flax.linen.meta.unbox), or "
                "out of its quantized form"
            )
        found[name] = array
    return found


def _check_shapes(
    owner: str, found: Arrays, bed: Bed, features: int, form: MatrixForm
) -> None:
    """Refuses a kernel or bias of another shape than the layer's."""
    n = len(bed.stack)
    own = (features,) if form is PLAIN else form.sizes[len(form.contracted) :]
    for name, array in found.items():
        fits = array.shape[:n] == bed.stack and array.shape[n:][-len(own) :] == own
        ndim = n + len(own)
        deep = array.ndim > ndim if name == "kernel" else array.ndim == ndim
        if not fits or not deep:
            axes = [*map(str, bed.stack), *(["..., D"] if name == "kernel" else [])]
            raise ValueError(
                f"weights[{owner!r}][{name!r}] must have shape "
                f"({', '.join([*axes, *map(str, own)])}), as the layer's output has "
                f"{features} features; got {array.shape}"
            )
