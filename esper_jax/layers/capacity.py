"""Changes the number of slots of a live model."""

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
      layer: the layer's seeds and bank.
      source: the old slot of each new slot, as `slot_sources` returns it.
      blueprints: the layer's blueprints.
      layout: the layer's chunks.
      key: draws the parameters of new slots.

    Returns:
      The resized seeds and bank.
    """
    seeds, bank = layer
    slots = len(source)
    fresh = init_bank(key, slots, blueprints, layout.width, layout.features)
    return resize(seeds, slots, source), move_slots(bank, fresh, source)


def grow_capacity(model: nnx.Module, capacity: int, *, rngs: nnx.Rngs) -> None:
    """Changes the number of slots of every growable layer of a model, in place.

    Each layer of a stack (`nnx.vmap`, `nnx.scan`) is changed. Existing values are kept
    bit for bit; new slots are free, with fresh parameters. A smaller capacity moves the
    slots of living seeds together.

    The optimizer state of the banks is not changed. To change it too, use
    `Program.grow_capacity` on the whole `TrainState`, or `lifecycle.slots.move_slots`
    on the optimizer state.

    Args:
      model: holds `ChunkedLayer` or `SeedBed` modules.
      capacity: new number of slots of each of them.
      rngs: its key ``params`` draws the parameters of new slots.

    Raises:
      ValueError: if the model holds no `ChunkedLayer` or `SeedBed`, if the capacity is
        out of a layer's range or too small for its living seeds, or if layers are
        stacked along an axis other than the first. The model is then unchanged.
    """
    beds = [node for _, node in nnx.iter_graph(model) if isinstance(node, SeedBed)]
    if not beds:
        raise ValueError(
            "model must hold at least one ChunkedLayer or SeedBed: without one, "
            "nothing can grow"
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
    """Seeds and bank of each layer of a bed: one, or all of its stack."""
    both = bed.seeds.get_value(), bed.bank.get_value()
    return [
        jax.tree.map(lambda x, at=index: x[at], both)
        for index in np.ndindex(stack_of(bed, "model"))
    ]
