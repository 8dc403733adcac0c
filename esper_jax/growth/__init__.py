"""Growth itself: the state of a run, its measurements, and the tick."""

from esper_jax.growth.recipe import Recipe
from esper_jax.growth.reports import LayerReport, SeedMoves, TickReport
from esper_jax.growth.state import GovernorMemory, Monitor, TrainState

__all__ = [
    "GovernorMemory",
    "LayerReport",
    "Monitor",
    "Recipe",
    "SeedMoves",
    "TickReport",
    "TrainState",
]
