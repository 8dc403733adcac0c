"""Train on all devices: each holds the whole state and an equal part of the rows.

XLA_FLAGS=--xla_force_host_platform_device_count=4 python examples/several_devices.py
"""

import jax
import optax
from flax import nnx
from jax.sharding import AxisType

from esper_jax import ControllerConfig, build, fit, over_mesh
from esper_jax.data import digits
from esper_jax.hosts import MLP
from esper_jax.parallel.replicas import check_replicas

devices = jax.device_count()
mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,))
program = over_mesh(
    build(
        MLP(64, (32,), 10, num_seeds=4, rngs=nnx.Rngs(0)),
        optax.adam(1e-3),
        optax.adam(3e-4),
        controller_config=ControllerConfig(patience=1, threshold=0.5),
        axis_name="data",
    ),
    mesh,
)
data = digits()
rows = len(data.held_out[0]) // devices * devices  # a multiple of the devices
held_out = (data.held_out[0][:rows], data.held_out[1][:rows])
state = program.init(jax.random.key(0))
state = fit(program, state, data.train, held_out, ticks=8, batch_size=64)
check_replicas(state)
print(f"{devices} devices, one state; stages {state.seeds['layers/0'].stage.tolist()}")
