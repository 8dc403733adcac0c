"""Another number of slots on a live `TrainState`."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from esper_jax.growth.parts import ModelParts
from esper_jax.growth.recipe import Recipe
from esper_jax.growth.state import TrainState
from esper_jax.layers.capacity import resize_layer
from esper_jax.lifecycle.slots import move_slots, slot_sources

__all__ = ["grow_capacity"]


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
    wanted = (
        dict(capacity)
        if isinstance(capacity, Mapping)
        else dict.fromkeys(parts.beds, capacity)
    )
    sources = _sources(parts, state, wanted)

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
