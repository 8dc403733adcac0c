"""The vocabulary of a seed's life: stages, outcomes, and which stage may follow which.

The integer codes are part of the checkpoint format and never change.
"""

import enum
from typing import Literal

import numpy as np
from jaxtyping import Array, Bool, Int

__all__ = [
    "LEGAL",
    "LIVING",
    "NO_REQUEST",
    "NUM_STAGES",
    "Incubation",
    "Outcome",
    "Stage",
    "is_active",
]


class Stage(enum.IntEnum):
    """Where a seed stands in its life."""

    DORMANT = 0
    GERMINATED = 1
    TRAINING = 2
    GRAFTING = 3
    STABILIZATION = 4
    EVALUATING = 5
    FINE_TUNING = 6
    FOSSILIZED = 7
    CULLED = 8
    CANCELLED = 9
    ROLLED_BACK = 10


NUM_STAGES = len(Stage)


NO_REQUEST = -1
"""In a command: leave this seed (or this field of it) as it is."""


class Outcome(enum.IntEnum):
    """What became of a request. All but ``NONE`` and ``OK`` are refusals."""

    NONE = 0
    """Nothing was requested."""
    OK = 1
    ILLEGAL = 2
    """Not in the table of legal transitions."""
    TOO_EARLY = 3
    """Fewer epochs in the stage than its minimum."""
    GATE = 4
    """A measured value does not meet the gate, or was not measured."""
    NO_CAPACITY = 5
    """Germination without a free slot."""
    BATCH = 6
    """Allowed by itself, but another request of its atomic batch was refused."""


LEGAL: dict[Stage, tuple[Stage, ...]] = {
    Stage.DORMANT: (Stage.GERMINATED,),
    Stage.GERMINATED: (Stage.TRAINING, Stage.CANCELLED),
    Stage.TRAINING: (
        Stage.GRAFTING,
        Stage.CULLED,
        Stage.CANCELLED,
        Stage.ROLLED_BACK,
    ),
    Stage.GRAFTING: (Stage.STABILIZATION, Stage.ROLLED_BACK),
    Stage.STABILIZATION: (Stage.EVALUATING, Stage.ROLLED_BACK),
    Stage.EVALUATING: (Stage.FINE_TUNING, Stage.CULLED, Stage.ROLLED_BACK),
    Stage.FINE_TUNING: (Stage.FOSSILIZED, Stage.CULLED, Stage.ROLLED_BACK),
    Stage.FOSSILIZED: (),
    Stage.CULLED: (Stage.DORMANT,),
    Stage.CANCELLED: (Stage.DORMANT,),
    Stage.ROLLED_BACK: (Stage.DORMANT,),
}


LIVING = np.array([Stage.GERMINATED <= stage <= Stage.FOSSILIZED for stage in Stage])
"""``LIVING[stage]``: whether a seed in that stage owns a slot."""


def is_active(stage: Int[Array, "*S"]) -> Bool[Array, "*S"]:
    """Whether each seed has learned something and is not kept for good.

    These are the stages from TRAINING to FINE_TUNING.
    """
    return (stage >= Stage.TRAINING) & (stage <= Stage.FINE_TUNING)


Incubation = Literal["task", "bounded", "reconstruction"]
"""How a seed in TRAINING learns: straight through from the task's gradient; from that,
with a pull on its correction that grows until it is as large as the activation; or from
``mean((f(y) - y)**2)`` on ``stop_gradient(y)``."""
