"""Brings the leaves of a saved step to today's schema.

The seeds of each layer go through the chain of migrations. A leaf that the state of a
run did not have yet when it was saved gets the starting value in the frozen layout.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from esper_jax.checkpoint.host_leaves import HostLeaf, flatten, nest, to_host
from esper_jax.checkpoint.location import printable
from esper_jax.checkpoint.manifest import Header
from esper_jax.migrations.chain import CODES, CURRENT, SCHEMAS, migrate
from esper_jax.migrations.schema import KEY, Leaf, check_codes, fresh

__all__ = ["upgraded"]

Leaves = dict[str, HostLeaf]

_log = logging.getLogger(__name__)


def upgraded(
    header: Header, leaves: Leaves, like: Any = None
) -> tuple[Leaves, list[str]]:
    """The leaves of a step in today's schema, and notes on what was assumed.

    The notes are logged, too.

    Args:
      header: of the step, of schema `CURRENT` or older.
      leaves: of the step, by name; not changed.
      like: the state to restore into. It decides how many slots seeds of schemas 1
        and 2 get, and which missing leaves to fill in. With None all leaves that a run
        of today has are filled in.

    Raises:
      MigrationError: if the step cannot be brought to today's schema, or holds a code
        that today's program does not know.
    """
    wanted = {name: leaf for name, (_, leaf) in flatten(like).items()}
    new, notes = _with_seeds(header.schema, leaves, wanted)
    for prefix in _runs(new):
        filled = _late(header, new, prefix, None if like is None else wanted)
        if filled:
            new |= filled
            notes.append(
                f"not saved by this early form of schema {header.schema}, start as in "
                f"a new run: {', '.join(filled)}"
            )
            _log.warning("step %d: %s", header.step, notes[-1])
        _check_codes(new, prefix)
    return new, notes


def _with_seeds(
    version: int, leaves: Leaves, wanted: Mapping[str, Any]
) -> tuple[Leaves, list[str]]:
    """The leaves, with the seeds of each layer in today's schema."""
    schema, notes = SCHEMAS[version], []

    def walk(branch: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(branch, dict):
            return branch
        if schema.mark not in branch:
            return {key: walk(value, (*path, key)) for key, value in branch.items()}
        arrays = _arrays(branch)
        if version == CURRENT:  # not checked: seeds of any shape may be saved
            new, more = schema.modern(arrays)
            new = new if more else branch
            for note in more:
                _log.warning("%s", printable(f"{'/'.join(path)}: {note}"))
        else:
            slots = wanted.get("/".join((*path, "seed_of_slot")))
            capacity = None if slots is None else int(np.shape(slots)[-1])
            new, more = migrate(version, arrays, capacity=capacity)
        notes.extend(more)
        return new

    return to_host(walk(nest(leaves), ())), notes


def _arrays(branch: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _arrays(leaf) if isinstance(leaf, dict) else leaf.array
        for key, leaf in branch.items()
    }


def _runs(leaves: Leaves) -> Iterator[tuple[str, ...]]:
    """The keys above each state of a run in the saved tree."""
    for leaf in list(leaves.values()):
        *prefix, last = leaf.keys or ("",)
        beside = ("/".join((*prefix, name)) for name in ("ticks", "rng"))
        layers = (*prefix, "seeds")
        if last != "step" or not all(name in leaves for name in beside):
            continue
        if any(other.keys[:-2] == layers for other in leaves.values()):
            yield tuple(prefix)


def _late(
    header: Header,
    leaves: Leaves,
    prefix: tuple[str, ...],
    wanted: Mapping[str, Any] | None,
) -> Leaves:
    """The leaves that a run's state lacks, at their starting values."""
    before = SCHEMAS[header.schema].rest
    seeds = _seeds_by_layer(leaves, prefix)
    known = _blueprints(header, prefix, wanted)
    filled: Leaves = {}
    for pattern, layout in SCHEMAS[CURRENT].rest.items():
        if not before or (pattern in before and not layout.late):
            continue
        if not _is_of(pattern, leaves, prefix):
            continue
        for layer in seeds if "<layer>" in pattern else [""]:
            keys = tuple(key.replace("<layer>", layer) for key in pattern.split("/"))
            name = "/".join((*prefix, *keys))
            if name in leaves or (wanted is not None and name not in wanted):
                continue
            sizes = dict(known)
            if layer:
                sizes["S"] = len(seeds[layer]["stage"])
            array = fresh({pattern: layout}, **sizes)[pattern]
            impl = "threefry2x32" if layout.dtype == KEY else None
            filled[name] = HostLeaf((*prefix, *keys), array, impl)
    return filled


def _seeds_by_layer(
    leaves: Leaves, prefix: tuple[str, ...]
) -> dict[str, dict[str, np.ndarray]]:
    """The seeds of each layer of a run, arrays by full name."""
    where = (*prefix, "seeds")
    layers: dict[str, dict[str, np.ndarray]] = {}
    for leaf in leaves.values():
        if leaf.keys[: len(where)] == where:
            layer, *rest = leaf.keys[len(where) :]
            layers.setdefault(layer, {})["/".join(rest)] = leaf.array
    return layers


def _blueprints(
    header: Header, prefix: tuple[str, ...], wanted: Mapping[str, Any] | None
) -> dict[str, int]:
    """``N``, the number of blueprints in the policy's memory, if it is known."""
    tried = (wanted or {}).get("/".join((*prefix, "memory", "tried")))
    if tried is not None:
        return {"N": int(np.shape(tried)[0])}
    try:
        return {"N": len(header.config["growth"]["blueprints"])}
    except (KeyError, TypeError):
        return {}


def _check_codes(leaves: Leaves, prefix: tuple[str, ...]) -> None:
    """Refuses codes that today's program does not know in the state of a run."""
    layout: dict[str, Leaf] = {}
    for pattern, leaf in SCHEMAS[CURRENT].state.items():
        if leaf.codes and _is_of(pattern, leaves, prefix):
            for layer in _seeds_by_layer(leaves, prefix):
                name = "/".join((*prefix, pattern.replace("<layer>", layer)))
                layout[name] = leaf
    arrays = {name: leaves[name].array for name in layout if name in leaves}
    check_codes(layout, arrays, CODES)


def _is_of(pattern: str, leaves: Leaves, prefix: tuple[str, ...]) -> bool:
    """Whether a leaf belongs to the run; another policy has a memory of its own."""
    heuristic = "/".join((*prefix, "memory", "best_loss")) in leaves
    return heuristic or not pattern.startswith("memory/")
