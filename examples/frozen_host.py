"""A frozen host adapts to new data by what grows in it; its own weights never change."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import esper_jax as ej
from esper_jax.data import digits

data, rngs = digits(), nnx.Rngs(0)
first, last = nnx.Linear(64, 48, rngs=rngs), nnx.Linear(48, 10, rngs=rngs)
model = nnx.Sequential(first, nnx.relu, last)


def loss_fn(model, batch):
    logits = model(batch[0])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
    return losses.mean(), jnp.mean(logits.argmax(-1) == batch[1])


@nnx.jit
def pretrain(model, optimizer, batch):
    grads, _ = nnx.grad(loss_fn, has_aux=True)(model, batch)
    optimizer.update(model, grads)


def batches(epoch, change):
    x, y = data.train
    for rows in np.random.default_rng(epoch).permutation(1024).reshape(-1, 64):
        yield change(x[rows]), y[rows]


optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
for epoch in range(20):
    for batch in batches(epoch, lambda x: x):
        pretrain(model, optimizer, batch)

ej.make_growable(model, nnx.Linear, num_seeds=2, blueprints=["context"], rngs=rngs)
host = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
quick = ej.LifecycleConfig(
    min_epochs=(0, 0, 1, 2, 1, 1, 4, 0, 1, 0, 1),
    reconstruction_threshold=1e9,
    min_improvement=0.0,
    min_stability=-1e9,
    min_final_stability=-1e9,
    grafting=ej.GraftConfig(ramp_duration=2),
)
policy = ej.ControllerConfig(when="period", period=1, births=4, max_training=4)
growth = ej.Growth(
    model,
    optax.adam(1e-2),
    wrt=None,  # no gradients of the host are computed
    lifecycle_config=quick,
    controller_config=policy,
)


@nnx.jit
def adapt(model, growth, batch):
    grad_fn = nnx.value_and_grad(loss_fn, has_aux=True, argnums=growth.argnums)
    (loss, _), grads = grad_fn(model, batch)
    growth.update(model, grads, loss=loss)


def inverted(x):
    return 1 - x


@nnx.jit
def evaluate(model):
    x, y = data.held_out
    return loss_fn(model, (inverted(x), y))


print(f"before: {float(evaluate(nnx.view(model, deterministic=True))[1]):.3f}")
for epoch in range(20):
    for batch in batches(epoch, inverted):
        adapt(model, growth, batch)
    report = growth.tick(model, evaluate)
print(f"after: {float(report.accuracy):.3f}")
for layer, seeds in report.layers.items():
    print(layer, [ej.Stage(s).name for s in seeds.stage])
same = jax.tree.map(jnp.array_equal, host, nnx.state(model, nnx.Param))
assert all(jax.tree.leaves(same))
