"""More or fewer slots on a live model."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from esper_jax.blueprints.bank import Bank, init_bank
from esper_jax.layers.bed import SeedBed, stack_of
from esper_jax.lifecycle.slots import move_slots, resize, slot_sources
from esper_jax.lifecycle.state import SeedState

__all__ = ["grow_capacity"]


def grow_capacity(model: nnx.Module, capacity: int, *, rngs: nnx.Rngs) -> None:
    """Changes the number of slots of every layer of a model that can grow, in place.

    In a stack of layers (`nnx.vmap`, `nnx.scan`), of each of them. Values are kept bit
    for bit; new slots are free and fresh. A smaller capacity moves the slots of living
    seeds together. An optimizer state of the banks does not follow:
    `Program.grow_capacity` does this with all of a `TrainState`, or use
    `state.move_slots` on it.

    Args:
      model: holds `ChunkedLayer` or `SeedBed` modules.
      capacity: slots of each of them.
      rngs: key ``params`` draws the parameters of new slots.

    Raises:
      ValueError: if the model holds nothing that can grow, or the capacity is out of a
        layer's range, or too small for its living seeds, or layers are stacked along
        another axis than the first. Nothing has been changed then.
    """
    beds = [node for _, node in nnx.iter_graph(model) if isinstance(node, SeedBed)]
    if not beds:
        raise ValueError(
            "model must hold at least one ChunkedLayer or SeedBed: without one there "
            "is nothing that could grow"
        )
    layers = [_layers(bed) for bed in beds]
    sources = [[slot_sources(seeds, capacity) for seeds, _ in each] for each in layers]
    for bed, each, source in zip(beds, layers, sources, strict=True):
        stack, layout = bed.seeds.get_value().stage.shape[:-1], bed.layout
        grown = []
        for (seeds, bank), kept in zip(each, source, strict=True):
            fresh = init_bank(
                rngs.params(), capacity, bed.blueprints, layout.width, layout.features
            )
            grown.append((resize(seeds, capacity, kept), move_slots(bank, fresh, kept)))
        seeds, bank = jax.tree.map(
            lambda *x, stack=stack: jnp.stack(x).reshape(*stack, *x[0].shape), *grown
        )
        bed.seeds.set_value(seeds)
        bed.bank.set_value(bank)
        bed.probe.set_value(jnp.zeros((*stack, capacity), jnp.float32))


def _layers(bed: SeedBed) -> list[tuple[SeedState, Bank]]:
    """Seeds and bank of the one layer that a bed is of, or of each of a stack."""
    both = bed.seeds.get_value(), bed.bank.get_value()
    return [
        jax.tree.map(lambda x, at=index: x[at], both)
        for index in np.ndindex(stack_of(bed, "model"))
    ]
