"""Schema 3: the whole state of a run, as esper_jax 0.1 saves it.

Frozen: data of this file never change. The number 3 stood for four layouts while it was
new. The last one is written down here. The earlier ones differ in this:

- until commit d62e44a ``history`` was uint8[S, 10], one byte a transition, newest
  first, and the state had no ``governor``;
- until 5d8b793 seeds had no ``worth_ticks``, the monitor no ``gradients``, and the
  policy's memory only ``best_loss`` and ``stale``;
- until cbb7b57 ``worth_ticks`` was uint16.

``Leaf.late`` marks what the earlier ones lack, `Schema.early` how to convert the rest.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from esper_jax.migrations import v2
from esper_jax.migrations.schema import (
    KEY,
    Arrays,
    Early,
    Leaf,
    MigrationError,
    Schema,
    Tree,
    flat,
    fresh,
    nested,
    refuse,
    seeds_in_words,
)

__all__ = ["SCHEMA", "consistent"]

_NAN, _INF = float("nan"), float("inf")

_CODES = {
    "stage": v2.SCHEMA.codes["stage"],
    "strategy": v2.SCHEMA.codes["strategy"],
    "blueprint": range(127),
    "reason": (
        "GERMINATED",
        "DISABLED",
        "TARGET_MET",
        "NOT_YET",
        "BUSY",
        "EMBARGOED",
        "FULL",
        "NO_SLOT",
        "UNMEASURED",
        "BUDGET_SPENT",
    ),
}

_LIVING = np.array(
    [
        name not in ("DORMANT", "CULLED", "CANCELLED", "ROLLED_BACK")
        for name in _CODES["stage"]
    ]
)
"""``_LIVING[stage]``: whether a seed in that stage owns a slot."""

_SEEDS = {
    "stage": Leaf("int8", "S", 0, codes="stage"),
    "parent_stage": Leaf("int8", "S", 0, codes="stage"),
    "blueprint": Leaf("int8", "S", 0, codes="blueprint"),
    "strategy": Leaf("int8", "S", 0, codes="strategy"),
    "epochs_in_stage": Leaf("uint16", "S", 0),
    "error_count": Leaf("uint8", "S", 0),
    # A byte a transition, source << 4 | target, newest in the lowest byte.
    "history/newest": Leaf("uint32", "S", 0),
    "history/middle": Leaf("uint32", "S", 0),
    "history/oldest": Leaf("uint16", "S", 0),
    "slot_of_seed": Leaf("int32", "S", -1),
    "graft/alpha": Leaf("float32", "S", 0),
    "graft/velocity": Leaf("float32", "S", 0),
    "graft/stable_alpha": Leaf("float32", "S", 0),
    "graft/previous_loss": Leaf("float32", "S", _NAN),
    "graft/pause": Leaf("uint16", "S", 0),
    "graft/unstable_checks": Leaf("uint8", "S", 0),
    "health": Leaf("float32", "S", _NAN),
    "worth": Leaf("float32", "S", _NAN),
    "worth_ticks": Leaf("uint8", "S", 0, late=True),
    "statistics/count": Leaf("float32", "S", 0),
    "statistics/total": Leaf("float32", "S", 0),
    "statistics/squares": Leaf("float32", "S", 0),
    "statistics/near_zero": Leaf("float32", "S", 0),
    "seed_of_slot": Leaf("int32", "K", -1),
    "reconstruction": Leaf("float32", "K", 0),
    "gain": Leaf("float32", "K", 0),
    "errors": Leaf("uint16", "K", 0),
    "steps": Leaf("int32", "", 0),
}

_REST = {
    "step": Leaf("int32", "", 0),
    "ticks": Leaf("int32", "", 0),
    "rng": Leaf(KEY),
    "params/<variable>": Leaf("any", "..."),
    "opt_state/<tree>": Leaf("any", "..."),
    "banks/<layer>/w1": Leaf("float32", "K C H"),
    "banks/<layer>/b1": Leaf("float32", "K H"),
    "banks/<layer>/w2": Leaf("float32", "K H C"),
    "banks/<layer>/b2": Leaf("float32", "K C"),
    "banks/<layer>/scale": Leaf("float32", "K C"),
    "banks/<layer>/custom/<blueprint>/<tree>": Leaf("any", "K ..."),
    "bank_opt/<layer>/<tree>": Leaf("any", "K ..."),
    "rest/<variable>": Leaf("any", "..."),
    "memory/best_loss": Leaf("float32", "", _INF),
    "memory/stale": Leaf("int32", "", 0),
    "memory/loss_mean": Leaf("float32", "", _NAN, late=True),
    "memory/since": Leaf("int32", "", 0, late=True),
    "memory/turn": Leaf("int32", "", 0, late=True),
    "memory/key": Leaf(KEY, "", 0, late=True),
    "memory/reason": Leaf("int8", "", 3, codes="reason", late=True),
    "memory/tried": Leaf("int32", "N", 0, late=True),
    "memory/kept": Leaf("int32", "N", 0, late=True),
    "memory/earned": Leaf("float32", "N", 0, late=True),
    "memory/before/<layer>": Leaf("float32", "S", _NAN, late=True),
    "monitor/initial_loss": Leaf("float32", "", _NAN),
    "monitor/loss_mean": Leaf("float32", "", _NAN),
    "monitor/loss_variance": Leaf("float32", "", _NAN),
    "monitor/accuracy_mean": Leaf("float32", "", _NAN),
    "monitor/accuracy_variance": Leaf("float32", "", _NAN),
    "monitor/host_mean/<layer>/<variable>": Leaf("any", "..."),
    "monitor/train_loss": Leaf("float32", "", 0),
    "monitor/grad_norm": Leaf("float32", "", 0),
    "monitor/gradients/<layer>/host": Leaf("float32", "", 0, late=True),
    "monitor/gradients/<layer>/chunk": Leaf("float32", "S", 0, late=True),
    "monitor/gradients/<layer>/seed": Leaf("float32", "S", 0, late=True),
    "monitor/steps": Leaf("int32", "", 0),
    "governor/losses": Leaf("float32", "16 2", _NAN, late=True),
    "governor/best": Leaf("float32", "2", _INF, late=True),
    "governor/rollbacks": Leaf("int32", "", 0, late=True),
    "governor/consecutive": Leaf("int32", "", 0, late=True),
}


def consistent(arrays: Arrays) -> None:
    """Checks that stages, ``slot_of_seed`` and ``seed_of_slot`` agree.

    Raises:
      MigrationError: naming the seed or the leaf that does not fit.
    """
    stage, slot = arrays["stage"], arrays["slot_of_seed"]
    owner = arrays["seed_of_slot"]
    s, k = len(slot), len(owner)
    if k > s:
        raise MigrationError(
            f"seed_of_slot: expected at most {s} slots, one a seed; got {k}"
        )
    last = len(_LIVING) - 1
    refuse("stage", stage, (stage < 0) | (stage > last), f"from 0 to {last}")
    refuse("slot_of_seed", slot, (slot < -1) | (slot >= k), f"from -1 to {k - 1}")
    refuse(
        "slot_of_seed",
        slot,
        (slot >= 0) != _LIVING[stage],
        "a slot for a seed that lives, and -1 for any other",
    )
    taken = slot[slot >= 0]
    expected = np.full(k, -1)
    expected[taken] = np.flatnonzero(slot >= 0)
    if not np.array_equal(expected, owner) or len(set(taken)) != len(taken):
        raise MigrationError(
            f"seed_of_slot: expected {expected.tolist()}, the seeds that name these "
            f"slots in slot_of_seed; got {owner.tolist()}"
        )


def _upgrade(
    tree: Mapping[str, Any], capacity: int | None = None
) -> tuple[Tree, list[str]]:
    """From schema 2: narrow dtypes, and slots for the living seeds in their order."""
    old = v2.SCHEMA.checked(tree)
    columns = dict(zip(v2.COLUMNS, old["state_tensor"].T, strict=True))
    _check_v2(columns, old)
    stage = columns["stage"]
    slots = np.flatnonzero(_LIVING[stage])
    s, needed = len(stage), max(1, len(slots))
    if capacity is None:
        capacity = needed
    if not needed <= capacity <= s:
        raise MigrationError(
            f"capacity: expected {needed} (the living seeds) to {s} (all seeds), got "
            f"{capacity}; a smaller one would lose a living seed"
        )
    notes: list[str] = []
    new = fresh(_SEEDS, S=s, K=capacity)
    new["slot_of_seed"][slots] = np.arange(len(slots))
    new["seed_of_slot"][: len(slots)] = slots
    new["stage"][:] = stage
    new["parent_stage"][:] = columns["parent stage"]
    new["blueprint"][:] = np.maximum(columns["blueprint"], 0)
    new["strategy"][:] = columns["strategy"]
    for name, column in (("epochs_in_stage", "epochs"), ("error_count", "error count")):
        most = np.iinfo(new[name].dtype).max
        above = int(np.sum(columns[column] > most))
        if above:
            notes.append(f"{name} of {seeds_in_words(above)} cut to {most}")
        new[name][:] = np.minimum(columns[column], most)
    new |= flat(
        _words(_newest_first(old["transition_history"], old["history_pointers"])),
        "history/",
    )
    new["health"][:], more = _health(old, columns["score"])
    notes += more
    alpha, more = _alpha(old, stage)
    notes += more
    new["graft/alpha"][:] = new["graft/stable_alpha"][:] = alpha
    new["statistics/total"][:] = old["telemetry_buffer"][:, 0]
    new["statistics/squares"][:] = old["telemetry_buffer"][:, 1]
    return nested(new), notes + _dropped(old, columns["checkpoint"])


def _check_v2(columns: Mapping[str, np.ndarray], old: Arrays) -> None:
    """Refuses codes and counts that schema 2 does not have."""
    stages, strategies, blueprints = (
        len(v2.SCHEMA.codes[name]) for name in ("stage", "strategy", "blueprint")
    )
    for name, values, count in (
        ("stage", columns["stage"], stages),
        ("parent stage", columns["parent stage"], stages),
        ("strategy", columns["strategy"], strategies),
        ("history_pointers", old["history_pointers"], 10),
        ("transition_history", old["transition_history"], stages),
    ):
        wrong = (values < 0) | (values >= count)
        refuse(name, values, wrong, f"from 0 to {count - 1}")
    for name in ("epochs", "error count"):
        refuse(name, columns[name], columns[name] < 0, "at least 0")
    blueprint = columns["blueprint"]
    absent = (blueprint == -1) & ~_LIVING[columns["stage"]]
    refuse(
        "blueprint",
        blueprint,
        ~absent & ((blueprint < 0) | (blueprint >= blueprints)),
        f"from 0 to {blueprints - 1}, or -1 for a seed that does not live",
    )


def _health(old: Arrays, score: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Health as recorded, else from the score; cut to 0 to 1."""
    health = np.asarray(old.get("health", score / 1000), np.float32)
    outside = int(np.sum((health < 0) | (health > 1)))
    notes = [f"health of {seeds_in_words(outside)} cut to 0 to 1"] if outside else []
    return np.clip(health, 0, 1), notes


