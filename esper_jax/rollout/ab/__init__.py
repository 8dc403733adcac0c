"""A/B tests: is another config better? Paired runs, and what they say."""

from esper_jax.rollout.ab.design import Design, told
from esper_jax.rollout.ab.plan import Plan
from esper_jax.rollout.ab.running import Result, run_ab
from esper_jax.rollout.ab.verdict import (
    Finding,
    Pair,
    advised,
    findings,
    is_decided,
    table,
)

__all__ = [
    "Design",
    "Finding",
    "Pair",
    "Plan",
    "Result",
    "advised",
    "findings",
    "is_decided",
    "run_ab",
    "table",
    "told",
]
