"""Layers that can grow, for Flax Linen."""

import contextvars
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict

from esper_jax.layers.bed import SeedBed
from esper_jax.layers.inputs import (
    check_readers,
    features_read,
    first_argument,
    input_of,
    input_width,
)
from esper_jax.layers.matrix_form import form_over
from esper_jax.layers.output import Output, check_output, find_output, with_output
from esper_jax.lifecycle.packing import pack, unpack
from esper_jax.lifecycle.state import SeedState

__all__ = [
    "ChunkedLayer",
    "Growable",
    "Met",
    "beds_in",
    "met_in",
    "read_seeds",
    "write_seeds",
]


class ChunkedLayer(nn.Module):
    """A Linen layer that can grow; the counterpart of `esper_jax.layers.ChunkedLayer`.

    The base layer's parameters stay in their own collections, under ``base``. The seeds
    add three collections: ``bank`` (parameters of the blueprints; optimize it with
    `optim.per_slot`), ``seeds`` and ``probe`` (always 0; may be left out). Each holds
    one array a leaf. Make ``seeds`` mutable to collect statistics. The first call fixes
    the width of the output. ``apply`` takes as many slots as the collections have,
    which may be fewer than ``options`` say: see `growth.linen_growth`.

    ``apply`` needs ``bank`` and ``seeds``, so keep them beside the parameters, as
    ``batch_stats`` are kept: in fields of a `TrainState` of your own. Transforms must
    carry them too:

    - `nn.scan` over layers, `nn.vmap`: ``variable_axes={"params": 0, "bank": 0,
      "seeds": 0, "probe": 0}``;
    - `nn.RNN`, `nn.scan` over time: ``variable_broadcast=["params", "bank", "seeds",
      "probe"]``. To collect statistics, apply the same variables with ``seeds`` in
      ``variable_carry`` instead (Flax cannot initialize what is carried).

    Attributes:
      base: any Linen layer whose output has its features on the last axis.
      num_seeds: number of chunks that the features are cut into, one seed each.
      options: further arguments of `SeedBed` by name.
      enabled: if False, a call runs the base layer alone.
      features: width of the array that grows; by default the output's own. Needed where
        the base returns several arrays.
      output: which of several arrays grows; as for `esper_jax.layers.ChunkedLayer`.

    Raises:
      ValueError: by a call, if an argument does not fit; by ``apply``, if ``bank`` or
        ``seeds`` is missing; by ``init``, if a transform would drop them.
    """

    base: nn.Module
    num_seeds: int
    options: Mapping[str, Any] | None = None
    enabled: bool = True
    features: int | None = None
    output: Output = None

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output on the same arguments, with the seeds blended in."""
        y = self.base(*args, **kwargs)
        if not self.enabled:
            return y
        bed = _Bed(self.num_seeds, self.options, name="bed")
        given = self.base, args, kwargs
        return _grow(y, bed, self.output, self.features, given)


class Growable(nn.Module):
    """A Linen model with layers that can grow, without changing its code.

    Parameters keep their paths. The seeds of a layer at ``a/b`` are at ``a/b/bed`` in
    the collections that `ChunkedLayer` describes.

    Attributes:
      model: the model; only its ``__call__`` grows.
      where: which layers grow: a type, a path (``"Dense_0"``, ``"block/mlp"``), a
        function ``(path, module) -> bool``, or a tuple of these.
      num_seeds: number of seeds of each layer, or a function ``(path, layer) -> int``.
      options: further arguments of `SeedBed` by name.
      features: as for `ChunkedLayer`.
      output: as for `ChunkedLayer`.

    Raises:
      ValueError: by a call, if ``where`` finds no layer, and as `ChunkedLayer` does.
    """

    model: nn.Module
    where: Any
    num_seeds: int | Callable[[str, Any], int]
    options: Mapping[str, Any] | None = None
    features: int | None = None
    output: Output = None

    def setup(self) -> None:
        """Lets parameters keep the paths that they have in the model."""
        nn.share_scope(self, self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output on the same arguments, with all seeds blended in."""
        own, seen, found = _place(self.scope), [], []

        def grow(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            y = next_call(*args, **kwargs)
            layer = context.module
            place = _place(layer.scope)
            ours = place[: len(own)] == own and place != own
            if context.method_name != "__call__" or not ours or type(layer) is _Bed:
                return y
            path = "/".join(place[len(own) :])
            seen.append(path)
            if not _chosen(self.where, path, layer):
                return y
            found.append(path)
            count = self.num_seeds
            seeds = count(path, layer) if callable(count) else count
            scope = layer.scope.push("bed", reuse=True)
            bed = _Bed(seeds, self.options, parent=scope)
            try:
                given = layer, args, kwargs
                return _grow(y, bed, self.output, self.features, given)
            except (TypeError, ValueError) as error:
                raise type(error)(f"layer {path!r}: {error}") from error

        with nn.intercept_methods(grow):
            out = self.model(*args, **kwargs)
        if not found:
            met = ", ".join(map(repr, dict.fromkeys(seen)))
            raise ValueError(
                f"where: no layer was found by {self.where!r}; the call met {met}"
                if met
                else f"model must hold layers for {self.where!r} to choose from, and "
                f"{type(self.model).__name__} called none. A layer that shall grow by "
                "itself is wrapped: linen.ChunkedLayer(base=layer, num_seeds=...)"
            )
        return out


def _place(scope: Any) -> tuple[str, ...]:
    """Path of a scope's variables.

    `nn.share_scope` gives layers that were made in ``setup``, as those of a list are,
    another parent, but leaves the path that they say they have.
    """
    names: list[str] = []
    while scope.parent is not None:
        names.insert(0, scope.name)
        scope = scope.parent
    return (*scope.path, *names)


def _chosen(where: Any, path: str, layer: nn.Module) -> bool:
    if isinstance(where, tuple):
        return any(_chosen(each, path, layer) for each in where)
    if isinstance(where, str):
        return path == where
    if isinstance(where, type):
        return isinstance(layer, where)
    return bool(where(path, layer))


def _grow(
    y: Any,
    bed: "_Bed",
    output: Output,
    features: int | None,
    given: tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]],
) -> Any:
    """A layer's output with the seeds blended in.

    Args:
      y: the layer's output.
      bed: of the layer.
      output: which array grows.
      features: its width, if known.
      given: the layer, and the arguments that it was called with.
    """
    base, args, kwargs = given
    layer = type(base).__name__
    check_output(output)
    options = bed.options or {}
    given_x = first_argument(base, args, kwargs)
    blueprints = options.get("blueprints", ())
    if features is None:
        features = features_read(base, blueprints, given_x)
    if features is None:
        if not hasattr(y, "shape") or not y.shape:
            raise ValueError(
                f"features must be given: {layer} returned {type(y).__name__}, and not "
                "one array that tells the width of the output"
            )
        features = y.shape[-1]
    form = form_over(base, features, given_x)

    if (met := _MET.get()) is not None:
        place = _place(base.scope)
        met.grown[place, type(base)] += 1
        met.bases["/".join(_place(bed.scope))] = base, place

    def grow(y: Any) -> Any:
        x = input_of(base, args, kwargs, y.dtype, form)
        inputs = options.get("inputs", input_width(base, features, given_x))
        check_readers(blueprints, inputs, base)
        return bed(y, x, inputs)

    y = form.output_rows(y)
    path = find_output(y, output, features, layer)
    return form.output_from(with_output(y, path, grow))