def _alpha(old: Arrays, stage: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Position on the ramp as recorded, else what the stage says."""
    if "alpha_blend" in old:
        alpha = old["alpha_blend"]
        refuse("alpha_blend", alpha, ~((alpha >= 0) & (alpha <= 1)), "from 0 to 1")
        return alpha.astype(np.float32), []
    names = np.array(_CODES["stage"])[stage]
    grafted = ("STABILIZATION", "EVALUATING", "FINE_TUNING", "FOSSILIZED")
    grafting = int(np.sum(names == "GRAFTING"))
    notes = []
    if grafting:
        notes.append(
            f"{seeds_in_words(grafting)} in GRAFTING: schema 2 recorded no alpha; the "
            "ramp starts again from 0"
        )
    return np.isin(names, grafted).astype(np.float32), notes


def _dropped(old: Arrays, saved: np.ndarray) -> list[str]:
    """Notes on what schema 3 has no place for."""
    notes = []
    if old["telemetry_buffer"].any():
        notes.append(
            "telemetry_buffer: how many values it sums was not recorded; the sums are "
            "kept with a count of 0 until the next tick clears them"
        )
    if (saved >= 0).any():
        notes.append(
            f"checkpoint ids of {seeds_in_words(int((saved >= 0).sum()))} dropped: "
            "a checkpoint now holds all seeds"
        )
    for name, values in zip(v2.METRICS, old["performance_metrics"].T, strict=True):
        measured = int(np.sum(np.isfinite(values) & (values != 0)))
        if measured:
            notes.append(
                f"performance_metrics, {name} of {seeds_in_words(measured)} dropped: "
                "now measured at each tick and kept for no seed"
            )
    return notes


def _newest_first(ring: np.ndarray, pointers: np.ndarray) -> np.ndarray:
    """The ring as bytes, uint8[S, 10], newest first, without gaps."""
    order = (pointers[:, None] - 1 - np.arange(10)) % 10
    newest = np.take_along_axis(ring, order[:, :, None], axis=1)
    byte = newest[:, :, 0] << 4 | newest[:, :, 1]
    behind = np.argsort(byte == 0, axis=1, kind="stable")
    return np.take_along_axis(byte, behind, axis=1).astype(np.uint8)


def _words(entries: np.ndarray) -> dict[str, np.ndarray]:
    """The words of ``history`` from bytes, uint8[..., 10], newest first."""
    shifted = entries.astype(np.uint32) << (8 * np.arange(10) % 32).astype(np.uint32)
    newest, middle, oldest = (
        np.bitwise_or.reduce(shifted[..., i : i + 4], axis=-1) for i in (0, 4, 8)
    )
    return {"newest": newest, "middle": middle, "oldest": oldest.astype(np.uint16)}


def _narrow(ticks: np.ndarray) -> np.ndarray:
    return np.minimum(ticks, 255).astype(np.uint8)


SCHEMA = Schema(
    version=3,
    mark="seed_of_slot",
    seeds=_SEEDS,
    rest=_REST,
    codes=_CODES,
    early={
        "history": Early(Leaf("uint8", "S 10"), _words),
        "worth_ticks": Early(Leaf("uint16", "S"), _narrow),
    },
    consistent=consistent,
    upgrade=_upgrade,
    digest="3fe32197c0d3f337b69b6dd1eef3e5c8a0acc1d6e911370727f90f29aa9709e5",
)
