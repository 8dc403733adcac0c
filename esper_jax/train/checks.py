"""Refuses batches that a program cannot use, before anything changes."""

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from esper_jax.growth.state import Arrays
from esper_jax.train.batches import Batches, DataError, is_iterable, stack
from esper_jax.train.calls import called
from esper_jax.train.losses import classification, common_rows
from esper_jax.train.recipe import TrainRecipe

__all__ = ["Checks", "checked"]

_T = TypeVar("_T")


class Checks:
    """Checks what a program is given, on the host.

    Shapes are checked always; those that have passed are looked up. Labels of the
    default loss are looked at where their values are known: not while JAX traces
    (inside `jax.jit`), nor while a device still computes them. Those give a loss of NaN
    if they are out of range.

    Args:
      recipe: of the program.
      initial: values of the model's variables, by name.
    """

    def __init__(self, recipe: TrainRecipe, initial: Arrays) -> None:
        self._recipe = recipe
        self._initial = initial
        self._classes: int | None = None
        self._fits: set[Any] = set()
        self._passed: dict[bool, list[weakref.ref[jax.Array]]] = {}

    def __call__(self, name: str, data: Any, whole: bool) -> None:
        """Checks the argument ``name``.

        Args:
          name: the argument's, for the error message.
          data: a batch or `Batches`; arrays that the program cuts where ``whole``.
          whole: whether all arrays must have the same number of rows.

        Raises:
          DataError: if the data do not fit; it says what to do.
        """
        if isinstance(data, Batches):
            return  # each was checked when they were stacked
        leaves, tree = jax.tree.flatten(data)
        # JAX's arrays do not change. Those that passed need no second look, whatever
        # they are called: `fit` checks a batch before it calls ``step``.
        passed = self._passed.get(whole, [])
        if (
            leaves
            and len(passed) == len(leaves)
            and all(old() is new for old, new in zip(passed, leaves, strict=True))
        ):
            return
        pair = self._recipe.objective is None
        form = tree, whole, tuple([getattr(leaf, "shape", None) for leaf in leaves])
        if form not in self._fits:
            if pair:
                _check_pair(name, data)
            _check_rows(name, data, whole, pair)
            self._fits.add(form)
        seen = True
        if pair and self._recipe.loss is classification:
            seen = self._check_labels(name, *data)
        if seen and all(
            isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
            for leaf in leaves
        ):
            self._passed[whole] = [weakref.ref(leaf) for leaf in leaves]

    def vouch(self, batch: Any) -> None:
        """Takes a batch on the devices as one that passed, as it did on the host."""
        self._passed[False] = [weakref.ref(leaf) for leaf in jax.tree.leaves(batch)]

    def _check_labels(self, name: str, x: Any, labels: Any) -> bool:
        """Refuses labels outside of the classes, where their values are known.

        Returns:
          Whether they are known.
        """
        if not hasattr(labels, "dtype") or (
            isinstance(labels, jax.Array) and not _concrete(labels)
        ):
            return False
        labels = np.asarray(labels)
        if labels.dtype.kind not in "iu" or not labels.size:
            return False  # the loss refuses the dtype
        classes = self._number_of_classes(x)
        # A number below 0 is a large one without its sign: one pass finds both.
        unsigned = labels.view(np.dtype(f"u{labels.dtype.itemsize}"))
        if classes is None or unsigned.max() < classes:
            return True
        bad = (labels < 0) | (labels >= classes)
        first = np.argwhere(bad)[0]
        where = f"row {first[0]}" if len(first) == 1 else f"place {first.tolist()}"
        raise DataError(
            f"{name} must have labels from 0 to {classes - 1}, as the model has "
            f"{classes} outputs; got {int(bad.sum())} others, the first is "
            f"{labels[tuple(first)]} in {where}. Remove those rows, or leave them out "
            "of the mean with a loss= or objective= of your own"
        )

    def _number_of_classes(self, x: Any) -> int | None:
        """Classes that the model tells apart; None where that cannot be known here."""
        if self._classes is None:

            def outputs(values: Arrays, x: Any) -> Any:
                model = self._recipe.parts.merge(values, train=True, alone=True)
                model.eval()
                return called(model, x)

            try:
                shape = jax.eval_shape(outputs, self._initial, x).shape
            except (NameError, AttributeError):
                return None  # a mapped axis is missing, or the outputs are no array
            self._classes = shape[-1] if shape else None
        return self._classes


def checked(
    check: Callable[[str, Any, bool], None],
    name: str,
    function: Callable[..., _T],
    whole: bool,
) -> Callable[..., _T]:
    """A function of a state and data that checks the data before it runs.

    Args:
      check: as `Checks`.
      name: of the argument, for the error message.
      function: ``function(state, data, ...)``.
      whole: whether the data are arrays that all have the same number of rows. If they
        are an iterable of batches instead, its batches are stacked.
    """

    @functools.wraps(function)
    def wrapper(state: Any, data: Any, *others: Any) -> _T:
        if name != "batch" and is_iterable(data):
            data = stack(name, data, check)
        check(name, data, whole)
        return function(state, data, *others)

    return wrapper


def _concrete(x: jax.Array) -> bool:
    """Whether reading a JAX array waits for nothing."""
    if isinstance(x, jax.core.Tracer) or not x.is_fully_addressable:
        return False
    return x.is_ready() if hasattr(x, "is_ready") else True


def _check_pair(name: str, data: Any) -> None:
    if isinstance(data, tuple | list) and len(data) == 2:
        return
    length = f" of {len(data)}" if isinstance(data, tuple | list | dict) else ""
    raise DataError(
        f"{name} must be (x, y), which the model and the loss are called with; got a "
        f"{type(data).__name__}{length}. For other batches (a dict, a mask, several "
        "inputs), give build objective=f, where f(model, batch) returns the loss. A "
        "list is taken for batches, each of them (x, y)"
    )


def _check_rows(name: str, data: Any, whole: bool, pair: bool) -> None:
    shapes = [
        np.shape(leaf) for leaf in jax.tree.leaves(data) if hasattr(leaf, "shape")
    ]
    numbers = len(jax.tree.leaves(data)) - len(shapes)
    if numbers and (whole or pair):
        raise DataError(
            f"{name} must hold arrays, rows first; got {numbers} Python numbers in "
            "lists or alone. Turn each list into an array with numpy.asarray"
        )
    counts = {shape[:1] for shape in shapes}
    expected = "(x, y)" if pair else "arrays"
    if whole and (len(counts) != 1 or counts & {(), (0,)}):
        found = ", ".join(map(str, shapes[:8])) + (", ..." if len(shapes) > 8 else "")
        raise DataError(
            f"{name} must be {expected} with the same number of rows, at least one, on "
            f"the first axis; got shapes {found or 'none'}. For batches that differ, "
            "such as graphs, give a list of them"
        )
    if pair:
        x, y = map(common_rows, data)
        if (x is not None and y is not None and x != y) or 0 in (x, y):
            raise DataError(
                f"{name} must be (x, y) with the same number of rows, at least one; "
                f"got {x} rows of x and {y} labels. Give every row its label"
            )
