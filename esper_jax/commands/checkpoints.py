"""``esper-jax checkpoint``."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from esper_jax.commands.base import Errand

__all__ = ["Checkpoint"]


@dataclasses.dataclass(frozen=True)
class Checkpoint(Errand):
    """List, verify or migrate the checkpoints of a run.

    verify reads every byte, prints one line per step and exits with status 1 if any
    step is damaged. migrate rewrites checkpoints of an older schema in today's schema.
    """

    action: Annotated[Literal["list", "verify", "migrate"], tyro.conf.Positional]
    """What to do."""
    dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of the run, or of its checkpoints."""

    def only_reads(self) -> bool:
        return self.action != "migrate"

    def act(self) -> int:
        from esper_jax.checkpoint import CheckpointError
        from esper_jax.checkpoint.checkpointer import Checkpointer
        from esper_jax.run.folder import RunFolder

        inner = RunFolder(self.dir).checkpoints
        with Checkpointer(inner if inner.is_dir() else self.dir) as checkpoints:
            steps = checkpoints.steps()
            if not steps:
                raise CheckpointError(f"{checkpoints.directory} holds no checkpoint")
            if self.action == "list":
                for step in steps:
                    print(checkpoints.describe(step))
                return 0
            migrate = self.action == "migrate"
            sound = [_verify(checkpoints, step, migrate) for step in steps]
        return 0 if all(sound) else 1


def _verify(checkpoints: Any, step: int, migrate: bool) -> bool:
    """Prints whether a step is sound, and migrates it first if asked to.

    Args:
      checkpoints: the `Checkpointer`, whose module is imported late.
      step: to look at.
      migrate: whether to rewrite the step in today's schema.

    Returns:
      Whether it is sound.
    """
    verdict = checkpoints.verify(step)
    if verdict.manifest is None or not migrate:
        print(verdict)
        return verdict.manifest is not None
    notes = checkpoints.migrate(step)
    after = checkpoints.verify(step)
    changed = after.manifest != verdict.manifest
    print(f"{after}, {f'was {verdict.manifest.schema}' if changed else 'as it was'}")
    for note in notes:
        print(f"  {note}")
    return True
