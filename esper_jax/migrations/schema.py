"""What a schema version is: names, shapes, dtypes and code tables, as data.

A *layout* maps the name of each leaf to a `Leaf`. Names of nested leaves are joined by
slashes. Shapes are letters, separated by spaces, or numbers:

- ``S`` seeds and ``K`` slots of one layer, ``N`` blueprints of the policy's memory;
- ``C`` chunk width and ``H`` hidden width of one layer's bank;
- a number stands for itself; ``...`` is any shape.

In the layout of a run's state ``<layer>``, ``<variable>`` and ``<blueprint>`` stand for
one key, which may hold slashes itself, and ``<tree>`` for any keys.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = [
    "KEY",
    "Early",
    "Layout",
    "Leaf",
    "MigrationError",
    "Schema",
    "Tree",
    "check_codes",
    "flat",
    "fresh",
    "nested",
    "refuse",
    "seeds_in_words",
]

Tree = dict[str, Any]

Arrays = dict[str, np.ndarray]
"""Arrays by the full name of their leaf."""

KEY = "key"
"""Dtype of a random key: threefry2x32, stored as uint32[2]."""


class MigrationError(ValueError):
    """A tree that cannot be brought to the current schema; names field and value."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of a layout."""

    dtype: str
    """A numpy dtype; ``int`` or ``float`` for any width of it; `KEY`; ``any``."""
    shape: str = ""
    """Letters and numbers, as the module's docstring lists them."""
    start: float | None = None
    """Value in a run that has not started; None if it is drawn or built."""
    codes: str = ""
    """Name of the code table whose codes it holds."""
    optional: bool = False
    """Whether a tree may lack it."""
    late: bool = False
    """Whether early forms of its version lack it; it then gets ``start``."""

    @property
    def axes(self) -> list[str]:
        """The letters and numbers of the shape, one an axis."""
        return self.shape.split()


Layout = Mapping[str, Leaf]


@dataclasses.dataclass(frozen=True)
class Early:
    """Another form that a leaf had under the same version number."""

    leaf: Leaf
    convert: Callable[[np.ndarray], Any]
    """Makes an array, or a dictionary of arrays, of the version's final form."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schema:
    """One version of the checkpoint schema.

    Attributes:
      version: its number.
      seeds: layout of the seeds of one layer.
      rest: layout of a run's state without its seeds; empty if none was saved yet.
      codes: by table, the names in the order of their codes, or a range of numbers.
      mark: a leaf that no tree but one of seeds has.
      early: other forms of leaves of ``seeds``, by the name of the leaf.
      consistent: raises `MigrationError` if leaves contradict each other.
      upgrade: ``upgrade(tree, capacity) -> tree, notes`` from the version before; None
        in the first.
      digest: of all data above, as `fingerprint` gives it. A released version never
        changes.
    """

    version: int
    seeds: Layout
    codes: Mapping[str, Sequence[str] | range]
    mark: str
    digest: str
    rest: Layout = dataclasses.field(default_factory=dict)
    early: Mapping[str, Early] = dataclasses.field(default_factory=dict)
    consistent: Callable[[Arrays], None] = lambda arrays: None
    upgrade: (
        Callable[[Mapping[str, Any], int | None], tuple[Tree, list[str]]] | None
    ) = None

    @property
    def state(self) -> Layout:
        """Layout of a run's state, seeds included."""
        seeds = {f"seeds/<layer>/{name}": leaf for name, leaf in self.seeds.items()}
        return {**self.rest, **seeds} if self.rest else {}

    def checked(self, tree: Mapping[str, Any]) -> Arrays:
        """The arrays of a tree of seeds of this version, by full name.

        Integers and floats that the layout leaves the width of come back as int64 and
        as they are.

        Raises:
          MigrationError: if a leaf is missing, unknown, or of another shape or dtype,
            or if leaves contradict each other. Codes are checked by `check_codes`.
        """
        where = f"schema {self.version}"
        if not isinstance(tree, Mapping):
            raise MigrationError(
                f"tree: expected a dictionary of arrays, got {type(tree).__name__}"
            )
        arrays = flat(tree)
        _check_names(where, self.seeds, arrays)
        sizes: dict[str, int] = {}
        for name, leaf in self.seeds.items():
            if name in arrays:
                arrays[name] = _fitting(f"{where}: {name}", leaf, arrays[name], sizes)
        self.consistent(arrays)
        return arrays

    def modern(self, tree: Mapping[str, Any]) -> tuple[Tree, list[str]]:
        """Seeds in the final form of this version, and notes on what was changed.

        Leaves that are in the final form already are not checked.
        """
        arrays = flat(tree)
        notes: list[str] = []
        for name, early in self.early.items():
            array = arrays.get(name)
            if array is None or array.dtype != np.dtype(early.leaf.dtype):
                continue
            del arrays[name]
            notes.append(
                f"{name}: an early form of schema {self.version}, "
                f"{early.leaf.dtype}, converted"
            )
            new = early.convert(array)
            arrays |= flat(new, f"{name}/") if isinstance(new, dict) else {name: new}
        if self.mark in arrays:
            absent = {
                name: leaf
                for name, leaf in self.seeds.items()
                if leaf.late and name not in arrays
            }
            for name, leaf in absent.items():
                like = next(n for n, x in self.seeds.items() if x.shape == leaf.shape)
                arrays[name] = np.full(arrays[like].shape, leaf.start, leaf.dtype)
                notes.append(
                    f"{name}: not in this early form of schema {self.version}; starts "
                    f"at {leaf.start}"
                )
        return nested(arrays), notes

    def fingerprint(self) -> str:
        """SHA-256 of names, shapes, dtypes, starting values and codes, in order."""
        lines = [f"schema {self.version}"]
        for title, layout in (("seeds", self.seeds), ("rest", self.rest)):
            lines += [
                f"{title} {name}: {dataclasses.astuple(leaf)!r}"
                for name, leaf in layout.items()
            ]
        lines += [f"codes {name}: {table!r}" for name, table in self.codes.items()]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def flat(tree: Mapping[str, Any], prefix: str = "") -> Arrays:
    """The leaves of nested dictionaries by full name."""
    arrays: Arrays = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            arrays |= flat(value, f"{prefix}{key}/")
        else:
            arrays[f"{prefix}{key}"] = np.asarray(value)
    return arrays


