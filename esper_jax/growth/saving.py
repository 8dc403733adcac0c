"""What a loop of one's own saves, in the form of the state of a run.

That form, `TrainState`, is the one whose layout is frozen: a checkpoint of it is
brought to a later version, and to another capacity, by the `Checkpointer`.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from esper_jax.groups import flat_slots, slots_of_layers
from esper_jax.growth.functions import Remembered, Sums
from esper_jax.growth.gradients import GradientSums
from esper_jax.growth.recipe import Recipe
from esper_jax.growth.state import Arrays, GovernorMemory, GrowthState, TrainState

__all__ = [
    "check_alike",
    "others_of",
    "put_others",
    "remembered_of",
    "run_state",
    "values_in",
]


@jax.debug_nans(False)  # NaN is what was not measured
def run_state(
    recipe: Recipe, remembered: Remembered, values: Arrays, others: Any
) -> TrainState:
    """The state of a run.

    Args:
      recipe: what the model is grown by.
      remembered: by growth.
      values: of the model's variables, by name.
      others: what stands beside the model and growth, as `others_of` returns it.
    """
    parts, groups = recipe.parts, recipe.parts.groups
    growth, sums = remembered.growth, remembered.sums
    gains, errors = groups.split(sums.gains), groups.split(sums.errors)
    moments = {
        key: slots_of_layers(of, len(groups.of[key].layers))
        for key, of in remembered.moments.items()
    }
    # Whole, so that what is not measured is not taken for missing.
    sampled = growth.monitor.gradients
    gradients = {
        name: sampled.get(name, GradientSums.start(parts.layouts[name].num_seeds))
        for name in parts.beds
    }
    params = parts.host_params()
    probes = {name for bed in parts.beds.values() for name in bed.variables("probe")}
    apart = {*params, *parts.of_beds(parts.beds)} - probes
    return TrainState(
        step=growth.step,
        ticks=growth.ticks,
        rng=growth.rng,
        params={name: values[name] for name in params},
        opt_state=others,
        banks=parts.take(values, "bank"),
        bank_opt=groups.split(moments),
        seeds={
            name: dataclasses.replace(s, gain=gains[name], errors=errors[name])
            for name, s in parts.take(values, "seeds").items()
        },
        rest={name: value for name, value in values.items() if name not in apart},
        memory=growth.memory,
        monitor=dataclasses.replace(growth.monitor, gradients=gradients),
        governor=GovernorMemory.start(),
    )


@jax.debug_nans(False)  # NaN is what was not measured
def remembered_of(
    recipe: Recipe, state: TrainState, measured: Collection[str]
) -> Remembered:
    """What growth remembers, from the state of a run.

    Args:
      recipe: what the model is grown by.
      state: as `run_state` returns it.
      measured: layers whose gradients are measured.
    """
    groups = recipe.parts.groups
    gradients = {name: state.monitor.gradients[name] for name in measured}
    growth = GrowthState(
        step=state.step,
        ticks=state.ticks,
        rng=state.rng,
        memory=state.memory,
        monitor=dataclasses.replace(state.monitor, gradients=gradients),
    )
    sums = Sums(
        calls=groups.stack({name: s.steps for name, s in state.seeds.items()}),
        gains=groups.stack({name: s.gain for name, s in state.seeds.items()}),
        errors=groups.stack({name: s.errors for name, s in state.seeds.items()}),
    )
    return Remembered(growth, flat_slots(groups.stack(state.bank_opt)), sums)


@jax.debug_nans(False)  # NaN is what was not measured
def values_in(recipe: Recipe, state: TrainState) -> Arrays:
    """The values of the model's variables, by name, in the state of a run."""
    parts = recipe.parts
    # Between ticks growth remembers these sums, and the model holds zeros.
    seeds = {
        name: dataclasses.replace(
            s, gain=jnp.zeros_like(s.gain), errors=jnp.zeros_like(s.errors)
        )
        for name, s in state.seeds.items()
    }
    banks = parts.joined("bank", state.banks)
    return {**state.params, **state.rest, **banks, **parts.joined("seeds", seeds)}


def check_alike(recipe: Recipe, state: TrainState, like: TrainState) -> None:
    """Refuses a state that is not one of this loop. The number of slots may differ.

    Args:
      recipe: what the model is grown by.
      state: to go on from.
      like: of the loop as it is.

    Raises:
      ValueError: naming the first array, or the part of the state, that does not fit.
    """
    if not isinstance(state, TrainState):
        raise ValueError(
            f"state must be a TrainState, as run_state returns it; got {state!r:.60}"
        )
    if state.seeds.keys() != recipe.parts.beds.keys():
        raise ValueError(
            "state must be of the layers "
            f"{', '.join(map(repr, recipe.parts.beds))}; got one of "
            f"{', '.join(map(repr, state.seeds))}"
        )
    if len(state.opt_state) != len(like.opt_state):
        raise ValueError(
            f"others must be the {len(state.opt_state)} that run_state was given; got "
            f"{len(like.opt_state)}"
        )
    for field, of in _MADE_BY.items():
        new, old = getattr(state, field), getattr(like, field)
        trees: list[Any] = [jax.tree.structure(new), jax.tree.structure(old)]
        if trees[0] != trees[1]:
            raise ValueError(
                f"state.{field} must have the arrays of this loop, and has others: "
                f"make {of} as it was where the state comes from"
            )
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(new), jax.tree.leaves(old), strict=True
        ):
            first = 1 if field in ("banks", "bank_opt") else 0  # the slots
            if field in ("seeds", "memory", "opt_state") or (
                field == "rest" and not _is_weight(recipe, path[0].key)
            ):
                continue
            if a.shape[first:] != b.shape[first:] or a.dtype != b.dtype:
                raise ValueError(
                    f"state.{field}{jax.tree_util.keystr(path)} must have shape "
                    f"{b.shape} and dtype {b.dtype} as in this loop; got {a.shape} and "
                    f"{a.dtype}. Make {of} as it was where the state comes from"
                )
    for name, seeds in state.seeds.items():
        if seeds.num_seeds != like.seeds[name].num_seeds:
            raise ValueError(
                f"state.seeds[{name!r}] must be of {like.seeds[name].num_seeds} seeds "
                f"as in this loop; got {seeds.num_seeds}"
            )


_MADE_BY = {
    "params": "the model",
    "rest": "the model",
    "seeds": "the model",
    "banks": "the blueprints",
    "bank_opt": "the optimizer of the blueprints",
    "opt_state": "the others",
    "memory": "the policy",
}
"""Parts of a state, and what decides which arrays they hold."""


def _is_weight(recipe: Recipe, name: str) -> bool:
    return isinstance(recipe.parts.variables[name][1], nnx.Param)


def others_of(others: tuple[Any, ...], model: nnx.Module) -> tuple[Any, ...]:
    """The arrays of NNX objects, without those of the model that they may hold."""
    return tuple(nnx.as_pure(_state(other, model)) for other in others)


def put_others(others: tuple[Any, ...], state: TrainState) -> None:
    """Inverse of `others_of`."""
    for other, saved in zip(others, state.opt_state, strict=True):
        nnx.update(other, saved)


def _state(other: Any, model: nnx.Module) -> Any:
    inside = [path for path, node in nnx.iter_graph(other) if node is model]
    flat = nnx.to_flat_state(nnx.state(other))
    return nnx.from_flat_state(
        [
            (path, leaf)
            for path, leaf in flat
            if not any(path[: len(start)] == start for start in inside)
        ]
    )
