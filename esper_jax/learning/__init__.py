"""Training of learned policies: whole runs as one pure function, by evolution."""

from esper_jax.learning.config import EvolutionConfig, Family, PolicyConfig
from esper_jax.learning.episodes import Episodes, Result
from esper_jax.learning.tasks import Task, draw_tasks, load_digits_task
from esper_jax.learning.train import train_policy

__all__ = [
    "Episodes",
    "EvolutionConfig",
    "Family",
    "PolicyConfig",
    "Result",
    "Task",
    "draw_tasks",
    "load_digits_task",
    "train_policy",
]
