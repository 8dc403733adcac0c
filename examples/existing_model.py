"""Make layers of an existing model growable, without rewriting the model, and train it.

python examples/existing_model.py
"""

import jax
import numpy as np
import optax
from flax import nnx

from esper_jax import ChunkedLayer, ControllerConfig, build, fit, make_growable


class Model(nnx.Module):
    """Your model, as it is."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(11, 16, rngs=rngs)
        self.conv = nnx.Conv(16, 16, (3,), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.head = nnx.Sequential(nnx.Linear(16, 32, rngs=rngs), nnx.relu)
        self.out = nnx.Linear(32, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv(self.embed(x)))
        x = self.norm(x + self.attention(x)).mean(axis=1)
        return self.out(self.head(x))


model = Model(nnx.Rngs(0))
tokens = np.random.default_rng(0).integers(0, 11, (512, 8)).astype(np.int32)
labels = (tokens[:, 0] * tokens[:, 1] % 3).astype(np.int32)
before = model(tokens)

rngs = nnx.Rngs(1)
make_growable(model, nnx.Embed, num_seeds=2, rngs=rngs)  # by type
make_growable(model, ["conv", "attention", "norm"], 4, rngs=rngs)  # by path
make_growable(model, "head", 8, features=32, rngs=rngs)  # a whole sub-model
assert np.array_equal(model(tokens), before)  # the same until a seed grafts
print("the convolution's kernel is still there:", model.conv.kernel.shape)

program = build(
    model,
    optax.adam(3e-3),
    optax.adam(1e-3),
    controller_config=ControllerConfig(patience=2),
)
state = program.init(jax.random.key(0))
data, held_out = (tokens[:384], labels[:384]), (tokens[384:], labels[384:])
state = fit(program, state, data, held_out, ticks=12, batch_size=64)
for path, seeds in state.seeds.items():
    print(f"{path:10} stages {seeds.stage.tolist()}")

grown = program.model(state)
grown.set_attributes(ChunkedLayer, enabled=False)  # runs the plain model
print("accuracy of the host alone:", float((grown(tokens).argmax(-1) == labels).mean()))