def nested(arrays: Mapping[str, Any]) -> Tree:
    """Nested dictionaries from leaves by full name."""
    tree: Tree = {}
    for name, array in arrays.items():
        *parents, last = name.split("/")
        branch = tree
        for key in parents:
            branch = branch.setdefault(key, {})
        branch[last] = array
    return tree


def fresh(layout: Layout, **sizes: int) -> Arrays:
    """Leaves with their starting values, given the number behind each letter.

    Raises:
      MigrationError: if a leaf has no starting value or a letter no number.
    """
    arrays = {}
    for name, leaf in layout.items():
        unknown = [x for x in leaf.axes if not x.isdecimal() and x not in sizes]
        if leaf.start is None or unknown:
            reason = f"size {unknown[0]} is not known" if unknown else "no value to use"
            raise MigrationError(f"{name} cannot be filled in: {reason}")
        shape = [int(x) if x.isdecimal() else sizes[x] for x in leaf.axes]
        if leaf.dtype == KEY:
            arrays[name] = np.full((*shape, 2), leaf.start, np.uint32)
        else:
            arrays[name] = np.full(shape, leaf.start, leaf.dtype)
    return arrays


def check_codes(
    layout: Layout, arrays: Arrays, codes: Mapping[str, Sequence[str] | range]
) -> None:
    """Refuses codes that a table does not have.

    Raises:
      MigrationError: naming the leaf, the seed and the code.
    """
    for name, leaf in layout.items():
        if leaf.codes and name in arrays:
            last = len(codes[leaf.codes]) - 1
            array = arrays[name]
            refuse(name, array, (array < 0) | (array > last), f"from 0 to {last}")


def refuse(name: str, values: np.ndarray, wrong: np.ndarray, expected: str) -> None:
    """Raises `MigrationError` for the first value that is wrong, if one is.

    Args:
      name: of the leaf or column.
      values: one a seed on the first axis.
      wrong: bool, of the same shape.
      expected: in words.
    """
    if np.any(wrong):
        seed = f" of seed {np.argwhere(wrong)[0][0]}" if values.ndim else ""
        got = values[wrong][0] if values.ndim else values
        raise MigrationError(f"{name}{seed}: expected {expected}, got {got}")


def seeds_in_words(count: int) -> str:
    """``1 seed`` or ``3 seeds``."""
    return f"{count} seed{'s' if count != 1 else ''}"


def _check_names(where: str, layout: Layout, names: Iterable[str]) -> None:
    present = set(names)
    known = ", ".join(layout)
    groups = {name.split("/")[0] for name in layout if "/" in name}
    for name, leaf in layout.items():
        group = name.split("/")[0]
        if group in groups and group in present:
            raise MigrationError(
                f"{where}: {group}: expected a dictionary of arrays, got one array"
            )
        if name not in present and not leaf.optional:
            raise MigrationError(f"{where}: {name} is missing; expected {known}")
    for name in sorted(present - set(layout)):
        raise MigrationError(f"{where}: {name} is not known; expected {known}")


def _fitting(
    where: str, leaf: Leaf, array: np.ndarray, sizes: dict[str, int]
) -> np.ndarray:
    """``array`` if it is as the layout has it; learns the sizes of new letters."""
    fits = array.ndim == len(leaf.axes)
    for axis, got in zip(leaf.axes, array.shape, strict=False):
        want = int(axis) if axis.isdecimal() else sizes.get(axis, got)
        fits &= got == want and got >= 1
    kinds = {"int": "iu", "float": "f"}.get(leaf.dtype)
    fits &= array.dtype.kind in kinds if kinds else str(array.dtype) == leaf.dtype
    if not fits:
        dtype = {"int": "integers", "float": "floats"}.get(leaf.dtype, leaf.dtype)
        letters = [f"{x} = {sizes[x]}" for x in leaf.axes if x in sizes]
        known = f" with {', '.join(letters)}" if letters else ""
        raise MigrationError(
            f"{where}: expected {dtype} of shape ({', '.join(leaf.axes)}){known}, got "
            f"{array.dtype}{array.shape}"
        )
    sizes.update(
        (axis, size)
        for axis, size in zip(leaf.axes, array.shape, strict=True)
        if not axis.isdecimal()
    )
    # Wide and signed, so that neither sums nor comparisons wrap.
    return array.astype(np.int64) if leaf.dtype == "int" else array
