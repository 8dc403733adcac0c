"""Our own loops: build a program from a model, and run it."""

from esper_jax.train.batches import Passes
from esper_jax.train.faults import GovernorConfig
from esper_jax.train.governor import Governor
from esper_jax.train.loop import epoch_order, fit
from esper_jax.train.losses import classification
from esper_jax.train.mesh import over_mesh
from esper_jax.train.program import Program, build
from esper_jax.train.retreat import Rollback, TrainingStopped
from esper_jax.train.scan import scan_fit, start_from
from esper_jax.train.stop import Interrupted, Stop

__all__ = [
    "Governor",
    "GovernorConfig",
    "Interrupted",
    "Passes",
    "Program",
    "Rollback",
    "Stop",
    "TrainingStopped",
    "build",
    "classification",
    "epoch_order",
    "fit",
    "over_mesh",
    "scan_fit",
    "start_from",
]
