"""Schema migrations: each step against values worked out by hand."""

import dataclasses
import json
import logging
from pathlib import Path

import jax
import numpy as np
import pytest

from esper_jax.lifecycle.history import pack_history
from esper_jax.lifecycle.state import init_seeds
from esper_jax.migrations import (
    CURRENT,
    MigrationError,
    from_tree,
    migrate,
    to_tree,
    v1_to_v2,
    v2_to_v3,
)


def packed(entries):
    return dataclasses.asdict(pack_history(entries))


FIXTURES = Path(__file__).parent / "fixtures"


def load(version):
    lists = json.loads((FIXTURES / f"seeds_v{version}.json").read_text())
    return {
        name: np.asarray(
            rows,
            np.int32
            if name in ("state_tensor", "error_count") or "history" in name
            else np.float32,
        )
        for name, rows in lists.items()
    }


def with_entry(tree, name, index, value):
    array = tree[name].copy()
    array[index] = value
    return {**tree, name: array}


def same(a, b):
    a, b = jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b)
    for (where, x), (there, y) in zip(a, b, strict=True):
        assert where == there
        assert x.dtype == y.dtype, where
        np.testing.assert_array_equal(x, y, err_msg=str(where))


def test_schema_1_to_2():
    old = load(1)
    new, notes = v1_to_v2(old)
    np.testing.assert_array_equal(
        new["state_tensor"],
        [
            [0, -1, 12, 0, 0, -1, 123, 0],
            [1, 2, 3, 1, 0, -1, 500, 1],
            [6, 5, 70000, 4, 0, -1, 875, 300],
            [8, 1, 7, 0, 0, -1, 250, 9],
            [7, 0, 900, 6, 0, -1, 1000, 255],
        ],
    )
    assert not new["transition_history"].any()
    assert not new["history_pointers"].any()
    assert np.isnan(new["performance_metrics"]).all()
    for name in ("health", "alpha_blend", "telemetry_buffer"):
        np.testing.assert_array_equal(new[name], old[name])
    assert len(notes) == 2
    assert "4 seeds: schema 1 recorded no parent stage and no history" in notes[0]
    assert "1 seed in ACTIVE with alpha below 1" in notes[1]
    same(old, load(1))  # left as it was


def test_schema_2_to_3():
    new, notes = v2_to_v3(load(2))
    expected = {
        "stage": np.int8([0, 3, 8, 7, 1]),
        "parent_stage": np.int8([8, 2, 5, 6, 0]),
        "blueprint": np.int8([0, 2, 1, 126, 0]),
        "strategy": np.int8([0, 5, 0, 6, 1]),
        "epochs_in_stage": np.uint16([4, 9, 65535, 1, 0]),
        "error_count": np.uint8([0, 2, 255, 0, 1]),
        # Newest first, source and target in one byte, without gaps.
        "history": packed(
            np.uint8(
                [
                    [0x90, 0x19, 0x01, 0, 0, 0, 0, 0, 0, 0],
                    [0x23, 0x12, 0x01, 0, 0, 0, 0, 0, 0, 0],
                    [0x58, 0x45, 0x34, 0x23, 0x80, 0x28, 0x12, 0x01, 0x80, 0x28],
                    [0x67, 0x56, 0x45, 0x34, 0x23, 0x12, 0x01, 0, 0, 0],
                    [0x01, 0, 0, 0, 0, 0, 0, 0, 0, 0],
                ]
            )
        ),
        "slot_of_seed": np.int32([-1, 0, -1, 1, 2]),
        "seed_of_slot": np.int32([1, 3, 4]),
        "health": np.float32([0.12, 0.875, 1.0, 1.0, 0.0]),
        "worth": np.full(5, np.nan, np.float32),
        "worth_ticks": np.zeros(5, np.uint8),
        "reconstruction": np.zeros(3, np.float32),
        "gain": np.zeros(3, np.float32),
        "errors": np.zeros(3, np.uint16),
        "steps": np.int32(0),
        "graft": {
            "alpha": np.float32([0, 0, 0, 1, 0]),
            "velocity": np.zeros(5, np.float32),
            "stable_alpha": np.float32([0, 0, 0, 1, 0]),
            "previous_loss": np.full(5, np.nan, np.float32),
            "pause": np.zeros(5, np.uint16),
            "unstable_checks": np.zeros(5, np.uint8),
        },
        "statistics": {
            "count": np.zeros(5, np.float32),
            "total": np.float32([1.5, 0, -3, 0.5, 4]),
            "squares": np.float32([2.25, 0, 10, 0.25, 8]),
            "near_zero": np.zeros(5, np.float32),
        },
    }
    same(new, {name: expected[name] for name in new})
    text = "\n".join(notes)
    for part in (
        "health of 2 seeds cut",
        "1 seed in GRAFTING: schema 2 recorded no alpha",
        "epochs_in_stage of 1 seed cut to 65535",
        "error_count of 1 seed cut to 255",
        "count of 0",
        "checkpoint ids of 2 seeds dropped",
        "loss of 3 seeds dropped",
        "accuracy of 3 seeds dropped",
        "stability of 3 seeds dropped",
    ):
        assert part in text
    assert "efficiency" not in text  # there was none


