"""What the configs of test_own_things.py name, as a user's module in their folder."""

import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from esper_jax import make_growable
from esper_jax.data import Dataset
from esper_jax.train import classification

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 4)).astype(np.float32)
Y = (X[:, 0] * X[:, 1] > 0).astype(np.int32)
BATCHES = [{"x": X[i : i + 8], "y": Y[i : i + 8]} for i in range(0, 64, 8)]


class Net(nnx.Module):
    def __init__(self, width, rngs):
        # No bias: its gradient before BatchNorm is rounding, which Adam enlarges.
        self.a = nnx.Linear(4, width, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.out = nnx.Linear(width, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.norm(self.a(x))))


def model(width, rngs):
    return Net(width, rngs)


def growable(width, rngs):
    model = Net(width, rngs)
    make_growable(model, "a", 2, rngs=rngs)
    return model


def no_model(rngs):
    return {"a": 1}


def breaks(rngs):
    raise KeyError("this is the user's")


def arrays(rows=64, label=0):
    """``label`` is that of the last row of the test data."""
    part = (X[:rows], Y[:rows])
    test = (part[0], np.append(part[1][:-1], np.int32(label)))
    return {"train": part, "held_out": part, "test": test if label else part}


def two_parts():
    return arrays()["train"], arrays()["test"]


class Loader:
    """An iterator with a position.

    Args:
      stop: batch before which the last process gets SIGTERM; 0 for none.
      full: batch before which process 0 can no longer write a log; 0 for none.
    """

    def __init__(self, stop=0, full=0):
        self.at, self.stop, self.full = 0, stop, full

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        if self.at == self.stop and jax.process_index() == jax.process_count() - 1:
            signal.raise_signal(signal.SIGTERM)
        if self.at == self.full and not jax.process_index():
            Path("run/ticks.jsonl").unlink()
            Path("run/ticks.jsonl").mkdir()
        return BATCHES[self.at * 5 % 8]

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def generator():
    yield from BATCHES * 100


def batches(kind, **more):
    kinds = {"loader": Loader, "list": lambda: BATCHES, "generator": generator}
    train = kinds[kind](**more)
    return Dataset(train, BATCHES[:2], iter(BATCHES[2:4]))


def lists():
    return batches("list")


def objective(model, batch):
    loss, score = classification(model(batch["x"]), batch["y"])
    return loss, {"score": score}


def loss(logits, y):
    return classification(logits, y)


def wrong_shape(logits, y):
    return jnp.zeros(3)


def one_argument(logits):
    return logits
