"""Splits a Flax model into graph and arrays once, and merges them wherever it runs.

`TrainState` holds the arrays. Variables and layers are named by their paths in the
model, joined by slashes (``layers/0/base/kernel``, ``layers/0``). Each layer of a stack
(`nnx.scan`, `nnx.vmap`) has its own name: ``blocks/mlp[0]``, ``blocks/mlp[1]``.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from esper_jax import blueprints
from esper_jax.chunks import ChunkLayout
from esper_jax.groups import Groups
from esper_jax.growth.beds import Bed, find_beds, group_layers, name_of
from esper_jax.growth.state import Arrays, TrainState
from esper_jax.layers.bed import SeedBed
from esper_jax.lifecycle.grafting import Strategy
from esper_jax.lifecycle.state import init_seeds
from esper_jax.policy.interface import LayerShape
from esper_jax.trees import is_key

__all__ = ["Bed", "ModelParts", "put_values", "split_model", "values_of"]


@dataclasses.dataclass(frozen=True)
class ModelParts:
    """A split model: everything but the arrays that is needed to rebuild it."""

    graph: dict[bool, Any]
    """The model's graph in training mode (True) and in evaluation mode (False)."""
    own_graph: Any
    """Graph in training mode as the user made it, for use outside a mapped axis."""
    variables: dict[str, tuple[tuple[Any, ...], Any]]
    """By name: path of each variable, and the variable (or bare array) there."""
    beds: dict[str, Bed]
    """Place of each layer's bed, by layer name."""
    layouts: dict[str, ChunkLayout]
    """Chunks of each layer, by layer name."""
    kinds: dict[str, tuple[blueprints.Blueprint, ...]]
    """Blueprints of each layer, by layer name."""
    groups: Groups
    """Which layers have the same shape."""
    trained: tuple[str, ...]
    """Names of the host's variables that train."""

    def merge(self, values: Arrays, train: bool, alone: bool = False) -> Any:
        """The model with the given values.

        Args:
          values: values of all variables, by name.
          train: whether the model is in training mode.
          alone: whether the model will run outside the mapped axis that it is trained
            along. It is then in training mode, whatever ``train`` says. In training
            mode, modules that the user put in evaluation mode stay there.
        """
        flat = [
            (path, _with_value(variable, values[name]))
            for name, (path, variable) in self.variables.items()
        ]
        graph = self.own_graph if alone else self.graph[train]
        return nnx.merge(graph, nnx.from_flat_state(flat), copy=True)

    def host_params(self) -> list[str]:
        """Names of the host's variables that train; none is a blueprint's."""
        return list(self.trained)

    def values(self, state: TrainState, probes: Arrays | None = None) -> Arrays:
        """The values of all variables by name.

        Args:
          state: state of the run.
          probes: probes by layer, to use instead of the state's.
        """
        return {
            **state.params,
            **state.rest,
            **self.joined("bank", state.banks),
            **self.joined("seeds", state.seeds),
            **self.joined("probe", probes or {}),
        }

    def joined(self, name: str, by_layer: Mapping[str, Any]) -> Arrays:
        """The values of the variables of banks, seeds or probes: inverse of `take`.

        Args:
          name: ``bank``, ``seeds`` or ``probe``.
          by_layer: of each layer; of all or none of a stack.
        """
        return self.put_beds(name, self.by_bed(by_layer))

    def take(self, values: Arrays, name: str) -> dict[str, Any]:
        """The ``bank``, ``seeds`` or ``probe`` of each layer, taken from all values."""
        return self.by_layer(self.take_beds(values, name))

    def by_layer(self, by_bed: Mapping[str, Any]) -> dict[str, Any]:
        """What is known of each bed, ``(*stack, ...)``, by layer."""
        return {
            layer: jax.tree.map(lambda x, bed=bed: x[bed.index], by_bed[bed.path])
            if bed.index
            else by_bed[bed.path]
            for layer, bed in self.beds.items()
        }

    def by_bed(self, by_layer: Mapping[str, Any]) -> dict[str, Any]:
        """Inverse of `by_layer`; of all or none of a stack."""
        members: dict[str, list[str]] = {}
        # Follow the order of the stack: jit sorts the keys of a dictionary.
        for layer in filter(by_layer.__contains__, self.beds):
            members.setdefault(self.beds[layer].path, []).append(layer)
        return {
            path: jax.tree.map(
                lambda *x, stack=self.beds[layers[0]].stack: _stacked(x, stack),
                *(by_layer[layer] for layer in layers),
            )
            for path, layers in members.items()
        }

    def strategies(self, values: Arrays) -> set[Strategy]:
        """The grafting strategies that seeds have."""
        states = self.take_beds(values, "seeds").values()
        return {Strategy(code) for s in states for code in np.unique(s.strategy)}

    def take_beds(self, values: Arrays, name: str) -> dict[str, Any]:
        """The ``bank``, ``seeds`` or ``probe`` of each bed, by its path."""
        beds = {bed.path: bed for bed in self.beds.values()}
        return {path: bed.read(values, name) for path, bed in beds.items()}

    def put_beds(self, name: str, by_bed: Mapping[str, Any]) -> Arrays:
        """The variables of banks, seeds or probes: inverse of `take_beds`.

        Args:
          name: ``bank``, ``seeds`` or ``probe``.
          by_bed: of some of the beds, by path.
        """
        beds = {bed.path: bed for bed in self.beds.values()}
        values: Arrays = {}
        for path, tree in by_bed.items():
            values |= beds[path].write(name, tree)
        return values

    def of_beds(self, layers: Collection[str]) -> list[str]:
        """Names of the variables of banks, seeds and probes of some layers."""
        beds = {bed.path: bed for name, bed in self.beds.items() if name in layers}
        kinds = ("bank", "seeds", "probe")
        return [n for bed in beds.values() for k in kinds for n in bed.variables(k)]

    def blank(self, slots: Mapping[str, int]) -> Arrays:
        """Banks of zeros and dormant seeds, by variable, with a number of slots.

        Args:
          slots: of each layer; the same for all of a stack.
        """
        banks, seeds = dict[str, Any](), dict[str, Any]()
        for layer, bed in self.beds.items():
            n, count = len(bed.stack), slots[layer]
            leaves = [_value(self.variables[v][1]) for v in bed.variables("bank")]
            arrays = [
                jnp.zeros((*bed.stack, count, *leaf.shape[n + 1 :]), leaf.dtype)
                for leaf in leaves
            ]
            banks[bed.path] = jax.tree.unflatten(bed.bank[1], arrays)
            seeds[bed.path] = jax.tree.map(
                lambda x, stack=bed.stack: jnp.broadcast_to(x, (*stack, *x.shape)),
                init_seeds(self.layouts[layer].num_seeds, count),
            )
        return {**self.put_beds("bank", banks), **self.put_beds("seeds", seeds)}

    def shapes(self) -> dict[str, LayerShape]:
        """What is fixed of each layer that can grow, for a policy."""
        return {
            layer: LayerShape(
                num_seeds=self.layouts[layer].num_seeds,
                capacity=bed.capacity,
                costs=blueprints.param_counts(
                    self.kinds[layer], self.layouts[layer].sizes
                ),
                aims=tuple(blueprints.aims([kind]) for kind in self.kinds[layer]),
            )
            for layer, bed in self.beds.items()
        }

    def host_weights(self, params: Arrays, layer: str) -> Arrays:
        """The parameters of the host layer that a layer's seeds grow in.

        For a `ChunkedLayer`: the parameters of its base. For a bare `SeedBed`: those of
        the nearest enclosing module that has any. A base that is frozen has none.
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
            if found or (prefix == self._base(layer) and self.has_base(layer)):
                return found
        return {}

    def has_base(self, layer: str) -> bool:
        """Whether the layer has a base with parameters, which then write its output."""
        base = self._base(layer)
        return any(
            name.startswith(base)
            and (name in self.trained or isinstance(variable, nnx.Param))
            for name, (_, variable) in self.variables.items()
        )

    def trains_output(self, layer: str) -> bool:
        """Whether weights of the layer's base train that write its chunks."""
        features = self.layouts[layer].features
        return any(
            np.shape(_value(self.variables[name][1]))[-1:] == (features,)
            for name in self.trained
            if name.startswith(self._base(layer))
        )

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
    return {name_of(path): _value(leaf) for path, leaf in flat}


