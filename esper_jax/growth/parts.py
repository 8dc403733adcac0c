"""A Flax model as pure functions of arrays: taken apart once, merged where it is run.

`TrainState` holds what a run is. Names of variables and layers are their paths in the
model, joined by slashes (``layers/0/base/kernel``, ``layers/0``). Of a stack of layers
(`nnx.scan`, `nnx.vmap`) each is one by itself: ``blocks/mlp[0]``, ``blocks/mlp[1]``.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from esper_jax import blueprints
from esper_jax.chunks import ChunkLayout
from esper_jax.growth.state import Arrays, TrainState
from esper_jax.layers.bed import BlueprintParam, SeedBed, stack_of
from esper_jax.trees import is_key

__all__ = ["Bed", "ModelParts", "split_model", "values_of"]


@dataclasses.dataclass(frozen=True)
class Bed:
    """Where the `SeedBed` of a layer is in the model."""

    path: str
    owner: str
    """Path of the `ChunkedLayer` that it belongs to, or its own."""
    stack: tuple[int, ...] = ()
    """Leading axes of the variables of a stack of layers; () for a single one."""
    index: tuple[int, ...] = ()
    """Which of the stack it is."""


@dataclasses.dataclass(frozen=True)
class ModelParts:
    """A model taken apart: what is needed to put it together again from arrays."""

    graph: dict[bool, Any]
    """The graph in training mode (True) and in evaluation mode (False)."""
    own_graph: Any
    """The graph in training mode as the user made it, with no axis set."""
    variables: dict[str, tuple[tuple[Any, ...], Any]]
    """Path, and the variable or the bare array there."""
    beds: dict[str, Bed]
    """By layer name."""
    layouts: dict[str, ChunkLayout]
    kinds: dict[str, tuple[blueprints.Blueprint, ...]]

    def merge(self, values: Arrays, train: bool, alone: bool = False) -> Any:
        """The model with the given values, variables by name.

        ``alone``: for use outside of the mapped axis that it is trained along.
        """
        flat = [
            (path, _with_value(variable, values[name]))
            for name, (path, variable) in self.variables.items()
        ]
        graph = self.own_graph if alone else self.graph[train]
        return nnx.merge(graph, nnx.from_flat_state(flat), copy=True)

    def host_params(self) -> list[str]:
        """Names of the parameters that are not a blueprint's."""
        return [
            name
            for name, (_, variable) in self.variables.items()
            if isinstance(variable, nnx.Param)
            and not isinstance(variable, BlueprintParam)
        ]

    def values(self, state: TrainState, probes: Arrays | None = None) -> Arrays:
        """The values of all variables, with other probes if given, by layer."""
        values = {**state.params, **state.rest}
        parts: dict[str, Arrays] = {
            "bank": state.banks,
            "seeds": state.seeds,
            "probe": probes or {},
        }
        for name, by_layer in parts.items():
            members: dict[str, list[str]] = {}
            # In the order of the stack: what was jitted has its keys sorted as text.
            for layer in filter(by_layer.__contains__, self.beds):
                members.setdefault(self.beds[layer].path, []).append(layer)
            for path, layers in members.items():
                stack = self.beds[layers[0]].stack
                values[f"{path}/{name}"] = jax.tree.map(
                    lambda *x, stack=stack: _stacked(x, stack),
                    *(by_layer[layer] for layer in layers),
                )
        return values

    def take(self, values: Arrays, name: str) -> dict[str, Any]:
        """The ``bank``, ``seeds`` or ``probe`` of each layer, from all values."""
        return {
            layer: jax.tree.map(
                lambda x, index=bed.index: x[index] if index else x,
                values[f"{bed.path}/{name}"],
            )
            for layer, bed in self.beds.items()
        }

    def host_weights(self, params: Arrays, layer: str) -> Arrays:
        """Parameters that a layer's seeds stand beside.

        Those of the base of a `ChunkedLayer`; for a bare `SeedBed`, those of the
        nearest module around it that has any.
        """
        bed = self.beds[layer]
        place = bed.owner.split("/") if bed.owner else []
        around = ["/".join(place[:n]) for n in range(len(place), -1, -1)]
        n = len(bed.stack)
        for prefix in (self._base(layer), *(f"{p}/" if p else "" for p in around)):
            found = {
                name: p[bed.index] if n and p.shape[:n] == bed.stack else p
                for name, p in params.items()
                if name.startswith(prefix)
            }
            if found:
                return found
        return {}

    def has_base(self, layer: str) -> bool:
        """Whether the layer's host weights are known to be those that write it."""
        return any(p.startswith(self._base(layer)) for p in self.host_params())

    def _base(self, layer: str) -> str:
        owner = self.beds[layer].owner
        return f"{owner}/base/" if owner else "base/"