def test_schema_1_to_3_loses_nothing_that_has_a_meaning(caplog):
    with caplog.at_level(logging.WARNING, logger="esper_jax.migrations"):
        new, notes = migrate(1, load(1))
    assert [record.getMessage()[15:] for record in caplog.records] == notes
    middle, first = v1_to_v2(load(1))
    last, second = v2_to_v3(middle)
    same({name: new[name] for name in last}, last)
    assert notes == first + second
    old = load(1)
    np.testing.assert_array_equal(new["health"], old["health"])  # not rounded
    np.testing.assert_array_equal(new["graft"]["alpha"], old["alpha_blend"])
    np.testing.assert_array_equal(new["stage"], [0, 1, 6, 8, 7])
    np.testing.assert_array_equal(new["blueprint"], [0, 2, 5, 1, 0])
    np.testing.assert_array_equal(new["strategy"], [0, 1, 4, 0, 6])
    np.testing.assert_array_equal(new["epochs_in_stage"], [12, 3, 65535, 7, 900])
    np.testing.assert_array_equal(new["error_count"], [0, 1, 255, 9, 255])
    np.testing.assert_array_equal(new["seed_of_slot"], [1, 2, 4])
    np.testing.assert_array_equal(
        new["statistics"]["total"], old["telemetry_buffer"][:, 0]
    )
    np.testing.assert_array_equal(
        new["statistics"]["squares"], old["telemetry_buffer"][:, 1]
    )


def test_capacity_of_schemas_without_slots():
    new, _ = migrate(2, load(2), capacity=5)
    assert new["seed_of_slot"].tolist() == [1, 3, 4, -1, -1]
    assert new["gain"].shape == (5,)
    for capacity in (2, 6):
        message = rf"expected 3 \(the living seeds\) to 5 .*, got {capacity}"
        with pytest.raises(MigrationError, match=message):
            migrate(2, load(2), capacity=capacity)
    dormant = with_entry(load(1), "state_tensor", (slice(None), 0), 0)
    assert migrate(1, dormant)[0]["seed_of_slot"].tolist() == [-1]


def test_the_current_schema_goes_through_a_state_and_back():
    for version in (1, 2):
        tree, _ = migrate(version, load(version), capacity=4)
        state = from_tree(tree)
        same(to_tree(state), tree)
        again, notes = migrate(CURRENT, tree)
        same(again, tree)
        assert notes == []
        assert jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), state
        ) == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), init_seeds(5, 4))


V1, V2 = load(1), load(2)
NOW = to_tree(init_seeds(4, 2))


