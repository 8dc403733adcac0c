"""Grow neural networks while they train, in JAX and Flax.

`ChunkedLayer` makes a layer able to grow; `build` and `fit` train a model that holds
some. `blend`, `lifecycle` and `per_slot` work on plain arrays, without Flax.
"""

from esper_jax import lifecycle
from esper_jax.chunks import ChunkLayout
from esper_jax.controller import ControllerConfig
from esper_jax.governor import Governor, GovernorConfig
from esper_jax.grafting import GraftConfig, Strategy
from esper_jax.growable import make_growable
from esper_jax.kernels.blend import blend
from esper_jax.layers import (
    BlueprintParam,
    ChunkedLayer,
    GraftProbe,
    SeedBed,
    SeedVariable,
    grow_capacity,
)
from esper_jax.lifecycle import Commands, LifecycleConfig
from esper_jax.optim import per_slot
from esper_jax.parallel import over_mesh
from esper_jax.signals import Signals
from esper_jax.stages import Outcome, Stage
from esper_jax.state import SeedState, coefficients, init_seeds
from esper_jax.train import build, fit

__version__ = "0.1.0"

__all__ = [
    "BlueprintParam",
    "ChunkLayout",
    "ChunkedLayer",
    "Commands",
    "ControllerConfig",
    "Governor",
    "GovernorConfig",
    "GraftConfig",
    "GraftProbe",
    "LifecycleConfig",
    "Outcome",
    "SeedBed",
    "SeedState",
    "SeedVariable",
    "Signals",
    "Stage",
    "Strategy",
    "blend",
    "build",
    "coefficients",
    "fit",
    "grow_capacity",
    "init_seeds",
    "lifecycle",
    "make_growable",
    "over_mesh",
    "per_slot",
]
