"""A run on disk: train from a config, resume it, evaluate it, export it."""

from esper_jax.run.build import build_run
from esper_jax.run.export import export_run
from esper_jax.run.folder import RunError, RunStopped
from esper_jax.run.logs import EventLog
from esper_jax.run.run import evaluate_run, train_run

__all__ = [
    "EventLog",
    "RunError",
    "RunStopped",
    "build_run",
    "evaluate_run",
    "export_run",
    "train_run",
]
