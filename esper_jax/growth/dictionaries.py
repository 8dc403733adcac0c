"""Growth on dictionaries of arrays: for pure JAX and for Flax Linen.

As optax is a pair of functions over a state, growth is `GrowthFunctions` over the
collections ``bank``, ``seeds``, ``probe`` and ``growth``, nested as Flax Linen nests
them: ``variables["bank"]["hidden"]["bank"]["w1"]``.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Key

from esper_jax.bits import as_bits, from_bits
from esper_jax.growth.functions import (
    Remembered,
    check_loss,
    check_untraced,
    recipe_for,
    start,
    tick,
    update,
)
from esper_jax.growth.outside import Outside
from esper_jax.growth.parts import split_model, values_of
from esper_jax.growth.recipe import Recipe, what_is_read
from esper_jax.growth.reports import TickReport
from esper_jax.growth.state import Arrays
from esper_jax.layers.bed import SeedBed
from esper_jax.layers.harvest import Parts, harvest
from esper_jax.layers.linen import beds_in
from esper_jax.layers.variables import named_leaves
from esper_jax.lifecycle.commands import Commands
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.optim import PerSlot
from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.heuristic import policy_of
from esper_jax.policy.interface import Policy, PolicyFactory
from esper_jax.trees import is_key

__all__ = ["GrowthFunctions", "Variables", "growth_functions", "linen_growth"]

Variables = dict[str, Any]
"""The collections ``bank``, ``seeds``, ``probe`` and ``growth``; others are kept."""

Evaluate = Callable[[Variables], Any]
"""``evaluate(variables)``: the held-out loss, or ``(loss, score)``."""

_COLLECTIONS = ("bank", "seeds", "probe")


class GrowthFunctions(NamedTuple):
    """Growth over `Variables`. All but ``tick`` and ``harvest`` are pure and jittable.

    Attributes:
      init: ``init(key) -> variables``: what growth needs, before the first step. For
        Linen, ``bank``, ``seeds`` and ``probe`` are those of the model.
      apply: ``apply(variables, layer, y, train=True) -> y, seeds``: the output ``y`` of
        a layer with its seeds blended in, and the collection ``seeds`` with what was
        measured. Thread it from layer to layer, and return it from the loss. Flax Linen
        does this by itself.
      update: ``update(variables, grads, loss=None) -> variables``: lets the blueprints
        learn. ``grads`` holds the gradients of the collections ``bank`` and ``probe``;
        ``variables`` the ``seeds`` after the forward pass.
      tick: ``tick(variables, evaluate) -> variables, report``: runs on the host,
        between steps. ``evaluate(variables)`` returns the held-out loss, or ``(loss,
        score)``; it is called once more for each seed on probation, with other probes.
        A third argument, commands by layer, is as for `Growth.tick`.
      harvest: ``harvest(variables, parts="fossils") -> layers``: for each layer the
        Flax NNX module that adds what has grown, with ordinary parameters:
        ``layers["hidden"](y)``. For ``parts`` see `esper_jax.harvest`.
    """

    init: Callable[[Key[Array, ""]], Variables]
    apply: Callable[..., tuple[Array, dict[str, Any]]]
    update: Callable[..., Variables]
    tick: Callable[..., tuple[Variables, TickReport]]
    harvest: Callable[..., dict[str, nnx.Module]]


def growth_functions(
    layers: Mapping[str, Mapping[str, Any]],
    optimizer: optax.GradientTransformation | PerSlot,
    **options: Any,
) -> GrowthFunctions:
    """Growth for functions of one's own.

    Args:
      layers: arguments of `SeedBed` for each layer that can grow, by name:
        ``{"hidden": {"features": 64, "num_seeds": 4}}``.
      optimizer: for the blueprints; runs in each slot.
      **options: ``lifecycle_config``, ``controller_config`` and ``policy``, as for
        `Growth`. The host's own gradients and weights are not known here: signals of
        them are NaN, and a policy or grafting strategy that reads them is refused. A
        policy that does not declare what it reads is trusted.

    Raises:
      TypeError, ValueError: if an argument does not fit a layer, whose name the message
        has, or as `Growth` does.
    """
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(
            "layers must name at least one layer that can grow, as in {'hidden': "
            f"{{'features': 64, 'num_seeds': 4}}}}; got {layers!r}"
        )

    _check_names(layers, reserved=("bed",))  # the layer around it would be meant

    def make(key: Key[Array, ""]) -> dict[str, SeedBed]:
        rngs, beds = nnx.Rngs(key), {}
        for name, arguments in layers.items():
            try:
                beds[name] = SeedBed(**arguments, rngs=rngs)
            except (TypeError, ValueError) as error:
                raise type(error)(f"layer {name!r}: {error}") from None
        return beds

    return _functions(make, optimizer, **options)


def linen_growth(
    call: Callable[[Variables], Any],
    variables: Mapping[str, Any],
    optimizer: optax.GradientTransformation | PerSlot,
    **options: Any,
) -> GrowthFunctions:
    """Growth for a Flax Linen model of `layers.linen`.

    Args:
      call: runs the model on the variables, ``lambda v: model.apply(v, x)``; traced
        once, to find the layers that can grow.
      variables: of the model, as ``init`` returned them.
      optimizer: for the blueprints; runs in each slot.
      **options: as for `growth_functions`.

    Raises:
      ValueError: if the model holds nothing that can grow, or as `Growth` does.
    """
    beds = beds_in(call, variables)
    _check_names(beds)
    return _functions(lambda key: beds, optimizer, **options)


def _functions(
    make: Callable[[Key[Array, ""]], dict[str, SeedBed]],
    optimizer: optax.GradientTransformation | PerSlot,
    *,
    lifecycle_config: LifecycleConfig | None = None,
    controller_config: ControllerConfig | None = None,
    policy: Policy | PolicyFactory | None = None,
) -> GrowthFunctions:
    model = _model(make(jax.random.key(0)))
    values = values_of(model)
    recipe = recipe_for(
        split_model(model, wrt=None),
        values,
        optimizer,
        lifecycle_config,
        policy_of(policy, controller_config, None),
        (None, 1),
    )
    if recipe.gates.fold != "never":
        raise ValueError(
            f"fold must be 'never', got {recipe.gates.fold!r}: the weights of the "
            "layers are not known here. Fold what harvest returns yourself"
        )
    _check_reads(recipe, values)
    recipe = dataclasses.replace(recipe, measured=frozenset())
    like = start(recipe, values, jax.random.key(0))

    def init(key: Key[Array, ""]) -> Variables:
        banks, policy = jax.random.split(key)
        values = values_of(_model(make(banks)))
        new = start(recipe, values, policy)
        return _nested(recipe, values) | {"growth": _named(new)}

    return GrowthFunctions(
        init=init,
        apply=functools.partial(_apply, recipe),
        update=functools.partial(_update, recipe, like),
        tick=functools.partial(_tick, recipe, like),
        harvest=functools.partial(_harvest, recipe),
    )


def _check_reads(recipe: Recipe, values: Arrays) -> None:
    """Refuses what reads the host, which is not known here.

    A policy that does not declare what it reads is trusted.

    Raises:
      ValueError: naming the signals.
    """
    declared = recipe.policy._replace(reads=recipe.policy.reads or frozenset())
    read = what_is_read(declared, recipe.parts.strategies(values))
    if read:
        raise ValueError(
            f"policy and grafting strategies must not read {', '.join(sorted(read))}: "
            "the host's gradients and weights are not known here. Choose others, such "
            "as where='health', how='fixed' and Strategy.LINEAR, or use Growth"
        )


def _named(remembered: Remembered) -> Arrays:
    """What growth remembers, as the collection ``growth``.

    Random keys are plain integers there, which every file format takes, and so are
    floats that may be NaN: see `bits.as_bits`.
    """
    kept = remembered._replace(growth=jax.tree.map(as_bits, remembered.growth))
    leaves = named_leaves(kept)
    return {n: jax.random.key_data(x) if is_key(x) else x for n, x in leaves.items()}


def _remembered(like: Remembered, variables: Variables) -> Remembered:
    """Inverse of `_named`."""
    given = _mapping("variables", variables).get("growth") or {}
    leaves = named_leaves(like)
    missing = [name for name in leaves if name not in given]
    if missing:
        raise ValueError(
            "variables must hold the collection growth, as init returns it; there is "
            f"no {missing[0]!r} in it"
        )
    arrays = [
        jax.random.wrap_key_data(given[name], impl=jax.random.key_impl(leaf))
        if is_key(leaf)
        else from_bits(jnp.asarray(given[name]), leaf.dtype)
        for name, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


def _update(
    recipe: Recipe,
    like: Remembered,
    variables: Variables,
    grads: Mapping[str, Any],
    loss: Any = None,
) -> Variables:
    check_loss(loss)
    values = _flat("variables", recipe, variables, _COLLECTIONS)
    given = _flat("grads", recipe, grads, ("bank", "probe"))
    old = _remembered(like, variables)
    new, banks = update(recipe, old, values, given, loss)
    bank = _nested(recipe, values | banks)["bank"]
    return {**variables, "bank": bank, "growth": _named(new)}


def _tick(
    recipe: Recipe,
    like: Remembered,
    variables: Variables,
    evaluate: Evaluate,
    commands: Outside | Mapping[str, Commands] | None = None,
) -> tuple[Variables, TickReport]:
    values = _flat("variables", recipe, variables, _COLLECTIONS)
    old = _remembered(like, variables)

    def measured(probes: Mapping[str, Any]) -> Any:
        changed = {f"{bed}/probe": probe for bed, probe in probes.items()}
        probe = _nested(recipe, values | changed)["probe"]
        return evaluate({**variables, "probe": probe})

    check_untraced("tick", "variables that are", values)
    new, changed, report = tick(recipe, old, values, measured, commands)
    nested = _nested(recipe, values | changed)
    return {**variables, **nested, "growth": _named(new)}, report


def _model(beds: Mapping[str, SeedBed]) -> nnx.Module:
    """A model of nothing but the beds, each at its path."""
    root = nnx.Module()
    for path, bed in beds.items():
        *around, last = path.split("/")
        place = root
        for name in around:
            if not hasattr(place, name):
                setattr(place, name, nnx.Module())
            place = getattr(place, name)
        setattr(place, last, bed)
    return root


def _check_names(beds: Collection[str], reserved: Collection[str] = ()) -> None:
    """Refuses names of layers that cannot be paths in a model of their own.

    Args:
      beds: the names.
      reserved: what a name may not end with.

    Raises:
      TypeError, ValueError: naming the layer.
    """
    for path in beds:
        if not isinstance(path, str):
            raise TypeError(f"layer {path!r}: its name must be a str")
        *around, last = names = path.split("/")
        taken = [name for name in names if not name or hasattr(nnx.Module, name)]
        taken += [last] if last in reserved else []
        if taken:
            raise ValueError(
                f"layer {path!r}: its name must be a path such as 'hidden' or "
                f"'block/mlp', without {taken[0]!r}. Give it another name"
            )
        above = ["/".join(around[:n]) for n in range(1, len(names))]
        for other in filter(beds.__contains__, above):
            raise ValueError(
                f"layer {path!r}: {other!r} is a layer and cannot hold another. Give "
                "one of them another name"
            )


def _mapping(argument: str, given: Any) -> Mapping[str, Any]:
    """What was given, if it is a mapping.

    Raises:
      TypeError: naming the argument.
    """
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{argument} must be a dictionary of collections, as init returns it; got "
            f"{type(given).__name__}"
        )
    return given


def _flat(
    argument: str,
    recipe: Recipe,
    nested: Mapping[str, Any],
    collections: tuple[str, ...],
) -> Arrays:
    """The arrays of some collections by name.

    Raises:
      ValueError: if one is missing, naming the argument.
    """
    found: Arrays = {}
    for collection in collections:
        tree = _mapping(argument, nested).get(collection) or {}
        found |= flatten_dict(_mapping(f"{argument}[{collection!r}]", tree), sep="/")
    for bed in recipe.parts.beds.values():
        for collection in collections:
            for name in bed.variables(collection):
                if name not in found:
                    raise ValueError(
                        f"{argument} must hold the collection {collection}, with "
                        f"{name!r} for one; got {', '.join(nested) or 'nothing'}"
                    )
    return found


def _nested(recipe: Recipe, values: Arrays) -> Variables:
    """The collections from arrays by name: inverse of `_flat`."""
    beds = recipe.parts.beds.values()
    return {
        collection: unflatten_dict(
            {name: values[name] for bed in beds for name in bed.variables(collection)},
            sep="/",
        )
        for collection in _COLLECTIONS
    }


def _filled(recipe: Recipe, variables: Variables) -> nnx.Module:
    """The model of beds with the variables' values."""
    values = _flat("variables", recipe, variables, _COLLECTIONS)
    return recipe.parts.merge(values, train=True)


