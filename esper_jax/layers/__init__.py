"""Flax layers that can grow."""

from esper_jax.layers.bed import (
    DEFAULT_CAPACITY,
    DEFAULT_STATISTICS_ROWS,
    SeedBed,
    stack_of,
)
from esper_jax.layers.capacity import grow_capacity
from esper_jax.layers.chunked import ChunkedLayer
from esper_jax.layers.corrections import CorrectedLayer, Corrections
from esper_jax.layers.growable import make_growable
from esper_jax.layers.harvest import harvest
from esper_jax.layers.variables import (
    BlueprintParam,
    GraftProbe,
    SeedVariable,
    VariableTree,
)

__all__ = [
    "DEFAULT_CAPACITY",
    "DEFAULT_STATISTICS_ROWS",
    "BlueprintParam",
    "ChunkedLayer",
    "CorrectedLayer",
    "Corrections",
    "GraftProbe",
    "SeedBed",
    "SeedVariable",
    "VariableTree",
    "grow_capacity",
    "harvest",
    "make_growable",
    "stack_of",
]
