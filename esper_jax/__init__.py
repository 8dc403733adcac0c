"""Grow neural networks while they train, in JAX and Flax.

`Growth` grows a model beside your own loop; `build` and `fit` are a loop of ours.
"""

# First of all: it takes the signals of the command, and the others import for seconds.
from esper_jax import _early  # noqa: F401  # isort: skip
from esper_jax import _old_paths, lifecycle
from esper_jax.chunks import ChunkLayout
from esper_jax.growth.transformation import Growth
from esper_jax.kernels.blend import blend
from esper_jax.layers import ChunkedLayer, SeedBed, grow_capacity, harvest
from esper_jax.layers.growable import make_growable
from esper_jax.layers.variables import BlueprintParam, GraftProbe, SeedVariable
from esper_jax.lifecycle import Commands, Outcome, Signals, Stage
from esper_jax.lifecycle.grafting import GraftConfig, Strategy
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.state import SeedState, coefficients, init_seeds
from esper_jax.monitor.monitor import Monitor
from esper_jax.optim import per_slot
from esper_jax.policy.config import ControllerConfig
from esper_jax.train import Governor, GovernorConfig, build, fit, over_mesh

__version__ = "0.2.0"

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
    "Growth",
    "LifecycleConfig",
    "Monitor",
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
    "harvest",
    "init_seeds",
    "lifecycle",
    "make_growable",
    "over_mesh",
    "per_slot",
]

_old_paths.install()
