"""Another number of slots on a live `TrainState`."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from esper_jax.growth.beds import name_of
from esper_jax.growth.parts import ModelParts
from esper_jax.growth.recipe import Recipe
from esper_jax.growth.state import TrainState
from esper_jax.layers.capacity import resize_layer
from esper_jax.layers.chunked import ChunkedLayer
from esper_jax.lifecycle.slots import move_slots, slot_sources
from esper_jax.lifecycle.state import SeedState
from esper_jax.policy.memory import Reason

__all__ = [
    "cut_capacity",
    "give_back",
    "grow_capacity",
    "is_settled",
    "switch_off",
    "switch_on",
]


@jax.debug_nans(False)  # NaN is what was not measured
def grow_capacity(
    recipe: Recipe, state: TrainState, capacity: int | Mapping[str, int]
) -> TrainState:
    """The same state with another number of slots in its layers.

    Slots that stay keep every value and every moment bit for bit. New slots are free,
    with fresh parameters and fresh moments. Runs on the host. What is jitted compiles
    once more for the new shapes.

    Args:
      recipe: holds the model and the bank's optimizer.
      state: neither changed nor donated.
      capacity: slots of every layer, or of some layers by name; the others stay.

    Raises:
      ValueError: if a layer is unknown, or its capacity is out of range or too small
        for its living seeds. Nothing has been changed then.
    """
    parts = recipe.parts
    sources = _sources(parts, state, _by_layer(parts, capacity))

    def resized(state: TrainState) -> TrainState:
        new = jax.tree.map(jnp.copy, state)
        for name, source in sources.items():
            slots, bed = len(source), parts.beds[name]
            new.seeds[name], new.banks[name] = resize_layer(
                (state.seeds[name], state.banks[name]),
                source,
                parts.kinds[name],
                parts.layouts[name],
                # Leaves the state's stream alone; a newborn draws its own parameters.
                jax.random.fold_in(state.rng, slots),
            )
            fresh = recipe.bank_optimizer.init(new.banks[name])
            new.bank_opt[name] = move_slots(state.bank_opt[name], fresh, source)
            new.rest[f"{bed.path}/probe"] = jnp.zeros((*bed.stack, slots), jnp.float32)
        return new

    return jax.jit(resized)(state)


def cut_capacity(
    recipe: Recipe, state: TrainState, capacity: int | Mapping[str, int]
) -> tuple[TrainState, dict[str, tuple[int, int]]]:
    """The same state with fewer slots, whatever the policy says.

    Args:
      recipe: holds the model and the bank's optimizer.
      state: neither changed nor donated.
      capacity: slots of every layer, or of some layers by name; the others stay.

    Returns:
      As `give_back`.

    Raises:
      ValueError: as `grow_capacity`, and if it is more than a layer has.
    """
    wanted = _by_layer(recipe.parts, capacity)
    _sources(recipe.parts, state, wanted)  # refuses what no layer can have
    before = {name: state.seeds[name].capacity for name in wanted}
    for name, slots in wanted.items():
        if slots > before[name]:
            raise ValueError(
                f"layer {name!r}: capacity must be at most {before[name]}, the slots "
                f"that it has, as shrinking gives slots back; got {slots}"
            )
    changed = {
        n: (before[n], slots) for n, slots in wanted.items() if slots < before[n]
    }
    if not changed:
        return state, {}
    smaller = {name: slots for name, (_, slots) in changed.items()}
    return grow_capacity(recipe, state, smaller), changed


def _by_layer(parts: ModelParts, capacity: int | Mapping[str, int]) -> dict[str, int]:
    if isinstance(capacity, Mapping):
        return dict(capacity)
    return dict.fromkeys(parts.beds, capacity)


def is_settled(memory: Any) -> bool:
    """Whether a policy, by the reason it gave last, will let nothing be born any more.

    Args:
      memory: of any policy; one without a ``reason`` never says so.

    Raises:
      ValueError: if the memory is being traced.
    """
    reason = getattr(memory, "reason", -1)
    if isinstance(reason, jax.core.Tracer):
        raise ValueError(
            "whether a policy is settled must be asked between steps, outside of "
            "jax.jit and nnx.jit, since shapes depend on it; it is being traced"
        )
    return int(reason) == Reason.SETTLED


def give_back(
    recipe: Recipe, state: TrainState
) -> tuple[TrainState, dict[str, tuple[int, int]]]:
    """The same state without the slots that nothing will be born in any more.

    Each layer keeps as many as seeds live in it, at least one; the layers of a stack as
    many as that of them with the most. Runs on the host.

    Args:
      recipe: holds the model and the bank's optimizer.
      state: neither changed nor donated.

    Returns:
      The state, the given one if nothing changes, and the slots before and after of
      each layer that has fewer. Nothing changes before the policy `is_settled`.
    """
    if not is_settled(state.memory):
        return state, {}
    beds, most = recipe.parts.beds, dict[str, int]()
    owners = jax.device_get({name: s.seed_of_slot for name, s in state.seeds.items()})
    for name, owner in owners.items():
        living = int(np.sum(owner >= 0))
        most[beds[name].path] = max(1, living, most.get(beds[name].path, 0))
    changed = {
        name: (seeds.capacity, most[beds[name].path])
        for name, seeds in state.seeds.items()
        if most[beds[name].path] < seeds.capacity
    }
    if not changed:
        return state, {}
    wanted = {name: after for name, (_, after) in changed.items()}
    return grow_capacity(recipe, state, wanted), changed


def switch_off(
    model: nnx.Module, parts: ModelParts, seeds: Mapping[str, SeedState]
) -> list[str]:
    """Lets each `ChunkedLayer` in which nothing lives run its base alone.

    Args:
      model: the model; the attribute ``enabled`` of such layers becomes False.
      parts: of it.
      seeds: of each layer, by name.

    Returns:
      Names of the layers that were switched off now.
    """
    owners = jax.device_get({name: s.seed_of_slot for name, s in seeds.items()})
    lives = {parts.beds[name].path for name, o in owners.items() if np.any(o >= 0)}
    off: list[str] = []
    for path, node in nnx.iter_graph(model):
        bed = name_of((*path, "bed"))
        if isinstance(node, ChunkedLayer) and node.enabled and bed not in lives:
            node.enabled = False
            off += [name for name, of in parts.beds.items() if of.path == bed]
    return off


def switch_on(model: nnx.Module, off: Collection[str]) -> None:
    """Lets each layer that `switch_off` has switched off run what lives in it again.

    A command from outside, or a state of before, may have brought something to life.

    Args:
      model: the model; the attribute ``enabled`` of such layers becomes True.
      off: paths of the beds of those that were switched off.
    """
    for path, node in nnx.iter_graph(model) if off else ():
        if isinstance(node, ChunkedLayer) and name_of((*path, "bed")) in off:
            owners = jax.device_get(node.bed.seeds.get_value().seed_of_slot)
            node.enabled = node.enabled or bool(np.any(owners >= 0))


def _sources(
    parts: ModelParts, state: TrainState, wanted: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """`slot_sources` of each layer whose capacity changes, all checked."""
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
    return sources
