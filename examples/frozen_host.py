"""A frozen host, trained on digits, adapts to inverted ones by what grows in it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import esper_jax as ej
from esper_jax.data import digits

data, rngs = digits(), nnx.Rngs(0)
layers = nnx.Linear(64, 48, rngs=rngs), nnx.relu, nnx.Linear(48, 10, rngs=rngs)
model = nnx.Sequential(*layers)
order = np.random.default_rng(0).integers(len(data.train[0]), size=800 * 64)
images, labels = data.train[0][order], data.train[1][order]


def loss_fn(model, batch):
    logits = model(batch[0])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
    return losses.mean(), jnp.mean(logits.argmax(-1) == batch[1])


@nnx.jit
def pretrain(model, optimizer, batch):
    optimizer.update(model, nnx.grad(loss_fn, has_aux=True)(model, batch)[0])


@nnx.jit
def adapt(model, growth, batch):
    grad_fn = nnx.value_and_grad(loss_fn, has_aux=True, argnums=growth.argnums)
    (loss, _), grads = grad_fn(model, batch)
    growth.update(model, grads, loss=loss)


batches = [slice(i, i + 64) for i in range(0, len(images), 64)]
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
for rows in batches:
    pretrain(model, optimizer, (images[rows], labels[rows]))
ej.make_growable(model, nnx.Linear, num_seeds=2, blueprints=["context"], rngs=rngs)
host = jax.tree.map(np.asarray, nnx.state(model, nnx.Param))
lives = ej.LifecycleConfig(
    min_epochs=(0, 0, 1, 6, 1, 1, 30, 0, 1, 0, 1),
    reconstruction_threshold=1e9,
    min_stability=-1e9,
    min_final_stability=-1e9,
    grafting=ej.GraftConfig(ramp_duration=6),
)
when = ej.ControllerConfig(when="period", period=1, births=4, max_training=4)
options = {"lifecycle_config": lives, "controller_config": when, "wrt": None}
growth = ej.Growth(model, optax.adam(3e-3), **options)
held_out = 1 - data.held_out[0], data.held_out[1]
for i, rows in enumerate(batches, start=1):
    adapt(model, growth, (1 - images[rows], labels[rows]))
    if i % 16 == 0:
        report = growth.tick(model, lambda m: loss_fn(m, held_out))
print("stages:", {name: seeds.stage.tolist() for name, seeds in report.layers.items()})
print(f"held-out accuracy: {float(loss_fn(ej.harvest(model), held_out)[1]):.3f}")
jax.tree.map(np.testing.assert_array_equal, host, nnx.state(model, nnx.Param))
