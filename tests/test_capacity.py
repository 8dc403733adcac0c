"""More or fewer slots on a live model: nothing that lives may change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from esper_jax.checkpoint import CheckpointError
from esper_jax.checkpoint.checkpointer import Checkpointer
from esper_jax.growth.parts import split_model
from esper_jax.hosts import MLP
from esper_jax.layers.bed import SeedBed
from esper_jax.layers.capacity import grow_capacity
from esper_jax.lifecycle.slots import resize, slot_sources
from esper_jax.lifecycle.stages import Stage
from esper_jax.lifecycle.state import init_seeds
from esper_jax.train.loop import fit
from esper_jax.train.program import build
from esper_jax.trees import is_key, state_hash

LAYERS = ("layers/0", "layers/1")


def make_data(rows, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 6)).astype(np.float32)
    return x, np.argmax(x[:, :3] * x[:, 3:], axis=1).astype(np.int32)


TRAIN, HELD_OUT = make_data(32, 1), make_data(32, 2)
# The model and the batch are those of test_train.py, whose step is the same program.
BATCH = tuple(part[:16] for part in TRAIN)


def make_program(capacity=2):
    model = MLP(6, (8, 10), 3, num_seeds=4, capacity=capacity, rngs=nnx.Rngs(0))
    return build(model, optax.adam(1e-2), optax.adam(1e-3))


@pytest.fixture(scope="module")
def program():
    return make_program()


@pytest.fixture(scope="module")
def wide():
    """The same with four slots a layer."""
    return make_program(4)


def living(program, slot, trained=3):
    """A state in which one seed of each layer counts, learns and has moments."""
    state = program.init(jax.random.key(0))
    seeds, banks = {}, {}
    for i, (name, layer) in enumerate(state.seeds.items()):
        seeds[name] = dataclasses.replace(
            layer,
            stage=layer.stage.at[i + 1].set(Stage.FINE_TUNING),
            slot_of_seed=layer.slot_of_seed.at[i + 1].set(slot),
            seed_of_slot=layer.seed_of_slot.at[slot].set(i + 1),
        )
        keys = iter(jax.random.split(jax.random.key(i), 8))
        banks[name] = jax.tree.map(
            lambda leaf, keys=keys: 0.3 * jax.random.normal(next(keys), leaf.shape),
            state.banks[name],
        )
    state = dataclasses.replace(state, seeds=seeds, banks=banks)
    for _ in range(trained):
        state = program.step(state, BATCH)
    return state


def equal_bits(a, b):
    if is_key(a):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(
        np.asarray(a).reshape(-1).view(np.uint8),
        np.asarray(b).reshape(-1).view(np.uint8),
    )


@pytest.mark.parametrize("slot", [0, 1])
def test_growing_keeps_every_value_and_moment(program, slot):
    state = living(program, slot)
    before = state_hash(state)
    grown = program.grow_capacity(state, 4)
    assert state_hash(state) == before  # neither changed nor donated
    for name in ("step", "ticks", "params", "opt_state", "memory", "monitor"):
        jax.tree.map(equal_bits, getattr(state, name), getattr(grown, name))
    equal_bits(jax.random.key_data(state.rng), jax.random.key_data(grown.rng))
    for name in LAYERS:
        for old, new in (
            (state.banks[name], grown.banks[name]),
            (state.bank_opt[name], grown.bank_opt[name]),
        ):
            jax.tree.map(lambda a, b: equal_bits(a, b[:2]), old, new)
        moments = jax.tree.leaves(grown.bank_opt[name])
        assert all(not np.any(leaf[2:]) for leaf in moments)  # fresh
        assert any(np.any(leaf[slot]) for leaf in moments)
        assert not np.any(grown.banks[name].w2[2:])  # the identity
        old, new = state.seeds[name], grown.seeds[name]
        assert new.capacity == 4
        assert new.seed_of_slot.tolist() == [*old.seed_of_slot.tolist(), -1, -1]
        for field in dataclasses.fields(old):
            a, b = getattr(old, field.name), getattr(new, field.name)
            per_slot = ("seed_of_slot", "reconstruction", "gain", "errors")
            if field.name in per_slot:
                b = b[:2]
            jax.tree.map(equal_bits, a, b)


@pytest.mark.slow
def test_the_output_is_the_same_and_training_goes_on(program):
    state = living(program, 1)
    grown = program.grow_capacity(state, {"layers/1": 3})
    assert [s.capacity for s in grown.seeds.values()] == [2, 3]
    x = HELD_OUT[0]
    equal_bits(program.model(state)(x), program.model(grown)(x))
    equal_bits(program.evaluate(state, HELD_OUT), program.evaluate(grown, HELD_OUT))
    for _ in range(3):
        state, grown = program.step(state, BATCH), program.step(grown, BATCH)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        (state.params, state.banks["layers/0"]),
        (grown.params, grown.banks["layers/0"]),
    )
    grown = fit(program, grown, TRAIN, HELD_OUT, ticks=2, batch_size=16)
    assert np.isfinite(program.evaluate(grown, HELD_OUT)[0])


def test_shrinking_moves_the_living_together(program):
    state = living(program, 1)
    small = program.grow_capacity(state, 1)
    for name in LAYERS:
        assert small.seeds[name].seed_of_slot.tolist() == [
            int(state.seeds[name].seed_of_slot[1])
        ]
        for tree in ("banks", "bank_opt"):
            jax.tree.map(
                lambda a, b: equal_bits(a[1:], b),
                getattr(state, tree)[name],
                getattr(small, tree)[name],
            )
    equal_bits(program.evaluate(state, HELD_OUT), program.evaluate(small, HELD_OUT))
    again = program.grow_capacity(small, 2)
    jax.tree.map(
        lambda a, b: equal_bits(a[0], b[0]),
        small.banks["layers/0"],
        again.banks["layers/0"],
    )


def test_a_capacity_that_would_lose_a_living_seed_is_refused(program):
    state = living(program, 0, trained=0)
    layer = state.seeds["layers/1"]
    layer = dataclasses.replace(
        layer,
        stage=layer.stage.at[0].set(Stage.TRAINING),
        slot_of_seed=layer.slot_of_seed.at[0].set(1),
        seed_of_slot=layer.seed_of_slot.at[1].set(0),
    )
    state = dataclasses.replace(state, seeds={**state.seeds, "layers/1": layer})
    with pytest.raises(
        ValueError, match=r"'layers/1': capacity must be at least 2, .*got 1"
    ):
        program.grow_capacity(state, 1)
    with pytest.raises(ValueError, match=r"num_seeds \(4\).*got 5"):
        program.grow_capacity(state, 5)
    with pytest.raises(ValueError, match=r"there is no layer 'layers/7'.*'layers/0'"):
        program.grow_capacity(state, {"layers/7": 3})
    batched = jax.tree.map(lambda leaf: leaf[None], layer)
    with pytest.raises(ValueError, match=r"must be of one layer.*\(1, 2\)"):
        resize(batched, 3)


def test_sources_of_slots():
    state = init_seeds(6, 4)
    owners = jnp.asarray([-1, 5, -1, 2], jnp.int32)
    state = dataclasses.replace(
        state,
        seed_of_slot=owners,
        slot_of_seed=state.slot_of_seed.at[jnp.asarray([5, 2])].set(
            jnp.asarray([1, 3], jnp.int32)
        ),
        gain=jnp.asarray([1.0, 2.0, 3.0, 4.0]),
    )
    assert slot_sources(state, 6).tolist() == [0, 1, 2, 3, -1, -1]
    assert slot_sources(state, 4).tolist() == [0, 1, 2, 3]
    assert slot_sources(state, 3).tolist() == [1, 3, 0]
    small = resize(state, 2)
    assert small.seed_of_slot.tolist() == [5, 2]
    assert small.slot_of_seed.tolist() == [-1, -1, 1, -1, -1, 0]
    assert small.gain.tolist() == [2.0, 4.0]


def through_disk(folder, state, like):
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(1, {"run": state, "epoch": 3})
        found = checkpoints.restore({"run": like, "epoch": 0})
    assert found.state["epoch"] == 3
    return found.state["run"], found.resized


@pytest.mark.parametrize("slot", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_restored_into_a_larger_capacity(program, wide, slot, tmp_path):
    state, like = living(program, slot), wide.init(jax.random.key(5))
    # New slots are fresh in the new state, whatever is in them: here something to see.
    like.banks["layers/1"] = jax.tree.map(lambda x: x + 7, like.banks["layers/1"])
    found, changed = through_disk(tmp_path, state, like)
    assert changed == dict.fromkeys(LAYERS, (2, 4))
    expected = program.grow_capacity(state, 4)
    for name in LAYERS:
        bank, fresh = expected.banks[name], like.banks[name]
        expected.banks[name] = jax.tree.map(
            lambda old, new: jnp.concatenate([old[:2], new[2:]]), bank, fresh
        )
        jax.tree.map(lambda a, b: equal_bits(a[:2], b), bank, state.banks[name])
    assert state_hash(found) == state_hash(expected)
    assert jax.tree.structure(found) == jax.tree.structure(like)
    equal_bits(program.evaluate(state, HELD_OUT), program.evaluate(found, HELD_OUT))
    trained = fit(wide, found, TRAIN, HELD_OUT, ticks=2, batch_size=16)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(trained.params))
    # The seed that lived does so still, in the same slot.
    assert [int(s.seed_of_slot[slot]) for s in trained.seeds.values()] == [1, 2]


def test_restored_into_a_smaller_capacity(program, wide, tmp_path):
    state = program.grow_capacity(living(program, 1), 4)
    found, changed = through_disk(tmp_path, state, program.init(jax.random.key(5)))
    assert changed == dict.fromkeys(LAYERS, (4, 2))
    assert state_hash(found) == state_hash(wide.grow_capacity(state, 2))
    equal_bits(program.evaluate(state, HELD_OUT), program.evaluate(found, HELD_OUT))


def test_a_restore_that_would_lose_a_living_seed_is_refused(program, tmp_path):
    state = living(program, 0, trained=0)
    layer = state.seeds["layers/1"]
    state.seeds["layers/1"] = dataclasses.replace(
        layer,
        stage=layer.stage.at[0].set(Stage.TRAINING),
        slot_of_seed=layer.slot_of_seed.at[0].set(1),
        seed_of_slot=layer.seed_of_slot.at[1].set(0),
    )
    small = make_program(1).init(jax.random.key(0))
    message = r"layer 'layers/1', saved with capacity 2, into capacity 1: .* least 2"
    with pytest.raises(CheckpointError, match=message):
        through_disk(tmp_path, state, small)


def test_only_the_capacity_may_differ(program, wide, tmp_path):
    state, like = living(program, 0, trained=0), wide.init(jax.random.key(5))
    wider = MLP(6, (8, 12), 3, num_seeds=4, capacity=4, rngs=nnx.Rngs(0))
    more = MLP(6, (8, 10), 3, num_seeds=5, capacity=4, rngs=nnx.Rngs(0))
    for model, message in (
        (wider, r"layers/1/base/linear/bias: expected float32\[12\], found .*\[10\]"),
        (more, r"banks/layers/0/w1: expected float32\[4, 2, 4\], found .*\[2, 2, 4\]"),
    ):
        other = build(model, optax.adam(1e-2), optax.adam(1e-3))
        with pytest.raises(CheckpointError, match=message):
            through_disk(tmp_path, state, other.init(jax.random.key(0)))
    shapes = jax.eval_shape(lambda: like.banks)
    abstract = dataclasses.replace(like, banks=shapes)
    with pytest.raises(CheckpointError, match=r"leaf run/banks/.* expected an array"):
        through_disk(tmp_path, state, abstract)


@pytest.mark.parametrize("capacity", [2.0, True, "2", 0, 5])
def test_a_capacity_that_is_none_is_refused_by_name(program, capacity):
    state, model = program.init(jax.random.key(0)), program.model
    message = rf"capacity must be an int, from 1 to num_seeds .4..*got {capacity!r}"
    with pytest.raises(ValueError, match=message):
        SeedBed(8, 4, capacity=capacity, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        program.grow_capacity(state, capacity)
    with pytest.raises(ValueError, match=message):
        grow_capacity(model(state), capacity, rngs=nnx.Rngs(0))


def test_growing_a_flax_model_in_place(program):
    model = program.model(living(program, 1))
    x = HELD_OUT[0]
    model.eval()
    before = model(x)
    grow_capacity(model, 4, rngs=nnx.Rngs(7))
    equal_bits(before, model(x))
    beds = [node for _, node in nnx.iter_graph(model) if isinstance(node, SeedBed)]
    assert [bed.seeds.get_value().capacity for bed in beds] == [4, 4]
    with pytest.raises(ValueError, match="must hold at least one"):
        grow_capacity(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), 4, rngs=nnx.Rngs(0))


def test_growing_a_stack_in_place():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
        return SeedBed(8, 4, capacity=2, rngs=rngs)

    bed = make(nnx.Rngs(0))
    seeds = bed.seeds.get_value()
    seeds = dataclasses.replace(
        seeds,
        stage=seeds.stage.at[1, 3].set(Stage.FINE_TUNING),
        slot_of_seed=seeds.slot_of_seed.at[1, 3].set(1),
        seed_of_slot=seeds.seed_of_slot.at[1, 1].set(3),
    )
    bed.seeds.set_value(seeds)
    bank = bed.bank.get_value()
    grow_capacity(bed, 3, rngs=nnx.Rngs(7))
    jax.tree.map(
        lambda a, b: equal_bits(a, b[:, :2]), bank, grown := bed.bank.get_value()
    )
    assert grown.w1.shape[:2] == bed.probe.get_value().shape == (3, 3)
    assert len(np.unique(grown.w1[:, 2])) == grown.w1[:, 2].size  # drawn one by one
    owners = bed.seeds.get_value().seed_of_slot.tolist()
    assert owners == [[-1, -1, -1], [-1, 3, -1], [-1, -1, -1]]
    grow_capacity(bed, 1, rngs=nnx.Rngs(7))
    assert bed.seeds.get_value().seed_of_slot.tolist() == [[-1], [3], [-1]]
    assert bed.seeds.get_value().slot_of_seed[1].tolist() == [-1, -1, -1, 0]
    jax.tree.map(lambda a, b: equal_bits(a[1, 1], b[1, 0]), bank, bed.bank.get_value())
    # Stacked along another axis, it could not be told which is which.
    bank = bed.bank.get_value()
    bed.bank.set_value(jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), bank))
    wrong = pytest.raises(ValueError, match=r"along their first axes.*has \(1, 3, 2")
    with wrong:
        grow_capacity(bed, 2, rngs=nnx.Rngs(7))
    with wrong:
        split_model(nnx.Sequential(bed))
