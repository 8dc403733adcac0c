"""Frozen schemas of checkpoints, and the way from each version to the next."""

from esper_jax.migrations.chain import (
    CURRENT,
    from_tree,
    migrate,
    to_tree,
    v1_to_v2,
    v2_to_v3,
)
from esper_jax.migrations.schema import MigrationError

__all__ = [
    "CURRENT",
    "MigrationError",
    "from_tree",
    "migrate",
    "to_tree",
    "v1_to_v2",
    "v2_to_v3",
]
