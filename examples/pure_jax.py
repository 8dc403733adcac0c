"""Growth in pure JAX, on dictionaries. Lines that growth adds are marked ``# +``."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from quick_lives import options

import esper_jax as ej
from esper_jax.data import digits
from esper_jax.growth import growth_functions

data, keys = digits(), jax.random.split(jax.random.key(0), 3)
first = jax.random.normal(keys[0], (64, 24)) / 8
params = {"first": first, "last": jax.random.normal(keys[1], (24, 10)) / 5}
layers = {"hidden": {"features": 24, "num_seeds": 4}}
growth = growth_functions(layers, optax.adam(1e-2), **options)  # +
grown = growth.init(keys[2])  # +
optimizer = optax.adamw(3e-3)
state = optimizer.init(params)


def loss_fn(params, learned, grown, x, y, train=True):
    h = x @ params["first"]
    h, seeds = growth.apply({**grown, **learned}, "hidden", h, train)  # +
    logits = jax.nn.relu(h) @ params["last"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return losses.mean(), (seeds, jnp.mean(logits.argmax(-1) == y))


@jax.jit
def train_step(params, state, grown, x, y):
    learned = {name: grown[name] for name in ("bank", "probe")}  # +
    grad_fn = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
    (loss, (seeds, _)), (grads, more) = grad_fn(params, learned, grown, x, y)
    updates, state = optimizer.update(grads, state, params)
    grown = growth.update({**grown, "seeds": seeds}, more, loss)  # +
    return optax.apply_updates(params, updates), state, grown


@jax.jit
def evaluate(params, grown):
    return loss_fn(params, {}, grown, *data.held_out, train=False)[0]


for epoch in range(24):
    x, y = data.train
    for rows in np.random.default_rng(epoch).permutation(1024).reshape(-1, 64):
        params, state, grown = train_step(params, state, grown, x[rows], y[rows])
    grown, report = growth.tick(grown, functools.partial(evaluate, params))  # +
print("seeds:", [ej.Stage(s).name for s in report.layers["hidden"].stage])
plain = growth.harvest(grown)["hidden"]  # an ordinary module: what has grown
logits = jax.nn.relu(plain(data.held_out[0] @ params["first"])) @ params["last"]
right = logits.argmax(-1) == data.held_out[1]
print(f"held-out accuracy: {float(right.mean()):.3f}")
