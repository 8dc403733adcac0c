"""Growth inside a model that somebody else wrote: layers of every kind, stacks,
ensembles, rematerialization, bfloat16."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

from esper_jax.checkpoint.checkpointer import Checkpointer
from esper_jax.layers.bed import SeedBed
from esper_jax.layers.chunked import ChunkedLayer
from esper_jax.layers.growable import make_growable
from esper_jax.layers.variables import BlueprintParam, SeedVariable
from esper_jax.lifecycle import GraftConfig
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.signals import health
from esper_jax.lifecycle.stages import Stage
from esper_jax.policy.config import ControllerConfig
from esper_jax.train.loop import fit
from esper_jax.train.program import build

GATES = LifecycleConfig(
    min_epochs=(0, 0, 1, 1, 1, 1, 1, 0, 1, 0, 1),
    reconstruction_threshold=1e9,
    min_stability=-1e9,
    cull_delta=-1e9,
    min_improvement=-1e9,
    min_final_stability=-1e9,
    grafting=GraftConfig(ramp_duration=2),
)
POLICY = ControllerConfig(patience=1, threshold=0.9)


def same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()


class Head(nnx.Module):
    def __init__(self, width, rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.out = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.norm(x))


class Transformer(nnx.Module):
    """A model as a user has it: nothing in it knows of growth."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.convs = nnx.List([nnx.Conv(8, 8, (3,), rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.tied = self.norm
        self.head = Head(8, rngs)

    def __call__(self, x):
        x = self.embed(x)
        for conv in self.convs:
            x = x + nnx.relu(conv(x))
        x = x + self.attention(self.norm(x))
        return self.head(self.tied(x).mean(axis=1))


TOKENS = np.random.default_rng(0).integers(0, 11, (16, 5)).astype(np.int32)
LABELS = (TOKENS.sum(axis=1) % 3).astype(np.int32)
SEEDS = {"embed": 2, "convs/1": 8, "attention": 4, "norm": 1, "head": 3}


def grown(seeds_of=SEEDS):
    model = Transformer(nnx.Rngs(0))
    for path, seeds in seeds_of.items():
        features = 3 if path == "head" else None
        found = make_growable(model, path, seeds, features=features, rngs=nnx.Rngs(1))
        assert found == [path]
    return model


