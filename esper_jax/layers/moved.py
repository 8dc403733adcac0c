"""Carries what is kept by the paths of a model along when its layers are wrapped.

A layer's variables move from ``layer/kernel`` to ``layer/base/kernel``. The state of an
`nnx.Optimizer`, an `nnx.EMA` and the like hold one array for each of them, in mappings
nested as the model's state is. Each such mapping is changed in place.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import jax
import numpy as np
from flax import nnx

__all__ = ["Path", "Wrapped", "check_holders", "move_holders"]

Path = tuple[Any, ...]
Flat = list[tuple[Path, Any]]
"""A model's variables and bare arrays, with their paths."""


class Wrapped:
    """A model before and after layers of it are wrapped, by paths alone.

    Args:
      model: before; it is not changed.
      beds: what each wrapped layer gets beside itself, by the layer's path.
    """

    def __init__(self, model: nnx.Module, beds: Mapping[Path, nnx.Module]) -> None:
        self.model = model
        # What lies inside comes first.
        self.layers = sorted(beds, key=len, reverse=True)
        self.before: Flat = list(nnx.to_flat_state(nnx.state(model)))
        self.after: Flat = [(self._moved(path), leaf) for path, leaf in self.before]
        for path, bed in beds.items():
            place = (*self._moved(path), "bed")
            own = nnx.to_flat_state(nnx.state(bed))
            self.after += [((*place, *rest), leaf) for rest, leaf in own]

    def _moved(self, path: Path) -> Path:
        """Where what is at a path will be. A layer itself stays where it is."""
        new: Path = ()
        for n, key in enumerate(path):
            new += ("base", key) if path[:n] in self.layers else (key,)
        return new

    def move(self, tree: Any) -> None:
        """Moves what a tree keeps by the model's paths, in place."""
        for root in _keyed(tree, self):
            for layer in self.layers:
                _wrap(root, layer)


def check_holders(optimizer: Any, wrapped: Wrapped) -> None:
    """Refuses what does not fit the model, now or after its layers are wrapped.

    Args:
      optimizer: an `nnx.Optimizer`, another holder, or a sequence of them.
      wrapped: the model.

    Raises:
      TypeError, ValueError: if it is of another model, or would not fit afterwards.
    """
    others = []
    for holder in _sequence(optimizer):
        if isinstance(holder, nnx.Optimizer | nnx.EMA):
            _check(holder, wrapped)
        else:
            others.append(holder)
    if not others:
        return
    if not all(isinstance(x, nnx.Pytree | Mapping | tuple | list) for x in others):
        raise TypeError(
            "optimizer must be an nnx.Optimizer, an nnx.EMA, a State, another object "
            "that holds States of the model, or a sequence of these; got "
            f"{', '.join(type(x).__name__ for x in others)}"
        )
    known = {path for path, _ in wrapped.before}
    held = [path for root in _keyed(others, wrapped) for path in _paths(root)]
    unknown = [path for path in held if not _begins_with_one(path, known)]
    if unknown or not held:
        what = f"{_name(unknown[0])!r}" if unknown else "nothing by the model's paths"
        raise ValueError(
            "optimizer must hold what was made of this model before make_growable; "
            f"{type(others[0]).__name__} holds {what}, and the model has "
            f"{', '.join(sorted(map(repr, map(_name, known))))}"
        )


def move_holders(optimizer: Any, wrapped: Wrapped) -> None:
    """Moves what holders keep by the model's paths, in place; see `check_holders`."""
    wrapped.move(_sequence(optimizer))  # at once: what two of them hold moves once


def _sequence(optimizer: Any) -> list[Any]:
    whole = not isinstance(optimizer, list | tuple) or hasattr(optimizer, "_fields")
    return [optimizer] if whole else list(optimizer)


def _check(holder: Any, wrapped: Wrapped) -> None:
    """Compares what is held with what the holder would make of the model."""
    kind = type(holder).__name__
    held = nnx.as_pure(
        holder.params if isinstance(holder, nnx.EMA) else holder.opt_state
    )
    different = _difference(held, _made(holder, wrapped.before))
    if different:
        raise ValueError(
            f"optimizer must be of this model as it is now; the {kind} holds "
            f"{different}. Pass the one that was made of the model, or make it after "
            "make_growable"
        )
    held = jax.tree.map(lambda x: x, held)  # a copy of its containers
    wrapped.move(held)
    different = _difference(held, _made(holder, wrapped.after))
    if different:
        chosen = "only" if isinstance(holder, nnx.EMA) else "wrt, a mask or labels"
        raise ValueError(
            f"optimizer cannot be kept: made of the model that can grow, the {kind} "
            f"would hold another tree ({different}), since its {chosen} chooses by "
            "path or takes in what growth adds. Choose parameters by type, as in "
            "nnx.Param, or make it after make_growable"
        )


def _made(holder: Any, flat: Flat) -> Any:
    """What a holder would hold if it were made of variables, by shapes."""
    chosen = holder.filter if isinstance(holder, nnx.EMA) else holder.wrt
    takes = nnx.filterlib.to_predicate(chosen)
    state = nnx.from_flat_state(
        [(path, leaf) for path, leaf in flat if takes(path, leaf)]
    )
    if isinstance(holder, nnx.EMA):
        return nnx.as_pure(state)
    try:
        return nnx.as_pure(jax.eval_shape(holder.tx.init, state))
    except (TypeError, ValueError, KeyError):  # closes over a tree of other paths
        return None


def _difference(held: Any, made: Any) -> str:
    """The first difference between two trees of arrays, in words; "" for none."""
    trees = []
    for tree in (held, made):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        trees.append({jax.tree_util.keystr(p): np.shape(x) for p, x in leaves})
    for name in [*trees[0], *trees[1]]:
        a, b = (tree.get(name, "nothing") for tree in trees)
        if a != b:
            return f"{a} at {name} instead of {b}"
    structures: list[Any] = [jax.tree.structure(tree) for tree in (held, made)]
    return "" if structures[0] == structures[1] else "a tree of another structure"


def _keyed(tree: Any, wrapped: Wrapped) -> Iterator[MutableMapping[Any, Any]]:
    """The mappings, outside of the model, that are nested as its state is."""
    nodes = sorted(nnx.iter_graph([tree]), key=lambda item: len(item[0]))
    known = {path for path, _ in wrapped.before}
    done = [path for path, node in nodes if node is wrapped.model]
    for path, node in nodes:
        if not isinstance(node, MutableMapping) or _begins_with_one(path, done):
            continue
        if any(_begins_with_one(leaf, known) for leaf in _paths(node)):
            done.append(path)
            yield node


def _paths(mapping: Mapping[Any, Any]) -> Iterable[Path]:
    return nnx.traversals.flatten_mapping(mapping)


def _begins_with_one(path: Path, starts: Collection[Path]) -> bool:
    return any(path[:n] in starts for n in range(len(path) + 1))


def _wrap(root: MutableMapping[Any, Any], layer: Path) -> None:
    """Puts what is at a path under ``base``, if there is anything."""
    node: Any = root
    for key in layer[:-1]:
        if not isinstance(node, Mapping) or key not in node:
            return
        node = node[key]
    if isinstance(node, MutableMapping) and layer[-1] in node:
        inner = node[layer[-1]]
        plain = inner.raw_mapping if isinstance(inner, nnx.State) else inner
        node[layer[-1]] = {"base": plain}


def _name(path: Path) -> str:
    return "/".join(map(str, path))