def read_seeds(arrays: Mapping[str, Any]) -> SeedState:
    """The seeds of one layer as the lifecycle's functions take them.

    Args:
      arrays: as the collection holds them: ``variables["seeds"]["layer"]["bed"]
        ["seeds"]``.
    """
    return unpack(arrays)


def write_seeds(seeds: SeedState) -> dict[str, Any]:
    """The inverse of `read_seeds`."""
    return pack(seeds)


@dataclasses.dataclass
class Met:
    """What a call of a Linen model met that can grow; see `met_in`.

    Paths are those of the beds.
    """

    makers: dict[str, Callable[..., SeedBed]] = dataclasses.field(default_factory=dict)
    """What makes each bed, by path."""
    bases: dict[str, tuple[nn.Module, tuple[str, ...]]] = dataclasses.field(
        default_factory=dict
    )
    """The layer whose output each bed grows in, and the place of its variables."""
    grown: Counter[Any] = dataclasses.field(default_factory=Counter)
    """Calls that a bed grew in, by place and type of the layer."""
    calls: Counter[Any] = dataclasses.field(default_factory=Counter)
    """All calls of layers, by place and type."""

    def beds(self, variables: Mapping[str, Any]) -> dict[str, SeedBed]:
        """The beds by path, with the values and the slots that the variables have."""
        flat = flatten_dict({name: variables[name] for name in ("bank", "seeds")})
        beds = {}
        for path, make in self.makers.items():
            place = tuple(path.split("/"))
            bed = beds[path] = make(rngs=nnx.Rngs(0))
            for name in ("bank", "seeds"):
                tree = getattr(bed, name)
                arrays = {leaf: flat[name, *place, name, leaf] for leaf in tree.names}
                tree.set_arrays(jax.tree.map(jnp.asarray, arrays))
            stack = bed.seeds.get_value().stage.shape[:-1]
            slots = bed.seeds.get_value().capacity
            bed.probe.set_value(jnp.zeros((*stack, slots), jnp.float32))
        return beds

    def base(self, path: str) -> tuple[nn.Module, bool]:
        """The layer that a bed grows in, and whether something else uses it, too."""
        base, place = self.bases[path]
        key = place, type(base)
        beds = [p for p, (_, other) in self.bases.items() if other == place]
        return base, len(beds) > 1 or self.calls[key] > self.grown[key]


