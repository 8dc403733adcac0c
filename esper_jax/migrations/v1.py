"""Schema 1: the seeds of one layer as the first ancestor saved them.

Frozen: data of this file never change. Columns of ``state_tensor`` are `COLUMNS`;
``telemetry_buffer`` is the sum and the sum of squares of the chunk's activations.
"""

from esper_jax.migrations.schema import Leaf, Schema

__all__ = ["COLUMNS", "SCHEMA"]

COLUMNS = ("stage", "blueprint", "epochs", "strategy")
"""Columns of ``state_tensor``. A blueprint of -1 is none."""

SCHEMA = Schema(
    version=1,
    mark="state_tensor",
    seeds={
        "state_tensor": Leaf("int", "S 4"),
        "health": Leaf("float", "S"),
        "error_count": Leaf("int", "S"),
        "alpha_blend": Leaf("float", "S"),
        "telemetry_buffer": Leaf("float", "S 2"),
    },
    codes={
        "stage": ("DORMANT", "LOADING", "ACTIVE", "ERROR_RECOVERY", "FOSSILIZED"),
    },
    digest="299d0f3aab03a349dbbd45219e89a3a84e0729a0c4fd3e3c3462a74e8a24b246",
)
