"""The host and the data of `configs/adapt.toml`, and a picture of what the run kept.

A small host is pretrained on upright digits and frozen. Parts of rank 1 are tried in
every place of it on rotated ones, those that are worth most stay, and the plain model
has them folded into its kernels.

    python examples/adapt.py [FILE.png]
"""

import pathlib
import sys
import tempfile

import numpy as np
import optax
from flax import nnx
from rich.console import Console

import esper_jax as ej
from esper_jax.blueprints import lora
from esper_jax.data import Dataset, digits
from esper_jax.run.config import load_config
from esper_jax.run.folder import RunFolder, read_lines
from esper_jax.run.run import restore_run, train_run

ROOT = pathlib.Path(__file__).parents[1]
PLACES, STEPS = 8, 600


def rotated() -> Dataset:
    """Digits on their side; those to train on in batches of 64."""

    def turn(part):
        images, labels = part
        turned = np.rot90(images.reshape(-1, 8, 8), axes=(1, 2))
        return turned.reshape(-1, 64), labels

    data = digits()
    images, labels = turn(data.train)
    starts = range(0, len(images) - 63, 64)
    batches = [(images[i : i + 64], labels[i : i + 64]) for i in starts]
    return data._replace(
        train=batches, held_out=turn(data.held_out), test=turn(data.test)
    )


def pretrained(rngs: nnx.Rngs) -> nnx.Module:
    """A host that knows upright digits, with a place for parts in eight chunks a layer.

    Replace this by a model of yours and its checkpoint.
    """
    first, last = nnx.Linear(64, 256, rngs=rngs), nnx.Linear(256, 10, rngs=rngs)
    middle = nnx.Linear(256, 256, rngs=rngs)
    model = nnx.Sequential(first, nnx.relu, middle, nnx.relu, last)
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, images, labels):
        def loss_fn(model):
            logits = model(images)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, labels
            ).mean()

        optimizer.update(model, nnx.grad(loss_fn)(model))

    images, labels = digits().train
    for rows in np.random.default_rng(0).integers(len(images), size=(STEPS, 64)):
        step(model, optimizer, images[rows], labels[rows])
    parts = [lora(rank=1, start="gradient")]
    ej.make_growable(model, nnx.Linear, PLACES, blueprints=parts, rngs=rngs)
    return model


def draw(worth, kept, path):
    """Bars of what each part was worth when it was judged, those kept in green."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(worth), sharey=True, figsize=(8, 2.5))
    for axis, (name, values) in zip(axes, worth.items(), strict=True):
        green = [seed in kept[name] for seed in range(PLACES)]
        axis.bar(range(PLACES), values, color=np.where(green, "tab:green", "lightgray"))
        axis.set(title=name, xlabel="seed (green: kept)")
    axes[0].set_ylabel("held-out loss without it, less")
    figure.tight_layout()
    figure.savefig(path)


def main(picture: str | None) -> None:
    config = load_config(ROOT / "configs" / "adapt.toml")
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(pathlib.Path(folder) / "adapt")
        train_run(config, run.path, console=Console(quiet=True))
        ticks, events = read_lines(run.ticks), read_lines(run.events)
        program, data, found = restore_run(run)
    judged = next(e["tick"] for e in events if e["to"] == "STABILIZATION")
    tried = ticks[judged - 1]["seeds"]
    worth = {name: seeds["worth"] for name, seeds in tried.items()}  # of every place
    model = program.model(found.state)
    plain = ej.harvest(model)  # parts of low rank are folded into the kernels
    kept = {}
    for name, seeds in found.state.seeds.items():
        kept[name] = np.flatnonzero(seeds.stage == ej.Stage.FOSSILIZED).tolist()
        of = ", ".join(f"{worth[name][seed]:.4f}" for seed in kept[name])
        print(f"{name}: {len(kept[name])} of {PLACES} parts kept, worth {of}")
    print(f"held-out accuracy before: {ticks[0]['accuracy']:.3f}")
    images, labels = data.test
    print(f"test accuracy: {np.mean(plain(images).argmax(-1) == labels):.3f}")
    assert all(not isinstance(m, ej.ChunkedLayer) for _, m in nnx.iter_graph(plain))
    if picture:
        draw(worth, kept, picture)


if __name__ == "__main__":
    main(*sys.argv[1:2] or [None])
