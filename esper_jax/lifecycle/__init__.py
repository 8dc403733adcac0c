"""The life of a seed: stages, state, rules and transitions, as pure functions.

To read the code, start with `stages`, `state` and `transitions`.
"""

from esper_jax.lifecycle.commands import Commands, commands_for, no_commands
from esper_jax.lifecycle.grafting import GraftConfig, Strategy
from esper_jax.lifecycle.rules import Gate, LifecycleConfig, gates, gates_pass
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import Outcome, Stage
from esper_jax.lifecycle.state import SeedState, coefficients, init_seeds
from esper_jax.lifecycle.transitions import age, step, transition

__all__ = [
    "Commands",
    "Gate",
    "GraftConfig",
    "LifecycleConfig",
    "Outcome",
    "SeedState",
    "Signals",
    "Stage",
    "Strategy",
    "age",
    "coefficients",
    "commands_for",
    "gates",
    "gates_pass",
    "init_seeds",
    "no_commands",
    "step",
    "transition",
]
