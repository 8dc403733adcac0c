"""Frozen schemas: they never change, and today's classes have the layout of the newest.

A layout here is a dictionary from the name of a leaf to its dtype and shape in letters,
such as ``{"seeds/<layer>/stage": "int8[S]"}``.
"""

import dataclasses
import hashlib
import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import esper_jax.migrations
from esper_jax.checkpoint import step_folder
from esper_jax.checkpoint.host_leaves import flatten
from esper_jax.growth.state import GovernorMemory, Monitor
from esper_jax.hosts import MLP
from esper_jax.lifecycle.grafting import Strategy
from esper_jax.lifecycle.stages import LIVING, Stage
from esper_jax.lifecycle.state import init_seeds
from esper_jax.migrations import chain, v3
from esper_jax.migrations.chain import CURRENT, SCHEMAS, to_tree
from esper_jax.migrations.schema import KEY, Leaf, MigrationError, flat, fresh, nested
from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.memory import Reason, init_memory
from esper_jax.train.program import build

FIXTURES = Path(__file__).parent / "fixtures"

# Every size is another number, so that a shape tells its letters.
SIZES = {"S": 5, "K": 3, "N": 6, "C": 4, "H": 8}
LETTERS = {size: letter for letter, size in SIZES.items()}
KINDS = ("residual_mlp", "bottleneck", "low_rank", "affine", "noop", "glu")

ANY = {
    ("params",): ("<variable>",),
    ("opt_state",): ("<tree>",),
    ("rest",): ("<variable>",),
    ("bank_opt", "<layer>"): ("<tree>",),
    ("monitor", "host_mean", "<layer>"): ("<variable>",),
}
"""What the names and shapes of a user's model and optimizers stand behind."""

OPEN = ("<tree>", "<variable>")

NEXT = f"v{CURRENT + 1}.py"

ADVICE = (
    f"The layout of a checkpoint has changed. Add migrations/{NEXT} with the new "
    f"layout and the step from schema {CURRENT}, or undo the change. Do not edit "
    f"v{CURRENT}.py: checkpoints of schema {CURRENT} exist.\n"
)


def pattern_of(keys, layers):
    """The name that a layout gives to a leaf of a run's state."""
    keys = tuple("<layer>" if key in layers else key for key in keys)
    for start, end in ANY.items():
        if keys[: len(start)] == start:
            return "/".join(start + end)
    if keys[0] == "banks" and keys[2] == "custom":
        keys = ("banks", "<layer>", "custom", "<blueprint>", "<tree>")
    return "/".join(keys)


def todays_layout():
    """Of a run's state, from the classes that make it."""
    model = MLP(
        7,
        [SIZES["S"] * SIZES["C"]],
        11,
        num_seeds=SIZES["S"],
        capacity=SIZES["K"],
        blueprints=KINDS,
        rngs=nnx.Rngs(0),
    )
    program = build(model, optax.adam(1e-3), optax.adam(1e-3))
    state = jax.eval_shape(program.init, jax.random.key(0))
    layout = {}
    for keys, leaf in flatten(state).values():
        name = pattern_of(keys, program.layouts)
        axes = ", ".join(LETTERS.get(n, str(n)) for n in leaf.shape)
        key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        dtype = KEY if key else leaf.dtype
        layout[name] = f"{dtype}[{axes}]"
    return layout


def frozen_layout(schema):
    return {
        name: f"{leaf.dtype}[{', '.join(leaf.axes)}]"
        for name, leaf in schema.state.items()
    }


def changes(frozen, today):
    """What differs, in words; leaves of any dtype and shape only by name."""
    told = [f"{name}: no leaf has this name" for name in frozen if name not in today]
    told += [f"{name}: {today[name]} is new" for name in today if name not in frozen]
    for name in [n for n in frozen if n in today and not frozen[n].startswith("any")]:
        if frozen[name] != today[name]:
            told.append(f"{name}: {today[name]}, but {frozen[name]} is frozen")
    return told


def hashed(layout):
    """SHA-256 of the names, and of the dtypes and shapes that are not the user's."""
    layout = {name: "" if name.endswith(OPEN) else layout[name] for name in layout}
    return hashlib.sha256(json.dumps(layout, sort_keys=True).encode()).hexdigest()


@pytest.fixture(scope="module")
def today():
    return todays_layout()


def test_the_layout_of_today_is_that_of_the_current_schema(today):
    frozen = frozen_layout(SCHEMAS[CURRENT])
    assert not changes(frozen, today), ADVICE + "\n".join(changes(frozen, today))
    assert hashed(today) == hashed(frozen), ADVICE


@pytest.mark.parametrize(
    ("name", "kind", "told"),
    [
        ("seeds/<layer>/made_up", "int8[S]", "made_up: int8[S] is new"),
        ("seeds/<layer>/stage", "int16[S]", "int16[S], but int8[S] is frozen"),
        ("governor/losses", "float32[17, 2]", "but float32[16, 2] is frozen"),
        ("memory/stale", None, "memory/stale: no leaf has this name"),
    ],
)
def test_a_change_of_the_layout_is_told(name, kind, told, today):
    other = {**today, name: kind}
    if kind is None:
        del other[name]
    frozen = frozen_layout(SCHEMAS[CURRENT])
    (found,) = changes(frozen, other)
    assert told in found
    assert hashed(frozen) != hashed(other)


@pytest.mark.parametrize("version", SCHEMAS)
def test_a_released_schema_never_changes(version):
    schema = SCHEMAS[version]
    assert schema.version == version
    assert schema.digest == schema.fingerprint(), (
        f"The data of migrations/v{version}.py have changed. Put them back and add "
        f"migrations/{NEXT}; only a version that nobody has saved may get a new digest"
    )


