"""The commands of ``esper-jax``: what each takes, and what it does."""

from esper_jax.commands.base import Command
from esper_jax.commands.bus import Bus
from esper_jax.commands.checkpoints import Checkpoint
from esper_jax.commands.reading import Evaluate, Export, Report
from esper_jax.commands.training import Train

__all__ = [
    "COMMANDS",
    "Bus",
    "Checkpoint",
    "Command",
    "Evaluate",
    "Export",
    "Report",
    "Train",
]

COMMANDS: dict[str, type[Command]] = {
    "train": Train,
    "evaluate": Evaluate,
    "export": Export,
    "checkpoint": Checkpoint,
    "report": Report,
    "bus": Bus,
}
"""By the word that calls them."""
