"""Baselines: is this code still as fast? Saved programs, run again beside today's."""

from esper_jax.rollout.baseline.comparison import Comparison, Figures, Part
from esper_jax.rollout.baseline.saved import Prepared, compare, measure, prepare, save

__all__ = [
    "Comparison",
    "Figures",
    "Part",
    "Prepared",
    "compare",
    "measure",
    "prepare",
    "save",
]
