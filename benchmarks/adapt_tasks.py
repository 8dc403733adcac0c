"""Pretrained hosts and what they are to learn next, for `adapt.py`.

Texts are those that ship with Python: its manual (`pydoc_data.topics`) and the sources
of its standard library. A character is one of 97: printable ASCII, the newline, and one
for all else. Images are scikit-learn's digits.
"""

import dataclasses
import functools
import itertools
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from model_hosts import MLP, Size, Trunk

__all__ = ["SIZE", "TASKS", "Parts", "Task"]

CHARACTERS, LENGTH = 97, 64
LABELS = 500


class Parts(NamedTuple):
    """Data to learn from, for a policy to read, to tune by, and to report.

    A text to learn from is a stream of ids, (N,); all else is a batch.
    """

    learned: Any
    judged: Any
    held_out: Any
    test: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A host, what it knows and what it is to learn.

    Args:
      make: ``make(rngs)``, the host.
      source: ``source()``, what it is pretrained on.
      target: ``target()``, what it is to learn.
      change: ``change(key, parts)``, what a run makes of the target.
      sample: ``sample(learned, key) -> batch`` of ``batch`` rows.
      loss: ``loss(model, batch) -> loss, score``.
      family: tasks of one family have the same host and source.
      score: what is reported: ``"bits"`` of the loss, or ``"error"``.
      pretrain: steps on the source.
      steps: steps on the target.
      budgets: parameters, by name.
      tuners: hosts, beside those that are reported, with which each rate is tried.
      uniform: ``uniform(budget, path) -> rank`` of uniform LoRA.
    """

    make: Callable[[nnx.Rngs], Any]
    source: Callable[[], Parts]
    target: Callable[[], Parts]
    change: Callable[[jax.Array, Parts], Parts]
    sample: Callable[[Any, jax.Array], Any]
    loss: Callable[[Any, Any], Any]
    family: str
    score: str
    pretrain: int
    steps: int = 600
    budgets: tuple[int, ...]
    tuners: int
    uniform: Callable[[int, str], int]


class Writer(nnx.Module):
    """A decoder: characters to logits of the next one, embeddings not tied."""

    def __init__(self, rngs: nnx.Rngs, size: Size) -> None:
        self.tokens = nnx.Embed(size.vocabulary, size.width, rngs=rngs)
        shape = (size.length, size.width)
        self.places = nnx.Param(0.02 * rngs.params.normal(shape))
        self.trunk = Trunk(size, True, rngs)
        self.norm = nnx.LayerNorm(size.width, rngs=rngs)
        self.head = nnx.Linear(size.width, size.vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.trunk(self.tokens(tokens) + self.places[...])
        return self.head(self.norm(x))


def _ids(text: str) -> np.ndarray:
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int32)
    ids = np.where((codes >= 32) & (codes < 127), codes - 30, 0)
    return np.where(codes == 10, 1, ids).astype(np.int32)


@functools.cache
def english() -> np.ndarray:
    """Python's manual."""
    from pydoc_data import topics

    return _ids("\n".join(topics.topics[k] for k in sorted(topics.topics)))


@functools.cache
def python() -> np.ndarray:
    """The first two million characters of the standard library's top-level modules."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))
    order = np.random.default_rng(0).permutation(len(files))
    text = "\n".join(files[i].read_text("utf-8", "replace") for i in order)
    return _ids(text[:2_000_000])


def _stream(ids: np.ndarray) -> Parts:
    """Disjoint stretches of a text: 80, 4, 6 and 10% of it."""
    ends = (np.array([0, 0.8, 0.84, 0.9, 1]) * len(ids)).astype(int)
    stretches = [ids[a:b] for a, b in itertools.pairwise(ends)]

    def windows(stretch: np.ndarray, count: int) -> np.ndarray:
        first = np.linspace(0, len(stretch) - LENGTH - 1, count).astype(int)
        return stretch[first[:, None] + np.arange(LENGTH + 1)]

    counts = (48, 128, 256)
    return Parts(stretches[0], *map(windows, stretches[1:], counts))


def _repeated(parts: Parts) -> Parts:
    """Stretches to learn from of one length, so that one program does for all texts."""
    return parts._replace(learned=np.resize(parts.learned, 1_600_000))


def _windows(stream: jax.Array, key: jax.Array) -> jax.Array:
    first = jax.random.randint(key, (16, 1), 0, stream.shape[0] - LENGTH)
    return stream[first + jnp.arange(LENGTH + 1)]


def _next_character(model: Any, windows: jax.Array) -> Any:
    logits = model(windows[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
    right = logits.argmax(-1) == windows[:, 1:]
    return losses.mean(), jnp.mean(right.astype(jnp.float32))


def _ciphered(key: jax.Array, parts: Parts) -> Parts:
    """Every letter stands for another; capitals follow."""
    order = jax.random.permutation(key, 26)
    table = jnp.arange(CHARACTERS)
    for first in "Aa":
        begin = ord(first) - 30
        table = table.at[begin + jnp.arange(26)].set(begin + order)
    return jax.tree.map(lambda ids: table[ids], parts)


@functools.cache
def _images(part: str) -> Parts:
    """Upright digits: 600 rows to pretrain on, others to adapt to."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = (x[order] / 16.0).astype(np.float32), y[order].astype(np.int32)
    ends = [0, 600] if part == "source" else [600, 600 + LABELS]
    ends += [1200, 1320, 1797]
    return Parts(*((x[a:b], y[a:b]) for a, b in itertools.pairwise(ends)))


