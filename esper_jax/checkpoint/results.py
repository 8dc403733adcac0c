"""What is found in a directory of checkpoints."""

import time
from typing import Any, NamedTuple

from esper_jax.checkpoint.location import printable
from esper_jax.checkpoint.manifest import Manifest

__all__ = ["Restored", "Verdict"]


class Restored(NamedTuple):
    """What `Checkpointer.restore` found."""

    state: Any
    step: int
    damaged: dict[int, str]
    """Newer steps that were skipped, and what is wrong with each."""
    manifest: Manifest
    resized: dict[str, tuple[int, int]]
    """Capacity as saved and as restored, for each layer where they differ."""


class Verdict(NamedTuple):
    """What `Checkpointer.verify` found."""

    step: int
    damage: str | None
    """What is wrong with the step; None if it is sound or gone."""
    manifest: Manifest | None
    """None if the step is damaged, or gone: removed by a writer since `steps`."""

    def __str__(self) -> str:
        if self.damage is None and self.manifest is None:
            return f"step {self.step}: gone, its writer has removed it"
        if self.manifest is None:
            return f"step {self.step}: damaged: {self.damage}"
        return f"step {self.step}: sound (schema {self.manifest.schema})"

    def in_full(self) -> str:
        """One line with what the manifest says of a sound step."""
        manifest = self.manifest
        if manifest is None:
            return str(self)
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.saved))
        size = sum(file.size for file in manifest.files.values())
        order = "" if manifest.order is None else f", save {manifest.order}"
        metrics = "".join(f", {k} {v:.6g}" for k, v in manifest.metrics.items())
        return printable(
            f"step {self.step}: schema {manifest.schema}, {saved}, {size} bytes"
            f"{order}{metrics}"
        )
