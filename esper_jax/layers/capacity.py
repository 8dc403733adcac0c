"""More or fewer slots on a live model."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Key

from esper_jax.blueprints import Bank, Blueprint, init_bank
from esper_jax.chunks import ChunkLayout
from esper_jax.layers.bed import SeedBed, stack_of
from esper_jax.lifecycle.slots import move_slots, resize, slot_sources
from esper_jax.lifecycle.state import SeedState

__all__ = ["grow_capacity", "resize_layer"]


def resize_layer(
    layer: tuple[SeedState, Bank],
    source: Int[np.ndarray, " N"],
    blueprints: tuple[Blueprint, ...],
    layout: ChunkLayout,
    key: Key[Array, ""],
) -> tuple[SeedState, Bank]:
    """Seeds and bank of one layer with ``N`` slots.

    Args:
      layer: its seeds and its bank.
      source: as `slot_sources` returns it.
      blueprints: what may grow in the layer.
      layout: the layer's chunks.
      key: draws the parameters of new slots.
    """
    seeds, bank = layer
    slots = len(source)
    fresh = init_bank(key, slots, blueprints, layout.width, layout.features)
    return resize(seeds, slots, source), move_slots(bank, fresh, source)


def grow_capacity(model: nnx.Module, capacity: int, *, rngs: nnx.Rngs) -> None:
    """Changes the number of slots of every layer of a model that can grow, in place.

    In a stack of layers (`nnx.vmap`, `nnx.scan`), of each of them. Values are kept bit
    for bit; new slots are free and fresh. A smaller capacity moves the slots of living
    seeds together. An optimizer state of the banks does not follow: use
    `Program.grow_capacity` on a whole `TrainState`, or `lifecycle.slots.move_slots` on
    the optimizer state.

    Args:
      model: holds `ChunkedLayer` or `SeedBed` modules.
      capacity: slots of each of them.
      rngs: key ``params`` draws the parameters of new slots.

    Raises:
      ValueError: if the model holds nothing that can grow, if the capacity is out of a
        layer's range or too small for its living seeds, or if layers are stacked along
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
        stack = bed.seeds.get_value().stage.shape[:-1]
        grown = [
            resize_layer(layer, kept, bed.blueprints, bed.layout, rngs.params())
            for layer, kept in zip(each, source, strict=True)
        ]
        seeds, bank = jax.tree.map(
            lambda *x, stack=stack: jnp.stack(x).reshape(*stack, *x[0].shape), *grown
        )
        bed.seeds.set_value(seeds)
        bed.bank.set_value(bank)
        bed.probe.set_value(jnp.zeros((*stack, capacity), jnp.float32))


def _layers(bed: SeedBed) -> list[tuple[SeedState, Bank]]:
    """Seeds and bank of a bed's one layer, or of each layer of its stack."""
    both = bed.seeds.get_value(), bed.bank.get_value()
    return [
        jax.tree.map(lambda x, at=index: x[at], both)
        for index in np.ndindex(stack_of(bed, "model"))
    ]
