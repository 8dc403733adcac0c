"""Baselines: is this code still as fast? Saved programs, run again beside today's."""

from esper_jax.rollout.baseline.comparison import Comparison, Figures, Part
from esper_jax.rollout.baseline.exported import Exported, compiled, export_program, load
from esper_jax.rollout.baseline.saved import Prepared, compare, measure, prepare, save
from esper_jax.rollout.baseline.timing import Ratio, ratio_of, take_turns

__all__ = [
    "Comparison",
    "Exported",
    "Figures",
    "Part",
    "Prepared",
    "Ratio",
    "compare",
    "compiled",
    "export_program",
    "load",
    "measure",
    "prepare",
    "ratio_of",
    "save",
    "take_turns",
]