def params_of(model):
    return {p[-1]: v for p, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def test_an_existing_model_grows_without_being_rewritten():
    plain, model = Transformer(nnx.Rngs(0)), grown()
    forward = jax.jit(
        lambda graph, state, x: nnx.merge(graph, state)(x), static_argnums=0
    )
    want = forward(*nnx.split(plain), TOKENS)
    same_bits(forward(*nnx.split(model), TOKENS), want)
    # Names that the user's code has go on working, tied layers stay tied.
    same_bits(model.convs[1].kernel[...], plain.convs[1].kernel[...])
    same_bits(model.head.out.bias[...], plain.head.out.bias[...])
    same_bits(model.attention.query.kernel[...], plain.attention.query.kernel[...])
    assert model.attention.num_heads == 2
    assert model.tied is model.norm
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.norm.no_such_thing


@pytest.mark.slow
def test_layers_with_different_seed_counts_train_in_an_existing_model():
    seeds_of = {"embed": 2, "attention": 4}  # each more layer costs the test seconds
    program = build(
        grown(seeds_of),
        optax.adam(1e-2),
        optax.adam(1e-2),
        lifecycle_config=GATES,
        controller_config=POLICY,
    )
    state = program.init(jax.random.key(0))
    assert {name: s.num_seeds for name, s in state.seeds.items()} == seeds_of
    data = (TOKENS, LABELS)
    state = fit(program, state, data, data, ticks=9, batch_size=8)
    stages = np.concatenate([np.asarray(s.stage) for s in state.seeds.values()])
    assert Stage.FINE_TUNING in stages or Stage.FOSSILIZED in stages
    loss, _ = program.evaluate(state, data)
    trained = program.model(state)
    trained.eval()
    logits = trained(TOKENS)
    same = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()
    np.testing.assert_allclose(same, loss, rtol=1e-5)


def test_a_disabled_layer_gives_back_the_plain_program():
    def text(model):
        graph, state = nnx.split(model)

        def forward(state, x):
            return nnx.merge(graph, state)(x)

        return jax.jit(forward).lower(state, TOKENS).as_text()

    model = grown()
    assert text(model) != text(Transformer(nnx.Rngs(0)))
    model.set_attributes(ChunkedLayer, enabled=False)
    assert text(model) == text(Transformer(nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (nnx.Conv, ["convs/0", "convs/1"]),
        (["norm", "embed"], ["norm", "embed"]),
        (nnx.PathContains("attention"), None),
        (lambda path, m: isinstance(m, nnx.Linear), ["head/out"]),
    ],
)
def test_layers_are_chosen_by_path_or_filter(where, expected):
    model = Transformer(nnx.Rngs(0))

    def seeds(path, layer):
        return 3 if path == "head/out" else 2

    found = make_growable(model, where, seeds, capacity=1, rngs=nnx.Rngs(1))
    if expected is None:  # the whole block and the layers in it
        assert found[-1] == "attention"
        assert len(found) == 5
    else:
        assert found == expected
    for path in found:
        node = functools.reduce(
            lambda m, key: m[int(key)] if key.isdigit() else getattr(m, key),
            path.split("/"),
            model,
        )
        assert isinstance(node, ChunkedLayer)
    same_bits(model(TOKENS), Transformer(nnx.Rngs(0))(TOKENS))
    # What can grow already is left alone.
    with pytest.raises(ValueError, match="where: no layer that cannot grow yet"):
        make_growable(model, lambda path, m: m is node, 2, rngs=nnx.Rngs(1))


@pytest.mark.parametrize(
    ("where", "num_seeds", "message"),
    [
        ("blocks/7", 2, "where: there is no layer 'blocks/7'; the model has 'attent"),
        (nnx.BatchNorm, 2, "where: no layer that cannot grow yet was found"),
        (Transformer, 2, "where: the model itself cannot be replaced"),
        (nnx.Embed, 9, "layer 'embed': num_seeds must be from 1"),
        (Head, 2, "layer 'head': features must be given"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_has_changed(
    where, num_seeds, message
):
    model = Transformer(nnx.Rngs(0))
    before = nnx.graphdef(model)
    with pytest.raises((TypeError, ValueError), match=message):
        make_growable(model, where, num_seeds, rngs=nnx.Rngs(1))
    assert nnx.graphdef(model) == before


class Block(nnx.Module):
    def __init__(self, rngs, growable):
        linear = nnx.Linear(8, 8, rngs=rngs)
        self.mlp = linear
        if growable:
            self.mlp = ChunkedLayer(linear, 4, capacity=2, rngs=rngs)

    def __call__(self, x):
        return x + nnx.tanh(self.mlp(x))


class Stack(nnx.Module):
    """Two blocks run by `nnx.scan`, or the same as a list."""

    def __init__(self, rngs, scan, growable=True, remat=False):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return Block(rngs, growable)

        self.scan, self.remat = scan, remat
        self.blocks = make(rngs)
        if not scan:
            graph, state = nnx.split(self.blocks)
            self.blocks = nnx.List(
                [
                    nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], state))
                    for i in range(2)
                ]
            )
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        def one(block, x):
            return block(x)

        if self.remat:
            one = nnx.remat(one)
        if self.scan:
            one = nnx.scan(one, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            return self.out(one(self.blocks, x))
        for block in self.blocks:
            x = one(block, x)
        return self.out(x)


X = np.random.default_rng(1).normal(size=(32, 8)).astype(np.float32)
DATA = (X, np.argmax(X[:, :3] * X[:, 3:6], axis=1).astype(np.int32))


def grow(model, ticks):
    program = build(
        model,
        optax.sgd(0.1),
        optax.sgd(0.1),
        lifecycle_config=GATES,
        controller_config=POLICY,
    )
    reports = []
    state = fit(
        program,
        program.init(jax.random.key(0)),
        DATA,
        DATA,
        ticks=ticks,
        batch_size=16,
        on_tick=lambda _, report: reports.append(report),
    )
    return program, state, reports


@pytest.fixture(scope="module")
def unrolled():
    return grow(Stack(nnx.Rngs(0), scan=False), 12)


def assert_same_growth(got, want):
    """Of a stack and of a list of the same layers."""
    _, state, reports = got
    _, expected, expected_reports = want
    names = {f"blocks/mlp[{i}]": f"blocks/{i}/mlp" for i in range(2)}
    assert list(state.seeds) == list(names)
    for report, other in zip(reports, expected_reports, strict=True):
        np.testing.assert_allclose(report.loss, other.loss, rtol=1e-4)
        for name, twin in names.items():
            np.testing.assert_array_equal(
                report.layers[name].stage, other.layers[twin].stage
            )
    for name, twin in names.items():
        for part in ("seeds", "banks"):
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5),
                getattr(state, part)[name],
                getattr(expected, part)[twin],
            )
    stages = np.concatenate([np.asarray(s.stage) for s in state.seeds.values()])
    assert np.sum(stages == Stage.FOSSILIZED) >= 2


