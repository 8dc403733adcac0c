"""The tasks that a policy is trained on: drawn on the device, all of one shape.

Rows of 64 numbers with up to ten labels, of one of three kinds: handwritten digits
whose pixels are mixed at random, with noise; random rows that a network of random width
labels (a teacher); clusters, several for each label. Half of the runs change on their
way: the labels are permuted; or the inputs are, and the host is frozen from then on.

Set aside for evaluation, and never seen here: MNIST-1D, spirals, text; convolutional
hosts; hosts of twice the width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from esper_jax.learning.config import Family

__all__ = [
    "CLASSES",
    "INPUTS",
    "KINDS",
    "Task",
    "changed",
    "draw_tasks",
    "load_digits_task",
    "sizes_of",
    "task_of",
]

INPUTS, CLASSES = 64, 10
KINDS = ("digits", "teacher", "clusters")
"""Kinds of tasks that a policy is trained on."""


class Task(NamedTuple):
    """Data and numbers of a run, or of many along leading axes."""

    train: Any
    """``(x, y)``: float32 (R, 64) and int32 (R,)."""
    held_out: Any
    test: Any
    change: Int[Array, "*N"]
    """0 for none; 1: the labels are permuted; 2: the inputs are, and the host freezes;
    from ``change_at`` on."""
    change_at: Int[Array, "*N"]
    """A tick."""
    inputs: Int[Array, "*N D"]
    """The permutation of the inputs."""
    labels: Int[Array, "*N C"]
    """The permutation of the labels."""
    rate: Float[Array, "*N"]
    """Peak learning rate of the host."""
    share: Float[Array, "*N"]
    """Rate of the blueprints over the host's."""
    budget: Float[Array, "*N"]
    """Most parameters of living seeds, over what one in every place has in the mean; -1
    for no limit."""
    key: Key[Array, "*N"]
    """Draws the host."""


def load_digits_task() -> tuple[np.ndarray, np.ndarray]:
    """All digits, standardised: float32 (1797, 64) and int32 (1797,)."""
    from sklearn.datasets import load_digits  # slow to import

    x, y = load_digits(return_X_y=True)
    x = (x - x.mean()) / x.std()
    return x.astype(np.float32), y.astype(np.int32)


def draw_tasks(
    key: Key[Array, ""],
    family: Family,
    digits: tuple[Any, Any],
    count: int,
    kind: int | None = None,
) -> Task:
    """As many tasks, stacked.

    Args:
      key: draws them.
      family: says how many rows, and ticks.
      digits: as `load_digits_task` returns them.
      count: how many.
      kind: of `KINDS`, by number; None for any.
    """

    def draw(key: Key[Array, ""]) -> Task:
        keys = jax.random.split(key, 10)
        x, y = _drawn_rows(keys[:4], sum(sizes_of(family)), digits, kind)
        return task_of(keys[4:], family, x, y)

    return jax.vmap(draw)(jax.random.split(key, count))


def sizes_of(family: Family) -> tuple[int, int, int]:
    """Rows to train on, held out and to test with."""
    return family.rows, family.held_out, family.test


