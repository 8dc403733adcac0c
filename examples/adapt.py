"""A pretrained, frozen host adapts to rotated digits, and is exported as a plain model.

A part of rank 1 is tried in every place; those of the greatest worth for each of their
parameters stay within a budget, learn on, and are folded into the host's kernels.

    python examples/adapt.py [FILE.png]
"""

import sys

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import esper_jax as ej
from esper_jax.blueprints import lora
from esper_jax.data import digits
from esper_jax.policy import TrialConfig, trial, trial_lives

BUDGET = 4000
data, rngs, rng = digits(), nnx.Rngs(0), np.random.default_rng(0)
layers = [nnx.Linear(64, 256, rngs=rngs), nnx.relu, nnx.Linear(256, 256, rngs=rngs)]
model = nnx.Sequential(*layers, nnx.relu, nnx.Linear(256, 10, rngs=rngs))


def rotated(images):
    return np.rot90(images.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)


def loss_fn(model, images, labels):
    logits = model(images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), jnp.mean(logits.argmax(-1) == labels)


def batches(images, steps):
    for _ in range(steps):
        rows = rng.integers(len(images), size=64)
        yield images[rows], data.train[1][rows]


@nnx.jit
def pretrain(model, optimizer, images, labels):
    grads, _ = nnx.grad(loss_fn, has_aux=True)(model, images, labels)
    optimizer.update(model, grads)


@nnx.jit
def adapt(model, growth, images, labels):
    grad_fn = nnx.value_and_grad(loss_fn, has_aux=True, argnums=growth.argnums)
    (loss, _), grads = grad_fn(model, images, labels)
    growth.update(model, grads, loss=loss)


optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
for batch in batches(data.train[0], 600):
    pretrain(model, optimizer, *batch)

parts = [lora(rank=1, start="gradient")]
ej.make_growable(model, nnx.Linear, 8, blueprints=parts, rngs=rngs)
growth = ej.Growth(
    model,
    optax.adam(optax.linear_schedule(0, 1e-2, 10)),
    wrt=None,  # the host is frozen
    policy=trial(TrialConfig(ticks=1, budget=BUDGET)),
    lifecycle_config=trial_lives(tuning=1),
)
images, held_out = rotated(data.train[0]), rotated(data.held_out[0])
evaluate = nnx.jit(lambda m: loss_fn(m, held_out, data.held_out[1]))
before = float(evaluate(model)[1])
# Born, aimed for 10 steps, counting for 50, judged, learning on, fossils.
worth = {}
for steps in (0, 10, 0, 50, 0, 0, 540, 0):
    for batch in batches(images, steps):
        adapt(model, growth, *batch)
    report = growth.tick(model, evaluate)
    if steps == 50:
        worth = {name: layer.signals.worth for name, layer in report.layers.items()}

test = rotated(data.test[0]), data.test[1]
plain = ej.harvest(model)  # parts of low rank are folded into the kernels
for name, layer in report.layers.items():
    kept = np.flatnonzero(layer.stage == ej.Stage.FOSSILIZED)
    of = ", ".join(f"{worth[name][i]:.4f}" for i in kept)
    cost = float(np.nansum(layer.signals.parameters[kept]))
    print(f"{name}: {len(kept)} of 8 parts kept, {cost:.0f} parameters, worth {of}")
print(f"held-out accuracy before: {before:.3f}")
print(f"test accuracy: {float(loss_fn(plain, *test)[1]):.3f}")
assert all(not isinstance(m, ej.ChunkedLayer) for _, m in nnx.iter_graph(plain))
if len(sys.argv) > 1:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(worth), sharey=True, figsize=(8, 2.5))
    for axis, (name, values) in zip(axes, worth.items(), strict=True):
        kept = report.layers[name].stage == ej.Stage.FOSSILIZED
        colors = np.where(kept, "tab:green", "lightgray")
        axis.bar(np.arange(len(values)), np.nan_to_num(values), color=colors)
        axis.set(title=name, xlabel="seed (green: kept)")
    axes[0].set_ylabel("held-out loss without it, less")
    figure.tight_layout()
    figure.savefig(sys.argv[1])