def test_a_stack_under_scan_grows_as_its_layers_one_by_one(unrolled):
    program, state, reports = grow(Stack(nnx.Rngs(0), scan=True), 12)
    assert program.recompiles() == 0
    assert_same_growth((program, state, reports), unrolled)
    bed = program.model(state).blocks.mlp.bed
    np.testing.assert_array_equal(
        bed.seeds.get_value().stage,
        np.stack([s.stage for s in state.seeds.values()]),
    )


@pytest.mark.slow
def test_rematerialization_changes_nothing(unrolled):
    assert_same_growth(grow(Stack(nnx.Rngs(0), scan=True, remat=True), 12), unrolled)


def test_jax_checkpoint_around_a_layer_changes_nothing():
    layer = ChunkedLayer(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), 4, rngs=nnx.Rngs(1))
    seeds = layer.bed.seeds.get_value()
    layer.bed.seeds.set_value(
        dataclasses.replace(
            seeds,
            stage=seeds.stage.at[2].set(Stage.FINE_TUNING),
            slot_of_seed=seeds.slot_of_seed.at[2].set(1),
            seed_of_slot=seeds.seed_of_slot.at[1].set(2),
        )
    )
    learned = nnx.Any(nnx.Param, BlueprintParam)
    graph, params, rest = nnx.split(layer, learned, ...)

    def loss(params, x):
        model = nnx.merge(graph, params, rest, copy=True)
        return jnp.sum(jnp.sin(model(x))), nnx.state(model, SeedVariable)

    plain, again = (
        jax.jit(jax.value_and_grad(f, has_aux=True))(params, X)
        for f in (loss, jax.checkpoint(loss))
    )
    same_bits(plain, again)
    assert np.any(np.asarray(again[1]["bed"]["bank"]["w2"][1]))


