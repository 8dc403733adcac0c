"""What `GrowthFunctions` do with variables."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from esper_jax.growth import functions
from esper_jax.growth.capacity import cut_capacity, give_back
from esper_jax.growth.folds import Fold
from esper_jax.growth.functions import (
    Remembered,
    check_loss,
    check_untraced,
    start_with,
)
from esper_jax.growth.given_weights import ProductOf, put_back, weights_given
from esper_jax.growth.nested import (
    COLLECTIONS,
    Variables,
    flat,
    named,
    nested,
    remembered_in,
    slots_in,
)
from esper_jax.growth.outside import Outside
from esper_jax.growth.parts import values_of
from esper_jax.growth.recipe import Recipe
from esper_jax.growth.reports import TickReport
from esper_jax.growth.saving import remembered_of, run_state, values_in
from esper_jax.growth.state import Arrays
from esper_jax.layers import harvest as harvested
from esper_jax.layers.harvest import Parts
from esper_jax.lifecycle.commands import Commands
from esper_jax.lifecycle.stages import Stage

__all__ = ["Made", "apply", "fold", "harvest", "shrink", "tick", "update"]

Evaluate = Callable[[Variables], Any]
"""``evaluate(variables)``: the held-out loss, or ``(loss, score)``."""


class Made:
    """What the functions share.

    Args:
      recipe: for the slots that the layers were made with.
      like: what is remembered at the start.
      product_of: what the layers compute.
    """

    def __init__(self, recipe: Recipe, like: Remembered, product_of: ProductOf) -> None:
        self.parts, self.product_of = recipe.parts, product_of
        slots = {name: bed.capacity for name, bed in recipe.parts.beds.items()}
        self._recipe, self._like = recipe, like
        # A recipe is a static argument by identity: one for each number of slots.
        self._for = {tuple(slots.values()): (recipe, like)}
        self._folds: dict[Any, Recipe] = {}

    @jax.debug_nans(False)  # NaN is what was not measured
    def of(self, slots: Mapping[str, int]) -> tuple[Recipe, Remembered]:
        """The recipe for a number of slots of each layer, and what it remembers."""
        key = tuple(slots.values())
        if key not in self._for:
            with jax.ensure_compile_time_eval():  # nothing of a trace is kept
                recipe = self._recipe.for_capacity(slots)
                values = recipe.parts.blank(slots)
                like = start_with(recipe, values, self._like.growth)
            self._for[key] = recipe, like
        return self._for[key]

    def folding(self, recipe: Recipe, folds: Mapping[str, Fold]) -> Recipe:
        """The recipe with what is folded."""
        key = recipe, tuple(folds.items())
        if key not in self._folds:
            self._folds[key] = dataclasses.replace(recipe, folds=folds)
        return self._folds[key]

    def take(self, variables: Variables) -> "_Taken":
        """What the variables hold, checked."""
        values = flat("variables", self.parts, variables, COLLECTIONS)
        slots = slots_in("variables", self.parts, values, COLLECTIONS)
        recipe, like = self.of(slots)
        return _Taken(recipe, values, remembered_in(like, variables), slots)


class _Taken(NamedTuple):
    """Variables, taken apart."""

    recipe: Recipe
    values: Arrays
    remembered: Remembered
    slots: dict[str, int]
    """Of each layer."""


def update(
    made: Made, variables: Variables, grads: Mapping[str, Any], loss: Any = None
) -> Variables:
    """Lets the blueprints learn from a step's gradients."""
    check_loss(loss)
    recipe, values, old, slots = made.take(variables)
    given = flat("grads", made.parts, grads, ("bank", "probe"))
    if (got := slots_in("grads", made.parts, given, ("bank", "probe"))) != slots:
        raise ValueError(
            f"grads must be of as many slots as the variables, {slots}; got {got}. "
            "Differentiate with respect to the same variables"
        )
    new, banks = functions.update(recipe, old, values, given, loss)
    bank = nested(recipe.parts, values | banks)["bank"]
    return {**variables, "bank": bank, "growth": named(new)}


