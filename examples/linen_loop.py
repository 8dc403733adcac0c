"""Growth in a Flax Linen loop with a TrainState. Lines it adds are marked ``# +``."""

from functools import partial

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from quick_lives import options

import esper_jax as ej
from esper_jax.data import digits
from esper_jax.growth import linen_growth
from esper_jax.layers.linen import Growable


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10, name="last")(nn.relu(nn.Dense(24, name="first")(x)))


data, row, tx = digits(), np.zeros((1, 64), np.float32), optax.adamw(3e-3)
model = Growable(Net(), "first", num_seeds=4)  # +
variables = model.init(jax.random.key(0), row)
state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx)
growth = linen_growth(lambda v: model.apply(v, row), variables, tx, **options)  # +
grown = growth.init(jax.random.key(1))  # +


def loss_fn(params, parts, grown, x, y, mutable=("seeds",)):
    logits, new = model.apply({**grown, **parts, "params": params}, x, mutable=mutable)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new


@jax.jit
def train_step(state, grown, x, y):
    parts = {name: grown[name] for name in ("bank", "probe")}  # +
    grad_fn = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
    (loss, new), (grads, more) = grad_fn(state.params, parts, grown, x, y)
    grown = growth.update({**grown, **new}, more, loss)  # +
    return state.apply_gradients(grads=grads), grown


@jax.jit
def evaluate(params, grown):
    return loss_fn(params, {}, grown, *data.held_out, mutable=[])[0]


for epoch in range(24):
    for rows in np.random.default_rng(epoch).permutation(1024).reshape(-1, 64):
        state, grown = train_step(state, grown, *(a[rows] for a in data.train))
    grown, report = growth.tick(grown, partial(evaluate, state.params))  # +
print("seeds:", [ej.Stage(s).name for s in report.layers["first"].stage])
plain = growth.harvest(grown)["first"]  # an ordinary module: what has grown
first, last = (state.params[name] for name in ("first", "last"))
hidden = nn.relu(plain(data.held_out[0] @ first["kernel"] + first["bias"]))
right = (hidden @ last["kernel"] + last["bias"]).argmax(-1) == data.held_out[1]
print(f"held-out accuracy: {float(right.mean()):.3f}")