def test_an_existing_stack_is_made_growable(tmp_path):
    model = Stack(nnx.Rngs(0), scan=True, growable=False)
    plain = model(X)
    found = make_growable(model, "blocks/mlp", 4, stack=2, capacity=2, rngs=nnx.Rngs(3))
    assert found == ["blocks/mlp"]
    # XLA fuses the body of the loop in another way, so not to the last bit.
    np.testing.assert_allclose(model(X), plain, rtol=1e-5, atol=1e-6)
    program, state, _ = grow(model, 9)
    assert list(state.seeds) == [f"blocks/mlp[{i}]" for i in range(2)]
    bigger = program.grow_capacity(state, 4)
    assert program.model(bigger).blocks.mlp.bed.probe.get_value().shape == (2, 4)
    loss, _ = program.evaluate(state, DATA)
    np.testing.assert_allclose(program.evaluate(bigger, DATA)[0], loss, rtol=1e-6)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        restored = checkpoints.restore(bigger).state
    same_bits(restored.seeds, bigger.seeds)
    np.testing.assert_allclose(program.evaluate(restored, DATA)[0], loss, rtol=1e-6)
    with pytest.raises(ValueError, match=r"'blocks/mlp\[0\]' and .* of one stack"):
        program.grow_capacity(state, {"blocks/mlp[0]": 4})


@pytest.mark.parametrize(
    ("scan", "where", "stack", "message"),
    [
        (True, "blocks/mlp", None, r"'blocks/mlp': stack must be given.*pass stack=2"),
        (True, "blocks/mlp", 3, r"first axis of the variables; got 3.* axes of \(2,\)"),
        (True, "blocks", 3, r"first axis of the variables; got 3.* axes of \(2,\)"),
        (True, "blocks/mlp", True, "stack must be an int of at least 1.*got True"),
        (False, "blocks/1/mlp", 8, r"got 8, and they have axes of \(\)"),
        (False, "own", 4, r"got 4, and 'weight' has shape \(8, 8\)"),
    ],
)
def test_a_stack_that_does_not_fit_is_refused_before_anything_changes(
    scan, where, stack, message
):
    class Own(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.eye(8))

    model = Stack(nnx.Rngs(0), scan=scan, growable=False)
    model.own = Own()
    before = nnx.graphdef(model)
    with pytest.raises(ValueError, match=message):
        make_growable(model, where, 2, features=8, stack=stack, rngs=nnx.Rngs(1))
    assert nnx.graphdef(model) == before


