"""The commands of ``esper-jax``: what each takes, and what it does."""

from esper_jax.commands.base import Command
from esper_jax.commands.bus import Bus
from esper_jax.commands.canary import Canary
from esper_jax.commands.checkpoints import Checkpoint
from esper_jax.commands.comparing import Ab, Bench
from esper_jax.commands.policy import LearnedPolicy
from esper_jax.commands.reading import Evaluate, Export, Report
from esper_jax.commands.rollout import Flags
from esper_jax.commands.training import Train

__all__ = [
    "COMMANDS",
    "Ab",
    "Bench",
    "Bus",
    "Canary",
    "Checkpoint",
    "Command",
    "Evaluate",
    "Export",
    "Flags",
    "LearnedPolicy",
    "Report",
    "Train",
]

COMMANDS: dict[str, type[Command]] = {
    "train": Train,
    "evaluate": Evaluate,
    "export": Export,
    "checkpoint": Checkpoint,
    "report": Report,
    "ab": Ab,
    "bench": Bench,
    "flags": Flags,
    "canary": Canary,
    "bus": Bus,
    "policy": LearnedPolicy,
}
"""By the word that calls them."""
