"""A run on disk: train from a config into a folder, resume it, evaluate it."""

from esper_jax.run.folder import EventLog, RunError
from esper_jax.run.run import build_run, evaluate_run, train_run

__all__ = ["EventLog", "RunError", "build_run", "evaluate_run", "train_run"]