def test_new_runs_start_at_the_frozen_values():
    schema = SCHEMAS[CURRENT]
    layers = {"a": SIZES["S"]}
    made = {
        "seeds": {"a": to_tree(init_seeds(SIZES["S"], SIZES["K"]))},
        "memory": dataclasses.asdict(init_memory(layers, blueprints=SIZES["N"])),
        "monitor": dataclasses.asdict(Monitor.start({}, layers)),
        "governor": dataclasses.asdict(GovernorMemory.start()),
    }
    made["memory"]["key"] = jax.random.key_data(made["memory"]["key"])
    made = flat(made)
    layout = {
        name: leaf
        for name, leaf in schema.state.items()
        if leaf.start is not None and name not in ("step", "ticks")
    }
    expected = fresh(layout, **SIZES)
    assert {name.replace("<layer>", "a") for name in expected} == set(made)
    for name, array in expected.items():
        found = made[name.replace("<layer>", "a")]
        assert found.dtype == array.dtype, name
        np.testing.assert_array_equal(found, array, err_msg=name)


@pytest.mark.parametrize(
    ("table", "codes"), [("stage", Stage), ("strategy", Strategy), ("reason", Reason)]
)
def test_codes_are_frozen(table, codes):
    """Strategies and reasons may be appended without a new version; stages not."""
    assert [code.value for code in codes] == list(range(len(codes)))
    names = [code.name for code in codes]
    for version, schema in SCHEMAS.items():
        frozen = list(schema.codes.get(table, ()))
        if version == 1:  # its stages were others
            continue
        kept = names if table == "stage" else names[: len(frozen)]
        if frozen:
            assert kept == frozen, f"{table} codes of schema {version} must stay"


def test_stages_that_own_a_slot_are_frozen():
    assert v3._LIVING.tolist() == LIVING.tolist()


def test_blueprints_are_0_to_126():
    assert SCHEMAS[CURRENT].codes["blueprint"] == range(127)
    assert ControllerConfig(blueprint=126).blueprint == 126
    with pytest.raises(ValueError, match="blueprint"):
        ControllerConfig(blueprint=127)


def test_a_step_of_version_0_1_has_the_layout_of_schema_3():
    folder = FIXTURES / "run_v0.1_smoke" / "checkpoints" / "320"
    manifest = step_folder.check(folder, 320)
    assert manifest.schema == 3
    sizes = {"S": 4, "K": 2, "N": 1, "C": 4, "H": 8}
    state, found = SCHEMAS[3].state, set()
    for record in manifest.leaves.values():
        name = pattern_of(record.keys, {"layers/0"})
        found.add(name)
        leaf = state[name]
        if leaf.dtype == "any":
            continue
        shape = tuple(int(a) if a.isdecimal() else sizes[a] for a in leaf.axes)
        if leaf.dtype == KEY:
            assert record.key_impl == "threefry2x32"
            assert (record.dtype, record.shape) == ("uint32", (*shape, 2))
        else:
            assert (record.dtype, record.shape) == (leaf.dtype, shape), name
    assert set(state) - found == {"banks/<layer>/custom/<blueprint>/<tree>"}


NEW = """
import dataclasses
from esper_jax.migrations import v{before}
from esper_jax.migrations.schema import Leaf, fresh, nested

OLD = v{before}.SCHEMA
SEEDS = {{**OLD.seeds, "made_up": Leaf("int16", "S", 7)}}

def upgrade(tree, capacity=None):
    old = OLD.checked(tree)
    sizes = {{"S": len(old["stage"]), "K": len(old["seed_of_slot"])}}
    return nested({{**fresh(SEEDS, **sizes), **old}}), []

SCHEMA = dataclasses.replace(
    OLD, version={version}, seeds=SEEDS, early={{}}, upgrade=upgrade, digest=""
)
"""


def test_a_new_version_is_one_new_file(tmp_path, monkeypatch):
    version = CURRENT + 1
    (tmp_path / NEXT).write_text(NEW.format(before=CURRENT, version=version))
    monkeypatch.setattr(
        esper_jax.migrations,
        "__path__",
        [*esper_jax.migrations.__path__, str(tmp_path)],
    )
    importlib.invalidate_caches()
    try:
        found = chain._discovered()
    finally:
        sys.modules.pop(f"esper_jax.migrations.v{version}", None)
    assert list(found) == [*SCHEMAS, version]
    old = to_tree(init_seeds(3, 2))
    new, notes = found[version].upgrade(old)
    assert new["made_up"].tolist() == [7, 7, 7]
    assert set(flat(new)) == {*flat(old), "made_up"}
    assert notes == []
    assert changes(frozen_layout(found[version]), frozen_layout(SCHEMAS[CURRENT])) == [
        "seeds/<layer>/made_up: no leaf has this name"
    ]


def test_a_leaf_without_a_starting_value_is_refused():
    with pytest.raises(MigrationError, match=r"rng cannot be filled in: no value"):
        fresh({"rng": Leaf(KEY)})
    with pytest.raises(
        MigrationError, match=r"tried cannot be .*: size N is not known"
    ):
        fresh({"tried": Leaf("int32", "N", 0)}, S=3)


def test_names_of_leaves_nest_and_flatten():
    tree = {"a": np.zeros(2), "b": {"c": np.ones(1), "d": {"e": np.ones(3)}}}
    assert list(flat(tree)) == ["a", "b/c", "b/d/e"]
    assert nested(flat(tree)).keys() == tree.keys()
    assert nested(flat(tree))["b"]["d"]["e"].tolist() == [1, 1, 1]