def put_values(model: nnx.Module, values: Arrays) -> None:
    """Writes the values of some variables of a model, by name."""
    flat = nnx.to_flat_state(nnx.state(model))
    new = [
        (path, _with_value(leaf, values[name_of(path)]))
        for path, leaf in flat
        if name_of(path) in values
    ]
    nnx.update(model, nnx.from_flat_state(new))


def _value(leaf: Any) -> Any:
    """The value of a variable, or the bare array itself."""
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _with_value(leaf: Any, value: Any) -> Any:
    return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value


def split_model(
    model: nnx.Module,
    axis_name: str | None = None,
    wrt: Any = nnx.Param,
) -> ModelParts:
    """Splits a model into the parts that `ModelParts` holds.

    Sown values (`nnx.Intermediate`) are left out: each call of the model adds to them.

    Args:
      model: the user's model; neither it nor its mode is changed.
      axis_name: name of the mapped axis that divides the rows among devices, if any.
      wrt: which of the host's variables train, bare arrays included; None for none.

    Raises:
      ValueError: if the model holds nothing that can grow, or is itself a `SeedBed`; if
        ``wrt`` matches no variable of the host, or one that has no gradient; if
        ``axis_name`` is given and the model holds an untyped random key, which cannot
        be told from other integers.
    """
    model = nnx.merge(*nnx.split(model))  # a copy: leave the user's model as it is
    nnx.pop(model, nnx.Intermediate)
    beds, layouts, kinds = find_beds(model)
    trained = _trained(model, beds, wrt)
    frozen = _in_evaluation_mode(model)
    _train(model, frozen)
    own_graph, state = nnx.split(model)
    nodes = [node for _, node in nnx.iter_graph(model) if isinstance(node, SeedBed)]
    graph = {}
    for train in (False, True):
        _train(model, frozen) if train else model.eval()
        for node in nodes:
            node.axis_name = node.axis_name if axis_name is None else axis_name
        graph[train] = nnx.graphdef(model)
    abstract = jax.tree.map(
        lambda x: x if is_key(x) else jax.ShapeDtypeStruct(np.shape(x), _dtype(x)),
        state,
    )
    variables = {
        name_of(path): (path, variable)
        for path, variable in nnx.to_flat_state(abstract)
    }
    if axis_name is not None:
        of_beds = tuple(f"{bed.path}/" for bed in beds.values())  # hold no keys
        for name, (_, variable) in variables.items():
            if not name.startswith(of_beds):
                _check_typed(name, variable)
    shapes = {name: _value(variable) for name, (_, variable) in variables.items()}
    groups = group_layers(beds, layouts, kinds, shapes)
    return ModelParts(
        graph, own_graph, variables, beds, layouts, kinds, groups, trained
    )


