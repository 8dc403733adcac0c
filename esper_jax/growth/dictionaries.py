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
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Key

from esper_jax.growth import calls
from esper_jax.growth.functions import recipe_for, start
from esper_jax.growth.given_weights import ProductOf, stated_product
from esper_jax.growth.nested import Variables, named, nested
from esper_jax.growth.parts import split_model, values_of
from esper_jax.growth.recipe import Recipe, what_is_read
from esper_jax.growth.reports import TickReport
from esper_jax.growth.state import Arrays
from esper_jax.layers.bed import SeedBed
from esper_jax.layers.folding import Product, linen_product
from esper_jax.layers.linen import met_in
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.optim import PerSlot
from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.heuristic import policy_of
from esper_jax.policy.interface import Policy, PolicyFactory

__all__ = ["GrowthFunctions", "Variables", "growth_functions", "linen_growth"]


class GrowthFunctions(NamedTuple):
    """Growth over `Variables`. ``init``, ``apply`` and ``update`` can be jitted.

    The others are pure, too, but run on the host. All take variables with any number of
    slots, so also those that ``shrink`` returned, in this process or another one.

    Attributes:
      init: ``init(key) -> variables``: what growth needs, before the first step. For
        Linen, ``bank``, ``seeds`` and ``probe`` are those of the model.
      apply: ``apply(variables, layer, y, train=True, x=None) -> y, seeds``: the output
        ``y`` of a layer with its seeds blended in, and the collection ``seeds`` with
        what was measured. Thread it from layer to layer, and return it from the loss.
        Blueprints that read the layer's input get it as ``x``; its width is the
        layer's argument ``inputs``. Flax Linen does all this by itself.
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
      shrink: ``shrink(variables, capacity=None) -> variables, changed``: gives back the
        slots that nothing will be born in any more, between steps. As `Growth.shrink`,
        it does nothing until the policy is settled (`policy.Reason.SETTLED`). With a
        ``capacity``, of all layers or of some by name, they get so many whatever the
        policy says. No value changes; at least one slot stays. ``changed`` has the
        slots before and after of each layer that has fewer. If it is not empty, what is
        jitted compiles once more.
      fold: ``fold(variables, weights) -> variables, weights, folded``: adds what linear
        fossils compute to the weights of their layers, between steps. ``weights`` holds
        ``{"kernel": (..., D, F), "bias": (F,)}`` by the layer's path, the bias only if
        there is one, of which the activation that grows is ``x @ kernel + bias``; of a
        stack those of all layers at once, with its axes first. They are computed in
        float32 and rounded once. The seeds are dormant afterwards, and their slots
        free. ``folded`` tells which, bool (S,) by layer; `TickReport.with_folded` puts
        it into a report. The moments that your optimizer has of these weights stay.
    """

    init: Callable[[Key[Array, ""]], Variables]
    apply: Callable[..., tuple[Array, dict[str, Any]]]
    update: Callable[..., Variables]
    tick: Callable[..., tuple[Variables, TickReport]]
    harvest: Callable[..., dict[str, nnx.Module]]
    shrink: Callable[..., tuple[Variables, dict[str, tuple[int, int]]]]
    fold: Callable[
        ..., tuple[Variables, dict[str, dict[str, Any]], dict[str, np.ndarray]]
    ]


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

    The layers have as many slots as the variables, those of the model's ``options`` or
    fewer after ``shrink``; the model itself need not change.

    Args:
      call: runs the model on the variables, ``lambda v: model.apply(v, x)``; traced
        once, to find the layers that can grow.
      variables: of the model, as ``init`` returned them.
      optimizer: for the blueprints; runs in each slot.
      **options: as for `growth_functions`.

    Raises:
      ValueError: if the model holds nothing that can grow, or as `Growth` does.
    """
    met = met_in(call, variables)
    beds = met.beds(variables)
    _check_names(beds)

    def product_of(bed: str, kernel: Any, bias: bool) -> Product:
        base, shared = met.base(bed)
        features = beds[bed].layout.features
        if (product := linen_product(base, features, kernel, bias)) is None:
            raise ValueError(
                "fossils can be folded into a plain nn.Dense, nn.Conv, or "
                "nn.DenseGeneral that has no batch axes and grows over all its "
                f"features; got {type(base).__name__}, or one with a product of its "
                "own. Harvest keeps them as a module beside it"
            )
        if shared:
            raise ValueError(
                f"the {type(base).__name__} is also called where nothing grows, or "
                "grows in two places: a fold into its weights would change that, too. "
                "Harvest keeps what has grown as a module beside it"
            )
        return product

    return _functions(lambda key: beds, optimizer, product_of, **options)


def _functions(
    make: Callable[[Key[Array, ""]], dict[str, SeedBed]],
    optimizer: optax.GradientTransformation | PerSlot,
    product_of: ProductOf = stated_product,
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
            f"fold must be 'never', got {recipe.gates.fold!r}: tick does not know the "
            "weights of the layers. After it, hand them to the function fold"
        )
    _check_reads(recipe, values)
    recipe = dataclasses.replace(recipe, measured=frozenset())
    made = calls.Made(recipe, start(recipe, values, jax.random.key(0)), product_of)

    def init(key: Key[Array, ""]) -> Variables:
        banks, policy = jax.random.split(key)
        values = values_of(_model(make(banks)))
        new = start(recipe, values, policy)
        return nested(recipe.parts, values) | {"growth": named(new)}

    return GrowthFunctions(
        init=init,
        apply=functools.partial(calls.apply, made),
        update=functools.partial(calls.update, made),
        tick=functools.partial(calls.tick, made),
        harvest=functools.partial(calls.harvest, made),
        shrink=functools.partial(calls.shrink, made),
        fold=functools.partial(calls.fold, made),
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
