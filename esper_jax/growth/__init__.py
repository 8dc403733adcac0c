"""Growth itself: a transformation beside the host's training.

`Growth` is its face for a loop of one's own in Flax NNX. The rest are the pure parts.
"""

from esper_jax.growth.dictionaries import (
    GrowthFunctions,
    growth_functions,
    linen_growth,
)
from esper_jax.growth.recipe import Recipe
from esper_jax.growth.reports import LayerReport, SeedMoves, TickReport
from esper_jax.growth.showing import display
from esper_jax.growth.state import (
    GovernorMemory,
    GrowthState,
    Monitor,
    TrainState,
)
from esper_jax.growth.transformation import Growth, GrowthVariable

__all__ = [
    "GovernorMemory",
    "Growth",
    "GrowthFunctions",
    "GrowthState",
    "GrowthVariable",
    "LayerReport",
    "Monitor",
    "Recipe",
    "SeedMoves",
    "TickReport",
    "TrainState",
    "display",
    "growth_functions",
    "linen_growth",
]