_Flag = tuple[nnx.Module, str]
_MODES = ("deterministic", "use_running_average")
"""Attributes that `nnx.Module.train` and ``eval`` switch."""


def _in_evaluation_mode(model: nnx.Module) -> list[_Flag]:
    """The modules that are in evaluation mode, with the attribute that says so."""
    return [
        (node, name)
        for _, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Module)
        for name in _MODES
        if getattr(node, name, None) is True
    ]


def _train(model: nnx.Module, frozen: list[_Flag]) -> None:
    """Puts a model in training mode but for the modules that the user has frozen."""
    model.train()
    for node, name in frozen:
        setattr(node, name, True)


def _trained(model: nnx.Module, beds: Mapping[str, Bed], wrt: Any) -> tuple[str, ...]:
    """Names of the host's variables that a filter matches."""
    if wrt is None:
        return ()
    of_beds = tuple(f"{bed.path}/" for bed in beds.values())
    host = {
        name_of(path): (path, leaf)
        for path, leaf in nnx.to_flat_state(nnx.state(model))
        if not name_of(path).startswith(of_beds)
    }
    matches = nnx.filterlib.to_predicate(wrt)
    trained = tuple(name for name, (p, leaf) in host.items() if matches(p, leaf))
    for name in trained:
        dtype = _dtype(_value(host[name][1]))
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                "wrt must match variables of floating point, as others have no "
                f"gradient; it matches {name!r} of {dtype}. Narrow it, for example to "
                "nnx.All(wrt, nnx.Not(nnx.RngState))"
            )
    if not trained:
        kinds = sorted({type(leaf).__name__ for _, leaf in host.values()})
        raise ValueError(
            f"wrt={_filtername_of(wrt)} must match a variable of the host, but matches "
            f"none; the host holds {', '.join(kinds) or 'no variables'}. Name what "
            "trains, for example wrt=MyVariable or a function of path and variable, or "
            "give wrt=None for a frozen host"
        )
    return trained


def _filtername_of(wrt: Any) -> str:
    return getattr(wrt, "__name__", None) or repr(wrt)


def _check_typed(name: str, variable: Any) -> None:
    """Refuses a random key made by `jax.random.PRNGKey`, which is plain integers."""
    value = _value(variable)
    if not isinstance(value, jax.ShapeDtypeStruct) or value.dtype != np.uint32:
        return
    if isinstance(variable, nnx.RngState):
        untyped = isinstance(variable, nnx.RngKey)  # a count is uint32, too
    else:
        untyped = value.shape[-1:] == jax.random.key_data(jax.random.key(0)).shape
    if untyped:
        raise ValueError(
            f"variable {name!r} must hold a typed random key, as jax.random.key makes "
            f"it: with an untyped one, all devices draw the same numbers; got uint32"
            f"{list(value.shape)}. Wrap it with jax.random.wrap_key_data; if it is not "
            "a key, give it another dtype"
        )


def _dtype(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
