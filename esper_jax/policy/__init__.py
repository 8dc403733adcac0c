"""What decides when, where, what and how to grow."""

from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.heuristic import Decide, decide
from esper_jax.policy.memory import ControllerMemory, Reason, init_memory

__all__ = [
    "ControllerConfig",
    "ControllerMemory",
    "Decide",
    "Reason",
    "decide",
    "init_memory",
]
