"""`make_growable`: lets an existing Flax NNX model grow without rewriting it."""

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.errors import TraceContextError

from esper_jax.layers.bed import SeedBed
from esper_jax.layers.chunked import ChunkedLayer
from esper_jax.layers.keys import TRACED
from esper_jax.layers.moved import Path, Wrapped, check_holders, move_holders

__all__ = ["make_growable"]


def make_growable(
    model: nnx.Module,
    where: Any,
    num_seeds: int | Callable[[str, Any], int],
    *,
    features: int | None = None,
    stack: int | None = None,
    optimizer: Any = None,
    rngs: nnx.Rngs,
    **options: Any,
) -> list[str]:
    """Wraps layers of a model in `ChunkedLayer`, in place.

    The model's output stays bit-identical until a seed is grafted. (Inside `nnx.scan`
    it stays equal to rounding, since XLA may fuse the loop's body differently.) Every
    parameter keeps its value. ``model.layer.kernel`` still works; the path of the
    kernel becomes ``layer/base/kernel``. An optimizer that was made before knows the
    old path: give it as ``optimizer``, or its next update fails with "different numbers
    of pytree children", for a subtree with the child key ``base``. A layer that is used
    in several places is replaced in all of them. Layers that can grow already are
    skipped.

    ``model.set_attributes(ChunkedLayer, enabled=False)`` restores the plain model's
    program.

    Args:
      model: holds the layers.
      where: the layers to wrap: a path (``"blocks/0/mlp"``), a sequence of paths, or an
        NNX filter over modules, such as `nnx.Linear`, ``nnx.PathContains("mlp")`` or a
        function ``(path, module) -> bool``.
      num_seeds: number of seeds of each layer, or a function ``(path, layer) -> int``.
      features: width of the layers' outputs; by default read from each layer.
      stack: number of layers in the stack, if `nnx.vmap` made the layers (as for
        `nnx.scan`) along the first axis of their variables. For Flax's own layers, the
        variables' shapes show whether it is missing or wrong. For other layers it is
        checked only if given.
      optimizer: what was made of the model before and holds arrays by its paths: an
        `nnx.Optimizer`, an `nnx.EMA`, a `State` of its parameters, the state of a plain
        optax optimizer, another object with such in it, or a sequence of these. What
        they hold moves to the new paths, in place; every value and sharding stays.
      rngs: its key ``params`` draws the banks.
      **options: further arguments of `ChunkedLayer` and `SeedBed`: among them
        ``output``, which array grows where the layers return several. The first call
        checks it, since only a call shows what a layer returns.

    Returns:
      The paths of the layers that were replaced.

    Raises:
      TypeError, ValueError: if no layer is found, if a path does not exist, if an
        argument does not fit a layer, whose path the message names, or if ``optimizer``
        is of another model or chooses what it trains by path, or if model or ``rngs``
        are of outside of what is being traced. Model and optimizer are then unchanged.
    """
    found = _find(model, where)
    if () in found:
        raise ValueError(
            "where: the model itself cannot be replaced in place; wrap it with "
            "ChunkedLayer(model, ...), or choose layers inside it"
        )
    new: dict[int, ChunkedLayer] = {}
    for place, layer in found.items():
        path = _name(place)
        seeds = num_seeds(path, layer) if callable(num_seeds) else num_seeds
        try:
            _check_stack(layer, stack)
            grown = ChunkedLayer(layer, seeds, features=features, rngs=rngs, **options)
            if stack is not None:
                grown.bed = _stacked_bed(grown.bed, stack, options, rngs)
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {path!r}: {error}") from None
        new[id(layer)] = grown
    replacements = _replacements(model, found)
    try:
        _place(replacements, {id(layer): layer for layer in found.values()})
    except TraceContextError as error:
        raise ValueError(
            f"model is of outside of what is being traced: {TRACED}"
        ) from error
    if optimizer is not None:
        beds = {path: new[id(layer)].bed for path, layer in found.items()}
        wrapped = Wrapped(model, beds)
        check_holders(optimizer, wrapped)
        move_holders(optimizer, wrapped)
    _place(replacements, new)
    return list(map(_name, found))


