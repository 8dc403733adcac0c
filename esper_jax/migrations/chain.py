"""Schema versions of the seeds' state, and the way from each to the next.

A *tree* is a dictionary of host arrays that describes the seeds of one layer, and
nothing else: no parameters of blueprints or hosts, no optimizer. ``S`` is the number of
seeds.

Schema 1, the ancestor's first form:

- ``state_tensor`` int[S, 4]: stage (DORMANT 0, LOADING 1, ACTIVE 2, ERROR_RECOVERY 3,
  FOSSILIZED 4), blueprint (-1 for none), epochs in the stage, grafting strategy;
- ``health`` float[S]; ``error_count`` int[S]; ``alpha_blend`` float[S];
- ``telemetry_buffer`` float[S, 2]: sum and sum of squares of the chunk's activations.

Schema 2, its second:

- ``state_tensor`` int[S, 8]: stage (`Stage`), blueprint, epochs, strategy, parent
  stage, checkpoint id (-1 for none), score times 1000, error count;
- ``transition_history`` int[S, 10, 2]: (source, target), a ring; (0, 0) is none;
- ``history_pointers`` int[S]: where the next transition would be written;
- ``performance_metrics`` float[S, 4]: loss, accuracy, stability, efficiency;
- ``telemetry_buffer`` as in schema 1;
- ``health`` and ``alpha_blend`` as in schema 1, both optional. A tree that came from
  schema 1 has them, so that nothing is rounded or lost on the way.

Schema 3 is `SeedState`, each field by its name, ``graft`` and ``statistics`` as
dictionaries (`to_tree`, `from_tree`).

A step is a pure function ``tree -> tree, notes``; a note is a sentence about something
that was dropped, cut off or could not be known.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_jax.lifecycle.grafting import GraftMemory, Strategy
from esper_jax.lifecycle.history import HISTORY, History, pack_history
from esper_jax.lifecycle.signals import Statistics
from esper_jax.lifecycle.stages import LIVING, NUM_STAGES, Stage
from esper_jax.lifecycle.state import SeedState, init_seeds

__all__ = [
    "CURRENT",
    "MigrationError",
    "from_tree",
    "migrate",
    "to_tree",
    "v1_to_v2",
    "v2_to_v3",
]

CURRENT = 3
"""The schema version that this program writes."""


Tree = dict[str, Any]


_LOGGER = logging.getLogger(__name__)


_FIRST_STAGES = {
    0: Stage.DORMANT,
    1: Stage.GERMINATED,  # LOADING
    2: Stage.FINE_TUNING,  # ACTIVE
    3: Stage.CULLED,  # ERROR_RECOVERY
    4: Stage.FOSSILIZED,
}


_MAX_BLUEPRINTS = 127


class MigrationError(ValueError):
    """A tree that cannot be brought to the current schema; names field and value."""


def migrate(
    version: int, tree: Mapping[str, Any], *, capacity: int | None = None
) -> tuple[Tree, list[str]]:
    """Brings the seeds of one layer to the current schema.

    Args:
      version: the schema version of ``tree``.
      tree: host arrays, as the module's docstring describes them; not changed.
      capacity: slots to give to the seeds of a schema that has none; by default as many
        as there are living seeds, at least 1. A tree of schema 3 keeps its own slots.

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
    notes: list[str] = []
    new = dict(tree)
    if version == 1:
        new, more = v1_to_v2(new)
        notes += more
    if version <= 2:
        new, more = v2_to_v3(new, capacity)
        notes += more
    _check_v3(new)
    for note in notes:
        _LOGGER.warning("schema %d to %d: %s", version, CURRENT, note)
    return new, notes