@pytest.mark.parametrize(
    "layer",
    [
        lambda r: nnx.LinearGeneral(6, (2, 6), rngs=r),
        lambda r: nnx.LinearGeneral((2, 3), 6, axis=(-2, -1), rngs=r),
        lambda r: nnx.Einsum("ab,bc->ac", (6, 6), (6,), rngs=r),
    ],
    ids=["LinearGeneral", "of two axes", "Einsum"],
)
def test_stacks_of_products_are_known_by_their_shapes(layer):
    """As those of attention are, in a stack of blocks for `nnx.scan`."""
    one = nnx.Dict(layer=layer(nnx.Rngs(0)))
    make_growable(one, "layer", 2, features=6, rngs=nnx.Rngs(0))
    make = nnx.vmap(layer, in_axes=(0,), out_axes=0)
    several = nnx.Dict(layer=nnx.split_rngs(splits=3)(make)(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"stack must be given.*pass stack=3"):
        make_growable(several, "layer", 2, features=6, rngs=nnx.Rngs(0))
    make_growable(several, "layer", 2, features=6, stack=3, rngs=nnx.Rngs(0))
    assert several.layer.bed.probe.shape == (3, 2)


class Ensemble(nnx.Module):
    """Two stacks of two blocks under `nnx.vmap`; the mean of their outputs."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=(2, 2))
        @nnx.vmap(in_axes=(0,), out_axes=0)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return Block(rngs, growable=True)

        self.members = make(rngs)

    def __call__(self, x):
        @nnx.vmap(in_axes=(0, None), out_axes=0)
        def run(member, x):
            one = nnx.scan(
                lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry
            )
            return one(member, x)

        return run(self.members, x).mean(axis=0)


@pytest.mark.slow
def test_an_ensemble_under_vmap_grows():
    program, state, reports = grow(Ensemble(nnx.Rngs(0)), 6)
    measured = program.step(state, DATA)
    assert list(state.seeds) == [
        f"members/mlp[{i},{j}]" for i in range(2) for j in range(2)
    ]
    stages = np.concatenate([np.asarray(s.stage) for s in measured.seeds.values()])
    assert Stage.TRAINING in stages or Stage.GRAFTING in stages
    assert all(np.isfinite(r.loss) for r in reports)
    # What the layers of one member measured is their own.
    totals = [float(s.statistics.total[0]) for s in measured.seeds.values()]
    assert len(set(totals)) == len(totals)


@pytest.mark.slow
def test_bfloat16_compute_keeps_float32_parameters_and_statistics():
    linear = nnx.Linear(8, 16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    model = nnx.Sequential(
        ChunkedLayer(linear, 4, rngs=nnx.Rngs(1)),
        nnx.relu,
        nnx.Linear(16, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(2)),
    )
    assert model.layers[0](X).dtype == jnp.bfloat16
    program, state, reports = grow(model, 9)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.banks)} == {jnp.dtype("f4")}
    assert {p.dtype for p in state.params.values()} == {jnp.dtype("f4")}
    seeds = state.seeds["layers/0"]
    assert np.max(seeds.stage) >= Stage.GRAFTING
    assert all(np.isfinite(r.loss) for r in reports)
    program.tick(state, DATA)


def test_a_deep_stack_keeps_its_order():
    """Of eleven and more: a state that was jitted has its names sorted as text."""

    class Deep(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=12)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def make(rngs):
                return Block(rngs, growable=True)

            self.blocks = make(rngs)

        def __call__(self, x):
            run = nnx.scan(
                lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry
            )
            return run(self.blocks, x)

    model = Deep(nnx.Rngs(0))
    program = build(model, optax.sgd(0.1), optax.sgd(0.1))
    state = program.init(jax.random.key(0))
    same_bits(
        program.model(state).blocks.mlp.bed.bank.get_value(),
        model.blocks.mlp.bed.bank.get_value(),
    )
    same_bits(
        state.banks["blocks/mlp[10]"].w1, model.blocks.mlp.bed.bank.get_value().w1[10]
    )


def test_models_with_bare_arrays_and_numbers():
    class Odd(nnx.Module):
        def __init__(self, rngs):
            self.layer = ChunkedLayer(nnx.Linear(8, 3, rngs=rngs), 3, rngs=rngs)
            self.offset = nnx.data(jnp.arange(3.0))
            self.scale = nnx.Variable(0.5)

        def __call__(self, x):
            return self.layer(x) * self.scale[...] + self.offset

    model = Odd(nnx.Rngs(0))
    program = build(model, optax.sgd(0.1), optax.sgd(0.1))
    state = program.step(program.init(jax.random.key(0)), DATA)
    trained = program.model(state)
    np.testing.assert_array_equal(trained.offset, np.arange(3.0))
    assert trained(X).shape == (32, 3)


def test_layers_in_plain_containers_are_replaced():
    class Held(nnx.Module):
        def __init__(self, rngs):
            self.list = nnx.data([nnx.Linear(8, 8, rngs=rngs)])
            self.dict = nnx.data({"a": nnx.Linear(8, 8, rngs=rngs)})

        def __call__(self, x):
            return self.dict["a"](self.list[0](x))

    model = Held(nnx.Rngs(0))
    plain = model(X)
    assert make_growable(model, nnx.Linear, 2, rngs=nnx.Rngs(1)) == ["dict/a", "list/0"]
    assert isinstance(model.list[0], ChunkedLayer)
    assert isinstance(model.dict["a"], ChunkedLayer)
    same_bits(model(X), plain)


def test_the_sample_of_a_batch_of_sequences_holds_every_position():
    """256 sequences of 256: a stride of 256 would meet the first token alone."""
    bed = SeedBed(8, 2, rngs=nnx.Rngs(0))
    y = jax.random.normal(jax.random.key(0), (256, 256, 8)).at[:, 0].set(0.0)
    bed(y)
    seen = health(bed.seeds.get_value().statistics)
    assert np.all(seen.dead < 0.05)
    count = bed.seeds.get_value().statistics.count
    assert np.all((count > 200 * 4) & (count <= 256 * 4))


# --- Layers that return several arrays, and methods other than the call.


class Returned(nnx.Module):
    """A layer of 8 features that returns what ``wrap`` makes of its output."""

    def __init__(self, wrap):
        self.proj = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.output = nnx.Linear(8, 8, rngs=nnx.Rngs(1))
        self.wrap = wrap

    def __call__(self, x):
        return self.wrap(self.proj(x))

    def encode(self, x):
        return self.proj(x)


class Holder(nnx.Module):
    def __init__(self, wrap):
        self.layer = Returned(wrap)


Point = collections.namedtuple("Point", "time place")


@dataclasses.dataclass
class Record:
    hidden: object
    note: str = "kept"


def fossilize(bed):
    """Seed 1 becomes a fossil that adds 1 to features 2 and 3."""
    seeds, bank = bed.seeds.get_value(), bed.bank.get_value()
    bed.seeds.set_value(
        dataclasses.replace(
            seeds,
            stage=seeds.stage.at[1].set(Stage.FOSSILIZED),
            slot_of_seed=seeds.slot_of_seed.at[1].set(0),
            seed_of_slot=seeds.seed_of_slot.at[0].set(1),
        )
    )
    bed.bank.set_value(dataclasses.replace(bank, b2=bank.b2.at[0].set(1)))


CACHE = jnp.arange(3.0)
OUTPUTS = {
    "tuple": (None, lambda y: (y, None), lambda out: out[0]),
    "list": (None, lambda y: [CACHE, y], lambda out: out[1]),
    "cell": (None, lambda y: ((y, y), y), lambda out: out[1]),
    "last": (-1, lambda y: (y, CACHE, y), lambda out: out[2]),
    "dict": ("y", lambda y: {"b": CACHE, "y": y, "a": "words"}, lambda out: out["y"]),
    "ordered": (
        "y",
        lambda y: collections.OrderedDict(z=1, y=y),
        lambda out: out["y"],
    ),
    "frozen": ("y", lambda y: FrozenDict(y=y, z=CACHE), lambda out: out["y"]),
    "namedtuple": ("place", lambda y: Point(CACHE, y), lambda out: out.place),
    "namedtuple by default": (None, lambda y: Point(CACHE, y), lambda out: out.place),
    "path": (
        (1, "h", 0),
        lambda y: (CACHE, {"h": [y, y]}),
        lambda out: out[1]["h"][0],
    ),
    "dataclass": ("hidden", Record, lambda out: out.hidden),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_one_array_of_several_grows_and_the_rest_is_kept(name):
    output, wrap, read = OUTPUTS[name]
    model = Holder(wrap)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8)), jnp.float32)
    plain = model.layer(x)
    make_growable(
        model,
        "layer",
        4,
        features=8,
        output=output,
        blueprints=["bottleneck"],
        rngs=nnx.Rngs(1),
    )
    assert isinstance(model.layer.output, nnx.Linear)  # not the option
    same_bits(_flat(model.layer(x)), _flat(plain))
    fossilize(model.layer.bed)
    grown = model.layer(x)
    assert type(grown) is type(plain)
    np.testing.assert_allclose(
        read(grown) - read(plain), [[0, 0, 1, 1, 0, 0, 0, 0]] * 2, atol=1e-6
    )
    pairs = zip(_flat(grown), _flat(plain), strict=True)
    rest = [np.array_equal(a, b) for a, b in pairs]
    assert rest.count(False) == 1
    if isinstance(plain, dict):
        assert list(grown) == list(plain)
    model.layer.enabled = False
    same_bits(_flat(model.layer(x)), _flat(plain))


def _flat(output):
    if isinstance(output, Record):
        output = [output.hidden]
    return [leaf for leaf in jax.tree.leaves(output) if hasattr(leaf, "shape")]


@pytest.mark.parametrize(
    ("output", "wrap", "message"),
    [
        (
            None,
            lambda y: {"y": y},
            r"returned \{'y': \(2, 8\)\}. Choose an array .* out",
        ),
        (None, lambda y: (CACHE, None), r"returned tuple\(\(3,\), NoneType\)"),
        (2, lambda y: (y, y), r"output=2 is not in what Returned returned: tuple\("),
        ("z", lambda y: {"y": y}, r"output='z' is not in what Returned returned"),
        (0, lambda y: y, "output=0 is not in what Returned returned"),
        ((0, 1), lambda y: (CACHE, y), r"output=\(0, 1\) is not in"),
        (0, lambda y: (CACHE, y), r"at output=0; Returned .* true width as features="),
    ],
)
def test_an_output_that_is_not_there_is_named_by_the_first_call(output, wrap, message):
    layer = ChunkedLayer(Returned(wrap), 4, features=8, output=output, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=message):
        layer(jnp.ones((2, 8)))


def test_a_function_can_choose_the_output():
    layer = ChunkedLayer(
        Returned(lambda y: {"norm": jnp.sum(y), "parts": [y, 2 * y]}),
        4,
        features=8,
        output=lambda out: out["parts"][0],
        rngs=nnx.Rngs(1),
    )
    fossilize(layer.bed)
    x = jnp.ones((2, 8))
    plain, grown = layer.base(x), layer(x)
    same_bits(grown["parts"][0], layer.bed(plain["parts"][0]))
    same_bits(grown["parts"][1], plain["parts"][1])
    assert isinstance(grown["parts"], list)
    new = ChunkedLayer(
        Returned(lambda y: y), 4, features=8, output=lambda y: y + 1, rngs=nnx.Rngs(1)
    )
    with pytest.raises(ValueError, match="output must return an array that Returned"):
        new(x)


@pytest.mark.parametrize("output", [1.5, True, (), (0, None), ["y"]])
def test_an_output_of_another_kind_is_refused_before_anything_changes(output):
    model = Holder(lambda y: y)
    with pytest.raises(TypeError, match="layer 'layer': output must be an index, a k"):
        make_growable(model, "layer", 4, features=8, output=output, rngs=nnx.Rngs(1))
    assert isinstance(model.layer, Returned)


def test_methods_other_than_the_call_say_that_they_pass_the_seeds_by():
    embed = nnx.Embed(5, 8, rngs=nnx.Rngs(0))
    layer = ChunkedLayer(embed, 4, blueprints=["bottleneck"], rngs=nnx.Rngs(1))
    x = jnp.ones((2, 8))
    want = embed.attend(x)
    same_bits(layer.attend(x), want)  # all seeds are dormant: nothing to say
    fossilize(layer.bed)
    with pytest.warns(UserWarning, match=r"Embed\.attend .* Read layer\.base\.attend"):
        same_bits(layer.attend(x), want)
    same_bits(layer.base.attend(x), want)
    # Inside jit, it is not known whether a seed will count.
    with pytest.warns(UserWarning, match=r"Embed\.attend"):
        nnx.jit(lambda layer, x: layer.attend(x))(layer, x)
    layer.enabled = False
    same_bits(layer.attend(x), want)
    # What NNX itself asks of every module passes no one by.
    layer.enabled = True
    nnx.view(layer, deterministic=True)
    layer.eval()
    assert layer.num_embeddings == 5


def test_nnx_view_reaches_the_base_once():
    seen = []

    class Viewed(Returned):
        def set_view(self, **kwargs):
            seen.append(kwargs)
            return {}

    layer = ChunkedLayer(Viewed(lambda y: y), 4, features=8, rngs=nnx.Rngs(1))
    fossilize(layer.bed)
    nnx.view(layer, deterministic=True)
    assert seen == [{"deterministic": True}]