def tick(
    made: Made,
    variables: Variables,
    evaluate: Evaluate,
    commands: Outside | Mapping[str, Commands] | None = None,
) -> tuple[Variables, TickReport]:
    """Measures, decides and carries out what was decided."""
    recipe, values, old, _ = made.take(variables)

    def measured(probes: Mapping[str, Any]) -> Any:
        changed = {f"{bed}/probe": probe for bed, probe in probes.items()}
        probe = nested(recipe.parts, values | changed)["probe"]
        return evaluate({**variables, "probe": probe})

    check_untraced("tick", "variables that are", values)
    new, changed, report = functions.tick(recipe, old, values, measured, commands)
    collections = nested(recipe.parts, values | changed)
    return {**variables, **collections, "growth": named(new)}, report


@jax.debug_nans(False)  # NaN is what was not measured
def shrink(
    made: Made,
    variables: Variables,
    capacity: int | Mapping[str, int] | None = None,
) -> tuple[Variables, dict[str, tuple[int, int]]]:
    """Gives back slots; what it gave back, by layer."""
    recipe, values, old, _ = made.take(variables)
    check_untraced("shrink", "variables that are", values)
    state = run_state(recipe, old, values, ())
    if capacity is None:
        state, changed = give_back(recipe, state)
    else:
        state, changed = cut_capacity(recipe, state, capacity)
    if not changed:
        return variables, {}
    new, _ = made.of({name: seeds.capacity for name, seeds in state.seeds.items()})
    remembered = remembered_of(new, state, ())
    collections = nested(new.parts, values_in(new, state))
    return {**variables, **collections, "growth": named(remembered)}, changed


@jax.debug_nans(False)  # NaN is what was not measured
def fold(
    made: Made, variables: Variables, weights: Mapping[str, Mapping[str, Any]]
) -> tuple[Variables, dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """Folds linear fossils into weights; which seeds, by layer."""
    recipe, values, _, _ = made.take(variables)
    folds, arrays = weights_given(recipe.parts, weights, made.product_of)
    check_untraced("fold", "variables or weights that are", values | arrays)
    parts = recipe.parts
    seeds, banks = (parts.take(values, name) for name in ("seeds", "bank"))
    none = {name: np.zeros(seeds[name].num_seeds, bool) for name in folds}
    if not any(np.any(seeds[name].stage == Stage.FOSSILIZED) for name in folds):
        return variables, put_back(weights, {}), none
    found = _folded(made.folding(recipe, folds), seeds, banks, arrays)
    new = parts.joined("seeds", {**seeds, **found.seeds})
    collections = nested(parts, values | new)
    which = jax.device_get(found.which)
    return (
        {**variables, "seeds": collections["seeds"]},
        put_back(weights, found.weights),
        which,
    )


_folded = jax.jit(Recipe.fold, static_argnums=0)


def _filled(made: Made, variables: Variables) -> nnx.Module:
    """The model of beds with the variables' values."""
    values = flat("variables", made.parts, variables, COLLECTIONS)
    slots_in("variables", made.parts, values, COLLECTIONS)
    return made.parts.merge(values, train=True)


def apply(
    made: Made,
    variables: Variables,
    layer: str,
    y: Float[Array, "*B F"],
    train: bool = True,
    x: Any = None,
) -> tuple[Float[Array, "*B F"], dict[str, Any]]:
    """A layer's output with its seeds blended in, and the seeds."""
    if layer not in made.parts.beds:
        known = ", ".join(map(repr, made.parts.beds))
        raise ValueError(f"layer must be one of {known}, got {layer!r}")
    filled = _filled(made, variables)
    bed = _at(filled, made.parts.beds[layer].path)
    bed.deterministic = bed.deterministic or not train
    try:
        out = bed(y, x=x)
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {layer!r}: {error}") from error
    return out, nested(made.parts, values_of(filled))["seeds"]


def harvest(
    made: Made, variables: Variables, parts: Parts = "fossils"
) -> dict[str, nnx.Module]:
    """What has grown in each layer, as a module of its own."""
    filled, grown = _filled(made, variables), {}
    for layer, bed in made.parts.beds.items():
        graph, state = nnx.split(_at(filled, bed.path))
        # Each layer of a stack is a module of its own.
        own = jax.tree.map(lambda leaf, index=bed.index: leaf[index], state)
        grown[layer] = harvested(nnx.merge(graph, own), parts=parts)
    return grown


def _at(model: Any, path: str) -> Any:
    """What is at a path of a model."""
    return functools.reduce(getattr, path.split("/"), model)
