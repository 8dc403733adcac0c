"""What decides when, where, what and how to grow."""

from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.heuristic import Decide, decide, heuristic
from esper_jax.policy.interface import LayerShape, Policy, PolicyFactory, Setting
from esper_jax.policy.memory import ControllerMemory, Reason, init_memory

__all__ = [
    "ControllerConfig",
    "ControllerMemory",
    "Decide",
    "LayerShape",
    "Policy",
    "PolicyFactory",
    "Reason",
    "Setting",
    "decide",
    "heuristic",
    "init_memory",
]
