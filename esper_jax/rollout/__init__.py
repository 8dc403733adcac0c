"""Safe rollout: what decides, outside of jit, which models get what is new."""

from esper_jax.rollout.canary import (
    Canary,
    CanaryError,
    Dial,
    FlagDial,
    Observer,
    Plan,
)
from esper_jax.rollout.flag_file import FlagFile
from esper_jax.rollout.flags import FEATURES, Decision, Flag, FlagError, bucket, decide
from esper_jax.rollout.hybrid import Comparison, HybridLayer
from esper_jax.run.features import Features, apply_features, policy_under

__all__ = [
    "FEATURES",
    "Canary",
    "CanaryError",
    "Comparison",
    "Decision",
    "Dial",
    "Features",
    "Flag",
    "FlagDial",
    "FlagError",
    "FlagFile",
    "HybridLayer",
    "Observer",
    "Plan",
    "apply_features",
    "bucket",
    "decide",
    "policy_under",
]
