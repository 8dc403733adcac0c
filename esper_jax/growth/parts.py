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
    """Where a layer's `SeedBed` is in the model."""

    path: str
    owner: str
    """Path of the `ChunkedLayer` that holds the bed, or the bed's own path."""
    stack: tuple[int, ...] = ()
    """Leading axes of the variables of a stack of layers; () for a single one."""
    index: tuple[int, ...] = ()
    """The layer's place in the stack."""


@dataclasses.dataclass(frozen=True)
class ModelParts:
    """A model taken apart: all that puts it together again from arrays."""

    graph: dict[bool, Any]
    """The model's graph in training mode (True) and in evaluation mode (False)."""
    own_graph: Any
    """The graph in training mode as the user made it: for use outside a mapped axis."""
    variables: dict[str, tuple[tuple[Any, ...], Any]]
    """Path of each variable, and the variable (or bare array) there, by name."""
    beds: dict[str, Bed]
    """By layer name."""
    layouts: dict[str, ChunkLayout]
    kinds: dict[str, tuple[blueprints.Blueprint, ...]]

    def merge(self, values: Arrays, train: bool, alone: bool = False) -> Any:
        """The model with the given values.

        Args:
          values: by variable name.
          train: whether the model is in training mode.
          alone: for use outside the mapped axis that the model is trained along.
        """
        flat = [
            (path, _with_value(variable, values[name]))
            for name, (path, variable) in self.variables.items()
        ]
        graph = self.own_graph if alone else self.graph[train]
        return nnx.merge(graph, nnx.from_flat_state(flat), copy=True)

    def host_params(self) -> list[str]:
        """Names of the parameters that belong to no blueprint."""
        return [
            name
            for name, (_, variable) in self.variables.items()
            if isinstance(variable, nnx.Param)
            and not isinstance(variable, BlueprintParam)
        ]

    def values(self, state: TrainState, probes: Arrays | None = None) -> Arrays:
        """The values of all variables by name.

        Args:
          state: of the run.
          probes: by layer, instead of the state's.
        """
        values = {**state.params, **state.rest}
        parts: dict[str, Arrays] = {
            "bank": state.banks,
            "seeds": state.seeds,
            "probe": probes or {},
        }
        for name, by_layer in parts.items():
            members: dict[str, list[str]] = {}
            # In the order of the stack; a jitted dictionary has its keys sorted.
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
        """The ``bank``, ``seeds`` or ``probe`` of each layer, out of all values."""
        return {
            layer: jax.tree.map(
                lambda x, index=bed.index: x[index] if index else x,
                values[f"{bed.path}/{name}"],
            )
            for layer, bed in self.beds.items()
        }

    def host_weights(self, params: Arrays, layer: str) -> Arrays:
        """The parameters that a layer's seeds stand beside.

        For a `ChunkedLayer` these are its base's. For a bare `SeedBed` they are those
        of the nearest module around it that has any.
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
        """Whether the layer's host weights are known to write its output."""
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
    """The value of a variable, or the bare array itself."""
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _with_value(leaf: Any, value: Any) -> Any:
    return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _layers(node: SeedBed, path: str, owner: str) -> dict[str, Bed]:
    """The layers that share a `SeedBed`: one, or each of a stack, by name."""
    stack = stack_of(node, path)
    if not stack:
        return {owner: Bed(path, owner)}
    return {
        f"{owner}[{','.join(map(str, index))}]": Bed(path, owner, stack, index)
        for index in np.ndindex(stack)
    }


def split_model(model: nnx.Module, axis_name: str | None = None) -> ModelParts:
    """Takes a model apart.

    Args:
      model: not changed, its mode included.
      axis_name: the mapped axis that the rows are divided along, if there is one.

    Raises:
      ValueError: if the model holds nothing that can grow, or, with ``axis_name``, a
        random key without a type, which cannot be told from other numbers.
    """
    model = nnx.merge(*nnx.split(model))  # the user's modules stay as they are
    beds, layouts, kinds = _find_beds(model)
    model.train()
    own_graph, state = nnx.split(model)
    nodes = [node for _, node in nnx.iter_graph(model) if isinstance(node, SeedBed)]
    graph = {}
    for train in (False, True):
        (model.train if train else model.eval)()
        for node in nodes:
            node.axis_name = node.axis_name if axis_name is None else axis_name
        graph[train] = nnx.graphdef(model)
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


_Found = tuple[
    dict[str, Bed], dict[str, ChunkLayout], dict[str, tuple[blueprints.Blueprint, ...]]
]


def _find_beds(model: nnx.Module) -> _Found:
    """Each layer's bed, chunks and blueprints, by layer name."""
    beds, layouts, kinds = {}, {}, {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, SeedBed):
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
    return beds, layouts, kinds


def _check_typed(name: str, variable: Any) -> None:
    """Refuses a random key made by `jax.random.PRNGKey`, which is plain integers."""
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