def _place(
    replacements: Sequence[tuple[Any, Any, Any]], layers: Mapping[int, Any]
) -> None:
    """Puts layers where others are held, by the identity of these.

    Each by itself changes nothing, and shows whether the model can be changed here.
    """
    for parent, key, child in replacements:
        if isinstance(parent, list | dict) or isinstance(key, int):
            parent[key] = layers[id(child)]
        else:
            setattr(parent, str(key), layers[id(child)])


def _replacements(
    model: nnx.Module, found: Mapping[Path, Any]
) -> list[tuple[Any, Any, Any]]:
    """Parent, key and layer of each place that holds a layer.

    Raises:
      ValueError: if a layer is held by nothing that it can be replaced in.
    """
    layers = set(map(id, found.values()))
    replacements = [
        (parent, key, child)
        for _, parent in nnx.iter_graph(model)
        for key, child in _children(parent)
        if id(child) in layers
    ]
    placed = {id(child) for _, _, child in replacements}
    for path, layer in found.items():
        if id(layer) not in placed:
            raise ValueError(
                f"layer {_name(path)!r} cannot be replaced where it is; hold it in an "
                "attribute, a list, a dictionary, nnx.List or nnx.Dict"
            )
    return replacements


def _children(parent: Any) -> list[tuple[Any, Any]]:
    """Key and value of each child that can be replaced in a part of a model."""
    if isinstance(parent, list):
        return list(enumerate(parent))
    if isinstance(parent, dict):
        return list(parent.items())
    return list(nnx.iter_children(parent)) if isinstance(parent, nnx.Module) else []


def _name(path: Path) -> str:
    return "/".join(map(str, path))


def _find(model: nnx.Module, where: Any) -> dict[Path, Any]:
    """The layers that ``where`` selects and that cannot grow yet, by path."""
    modules: dict[str, tuple[Path, Any]] = {}
    taken = set()
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            modules[_name(path)] = path, node
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
        chosen = dict(modules[name] for name in names)
    else:
        selects = nnx.filterlib.to_predicate(where)
        chosen = {p: node for p, node in modules.values() if selects(p, node)}
    found = {path: node for path, node in chosen.items() if id(node) not in taken}
    if not found:
        raise ValueError(
            f"where: no layer that cannot grow yet was found by {where!r}; the model "
            f"has {', '.join(repr(name) for name in modules if name)}"
        )
    return found


def _leading(layer: Any) -> tuple[int, ...] | None:
    """Leading axes that stacking gave to a layer of Flax's; None if unknown."""
    variable: Any
    if not type(layer).__module__.startswith("flax."):  # a user's subclass may differ
        return None
    match layer:
        case nnx.Linear():
            variable, own = layer.kernel, 2
        case nnx.LinearGeneral():
            sizes = layer.batch_axis, layer.in_features, layer.out_features
            variable, own = layer.kernel, sum(map(len, sizes))
        case nnx.Einsum():
            variable, own = layer.kernel, len(layer.kernel_shape)
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
    """Refuses a ``stack`` that is missing or contradicts the layer's variables."""
    if stack is None:
        axes = _leading(layer)
        if axes:
            advice = (
                f"pass stack={axes[0]}"
                if len(axes) == 1
                else "put ChunkedLayer into the function that nnx.vmap maps, since "
                "stack= stands for one axis only"
            )
            raise ValueError(
                "stack must be given for layers made by nnx.vmap; got None, but this "
                f"layer's variables have axes of {axes} before their own. If it is "
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
                f"{stack}, and they have axes of {axes} before their own. Leave out "
                "stack= if the layer is not a stack"
            )
    for path, param in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
        for shape in map(np.shape, jax.tree.leaves(param.get_value())):
            if shape[:1] != (stack,):
                raise ValueError(
                    f"stack must be the length of the first axis of the variables; got "
                    f"{stack}, and {'/'.join(map(str, path))!r} has shape {shape}. "
                    "Leave out stack= if the layer is not a stack"
                )


def _stacked_bed(
    bed: SeedBed, stack: int, options: dict[str, Any], rngs: nnx.Rngs
) -> SeedBed:
    """A stack of ``stack`` beds, each of the same layout as ``bed``."""

    @nnx.split_rngs(splits=stack)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs: nnx.Rngs) -> SeedBed:
        layout = bed.layout
        own = {name: value for name, value in options.items() if name != "output"}
        own["blueprints"] = bed.blueprints  # which know the layer's input
        return SeedBed(layout.features, layout.num_seeds, rngs=rngs, **own)

    return make(rngs)
