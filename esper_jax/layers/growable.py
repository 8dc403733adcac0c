"""An existing Flax NNX model made able to grow, without rewriting it."""

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from esper_jax.layers.bed import SeedBed
from esper_jax.layers.chunked import ChunkedLayer

__all__ = ["make_growable"]


def make_growable(
    model: nnx.Module,
    where: Any,
    num_seeds: int | Callable[[str, Any], int],
    *,
    features: int | None = None,
    stack: int | None = None,
    rngs: nnx.Rngs,
    **options: Any,
) -> list[str]:
    """Puts a `ChunkedLayer` around layers of a model, in place.

    The model's output stays bit-identical until a seed is grafted (inside `nnx.scan` to
    rounding: XLA may fuse the body of a loop in another way). Every parameter
    keeps its value; ``model.layer.kernel`` can still be reached as such, and its path
    is now ``layer/base/kernel``. A layer that is used in several places is replaced in
    all of them. Layers that can grow already are left alone.
    ``model.set_attributes(ChunkedLayer, enabled=False)`` gives back the plain model's
    program.

    Args:
      model: holds the layers.
      where: which layers: a path (``"blocks/0/mlp"``) or a sequence of paths, or else
        an NNX filter over modules, such as `nnx.Linear`, ``nnx.PathContains("mlp")`` or
        a function ``(path, module) -> bool``.
      num_seeds: seeds of each, or a function ``(path, layer) -> int``.
      features: width of their outputs; by default read off each layer.
      stack: length of the stack where the layers were made by `nnx.vmap` (as for
        `nnx.scan`), along the first axis of their variables. That it fits is checked
        as far as the variables tell: of Flax's own layers; and of others, if given.
      rngs: key ``params`` draws the banks.
      **options: of `SeedBed`.

    Returns:
      The paths of the layers that were replaced.

    Raises:
      TypeError, ValueError: if no layer is found, a path does not exist, or an argument
        does not fit a layer, whose path is named. Nothing has been changed then.
    """
    found = _find(model, where)
    if "" in found:
        raise ValueError(
            "where: the model itself cannot be replaced within itself; write "
            "ChunkedLayer(model, ...), or choose layers of it"
        )
    new = {}
    for path, layer in found.items():
        seeds = num_seeds(path, layer) if callable(num_seeds) else num_seeds
        try:
            _check_stack(layer, stack)
            grown = ChunkedLayer(layer, seeds, features=features, rngs=rngs, **options)
            if stack is not None:
                grown.bed = _stacked_bed(grown.bed, stack, options, rngs)
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {path!r}: {error}") from None
        new[id(layer)] = grown
    replacements = [
        (parent, key, child)
        for _, parent in nnx.iter_graph(model)
        for key, child in _children(parent)
        if id(child) in new
    ]
    placed = {id(child) for _, _, child in replacements}
    for path, layer in found.items():
        if id(layer) not in placed:
            raise ValueError(
                f"layer {path!r} cannot be replaced where it is; hold it in an "
                "attribute, a list, a dictionary, nnx.List or nnx.Dict"
            )
    for parent, key, child in replacements:
        if isinstance(parent, list | dict) or isinstance(key, int):
            parent[key] = new[id(child)]
        else:
            setattr(parent, str(key), new[id(child)])
    return list(found)


def _children(parent: Any) -> list[tuple[Any, Any]]:
    """What can be replaced in a part of a model, by key."""
    if isinstance(parent, list):
        return list(enumerate(parent))
    if isinstance(parent, dict):
        return list(parent.items())
    return list(nnx.iter_children(parent)) if isinstance(parent, nnx.Module) else []


def _find(model: nnx.Module, where: Any) -> dict[str, Any]:
    """The layers asked for that cannot grow yet, by path."""
    modules: dict[str, tuple[tuple[Any, ...], Any]] = {}
    taken = set()
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            modules["/".join(map(str, path))] = path, node
        if isinstance(node, ChunkedLayer):
            taken |= {id(node), id(node.base)}
        if isinstance(node, SeedBed):
            taken.add(id(node))
    names = [where] if isinstance(where, str) else where
    if isinstance(names, Sequence) and all(isinstance(n, str) for n in names):
        unknown = [name for name in names if name not in modules]
        if unknown:
            raise ValueError(
                f"where: there is no layer {unknown[0]!r}; the model has "
                f"{', '.join(repr(name) for name in modules if name)}"
            )
        chosen = {name: modules[name][1] for name in names}
    else:
        selects = nnx.filterlib.to_predicate(where)
        chosen = {
            name: node for name, (path, node) in modules.items() if selects(path, node)
        }
    found = {name: node for name, node in chosen.items() if id(node) not in taken}
    if not found:
        raise ValueError(
            f"where: no layer that cannot grow yet was found by {where!r}; the model "
            f"has {', '.join(repr(name) for name in modules if name)}"
        )
    return found


def _leading(layer: Any) -> tuple[int, ...] | None:
    """The axes that one of Flax's layers has before its own; None if unknown."""
    variable: Any
    if not type(layer).__module__.startswith("flax."):  # a subclass may differ
        return None
    match layer:
        case nnx.Linear():
            variable, own = layer.kernel, 2
        case nnx.Embed():
            variable, own = layer.embedding, 2
        case nnx.Conv() | nnx.ConvTranspose():
            variable, own = layer.kernel, len(layer.kernel_shape)
        case nnx.LayerNorm() | nnx.RMSNorm() | nnx.BatchNorm() | nnx.GroupNorm():
            variable, own = layer.scale, 1
            if variable is None:
                variable = getattr(layer, "bias", None)
        case _:
            return None
    return None if variable is None else variable.shape[: len(variable.shape) - own]


def _check_stack(layer: Any, stack: Any) -> None:
    """Refuses a stack that the variables of a layer do not have, or one not named."""
    if stack is None:
        axes = _leading(layer)
        if axes:
            advice = (
                f"pass stack={axes[0]}"
                if len(axes) == 1
                else "of stacks within stacks, put ChunkedLayer into the function that "
                "nnx.vmap maps"
            )
            raise ValueError(
                "stack must be given for layers made by nnx.vmap; got None, and the "
                f"variables of this one have axes of {axes} before their own. If it is "
                f"a stack, {advice}"
            )
        return
    if not isinstance(stack, numbers.Integral) or stack is True or stack < 1:
        raise ValueError(f"stack must be an int of at least 1, or None; got {stack!r}")
    parts = (node for _, node in nnx.iter_graph(layer) if isinstance(node, nnx.Module))
    for axes in map(_leading, parts):
        if axes is not None and axes[:1] != (stack,):
            raise ValueError(
                f"stack must be the length of the first axis of the variables; got "
                f"{stack}, and they have axes of {axes} before their own. Leave it out "
                "if the layer is no stack"
            )
    for path, param in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
        for shape in map(np.shape, jax.tree.leaves(param.get_value())):
            if shape[:1] != (stack,):
                raise ValueError(
                    f"stack must be the length of the first axis of the variables; got "
                    f"{stack}, and {'/'.join(map(str, path))!r} has shape {shape}. "
                    "Leave it out if the layer is no stack"
                )


def _stacked_bed(
    bed: SeedBed, stack: int, options: dict[str, Any], rngs: nnx.Rngs
) -> SeedBed:
    """A `SeedBed` like ``bed`` for each layer of a stack."""

    @nnx.split_rngs(splits=stack)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs: nnx.Rngs) -> SeedBed:
        layout = bed.layout
        return SeedBed(layout.features, layout.num_seeds, rngs=rngs, **options)

    return make(rngs)
