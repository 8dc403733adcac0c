"""Schema 2: the seeds of one layer as the second ancestor saved them.

Frozen: data of this file never change. Columns of ``state_tensor`` are `COLUMNS`.
``transition_history`` is a ring of (source, target) stages, (0, 0) for none, and
``history_pointers`` the place where the next transition would be written.
``telemetry_buffer`` is as in schema 1. ``health`` and ``alpha_blend`` are optional: a
tree that came from schema 1 has them, so that nothing is rounded or lost on the way.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from esper_jax.migrations import v1
from esper_jax.migrations.schema import Leaf, Schema, Tree, refuse, seeds_in_words

__all__ = ["COLUMNS", "METRICS", "SCHEMA"]

COLUMNS = (
    "stage",
    "blueprint",
    "epochs",
    "strategy",
    "parent stage",
    "checkpoint",
    "score",
    "error count",
)
"""Columns of ``state_tensor``: blueprint and checkpoint id are -1 for none, the score
is the health times 1000."""

METRICS = ("loss", "accuracy", "stability", "efficiency")
"""Columns of ``performance_metrics``; NaN or 0 is not measured."""

_STAGES = (
    "DORMANT",
    "GERMINATED",
    "TRAINING",
    "GRAFTING",
    "STABILIZATION",
    "EVALUATING",
    "FINE_TUNING",
    "FOSSILIZED",
    "CULLED",
    "CANCELLED",
    "ROLLED_BACK",
)

_FROM_V1 = {
    "DORMANT": "DORMANT",
    "LOADING": "GERMINATED",
    "ACTIVE": "FINE_TUNING",
    "ERROR_RECOVERY": "CULLED",
    "FOSSILIZED": "FOSSILIZED",
}
"""Stage of schema 2 for each of schema 1."""


def _upgrade(
    tree: Mapping[str, Any], capacity: int | None = None
) -> tuple[Tree, list[str]]:
    """From the five stages of schema 1 to the eleven of schema 2."""
    old = v1.SCHEMA.checked(tree)
    stage, *others = old["state_tensor"].T
    s, alpha = len(stage), old["alpha_blend"]
    stages = v1.SCHEMA.codes["stage"]
    refuse(
        "stage",
        stage,
        (stage < 0) | (stage >= len(stages)),
        f"from 0 to {len(stages) - 1}",
    )
    stage = np.array([_STAGES.index(_FROM_V1[str(name)]) for name in stages])[stage]
    score = np.round(old["health"].astype(np.float64) * 1000)
    columns = [
        stage,
        *others,
        np.full(s, _STAGES.index("DORMANT")),
        np.full(s, -1),
        np.clip(np.nan_to_num(score, nan=0.0), -(2**31), 2**31 - 1),
        old["error_count"],
    ]
    new = {
        "state_tensor": np.stack(columns, axis=1).astype(np.int64),
        "transition_history": np.zeros((s, 10, 2), np.int32),
        "history_pointers": np.zeros(s, np.int32),
        "performance_metrics": np.full((s, 4), np.nan, np.float32),
        "telemetry_buffer": old["telemetry_buffer"].copy(),
        "health": old["health"].copy(),
        "alpha_blend": alpha.copy(),
    }
    notes = []
    lived = int(np.sum(stage != _STAGES.index("DORMANT")))
    if lived:
        notes.append(
            f"{seeds_in_words(lived)}: schema 1 recorded no parent stage and no "
            "history; the parent is set to DORMANT, the history is empty"
        )
    partial = int(np.sum((stage == _STAGES.index("FINE_TUNING")) & (alpha < 1)))
    if partial:
        notes.append(
            f"{seeds_in_words(partial)} in ACTIVE with alpha below 1: kept as position "
            "of the ramp; in FINE_TUNING the blueprint counts in full"
        )
    return new, notes


SCHEMA = Schema(
    version=2,
    mark="state_tensor",
    seeds={
        "state_tensor": Leaf("int", "S 8"),
        "transition_history": Leaf("int", "S 10 2"),
        "history_pointers": Leaf("int", "S"),
        "performance_metrics": Leaf("float", "S 4"),
        "telemetry_buffer": Leaf("float", "S 2"),
        "health": Leaf("float", "S", optional=True),
        "alpha_blend": Leaf("float", "S", optional=True),
    },
    codes={
        "stage": _STAGES,
        "strategy": (
            "LINEAR",
            "DRIFT_CONTROLLED",
            "MOMENTUM",
            "ADAPTIVE",
            "STABILITY",
            "PERFORMANCE_LINKED",
            "GRAD_NORM_GATED",
        ),
        "blueprint": range(127),
    },
    upgrade=_upgrade,
    digest="8deea22e7333c522ccb876e34adde79535ae6687e7145e4cc0b3444e17fdab3c",
)
