"""Brings the seeds of one layer from any schema version to the one written today.

A *tree* is nested dictionaries of host arrays that describe the seeds of one layer:
no parameters of blueprints or hosts, no optimizer. Each version has a module,
``v1.py``, ``v2.py`` and so on, with its layout as data and the step that builds it from
the version before. The newest module that exists is the version that is written.

A step is a pure function ``tree -> tree, notes``. A note is a sentence about something
that was dropped, cut off or could not be known.
"""

import dataclasses
import importlib
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_jax.lifecycle.grafting import Strategy
from esper_jax.lifecycle.stages import Stage
from esper_jax.lifecycle.state import SeedState, init_seeds
from esper_jax.migrations.schema import (
    MigrationError,
    Schema,
    Tree,
    check_codes,
    flat,
    nested,
)
from esper_jax.policy.memory import Reason

__all__ = [
    "CODES",
    "CURRENT",
    "SCHEMAS",
    "MigrationError",
    "from_tree",
    "migrate",
    "to_tree",
    "v1_to_v2",
    "v2_to_v3",
]

_LOGGER = logging.getLogger(__name__)


def _discovered() -> dict[int, Schema]:
    """The schema of every ``v{n}.py``, from 1 on while there is one."""
    found: dict[int, Schema] = {}
    while importlib.util.find_spec(name := f"{__package__}.v{len(found) + 1}"):
        found[len(found) + 1] = importlib.import_module(name).SCHEMA
    return found


SCHEMAS = _discovered()
"""Every schema version, by number."""

CURRENT = max(SCHEMAS)
"""The schema version that this program writes."""

CODES: Mapping[str, Sequence[str] | range] = {
    "stage": [stage.name for stage in Stage],
    "strategy": [strategy.name for strategy in Strategy],
    "reason": [reason.name for reason in Reason],
    "blueprint": SCHEMAS[CURRENT].codes["blueprint"],
}
"""Today's code tables. Each begins with the table that a schema froze; stages are equal
to it."""


def migrate(
    version: int, tree: Mapping[str, Any], *, capacity: int | None = None
) -> tuple[Tree, list[str]]:
    """Brings the seeds of one layer to the current schema.

    Args:
      version: the schema version of ``tree``.
      tree: host arrays in the layout of ``SCHEMAS[version].seeds``; not changed.
      capacity: slots for the seeds of schema 1 or 2, which have none; by default as
        many as there are living seeds, at least 1. Later trees keep their slots.

    Returns:
      The tree in schema `CURRENT`, and notes on what was lost, which are logged too.

    Raises:
      MigrationError: if the version is not known, or a field is missing, unknown, of
        another shape or kind, or holds a code that does not exist.
    """
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise MigrationError(
            f"schema version: expected an integer from 1 to {CURRENT}, got {version!r}"
        )
    if version > CURRENT:
        raise MigrationError(
            f"schema version {version} is newer than {CURRENT}, the newest that this "
            "program knows: use the esper_jax that wrote it, or a later one"
        )
    if not isinstance(tree, Mapping):
        raise MigrationError(
            f"tree: expected a dictionary of arrays, got {type(tree).__name__}"
        )
    new, notes = SCHEMAS[version].modern(tree)
    for target in range(version + 1, CURRENT + 1):
        new, more = _step(target, new, capacity)
        notes += more
    _check(new)
    for note in notes:
        _LOGGER.warning("schema %d to %d: %s", version, CURRENT, note)
    return new, notes


def v1_to_v2(tree: Mapping[str, Any]) -> tuple[Tree, list[str]]:
    """From the five stages of schema 1 to the eleven of schema 2.

    Raises:
      MigrationError: as `migrate`.
    """
    return _step(2, tree)


def v2_to_v3(
    tree: Mapping[str, Any], capacity: int | None = None
) -> tuple[Tree, list[str]]:
    """From schema 2 to schema 3: narrow dtypes, and slots for the living seeds.

    Raises:
      MigrationError: as `migrate`.
    """
    return _step(3, tree, capacity)


def to_tree(state: SeedState) -> Tree:
    """The seeds of one layer as a tree of schema `CURRENT`; host copies."""
    return jax.tree.map(lambda leaf: np.array(leaf), dataclasses.asdict(state))


def from_tree(tree: Mapping[str, Any]) -> SeedState:
    """The seeds that a tree of schema `CURRENT` describes.

    Raises:
      MigrationError: if it is not one.
    """
    arrays = flat(_check(tree))
    like = init_seeds(len(arrays["slot_of_seed"]), len(arrays["seed_of_slot"]))
    names = flat(dataclasses.asdict(like))
    leaves = [jnp.asarray(arrays[name]) for name in names]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _step(
    target: int, tree: Mapping[str, Any], capacity: int | None = None
) -> tuple[Tree, list[str]]:
    """One step of the chain, to version ``target``."""
    upgrade = SCHEMAS[target].upgrade
    assert upgrade is not None, f"v{target}.py has no upgrade"
    return upgrade(tree, capacity)


def _check(tree: Mapping[str, Any]) -> Tree:
    """A tree that is found to be of schema `CURRENT`, with today's codes."""
    schema = SCHEMAS[CURRENT]
    arrays = schema.checked(tree)
    check_codes(schema.seeds, arrays, CODES)
    return nested(arrays)
