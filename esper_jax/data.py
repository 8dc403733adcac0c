"""Data sets for the command line: real data that ships inside a package."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

__all__ = ["DATASETS", "Dataset", "digits"]

Rows = tuple[np.ndarray, np.ndarray]


class Dataset(NamedTuple):
    """A three-way split. Each part is ``(x, y)``, float32 (N, D) and int32 (N,).

    Attributes:
      train: to learn from.
      held_out: read by the gates and the controller.
      test: read by nobody until the result is reported.
      num_classes: labels are from 0 to this, excluded.
    """

    train: Rows
    held_out: Rows
    test: Rows
    num_classes: int


def digits(seed: int = 0) -> Dataset:
    """Handwritten digits of scikit-learn: 1797 images of 8x8, in [0, 1].

    Split 60/20/20 in an order drawn from ``seed``.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI
    Machine Learning Repository, doi:10.24432/C50P49.
    """
    from sklearn.datasets import load_digits  # slow to import

    x, y = load_digits(return_X_y=True)
    return _split((x / 16.0).astype(np.float32), y.astype(np.int32), 10, seed)


def _split(x: np.ndarray, y: np.ndarray, num_classes: int, seed: int) -> Dataset:
    order = np.random.default_rng(seed).permutation(len(x))
    first, second = int(0.6 * len(x)), int(0.8 * len(x))
    parts = (order[:first], order[first:second], order[second:])
    train, held_out, test = ((x[rows], y[rows]) for rows in parts)
    return Dataset(train, held_out, test, num_classes)


DATASETS: dict[str, Callable[[int], Dataset]] = {"digits": digits}
"""Data sets by the name that a config gives."""
