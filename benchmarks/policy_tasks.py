"""The tasks and hosts that `policy.py` compares on, seen in training and set aside.

MNIST-1D, spirals, the convolutional host and the host of twice the width were named
here before the first policy was trained, and no training has seen them.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_jax import data
from esper_jax.learning import Family, Task, draw_tasks, load_digits_task
from esper_jax.learning.tasks import INPUTS, KINDS, sizes_of, task_of

__all__ = ["BUDGETS", "CELLS", "HOSTS", "Cell", "Sets", "write_sets"]

_FIRST = Family(hidden=(8, 8), ticks=30, steps=8, batch=128)
HOSTS = {
    "mlp": _FIRST,
    "wide": dataclasses.replace(_FIRST, hidden=(16, 16)),
    "conv": dataclasses.replace(_FIRST, hidden=(8, 8), host="conv"),
}
"""Hosts: of the training, of twice its width, and of another family."""

BUDGETS = (0.25, 0.5, 1.0)
"""Parameters of all living seeds, over what one in every place has in the mean."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A data set on a host.

    Args:
      name: for a reader.
      host: a key of `HOSTS`.
      rows: ``digits``, ``teacher``, ``clusters``, ``spirals`` or ``mnist1d``.
      change: as in `Task`.
      seen: whether training has seen such data on such a host.
    """

    name: str
    host: str
    rows: str
    change: int
    seen: bool


CELLS = (
    Cell("digits", "mlp", "digits", 0, True),
    Cell("teacher", "mlp", "teacher", 0, True),
    Cell("clusters", "mlp", "clusters", 0, True),
    Cell("clusters, labels change", "mlp", "clusters", 1, True),
    Cell("digits, host freezes", "mlp", "digits", 2, True),
    Cell("spirals", "mlp", "spirals", 0, False),
    Cell("mnist1d", "mlp", "mnist1d", 0, False),
    Cell("mnist1d, labels change", "mlp", "mnist1d", 1, False),
    Cell("mnist1d, host freezes", "mlp", "mnist1d", 2, False),
    Cell("digits", "wide", "digits", 0, False),
    Cell("spirals", "wide", "spirals", 0, False),
    Cell("mnist1d", "wide", "mnist1d", 0, False),
    Cell("mnist1d", "conv", "mnist1d", 0, False),
    Cell("mnist1d, labels change", "conv", "mnist1d", 1, False),
)


def write_sets(path: Path) -> None:
    """Writes the rows of the data sets that were set aside, for machines without them.

    Args:
      path: of the file, .npz.
    """
    np.savez_compressed(path, **_rows())


def _rows() -> dict[str, np.ndarray]:
    spirals = [part for seed in (0, 1) for part in data.spirals(seed)[:3]]
    signals = data.mnist1d()[:3]
    return {
        f"{name}_{axis}": np.concatenate([part[i] for part in parts])
        for name, parts in (("spirals", spirals), ("mnist1d", signals))
        for i, axis in enumerate("xy")
    }


class Sets:
    """Draws the tasks of cells.

    Args:
      path: of a file by `write_sets`; None to make the rows here.
    """

    def __init__(self, path: Path | None) -> None:
        rows = _rows() if path is None else dict(np.load(path))
        self._digits = jax.tree.map(jnp.asarray, load_digits_task())
        self._rows = {}
        for name in ("spirals", "mnist1d"):
            x = rows[f"{name}_x"].astype(np.float32)
            x = (x - x.mean()) / x.std()
            wide = np.zeros((len(x), INPUTS), np.float32)
            wide[:, : x.shape[1]] = x
            self._rows[name] = jnp.asarray(wide), jnp.asarray(rows[f"{name}_y"], "i4")

    def tasks(self, cell: Cell, family: Family, budget: float, runs: int) -> Task:
        """The tasks of a cell, stacked; the same for any budget but for the budget."""
        number = CELLS.index(cell)
        # Training folds a number of generations into its seed's key, and no such word.
        key = jax.random.fold_in(jax.random.key(0x7E57), number)
        if cell.rows in KINDS:
            kind = KINDS.index(cell.rows)
            tasks = draw_tasks(key, family, self._digits, runs, kind)
        else:
            tasks = self._of_rows(key, cell.rows, family, runs)
        return tasks._replace(
            change=jnp.full(runs, cell.change, jnp.int32),
            budget=jnp.full(runs, budget, jnp.float32),
        )

    def _of_rows(self, key: Any, name: str, family: Family, runs: int) -> Task:
        x, y = self._rows[name]

        def draw(key: Any) -> Task:
            order, others = jax.random.split(key)
            some = jax.random.permutation(order, len(y))[: sum(sizes_of(family))]
            return task_of(jax.random.split(others, 6), family, x[some], y[some])

        return jax.vmap(draw)(jax.random.split(key, runs))
