"""What decides when, where, what and how to grow."""

from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.heuristic import Decide, decide, heuristic
from esper_jax.policy.interface import LayerShape, Policy, PolicyFactory, Setting
from esper_jax.policy.learned import (
    LearnedConfig,
    LearnedMemory,
    learned,
    learned_lives,
    load,
)
from esper_jax.policy.learned_file import PolicyFileError
from esper_jax.policy.memory import ControllerMemory, Reason, init_memory
from esper_jax.policy.trial import TrialMemory, trial
from esper_jax.policy.trial_config import TrialConfig, trial_lives

__all__ = [
    "ControllerConfig",
    "ControllerMemory",
    "Decide",
    "LayerShape",
    "LearnedConfig",
    "LearnedMemory",
    "Policy",
    "PolicyFactory",
    "PolicyFileError",
    "Reason",
    "Setting",
    "TrialConfig",
    "TrialMemory",
    "decide",
    "heuristic",
    "init_memory",
    "learned",
    "learned_lives",
    "load",
    "trial",
    "trial_lives",
]