def _rows(learned: Any, key: jax.Array) -> Any:
    rows = jax.random.randint(key, (64,), 0, learned[0].shape[0])
    return jax.tree.map(lambda a: a[rows], learned)


def _digit(model: Any, batch: Any) -> Any:
    logits = model(batch[0])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
    right = logits.argmax(-1) == batch[1]
    return losses.mean(), jnp.mean(right.astype(jnp.float32))


def _of_images(
    change: Callable[[jax.Array, Any, Any], Any],
) -> Callable[[jax.Array, Parts], Parts]:
    def changed(key: jax.Array, parts: Parts) -> Parts:
        keys = jax.random.split(key, len(parts))
        # A run draws once what all its parts share, and apart what each row has.
        return Parts(
            *(change(key, k, part) for k, part in zip(keys, parts, strict=True))
        )

    return changed


def _rotated(_: Any, __: Any, batch: Any) -> Any:
    squares = batch[0].reshape(-1, 8, 8)
    return jnp.rot90(squares, axes=(1, 2)).reshape(-1, 64), batch[1]


def _inverted(_: Any, __: Any, batch: Any) -> Any:
    return 1 - batch[0], batch[1]


def _noisy(_: Any, key: Any, batch: Any) -> Any:
    return batch[0] + 0.5 * jax.random.normal(key, batch[0].shape), batch[1]


def _relabelled(run: Any, __: Any, batch: Any) -> Any:
    return batch[0], jax.random.permutation(run, 10)[batch[1]].astype(jnp.int32)


SIZE = Size(
    blocks=4,
    width=128,
    heads=4,
    length=LENGTH,
    vocabulary=CHARACTERS,
    dtype="float32",
    scanned=True,
)


def _by_layer(budget: int, path: str) -> int:
    """Rank 1 of queries, keys and values; at 8,192 and 24,576, 1 and 3 of blocks."""
    if not path.startswith("trunk"):
        return 0
    return budget // 8192 or int(path.endswith("qkv"))


def _of_mlp(budget: int, path: str) -> int:
    """Rank 1 of the middle layer; at 2,122 and 8,488, 1 and 4 everywhere."""
    return budget // 2122 or int(path == "down")


def _text(source: Any, target: Any, change: Any = lambda _, parts: parts) -> Task:
    return Task(
        make=lambda rngs: Writer(rngs, SIZE),
        source=lambda: _stream(source()),
        target=lambda: _repeated(_stream(target())),
        change=change,
        sample=_windows,
        loss=_next_character,
        family=f"a writer of {source.__name__}",
        score="bits",
        pretrain=3000,
        budgets=(2048, 8192, 24576),
        tuners=4,
        uniform=_by_layer,
    )


def _digits(change: Any) -> Task:
    return Task(
        make=lambda rngs: MLP(64, 512, 10, rngs),
        source=lambda: _images("source"),
        target=lambda: _images("target"),
        change=_of_images(change),
        sample=_rows,
        loss=_digit,
        family="a reader of digits",
        score="error",
        pretrain=600,
        budgets=(1024, 2122, 8488),
        tuners=12,
        uniform=_of_mlp,
    )


TASKS = {
    "english-python": _text(english, python),
    "python-english": _text(python, english),
    "cipher": _text(english, english, _ciphered),
    "digits-rotated": _digits(_rotated),
    "digits-inverted": _digits(_inverted),
    "digits-noisy": _digits(_noisy),
    "digits-relabelled": _digits(_relabelled),
}
