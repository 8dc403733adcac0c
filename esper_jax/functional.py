"""A Flax model as pure functions of arrays: taken apart once, merged where it is run.

`TrainState` holds what a run is. Names of variables and layers are their paths in the
model, joined by slashes (``layers/0/base/kernel``, ``layers/0``). Of a stack of layers
(`nnx.scan`, `nnx.vmap`) each is one by itself: ``blocks/mlp[0]``, ``blocks/mlp[1]``.
"""

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Float, Int, Key

from esper_jax import blueprints
from esper_jax.blueprints import Bank
from esper_jax.chunks import ChunkLayout
from esper_jax.gradients import GradientSums
from esper_jax.layers import BlueprintParam, SeedBed, stack_of
from esper_jax.optim import PerSlot
from esper_jax.state import SeedState, move_slots, resize, slot_sources

__all__ = [
    "LOSS_WINDOW",
    "Arrays",
    "Bed",
    "GovernorMemory",
    "ModelParts",
    "Monitor",
    "TrainState",
    "copy_state",
    "count_recompiles",
    "counted",
    "grow_capacity",
    "is_key",
    "split_model",
    "state_hash",
    "values_of",
]

Arrays = dict[str, Any]
_T = TypeVar("_T")


@struct.dataclass
class Monitor:
    """Running measurements of the whole model between ticks."""

    initial_loss: Float[Array, ""]
    """First finite held-out loss; the scale of the stability score. NaN before."""
    loss_mean: Float[Array, ""]
    loss_variance: Float[Array, ""]
    accuracy_mean: Float[Array, ""]
    accuracy_variance: Float[Array, ""]
    host_mean: Arrays
    """Running mean of the host weights of the layers that can grow, by name."""
    train_loss: Float[Array, ""]
    """Sum over the tick's steps."""
    grad_norm: Float[Array, ""]
    """Sum over the tick's steps."""
    gradients: dict[str, GradientSums]
    """Of each layer, sums over the tick's steps."""
    steps: Int[Array, ""]

    @classmethod
    def start(
        cls, host_mean: dict[str, Arrays], num_seeds: Mapping[str, int]
    ) -> "Monitor":
        """A monitor that has measured nothing yet."""
        # One array a field: the state is donated, so no two leaves may share one.
        unknown = {
            name: jnp.full((), jnp.nan, jnp.float32)
            for name in (
                "initial_loss",
                "loss_mean",
                "loss_variance",
                "accuracy_mean",
                "accuracy_variance",
            )
        }
        return cls(
            **unknown,
            host_mean=host_mean,
            train_loss=jnp.zeros((), jnp.float32),
            grad_norm=jnp.zeros((), jnp.float32),
            gradients={name: GradientSums.start(s) for name, s in num_seeds.items()},
            steps=jnp.zeros((), jnp.int32),
        )


LOSS_WINDOW = 16
"""Ticks whose losses the governor remembers."""


@struct.dataclass
class GovernorMemory:
    """What the governor remembers; part of the state, so that a restored run judges as
    one that was never stopped."""

    losses: Float[Array, "W 2"]
    """Train and held-out loss of the last good ticks, newest first; NaN for none."""
    best: Float[Array, " 2"]
    """The lowest of each."""
    rollbacks: Int[Array, ""]
    """Since the beginning of the run; part of the order of the rows."""
    consecutive: Int[Array, ""]
    """Since the last good tick."""

    @classmethod
    def start(cls) -> "GovernorMemory":
        """A memory without any tick."""
        return cls(
            losses=jnp.full((LOSS_WINDOW, 2), jnp.nan, jnp.float32),
            best=jnp.full((2,), jnp.inf, jnp.float32),
            rollbacks=jnp.zeros((), jnp.int32),
            consecutive=jnp.zeros((), jnp.int32),
        )