def v1_to_v2(tree: Mapping[str, Any]) -> tuple[Tree, list[str]]:
    """From the five stages of schema 1 to the eleven of schema 2.

    Raises:
      MigrationError: as `migrate`.
    """
    _check_names(1, tree, _V1_FIELDS)
    table = _array(1, tree, "state_tensor", "iu", (None, 4))
    s = len(table)
    health = _array(1, tree, "health", "f", (s,))
    errors = _array(1, tree, "error_count", "iu", (s,))
    alpha = _array(1, tree, "alpha_blend", "f", (s,))
    telemetry = _array(1, tree, "telemetry_buffer", "f", (s, 2))
    _check_codes("stage", table[:, 0], len(_FIRST_STAGES))
    stage = np.array([_FIRST_STAGES[code] for code in range(5)], np.int32)[table[:, 0]]
    score = np.nan_to_num(np.round(health.astype(np.float64) * 1000), nan=0.0)
    columns = [
        stage,
        *table.T[1:],
        np.full(s, Stage.DORMANT),
        np.full(s, -1),
        np.clip(score, -(2**31), 2**31 - 1),
        errors,
    ]
    notes = []
    lived = int(np.sum(stage != Stage.DORMANT))
    if lived:
        notes.append(
            f"{_seeds(lived)}: schema 1 recorded no parent stage and no history; the "
            "parent is set to DORMANT, the history is empty"
        )
    partial = int(np.sum((stage == Stage.FINE_TUNING) & (alpha < 1)))
    if partial:
        notes.append(
            f"{_seeds(partial)} in ACTIVE with alpha below 1: kept as position of the "
            "ramp; in FINE_TUNING the blueprint counts in full"
        )
    return {
        "state_tensor": np.stack(columns, axis=1).astype(np.int64),
        "transition_history": np.zeros((s, HISTORY, 2), np.int32),
        "history_pointers": np.zeros(s, np.int32),
        "performance_metrics": np.full((s, 4), np.nan, np.float32),
        "telemetry_buffer": telemetry.copy(),
        "health": health.copy(),
        "alpha_blend": alpha.copy(),
    }, notes


def v2_to_v3(
    tree: Mapping[str, Any], capacity: int | None = None
) -> tuple[Tree, list[str]]:
    """From schema 2 to `SeedState`: narrow dtypes, and slots for the living seeds.

    The living seeds get the slots in their order.

    Raises:
      MigrationError: as `migrate`.
    """
    _check_names(2, tree, _V2_FIELDS, _V2_OPTIONAL)
    table = _array(2, tree, "state_tensor", "iu", (None, 8))
    s = len(table)
    ring = _array(2, tree, "transition_history", "iu", (s, HISTORY, 2))
    pointers = _array(2, tree, "history_pointers", "iu", (s,))
    metrics = _array(2, tree, "performance_metrics", "f", (s, 4))
    telemetry = _array(2, tree, "telemetry_buffer", "f", (s, 2))
    stage, blueprint, epochs, strategy, parent, saved, score, errors = table.T
    _check_codes("stage", stage, NUM_STAGES)
    _check_codes("parent stage", parent, NUM_STAGES)
    _check_codes("strategy", strategy, len(Strategy))
    _check_codes("history_pointers", pointers, HISTORY)
    _check_codes("transition_history", ring.reshape(s, -1), NUM_STAGES)
    for name, values in (("epochs", epochs), ("error count", errors)):
        _refuse(name, values, values < 0, "at least 0")
    living = LIVING[stage]
    absent = (blueprint == -1) & ~living
    _refuse(
        "blueprint",
        blueprint,
        ~absent & ((blueprint < 0) | (blueprint >= _MAX_BLUEPRINTS)),
        f"from 0 to {_MAX_BLUEPRINTS - 1}, or -1 for a seed that does not live",
    )
    notes: list[str] = []

    if "health" in tree:
        health = _array(2, tree, "health", "f", (s,)).astype(np.float32)
    else:
        health = (score / 1000).astype(np.float32)
    outside = (health < 0) | (health > 1)
    if outside.any():
        notes.append(f"health of {_seeds(int(outside.sum()))} cut to 0 to 1")
        health = np.clip(health, 0, 1)
    alpha, note = _alpha(tree, stage)
    notes += note

    slots = np.flatnonzero(living)
    if capacity is None:
        capacity = max(1, len(slots))
    if not max(1, len(slots)) <= capacity <= s:
        raise MigrationError(
            f"capacity: expected {max(1, len(slots))} (the living seeds) to {s} (all "
            f"seeds), got {capacity}; a smaller one would lose a living seed"
        )
    new = to_tree(init_seeds(s, capacity))
    new["slot_of_seed"][slots] = np.arange(len(slots))
    new["seed_of_slot"][: len(slots)] = slots
    new["stage"][:] = stage
    new["parent_stage"][:] = parent
    new["blueprint"][:] = np.where(absent, 0, blueprint)
    new["strategy"][:] = strategy
    for name, values in (("epochs_in_stage", epochs), ("error_count", errors)):
        new[name], note = _saturated(name, values, new[name].dtype)
        notes += note
    new["history"] = dataclasses.asdict(pack_history(_packed(ring, pointers)))
    new["health"][:] = health
    new["graft"]["alpha"][:] = alpha
    new["graft"]["stable_alpha"][:] = alpha
    new["statistics"]["total"][:] = telemetry[:, 0]
    new["statistics"]["squares"][:] = telemetry[:, 1]
    if telemetry.any():
        notes.append(
            "telemetry_buffer: how many values it sums was not recorded; the sums are "
            "kept with a count of 0 until the next tick clears them"
        )
    if (saved >= 0).any():
        notes.append(
            f"checkpoint ids of {_seeds(int((saved >= 0).sum()))} dropped: "
            "a checkpoint now holds all seeds"
        )
    for column, name in enumerate(("loss", "accuracy", "stability", "efficiency")):
        measured = np.isfinite(metrics[:, column]) & (metrics[:, column] != 0)
        if measured.any():
            notes.append(
                f"performance_metrics, {name} of {_seeds(int(measured.sum()))} "
                "dropped: now measured at each tick and kept for no seed"
            )
    return new, notes