def task_of(
    keys: Key[Array, " 6"],
    family: Family,
    x: Float[Array, "R 64"],
    y: Int[Array, " R"],
) -> Task:
    """A task of given rows, whose change, rates and budget are drawn.

    Args:
      keys: draw them.
      family: says how the rows are divided, and how long a run is.
      x: as many rows as `sizes_of` says.
      y: their labels.
    """
    ends = np.cumsum(sizes_of(family))[:-1]
    xs, ys = jnp.split(x, ends), jnp.split(y, ends)
    low, high = np.log(4e-3), np.log(3e-2)
    drawn = jax.random.uniform(keys[0], (4,))
    change = jnp.asarray([0, 0, 1, 2])[jax.random.randint(keys[1], (), 0, 4)]
    ticks = family.ticks
    return Task(
        (xs[0], ys[0]),
        (xs[1], ys[1]),
        (xs[2], ys[2]),
        change=change,
        change_at=jax.random.randint(keys[2], (), ticks // 4, ticks // 2),
        inputs=jax.random.permutation(keys[3], INPUTS),
        labels=jax.random.permutation(keys[4], CLASSES),
        rate=jnp.exp(low + (high - low) * drawn[0]),
        share=0.3 + 0.7 * drawn[1],
        budget=jnp.where(drawn[2] < 0.2, -1.0, 0.1 + 0.9 * drawn[3]),
        key=keys[5],
    )


def _drawn_rows(
    keys: Key[Array, " 4"], rows: int, digits: Any, kind: int | None
) -> tuple[Array, Array]:
    kinds = [
        _digits(keys[0], rows, digits),
        _teacher(keys[1], rows),
        _clusters(keys[2], rows),
    ]
    if kind is not None:
        return kinds[kind]
    which = jax.random.randint(keys[3], (), 0, len(kinds))
    x, y = jax.tree.map(lambda *a: jnp.stack(a)[which], *kinds)
    return x, y


def _digits(key: Key[Array, ""], rows: int, digits: Any) -> tuple[Array, Array]:
    """Digits whose pixels are mixed at random, with noise."""
    pick, turn, noise, level = jax.random.split(key, 4)
    known = len(digits[1])
    # Rows that come twice carry different noise.
    order = jax.random.permutation(pick, max(known, rows))[:rows] % known
    x, y = jnp.asarray(digits[0])[order], jnp.asarray(digits[1])[order]
    x = x @ jax.random.normal(turn, (INPUTS, INPUTS)) / np.sqrt(INPUTS)
    scale = jax.random.uniform(level, (), minval=0.3, maxval=1.2)
    return x + scale * jax.random.normal(noise, x.shape), y


def _teacher(key: Key[Array, ""], rows: int) -> tuple[Array, Array]:
    """Random rows that a random network of one hidden layer labels."""
    x, first, second, size, classes, dims = jax.random.split(key, 6)
    seen = _some(dims, INPUTS, 4, 32)
    width = _some(size, 32, 4, 32)
    rows_x = jax.random.normal(x, (rows, INPUTS)) * seen
    hidden = jnp.maximum(
        rows_x @ jax.random.normal(first, (INPUTS, 32)) / jnp.sqrt(jnp.sum(seen)), 0
    )
    logits = (hidden * width) @ jax.random.normal(second, (32, CLASSES))
    logits = (logits - logits.mean(axis=0)) / (logits.std(axis=0) + 1e-6)
    used = _some(classes, CLASSES, 2, CLASSES)
    label = jnp.argmax(jnp.where(used > 0, logits, -jnp.inf), axis=1)
    return rows_x, label.astype(jnp.int32)


def _clusters(key: Key[Array, ""], rows: int) -> tuple[Array, Array]:
    """Clusters around random points, each with a random label."""
    points, which, label, noise, dims, classes = jax.random.split(key, 6)
    seen = _some(dims, INPUTS, 3, 16)
    number = jax.random.randint(classes, (), 2, CLASSES + 1)
    centres = 1.5 * jax.random.normal(points, (32, INPUTS))
    labels = jax.random.randint(label, (32,), 0, number)
    of = jax.random.randint(which, (rows,), 0, 32)
    x = centres[of] + jax.random.normal(noise, (rows, INPUTS))
    return x * seen, labels[of].astype(jnp.int32)


def _some(key: Key[Array, ""], size: int, low: int, high: int) -> Array:
    """The first so many of ``size`` as 1, the others as 0."""
    count = jax.random.randint(key, (), low, high + 1)
    return (jnp.arange(size) < count).astype(jnp.float32)


def changed(task: Task, part: Any, tick: Int[Array, ""]) -> tuple[Array, Array]:
    """A part of the data as it is at a tick."""
    x, y = part
    now = tick >= task.change_at
    moved = jnp.where(now & (task.change == 2), x[:, task.inputs], x)
    return moved, jnp.where(now & (task.change == 1), task.labels[y], y)
