"""Another number of slots on a live `TrainState`."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from esper_jax import blueprints
from esper_jax.growth.parts import ModelParts
from esper_jax.growth.state import TrainState
from esper_jax.lifecycle.slots import move_slots, resize, slot_sources
from esper_jax.optim import PerSlot

__all__ = ["grow_capacity"]


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