def to_tree(state: SeedState) -> Tree:
    """The seeds of one layer as a tree of schema `CURRENT`; host copies."""
    return jax.tree.map(lambda leaf: np.array(leaf), dataclasses.asdict(state))


def from_tree(tree: Mapping[str, Any]) -> SeedState:
    """The seeds that a tree of schema `CURRENT` describes.

    Raises:
      MigrationError: if it is not one.
    """
    _check_v3(tree)
    fields: dict[str, Any] = jax.tree.map(jnp.asarray, dict(tree))
    fields["history"] = History(**fields["history"])
    fields["graft"] = GraftMemory(**fields["graft"])
    fields["statistics"] = Statistics(**fields["statistics"])
    return SeedState(**fields)


_V1_FIELDS = (
    "state_tensor",
    "health",
    "error_count",
    "alpha_blend",
    "telemetry_buffer",
)


_V2_FIELDS = (
    "state_tensor",
    "transition_history",
    "history_pointers",
    "performance_metrics",
    "telemetry_buffer",
)


_V2_OPTIONAL = ("health", "alpha_blend")


def _alpha(tree: Mapping[str, Any], stage: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Position on the ramp: as recorded, else as the stage has it."""
    if "alpha_blend" in tree:
        alpha = _array(2, tree, "alpha_blend", "f", (len(stage),))
        _refuse("alpha_blend", alpha, ~((alpha >= 0) & (alpha <= 1)), "from 0 to 1")
        return alpha.astype(np.float32), []
    grafted = (stage >= Stage.STABILIZATION) & (stage <= Stage.FOSSILIZED)
    grafting = int(np.sum(stage == Stage.GRAFTING))
    notes = []
    if grafting:
        notes.append(
            f"{_seeds(grafting)} in GRAFTING: schema 2 recorded no alpha; the ramp "
            "starts again from 0"
        )
    return grafted.astype(np.float32), notes


def _packed(ring: np.ndarray, pointers: np.ndarray) -> np.ndarray:
    """The ring newest first, a byte a transition, without gaps."""
    order = (pointers[:, None] - 1 - np.arange(HISTORY)) % HISTORY
    newest = np.take_along_axis(ring, order[:, :, None], axis=1).astype(np.int64)
    byte = newest[:, :, 0] << 4 | newest[:, :, 1]
    behind = np.argsort(byte == 0, axis=1, kind="stable")
    return np.take_along_axis(byte, behind, axis=1).astype(np.uint8)


def _saturated(
    name: str, values: np.ndarray, dtype: np.dtype
) -> tuple[np.ndarray, list[str]]:
    most = np.iinfo(dtype).max
    above = int(np.sum(values > most))
    notes = [f"{name} of {_seeds(above)} cut to {most}"] if above else []
    return np.minimum(values, most).astype(dtype), notes


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count != 1 else ''}"


def _check_names(
    version: int,
    tree: Mapping[str, Any],
    needed: tuple[str, ...],
    optional: tuple[str, ...] = (),
    where: str = "",
) -> None:
    known = ", ".join((*needed, *optional))
    for name in needed:
        if name not in tree:
            raise MigrationError(
                f"schema {version}: {where}{name} is missing; expected {known}"
            )
    for name in tree:
        if name not in needed and name not in optional:
            raise MigrationError(
                f"schema {version}: {where}{name} is not known; expected {known}"
            )


def _array(
    version: int, tree: Mapping[str, Any], name: str, kinds: str, shape: tuple[Any, ...]
) -> np.ndarray:
    """The array under a name; ``None`` in ``shape`` is any length, at least 1."""
    array = np.asarray(tree[name])
    fits = array.ndim == len(shape) and all(
        got == want if want is not None else got >= 1
        for got, want in zip(array.shape, shape, strict=True)
    )
    if array.dtype.kind not in kinds or not fits:
        kind = "floats" if kinds == "f" else "integers"
        size = ", ".join("S" if n is None else str(n) for n in shape)
        raise MigrationError(
            f"schema {version}: {name}: expected {kind} of shape ({size}), "
            f"got {array.dtype}{array.shape}"
        )
    # Wide and signed, so that neither sums nor comparisons wrap.
    return array if kinds == "f" else array.astype(np.int64)


def _check_codes(name: str, codes: np.ndarray, count: int) -> None:
    _refuse(name, codes, (codes < 0) | (codes >= count), f"from 0 to {count - 1}")


def _refuse(name: str, values: np.ndarray, wrong: np.ndarray, expected: str) -> None:
    if wrong.any():
        seed = int(np.argwhere(wrong)[0][0])
        raise MigrationError(
            f"{name} of seed {seed}: expected {expected}, got {values[wrong][0]}"
        )


def _check_v3(tree: Mapping[str, Any]) -> None:
    """Names, shapes, dtypes, codes and the ownership of slots."""
    names = tuple(f.name for f in dataclasses.fields(SeedState))
    _check_names(CURRENT, tree, names)
    stage = _array(CURRENT, tree, "stage", "iu", (None,))
    owner = _array(CURRENT, tree, "seed_of_slot", "iu", (None,))
    s, k = len(stage), len(owner)
    if k > s:
        raise MigrationError(
            f"schema {CURRENT}: seed_of_slot: expected at most {s} slots, one a seed; "
            f"got {k}"
        )
    like = to_tree(init_seeds(s, k))
    for name in ("graft", "history", "statistics"):
        if not isinstance(tree[name], Mapping):
            raise MigrationError(
                f"schema {CURRENT}: {name}: expected a dictionary of arrays, "
                f"got {type(tree[name]).__name__}"
            )
        _check_names(CURRENT, tree[name], tuple(like[name]), where=f"{name}.")
    for name, want in like.items():
        pairs = want.items() if isinstance(want, dict) else [("", want)]
        for inner, expected in pairs:
            got = np.asarray(tree[name][inner] if inner else tree[name])
            if (got.shape, got.dtype) != (expected.shape, expected.dtype):
                raise MigrationError(
                    f"schema {CURRENT}: {name}{'.' * bool(inner)}{inner}: expected "
                    f"{expected.dtype}{expected.shape}, got {got.dtype}{got.shape}"
                )
    _check_codes("stage", stage, NUM_STAGES)
    _check_codes("parent_stage", np.asarray(tree["parent_stage"]), NUM_STAGES)
    _check_codes("strategy", np.asarray(tree["strategy"]), len(Strategy))
    _check_codes("blueprint", np.asarray(tree["blueprint"]), _MAX_BLUEPRINTS)
    slot = np.asarray(tree["slot_of_seed"])
    _refuse("slot_of_seed", slot, (slot < -1) | (slot >= k), f"from -1 to {k - 1}")
    _refuse(
        "slot_of_seed",
        slot,
        (slot >= 0) != LIVING[stage],
        "a slot for a seed that lives, and -1 for any other",
    )
    want_owner = np.full(k, -1)
    want_owner[slot[slot >= 0]] = np.flatnonzero(slot >= 0)
    if not np.array_equal(want_owner, owner) or len(set(slot[slot >= 0])) != sum(
        slot >= 0
    ):
        raise MigrationError(
            f"seed_of_slot: expected {want_owner.tolist()}, as slot_of_seed has it; "
            f"got {owner.tolist()}"
        )
