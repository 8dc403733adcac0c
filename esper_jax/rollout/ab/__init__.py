"""A/B tests: is another config better? Paired runs, and what they say."""

from esper_jax.rollout.ab.plan import Plan
from esper_jax.rollout.ab.running import Result, run_ab
from esper_jax.rollout.ab.verdict import Finding, Pair, findings

__all__ = ["Finding", "Pair", "Plan", "Result", "findings", "run_ab"]