@struct.dataclass
class TrainState:
    """All that a run is: restored, it goes on as if it had never stopped.

    The dictionaries are keyed by the path of the variable (``layers/0/base/kernel``) or
    of the layer (``layers/0``) in the model.
    """

    step: Int[Array, ""]
    """Steps done: with the seed of the data order, the position in the data."""
    ticks: Int[Array, ""]
    rng: Key[Array, ""]
    params: Arrays
    opt_state: Any
    banks: dict[str, Bank]
    bank_opt: dict[str, Any]
    seeds: dict[str, SeedState]
    rest: Arrays
    """Every other variable of the model: batch statistics, random streams, probes."""
    memory: Any
    """`ControllerMemory`, or what another policy than `controller.decide` remembers."""
    monitor: Monitor
    governor: GovernorMemory


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


def grow_capacity(
    parts: ModelParts,
    bank_optimizer: PerSlot,
    state: TrainState,
    capacity: int | Mapping[str, int],
) -> TrainState:
    """The same state with another number of slots in its layers.

    Every value and every moment of the slots that stay is kept bit for bit; new slots
    are free, with fresh parameters and fresh moments. Runs on the host; what is jitted
    compiles once more for the new shapes.

    Args:
      parts: the model.
      bank_optimizer: the one that the state's ``bank_opt`` is of.
      state: not changed, nor donated.
      capacity: slots of every layer, or of some by name; the others stay.

    Raises:
      ValueError: if a layer is unknown, or its capacity out of range, or too small for
        its living seeds. Nothing has been changed then.
    """
    wanted = (
        dict(capacity)
        if isinstance(capacity, Mapping)
        else dict.fromkeys(parts.beds, capacity)
    )
    for name in wanted:
        if name not in parts.beds:
            raise ValueError(
                f"capacity: there is no layer {name!r}; expected some of "
                f"{', '.join(map(repr, parts.beds))}"
            )
    sources = {}
    for name, slots in wanted.items():
        for other, bed in parts.beds.items():
            after = wanted.get(other, state.seeds[other].capacity)
            if bed.path == parts.beds[name].path and after != slots:
                raise ValueError(
                    f"capacity: {name!r} and {other!r} are of one stack and must have "
                    f"the same; got {slots} and {after}. Name all of the stack"
                )
        try:
            sources[name] = slot_sources(state.seeds[name], slots)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None

    def resized(state: TrainState) -> TrainState:
        new = jax.tree.map(jnp.copy, state)
        for name, source in sources.items():
            slots = len(source)
            # Leaves the stream of the state alone; a newborn draws its own.
            fresh = blueprints.init_bank(
                jax.random.fold_in(state.rng, slots),
                slots,
                parts.kinds[name],
                parts.layouts[name].width,
                parts.layouts[name].features,
            )
            new.seeds[name] = resize(state.seeds[name], slots, source)
            new.banks[name] = move_slots(state.banks[name], fresh, source)
            new.bank_opt[name] = move_slots(
                state.bank_opt[name], bank_optimizer.init(new.banks[name]), source
            )
            bed = parts.beds[name]
            new.rest[f"{bed.path}/probe"] = jnp.zeros((*bed.stack, slots), jnp.float32)
        return new

    return jax.jit(resized)(state)


def copy_state(state: TrainState) -> TrainState:
    """The same state in arrays of its own: what donates one leaves the other be."""
    return _copy(state)


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def counted(traces: Counter[str], function: Callable[..., _T]) -> Callable[..., _T]:
    """A function that counts its calls by name: inside `jax.jit`, how often it was
    traced, and so compiled."""

    @functools.wraps(function)
    def wrapper(*args: Any) -> _T:
        traces[function.__name__] += 1
        return function(*args)

    return wrapper


def count_recompiles(traces: Counter[str]) -> int:
    """How often what `counted` counts was traced again after its first time."""
    return sum(n - 1 for n in traces.values())


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed random keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    )


def state_hash(state: TrainState) -> str:
    """SHA-256 over every leaf of the state: path, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if is_key(leaf):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
