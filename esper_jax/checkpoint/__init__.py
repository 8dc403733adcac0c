"""Checkpoints with checksums: a restore gives what was saved, or says why not."""

from esper_jax.checkpoint.checkpointer import Checkpointer, Restored, Verdict
from esper_jax.checkpoint.retention import Retention
from esper_jax.checkpoint.step_directory import CheckpointError

__all__ = ["CheckpointError", "Checkpointer", "Restored", "Retention", "Verdict"]