_MET: contextvars.ContextVar[Met | None] = contextvars.ContextVar("met", default=None)
"""Where `met_in` collects what is called."""


def met_in(call: Callable[[dict[str, Any]], Any], variables: Mapping[str, Any]) -> Met:
    """What a call of a Linen model meets that can grow.

    Args:
      call: runs the model on the variables; only traced.
      variables: as ``init`` returned them.

    Raises:
      ValueError: if the model calls nothing that can grow.
    """
    met = Met()

    def count(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if (scope := context.module.scope) is not None:
            met.calls[_place(scope), type(context.module)] += 1
        return next_call(*args, **kwargs)

    token = _MET.set(met)
    try:
        with nn.intercept_methods(count):
            jax.eval_shape(call, dict(variables))
    finally:
        _MET.reset(token)
    if not met.makers:
        raise ValueError(
            "call must run a model with layers that can grow, such as linen.Growable; "
            "it met none"
        )
    return met


def beds_in(
    call: Callable[[dict[str, Any]], Any], variables: Mapping[str, Any]
) -> dict[str, SeedBed]:
    """The beds that a Linen model calls, by path, with their values.

    Args:
      call: runs the model on the variables; only traced.
      variables: as ``init`` returned them.

    Raises:
      ValueError: if the model calls none.
    """
    return met_in(call, variables).beds(variables)


class _Bed(nn.Module):
    """`SeedBed` with its variables in Linen's collections."""

    num_seeds: int
    options: Mapping[str, Any] | None = None

    @nn.compact
    def __call__(self, y: Any, x: Any = None, inputs: int | None = None) -> Any:
        starting = self.is_initializing()
        self._check_collections(starting)
        features, options = y.shape[-1], {"inputs": inputs, **(self.options or {})}
        make = functools.partial(SeedBed, features, self.num_seeds, **options)
        if (met := _MET.get()) is not None:
            met.makers["/".join(_place(self.scope))] = make
        held = [self.has_variable(name, name) for name in ("bank", "seeds")]
        if starting and not all(held):
            bed = make(rngs=nnx.Rngs(params=self.make_rng("params")))
        else:
            # Only its structure: all values come from the collections.
            bed = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
        for name in ("bank", "seeds"):
            tree = getattr(bed, name)
            value = self.variable(name, name, tree.get_arrays).value
            # Lifted transforms may give NumPy arrays, which no tracer can index.
            tree.set_arrays(jax.tree.map(jnp.asarray, value))
        # As many slots as the collections have, which may be fewer than were made.
        slots = bed.seeds.get_value().seed_of_slot.shape
        probe = jnp.zeros(slots, bed.probe.dtype)
        if starting or self.has_variable("probe", "probe"):
            probe = jnp.asarray(self.variable("probe", "probe", lambda: probe).value)
        bed.probe.set_value(probe)
        counts = not starting and self.is_mutable_collection("seeds")
        bed.deterministic = bed.deterministic or not counts
        out = bed(y, x=x)
        if counts and not bed.deterministic:
            self.put_variable("seeds", "seeds", bed.seeds.get_arrays())
        return out

    def _check_collections(self, starting: bool) -> None:
        missing = [c for c in ("bank", "seeds") if not self.has_variable(c, c)]
        path = "/".join(_place(self.scope)[:-1])
        if not starting and missing:
            raise ValueError(
                f"layer {path!r}: the collection{'s' * (len(missing) > 1)} "
                f"{' and '.join(missing)} must be given to apply, since without it all "
                "that has grown is lost. Pass all variables that init returned, as in "
                "apply({'params': params, 'bank': bank, 'seeds': seeds}, ...). Inside "
                "nn.scan, nn.RNN or nn.vmap, name them in variable_broadcast, "
                "variable_axes or variable_carry too"
            )
        if starting and not all(map(self.is_mutable_collection, ("bank", "seeds"))):
            raise ValueError(
                f"layer {path!r}: init would drop the collections bank and seeds. "
                "Inside nn.scan over layers or nn.vmap, add 'bank', 'seeds' and "
                "'probe' to variable_axes; inside nn.RNN or nn.scan over time, to "
                "variable_broadcast; and let init make every collection (mutable=)"
            )
