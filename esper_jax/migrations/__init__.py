"""Old schemas of the seeds, and the way from each to the next."""

from esper_jax.migrations.chain import (
    CURRENT,
    MigrationError,
    from_tree,
    migrate,
    to_tree,
    v1_to_v2,
    v2_to_v3,
)

__all__ = [
    "CURRENT",
    "MigrationError",
    "from_tree",
    "migrate",
    "to_tree",
    "v1_to_v2",
    "v2_to_v3",
]