def _apply(
    recipe: Recipe,
    variables: Variables,
    layer: str,
    y: Float[Array, "*B F"],
    train: bool = True,
) -> tuple[Float[Array, "*B F"], dict[str, Any]]:
    if layer not in recipe.parts.beds:
        known = ", ".join(map(repr, recipe.parts.beds))
        raise ValueError(f"layer must be one of {known}, got {layer!r}")
    filled = _filled(recipe, variables)
    bed = _at(filled, recipe.parts.beds[layer].path)
    bed.deterministic = bed.deterministic or not train
    try:
        out = bed(y)
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {layer!r}: {error}") from error
    return out, _nested(recipe, values_of(filled))["seeds"]


def _harvest(
    recipe: Recipe, variables: Variables, parts: Parts = "fossils"
) -> dict[str, nnx.Module]:
    filled, grown = _filled(recipe, variables), {}
    for layer, bed in recipe.parts.beds.items():
        graph, state = nnx.split(_at(filled, bed.path))
        # Each layer of a stack is a module of its own.
        own = jax.tree.map(lambda leaf, index=bed.index: leaf[index], state)
        grown[layer] = harvest(nnx.merge(graph, own), parts=parts)
    return grown


def _at(model: Any, path: str) -> Any:
    """What is at a path of a model."""
    return functools.reduce(getattr, path.split("/"), model)