def _stacked(layers: tuple[Array, ...], stack: tuple[int, ...]) -> Array:
    if not stack:
        return layers[0]
    return jnp.stack(layers).reshape(*stack, *layers[0].shape)


def values_of(model: nnx.Module) -> Arrays:
    """The values of all variables of a model, by name."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {_name(path): _value(leaf) for path, leaf in flat}


def _value(leaf: Any) -> Any:
    """The value of a variable; an array that is an attribute is its own."""
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _with_value(leaf: Any, value: Any) -> Any:
    return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _layers(node: SeedBed, path: str, owner: str) -> dict[str, Bed]:
    """The layers that share a `SeedBed`: one, or each of a stack."""
    stack = stack_of(node, path)
    if not stack:
        return {owner: Bed(path, owner)}
    return {
        f"{owner}[{','.join(map(str, index))}]": Bed(path, owner, stack, index)
        for index in np.ndindex(stack)
    }


def split_model(model: nnx.Module, axis_name: str | None = None) -> ModelParts:
    """Takes a model apart, and leaves it in training mode.

    Args:
      model: is left as it was but for its mode.
      axis_name: of the mapped axis that the rows are divided along, if there is one.

    Raises:
      ValueError: if it holds nothing that can grow, or, with ``axis_name``, a random
        key without a type, which could not be told from other numbers.
    """
    beds, layouts, kinds = {}, {}, {}
    nodes = []
    for path, node in nnx.iter_graph(model):
        if isinstance(node, SeedBed):
            nodes.append(node)
            owner = _name(path[:-1] if path and path[-1] == "bed" else path)
            for name, bed in _layers(node, _name(path), owner).items():
                beds[name], layouts[name] = bed, node.layout
                kinds[name] = node.blueprints
    if "" in [bed.path for bed in beds.values()]:
        raise ValueError(
            "model must hold a SeedBed, not be one: by itself it has no host to grow"
        )
    if not beds:
        raise ValueError(
            "model must hold at least one ChunkedLayer or SeedBed: without one there "
            "is nothing that could grow"
        )
    model.train()
    own_graph, state = nnx.split(model)
    before = [node.axis_name for node in nodes]
    graph = {}
    for train in (False, True):
        (model.train if train else model.eval)()
        for node, own in zip(nodes, before, strict=True):
            node.axis_name = own if axis_name is None else axis_name
        graph[train] = nnx.graphdef(model)
    for node, own in zip(nodes, before, strict=True):
        node.axis_name = own
    abstract = jax.tree.map(
        lambda x: x if is_key(x) else jax.ShapeDtypeStruct(np.shape(x), _dtype(x)),
        state,
    )
    variables = {
        _name(path): (path, variable) for path, variable in nnx.to_flat_state(abstract)
    }
    if axis_name is not None:
        for name, (_, variable) in variables.items():
            _check_typed(name, variable)
    return ModelParts(graph, own_graph, variables, beds, layouts, kinds)


def _check_typed(name: str, variable: Any) -> None:
    """Refuses a random key as `jax.random.PRNGKey` makes it, of plain integers."""
    value = _value(variable)
    if not isinstance(value, jax.ShapeDtypeStruct) or value.dtype != np.uint32:
        return
    if isinstance(variable, nnx.RngState):
        untyped = isinstance(variable, nnx.RngKey)  # or a count
    else:
        untyped = value.shape[-1:] == jax.random.key_data(jax.random.key(0)).shape
    if untyped:
        raise ValueError(
            f"variable {name!r} must hold a typed random key, as jax.random.key makes "
            f"it, or each device would draw the same numbers; got uint32"
            f"{list(value.shape)}. Wrap it with jax.random.wrap_key_data; if it is no "
            "key, give it another dtype"
        )


def _dtype(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
