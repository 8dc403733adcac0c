"""A model, data and a loss of one's own for the command line.

cd examples && esper-jax train own_things.toml --out /tmp/own_things
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx


class Ratings(nnx.Module):
    """What a user gives an item: two embeddings and a hidden layer."""

    def __init__(self, users: int, items: int, width: int, rngs: nnx.Rngs) -> None:
        self.user = nnx.Embed(users, width, rngs=rngs)
        self.item = nnx.Embed(items, width, rngs=rngs)
        self.hidden = nnx.Linear(2 * width, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.out = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, user, item):
        x = jnp.concatenate([self.user(user), self.item(item)], -1)
        return self.out(nnx.relu(self.norm(self.hidden(x))))[..., 0]


def model(users: int, items: int, width: int, rngs: nnx.Rngs) -> nnx.Module:
    """`[model] factory`: called with the other keys of the table, and ``rngs``."""
    return Ratings(users, items, width, rngs)


def data(users: int, items: int, rows: int):
    """`[data] factory`: training, held-out and test data, here arrays (x, y)."""
    rng = np.random.default_rng(0)
    taste, kind = rng.normal(size=(users, 2)), rng.normal(size=(items, 2))

    def part(n):
        user, item = rng.integers(0, users, n), rng.integers(0, items, n)
        rating = np.tanh((taste[user] * kind[item]).sum(-1))
        return (user.astype(np.int32), item.astype(np.int32)), rating.astype(np.float32)

    return part(rows), part(rows // 4), part(rows // 4)


def loss(rating, y):
    """`[train] loss`: one number for each row; the second counts as accuracy."""
    error = jnp.square(rating - y)
    return error, (error < 0.25).astype(jnp.float32)