@pytest.mark.parametrize(
    ("version", "tree", "message"),
    [
        (
            CURRENT + 1,
            NOW,
            rf"{CURRENT + 1} is newer than {CURRENT}.*use the esper_jax t",
        ),
        (0, V1, rf"schema version: expected an integer from 1 to {CURRENT}, got 0"),
        ("1", V1, r"schema version: .* got '1'"),
        (1, [1], r"tree: expected a dictionary of arrays, got list"),
        (1, {}, r"schema 1: state_tensor is missing"),
        (1, {**V1, "colour": V1["health"]}, r"schema 1: colour is not known"),
        (1, V2, r"schema 1: health is missing"),
        (2, V1, r"schema 2: transition_history is missing"),
        (2, {**V2, "state_tensor": V1["state_tensor"]}, r"of shape \(S, 8\).*\(5, 4\)"),
        (1, {**V1, "health": V1["error_count"]}, r"health: expected floats.*int32"),
        (1, {**V1, "state_tensor": np.zeros((0, 4), int)}, r"got int64\(0, 4\)"),
        (1, with_entry(V1, "state_tensor", (2, 0), 5), r"stage of seed 2.*0 to 4.*5"),
        (2, with_entry(V2, "state_tensor", (2, 0), 11), r"stage of seed 2.*to 10.*11"),
        (2, with_entry(V2, "state_tensor", (0, 4), -1), r"parent stage of seed 0.*-1"),
        (2, with_entry(V2, "state_tensor", (1, 3), 7), r"strategy of seed 1.*to 6.*7"),
        (2, with_entry(V2, "state_tensor", (1, 1), -1), r"blueprint of seed 1.*got -1"),
        (2, with_entry(V2, "state_tensor", (0, 1), 127), r"blueprint of seed 0.*127"),
        (2, with_entry(V2, "state_tensor", (4, 2), -3), r"epochs of seed 4.*got -3"),
        (2, with_entry(V2, "state_tensor", (4, 7), -1), r"error count of seed 4"),
        (2, with_entry(V2, "history_pointers", 3, 10), r"history_pointers of seed 3"),
        (2, with_entry(V2, "transition_history", (1, 4, 1), 12), r"seed 1.*to 10.*12"),
        (1, with_entry(V1, "alpha_blend", 2, np.nan), r"alpha_blend of seed 2.*nan"),
        (1, with_entry(V1, "alpha_blend", 2, 1.5), r"alpha_blend of seed 2.*1.5"),
        (
            CURRENT,
            {**NOW, "stage": NOW["stage"].astype(int)},
            r"stage: expected int8.*int64",
        ),
        (CURRENT, {**NOW, "graft": NOW["stage"]}, r"graft: expected a dictionary"),
        (CURRENT, {**NOW, "graft": {}}, r"graft.alpha is missing"),
        (
            CURRENT,
            {**NOW, "gain": np.zeros(3, np.float32)},
            r"gain: expected float32 of shape \(K\) with K = 2, got float32\(3,\)",
        ),
        (CURRENT, with_entry(NOW, "stage", 1, 11), r"stage of seed 1"),
        (CURRENT, with_entry(NOW, "stage", 1, 2), r"slot_of_seed of seed 1.*got -1"),
        (
            CURRENT,
            with_entry(NOW, "seed_of_slot", 1, 3),
            r"seed_of_slot: expected \[-1, -1\]",
        ),
    ],
)
def test_what_cannot_be_migrated_is_refused_by_name(version, tree, message):
    with pytest.raises(MigrationError, match=message):
        migrate(version, tree)


def test_early_forms_of_schema_3():
    """Bytes for the history, and a wider count or none."""
    entries = np.uint8([[0x12, 0x01, 0, 0, 0x34, 0, 0, 0, 0x45, 0x56], [0] * 10])
    final, _ = v2_to_v3(v1_to_v2(load(1))[0])
    entries = np.concatenate([entries, np.zeros((3, 10), np.uint8)])
    ticks = np.uint16([300, 7, 0, 0, 65535])
    early = {**final, "history": entries, "worth_ticks": ticks}
    tree, notes = migrate(3, early)
    same(tree["history"], packed(entries))
    np.testing.assert_array_equal(tree["worth_ticks"], np.uint8([255, 7, 0, 0, 255]))
    assert tree["worth_ticks"].dtype == np.uint8
    assert [note.split(":")[0] for note in notes] == ["history", "worth_ticks"]
    del early["worth_ticks"]
    tree, notes = migrate(3, early)
    assert tree["worth_ticks"].tolist() == [0] * 5
    assert "worth_ticks: not in this early form of schema 3; starts at 0" in notes
    with pytest.raises(MigrationError, match="health is missing"):
        migrate(3, {name: early[name] for name in early if name != "health"})
