"""A rollout that advances, holds or rolls back by itself.

Read `plan`, `evidence` and `decisions` first; they are pure. `canary` joins them with a
flag (`dial`), a `journal` and the `observations` of a service or of `runs`.
"""

from esper_jax.rollout.canary.canary import BlindError, Canary, Report, report
from esper_jax.rollout.canary.decisions import Action, State, begin, decide
from esper_jax.rollout.canary.dial import Dial, FlagDial
from esper_jax.rollout.canary.observations import Observer
from esper_jax.rollout.canary.plan import CanaryError, Plan

__all__ = [
    "Action",
    "BlindError",
    "Canary",
    "CanaryError",
    "Dial",
    "FlagDial",
    "Observer",
    "Plan",
    "Report",
    "State",
    "begin",
    "decide",
    "report",
]
