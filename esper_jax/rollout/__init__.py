"""Safe rollout: what decides, outside of jit, which models get what is new."""

from esper_jax.rollout.flag_file import FlagFile
from esper_jax.rollout.flags import FEATURES, Decision, Flag, FlagError, bucket, decide
from esper_jax.run.features import Features

__all__ = [
    "FEATURES",
    "Decision",
    "Features",
    "Flag",
    "FlagError",
    "FlagFile",
    "bucket",
    "decide",
]
