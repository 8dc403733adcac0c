"""Flax layers that can grow."""

from esper_jax.layers.bed import (
    DEFAULT_CAPACITY,
    DEFAULT_STATISTICS_ROWS,
    BlueprintParam,
    GraftProbe,
    SeedBed,
    SeedVariable,
    stack_of,
)
from esper_jax.layers.capacity import grow_capacity
from esper_jax.layers.chunked import ChunkedLayer
from esper_jax.layers.growable import make_growable

__all__ = [
    "DEFAULT_CAPACITY",
    "DEFAULT_STATISTICS_ROWS",
    "BlueprintParam",
    "ChunkedLayer",
    "GraftProbe",
    "SeedBed",
    "SeedVariable",
    "grow_capacity",
    "make_growable",
    "stack_of",
]
