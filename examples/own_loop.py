"""Growth beside a loop of one's own. Lines that growth adds are marked ``# +``."""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from quick_lives import options

import esper_jax as ej
from esper_jax.data import digits

data, rngs = digits(), nnx.Rngs(0)
first, last = nnx.Linear(64, 24, rngs=rngs), nnx.Linear(24, 10, rngs=rngs)
model = nnx.Sequential(first, nnx.relu, nnx.Dropout(0.1, rngs=rngs), last)
ej.make_growable(model, "layers/0", num_seeds=4, rngs=rngs)  # +
growth = ej.Growth(model, optax.adam(1e-2), **options)  # +
optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)


def loss_fn(model, batch):
    logits = model(batch["image"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return losses.mean(), jnp.mean(logits.argmax(-1) == batch["label"])


@nnx.jit
def train_step(model, optimizer, growth, batch):
    grad_fn = nnx.value_and_grad(loss_fn, has_aux=True, argnums=growth.argnums)  # +
    (loss, _), grads = grad_fn(model, batch)
    optimizer.update(model, grads)
    growth.update(model, grads, loss=loss)  # +


@nnx.jit
def evaluate(model):
    x, y = data.held_out
    return loss_fn(nnx.view(model, deterministic=True), {"image": x, "label": y})


def batches(epoch):
    x, y = data.train
    for rows in np.random.default_rng(epoch).permutation(1024).reshape(-1, 64):
        yield {"image": x[rows], "label": y[rows]}


for epoch in range(24):
    for batch in batches(epoch):
        train_step(model, optimizer, growth, batch)
    report = growth.tick(model, evaluate)  # +
print("seeds:", [ej.Stage(s).name for s in report.layers["layers/0"].stage])
print(f"held-out accuracy: {float(evaluate(ej.harvest(model))[1]):.3f}")
