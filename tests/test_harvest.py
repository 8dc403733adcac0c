"""A harvested model: same outputs, true size, nothing left of seeds and slots."""

import dataclasses
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esper_jax.blueprints import Custom, param_counts, resolve
from esper_jax.layers import (
    BlueprintParam,
    ChunkedLayer,
    CorrectedLayer,
    Corrections,
    GraftProbe,
    SeedBed,
    SeedVariable,
    harvest,
    make_growable,
)
from esper_jax.layers.corrections import PartVariable
from esper_jax.lifecycle.stages import Stage

ALL = (
    "residual_mlp",
    "bottleneck",
    "low_rank",
    "affine",
    "noop",
    "glu",
    "context",
    "context_glu",
)
X = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)


def own_blueprint():
    def init(key, width):
        return {"names": jnp.zeros((width,)), "deep": [jnp.zeros((2, width))]}

    def apply(params, y):
        return jnp.sin(y) * params["names"] + params["deep"][0].sum(axis=0)

    return Custom(name="own", init=init, apply=apply)


def grow(bed, parts, at=(), seed=0):
    """Gives seeds of a bed a stage, a blueprint and random parameters, by hand.

    ``parts`` maps a seed to ``(blueprint, stage)``; slots are given from the last.
    """
    state = bed.seeds.get_value()
    fields = {
        name: np.array(getattr(state, name))
        for name in ("stage", "blueprint", "slot_of_seed", "seed_of_slot")
    }
    alpha = np.array(state.graft.alpha)
    names = [b.name for b in bed.blueprints]
    for i, (owner, (blueprint, stage)) in enumerate(parts.items()):
        slot = state.capacity - 1 - i
        fields["stage"][(*at, owner)] = stage
        fields["blueprint"][(*at, owner)] = names.index(blueprint)
        fields["slot_of_seed"][(*at, owner)] = slot
        fields["seed_of_slot"][(*at, slot)] = owner
        alpha[(*at, owner)] = 0.3
    fields = {name: jnp.asarray(value) for name, value in fields.items()}
    graft = dataclasses.replace(state.graft, alpha=jnp.asarray(alpha))
    bed.seeds.set_value(dataclasses.replace(state, graft=graft, **fields))
    leaves, tree = jax.tree.flatten(bed.bank.get_value())
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    if not at:
        bed.bank.set_value(
            jax.tree.unflatten(
                tree,
                [
                    0.5 * jax.random.normal(k, leaf.shape)
                    for k, leaf in zip(keys, leaves, strict=True)
                ],
            )
        )


def fossils(*blueprints):
    return {i: (b, Stage.FOSSILIZED) for i, b in enumerate(blueprints)}


class Net(nnx.Module):
    def __init__(self, layer, rngs):
        self.layer = layer
        self.head = nnx.Linear(11, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.layer(x)))


def net(blueprints=ALL, num_seeds=4, parts=None, **options):
    rngs = nnx.Rngs(0)
    model = Net(nnx.Linear(6, 11, rngs=rngs, **options), rngs)
    make_growable(
        model, "layer", num_seeds, capacity=num_seeds, blueprints=blueprints, rngs=rngs
    )
    model.layer.base.bias.set_value(
        jnp.linspace(-1, 1, 11).astype(model.layer.base.bias.dtype)
    )
    if parts:
        grow(model.layer.bed, parts)
    model.eval()
    return model


def count(model, kind=nnx.Param):
    return sum(np.size(leaf) for leaf in jax.tree.leaves(nnx.state(model, kind)))


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype
    assert a.tobytes() == b.tobytes()


def close(got, want, tolerance=1e-5):
    assert got.dtype == want.dtype
    got, want = (np.asarray(v, np.float64) for v in (got, want))
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def is_plain(model):
    beds = (BlueprintParam, SeedVariable, GraftProbe)
    assert not jax.tree.leaves(nnx.state(model, nnx.Any(*beds)))
    kinds = [type(node) for _, node in nnx.iter_graph(model)]
    assert ChunkedLayer not in kinds
    assert SeedBed not in kinds
    pure = nnx.to_pure_dict(nnx.state(model))
    leaves = jax.tree.leaves(pure, is_leaf=lambda v: not isinstance(v, dict))
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)


def kept_parameters(model):
    """From the table of costs, of all fossils."""
    total = 0
    for _, bed in nnx.iter_graph(model):
        if isinstance(bed, SeedBed):
            costs = param_counts(bed.blueprints, bed.layout.sizes)
            seeds = bed.seeds.get_value()
            kept = np.asarray(seeds.stage) == Stage.FOSSILIZED
            own = costs[np.asarray(seeds.blueprint), np.arange(seeds.num_seeds)]
            total += int(own[kept].sum())
    return total


@pytest.mark.parametrize("blueprint", [*ALL, own_blueprint()])
@pytest.mark.parametrize("fold", [True, False])
def test_every_blueprint_gives_the_same_outputs(blueprint, fold):
    [kind] = resolve([blueprint])
    # 11 features in 4 chunks: the last one is narrower.
    parts = {i: (kind.name, Stage.FOSSILIZED) for i in (0, 3)}
    model = net(blueprints=("affine", blueprint), parts=parts)
    want, before = model(X), jax.tree.map(np.asarray, nnx.state(model))
    plain = harvest(model, fold=fold)
    is_plain(plain)
    close(plain(X), want)
    if kind.name != "noop":  # the truth is of something
        assert np.abs(model.head(nnx.relu(model.layer.base(X))) - want).max() > 0.1
    folded = (fold and kind.name in ("affine", "low_rank")) or kind.name == "noop"
    assert type(plain.layer) is (nnx.Linear if folded else CorrectedLayer)
    host = count(model)
    assert count(plain) == (host if folded else host + kept_parameters(model))
    jax.tree.map(same_bits, before, nnx.state(model))  # as it was


def test_where_nothing_counts_the_base_is_put_back():
    model = net(parts={0: ("affine", Stage.TRAINING), 1: ("glu", Stage.GERMINATED)})
    for parts in ("fossils", "counting"):
        plain = harvest(model, parts=parts)
        assert type(plain.layer) is nnx.Linear
        same_bits(plain(X), model(X))
        assert count(plain) == count(model)


def test_fossils_alone_or_whatever_counts():
    parts = {
        0: ("residual_mlp", Stage.FOSSILIZED),
        1: ("affine", Stage.GRAFTING),  # alpha 0.3
        2: ("glu", Stage.FINE_TUNING),
        3: ("low_rank", Stage.TRAINING),
    }
    model = net(parts=parts)
    close(harvest(model, parts="counting")(X), model(X))
    close(harvest(model, parts="counting", fold=False)(X), model(X))
    fossil = net(parts={0: parts[0]})
    close(harvest(model)(X), fossil(X))
    assert count(harvest(model)) == count(model) + kept_parameters(model)


@pytest.mark.parametrize("fold", [True, False])
def test_bfloat16(fold):
    for dtype in (jnp.float32, jnp.bfloat16):
        parts = fossils("low_rank", "affine", "residual_mlp", "bottleneck")
        model = net(parts=parts, dtype=jnp.bfloat16, param_dtype=dtype)
        want = model.layer(X)
        plain = harvest(model, fold=fold)
        assert plain.layer.kernel.dtype == dtype
        close(plain.layer(X), want, 2e-2)


def test_what_can_be_folded_is_folded_and_the_rest_stays():
    model = net(parts=fossils("residual_mlp", "low_rank", "affine", "glu"))
    plain = harvest(model)
    groups = [group.blueprint.name for group in plain.layer.corrections.groups]
    assert groups == ["residual_mlp", "glu"]
    costs = param_counts(model.layer.bed.blueprints, model.layer.bed.layout.sizes)
    want = costs[ALL.index("residual_mlp"), 0] + costs[ALL.index("glu"), 3]
    assert count(plain) == count(model) + want
    close(plain(X), model(X))


def test_what_reads_the_whole_output_reads_it_unfolded():
    model = net(parts=fossils("low_rank", "context", "affine", "context_glu"))
    plain = harvest(model)
    same_bits(plain.layer.kernel, model.layer.kernel)
    close(plain(X), model(X))


def test_fold_by_hand():
    """Against the formula of the blueprint, in float64."""
    model = net(parts=fossils("low_rank", "affine"))
    bank, bed = model.layer.bed.bank.get_value(), model.layer.bed
    kernel = np.asarray(model.layer.kernel, np.float64)
    bias = np.asarray(model.layer.bias, np.float64)
    slots = np.asarray(bed.seeds.get_value().slot_of_seed)
    hidden = resolve(["low_rank"])[0].hidden(3)
    w1 = np.asarray(bank.w1[slots[0], :, :hidden], np.float64)
    w2 = np.asarray(bank.w2[slots[0], :hidden], np.float64)
    more = np.eye(11)
    more[:3, :3] += w1 @ w2
    scale, b2 = bank.scale[slots[1]], bank.b2[slots[1]]
    more[3:6, 3:6] += np.diag(scale)
    added = np.zeros(11)
    added[3:6] = b2
    plain = harvest(model).layer
    np.testing.assert_allclose(plain.kernel, kernel @ more, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(plain.bias, bias @ more + added, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "blueprint", "folds"),
    [
        ({}, "low_rank", True),
        ({"strides": 2, "padding": "CIRCULAR"}, "low_rank", True),
        ({"kernel_dilation": 2}, "affine", True),
        ({"feature_group_count": 2}, "affine", True),
        ({"feature_group_count": 2}, "low_rank", False),
        ({"use_bias": False}, "low_rank", True),
        ({"use_bias": False}, "affine", False),
        ({"mask": np.tril(np.ones((3, 3, 4, 8), np.float32))}, "affine", True),
        ({"mask": np.tril(np.ones((3, 3, 4, 8), np.float32))}, "low_rank", False),
    ],
)
def test_convolutions(options, blueprint, folds):
    layer = nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0), **options)
    model = ChunkedLayer(layer, 2, blueprints=[blueprint], rngs=nnx.Rngs(1))
    grow(model.bed, fossils(blueprint, blueprint))
    model.eval()
    plain = harvest(model)
    assert type(plain) is (nnx.Conv if folds else CorrectedLayer)
    x = jax.random.normal(jax.random.key(0), (2, 7, 7, 4))
    close(plain(x), model(x))
    assert np.abs(layer(x) - model(x)).max() > 0.1


class Shared(nnx.Module):
    """Uses one layer, or one kernel, in two places, once without the seeds."""

    def __init__(self, share):
        linear = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
        self.grown = ChunkedLayer(linear, 2, blueprints=["affine"], rngs=nnx.Rngs(1))
        if share == "base":
            self.other = linear
        elif share == "kernel":
            self.other = nnx.Linear(6, 6, rngs=nnx.Rngs(2))
            self.other.kernel = linear.kernel
        elif share == "layer":
            self.other = self.grown
        elif share == "nested":
            self.other = ChunkedLayer(
                self.grown, 3, features=6, blueprints=["affine"], rngs=nnx.Rngs(3)
            )
            grow(self.other.bed, fossils("affine", "affine"), seed=1)
        grow(self.grown.bed, fossils("affine", "affine"))
        self.eval()

    def __call__(self, x):
        return jnp.concatenate([self.grown(x), self.other(x)], axis=-1)


@pytest.mark.parametrize("share", ["base", "kernel", "layer", "nested"])
def test_what_is_shared_stays_shared_and_right(share):
    model = Shared(share)
    plain = harvest(model)
    is_plain(plain)
    close(plain(X), model(X))
    if share == "base":
        assert plain.other is plain.grown.base
    if share == "kernel":
        assert plain.other.kernel is plain.grown.base.kernel
    if share == "layer":
        assert plain.other is plain.grown
        assert type(plain.grown) is nnx.Linear
    if share == "nested":
        assert plain.other.base is plain.grown


def test_nested_layers_fold_into_one():
    inner = ChunkedLayer(
        nnx.Linear(6, 6, rngs=nnx.Rngs(0)), 2, blueprints=["affine"], rngs=nnx.Rngs(1)
    )
    outer = ChunkedLayer(
        inner, 3, features=6, blueprints=["low_rank"], rngs=nnx.Rngs(2)
    )
    grow(inner.bed, fossils("affine", "affine"))
    grow(outer.bed, fossils("low_rank", "low_rank", "low_rank"))
    outer.eval()
    plain = harvest(outer)
    assert type(plain) is nnx.Linear
    close(plain(X), outer(X))


def test_wherever_a_layer_is_held():
    def layer():
        linear = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
        layer = ChunkedLayer(linear, 2, rngs=nnx.Rngs(1))
        grow(layer.bed, fossils("residual_mlp"))
        return layer

    class Holder(nnx.Module):
        def __init__(self):
            self.pair = nnx.data((layer(), layer()))
            self.lists = nnx.List([layer()])
            self.plain = nnx.data([layer(), {"a": layer()}])
            self.by_name = nnx.Dict(a=layer())
            self.bare = SeedBed(6, 3, blueprints=["affine"], rngs=nnx.Rngs(0))
            self.idle = SeedBed(6, 3, rngs=nnx.Rngs(0))
            grow(self.bare, fossils("affine"))

        def __call__(self, x):
            for part in (*self.pair, *self.lists, self.plain[0], self.plain[1]["a"]):
                x = part(x)
            return self.idle(self.bare(self.by_name["a"](x)))

    model = Holder()
    model.eval()
    plain = harvest(model)
    is_plain(plain)
    close(plain(X), model(X))
    assert count(plain) == count(model) + kept_parameters(model)
    assert type(plain.idle) is Corrections
    same_bits(plain.idle(X), X)


@pytest.mark.filterwarnings("ignore:Embed.attend is a method:UserWarning")
def test_attributes_and_methods_of_the_base():
    class Tokens(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(5, 6, rngs=nnx.Rngs(0))
            make_growable(self, "embed", 2, rngs=nnx.Rngs(1))

    model = Tokens()
    same_bits(harvest(model).embed.attend(X), model.embed.attend(X))
    grow(model.embed.bed, fossils("residual_mlp"))
    plain = harvest(model)
    same_bits(plain.embed.attend(X), model.embed.attend(X))
    assert plain.embed.num_embeddings == 5
    plain.embed.embedding = nnx.Param(jnp.zeros((5, 6)))
    assert not plain.embed.base.embedding[...].any()
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = plain.embed.no_such_thing


def test_a_disabled_layer_becomes_its_base():
    model = net(parts=fossils("residual_mlp"))
    model.set_attributes(ChunkedLayer, enabled=False)
    plain = harvest(model)
    assert type(plain.layer) is nnx.Linear
    same_bits(plain(X), model(X))


def test_a_second_harvest_changes_nothing():
    plain = harvest(net(parts=fossils("residual_mlp", "affine")))
    again = harvest(plain)
    assert again is not plain
    same_bits(again(X), plain(X))


def test_a_harvested_model_trains():
    plain = harvest(net(parts=fossils("residual_mlp", "glu")))
    grads = nnx.grad(lambda m: (m(X) ** 2).mean())(plain)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


class Blocks(nnx.Module):
    """Three layers under `nnx.scan`, and the same three as an ensemble of two."""

    def __init__(self, *axes, blueprints=ALL):
        def make(rngs):
            return nnx.Linear(11, 11, rngs=rngs)

        def grown(rngs):
            return ChunkedLayer(
                make(rngs),
                4,
                blueprints=blueprints,
                deterministic=True,
                rngs=rngs,
            )

        for length in axes[::-1]:
            grown = nnx.vmap(grown, in_axes=(0,), out_axes=0)
            grown = nnx.split_rngs(splits=length)(grown)
        self.mlp = grown(nnx.Rngs(0))
        self.axes = axes

    def __call__(self, x):
        run = nnx.scan(lambda x, layer: (layer(x), None))
        for _ in self.axes[1:]:
            run = nnx.vmap(run, in_axes=(None, 0), out_axes=0)
        return run(x, self.mlp)[0]


def grow_stack(bed, parts_of):
    state = bed.bank.get_value()
    leaves, tree = jax.tree.flatten(state)
    rng = np.random.default_rng(0)
    fresh = [jnp.asarray(0.3 * rng.normal(size=v.shape), jnp.float32) for v in leaves]
    bed.bank.set_value(jax.tree.unflatten(tree, fresh))
    for at, parts in parts_of.items():
        grow(bed, parts, at=at)


STACKS = {
    "folded": {(0,): fossils("affine", "low_rank"), (2,): fossils("low_rank")},
    "one or none": {
        (1,): {3: ("residual_mlp", Stage.FOSSILIZED), 0: ("glu", Stage.TRAINING)}
    },
    "all kinds": {
        (0,): fossils("residual_mlp", "low_rank", "affine", "residual_mlp"),
        (1,): fossils("glu", "bottleneck"),
        (2,): {2: ("residual_mlp", Stage.GRAFTING), 0: ("affine", Stage.FINE_TUNING)},
    },
    "reading all": {(0,): fossils("context", "affine"), (1,): fossils("context_glu")},
    "none": {},
}


@pytest.mark.parametrize(
    ("name", "fold"),
    [*((name, True) for name in STACKS), ("folded", False), ("all kinds", False)],
)
def test_each_layer_of_a_stack_keeps_its_own_parts(name, fold):
    model = Blocks(3)
    grow_stack(model.mlp.bed, STACKS[name])
    plain = harvest(model, parts="counting", fold=fold)
    is_plain(plain)
    x = np.random.default_rng(1).normal(size=(8, 11)).astype(np.float32)
    close(plain(x), model(x))
    if name == "none" or (name == "folded" and fold):
        assert type(plain.mlp) is nnx.Linear
    else:
        assert type(plain.mlp) is CorrectedLayer


def test_an_ensemble_of_stacks():
    model = Blocks(2, 3, blueprints=["residual_mlp", "affine", "low_rank", "glu"])
    parts = {
        (0, 0): fossils("residual_mlp", "affine"),
        (1, 2): fossils("residual_mlp", "residual_mlp", "low_rank"),
        (1, 0): fossils("glu"),
    }
    grow_stack(model.mlp.bed, parts)
    plain = harvest(model)
    x = np.random.default_rng(1).normal(size=(8, 11)).astype(np.float32)
    assert plain(x).shape == (2, 8, 11)
    close(plain(x), model(x))
    shapes = {g.blueprint.name: g for g in plain.mlp.corrections.groups}
    assert set(shapes) == {"residual_mlp", "glu"}
    assert shapes["residual_mlp"].seeds.shape == (2, 3, 2)
    assert shapes["glu"].seeds.shape == (2, 3, 1)
    # What is padded has no part: zeros of the parameters, no chunk.
    assert (shapes["glu"].seeds[0] == -1).all()
    kinds = {type(v) for _, v in nnx.to_flat_state(nnx.state(plain))}
    assert kinds == {nnx.Param, PartVariable}


def test_padding_is_no_number_that_spoils_gradients():
    model = Blocks(3)
    grow_stack(model.mlp.bed, {(1,): fossils("residual_mlp")})
    bank = model.mlp.bed.bank.get_value()
    model.mlp.bed.bank.set_value(
        dataclasses.replace(bank, w1=bank.w1.at[0].set(np.nan))
    )
    plain = harvest(model)
    x = np.ones((2, 11), np.float32)
    grads = nnx.grad(lambda m: m(x).sum())(plain)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


class OwnCall(ChunkedLayer):
    def __call__(self, x):
        return 2 * super().__call__(x)


def test_what_cannot_be_harvested_is_refused_by_name():
    with pytest.raises(TypeError, match=r"model must be an nnx\.Module, got dict"):
        harvest({})
    model = net(parts=fossils("affine"))
    with pytest.raises(ValueError, match=r"parts must be one of .*'fossils'.*'all'"):
        harvest(model, parts="all")
    with pytest.raises(TypeError, match="layer 'layer/bed' is traced: call harvest"):
        nnx.jit(lambda m: harvest(m)(X))(model)
    abstract = nnx.eval_shape(lambda: net())
    with pytest.raises(TypeError, match="layer 'layer/bed' is abstract"):
        harvest(abstract)
    model.layer = OwnCall(nnx.Linear(6, 11, rngs=nnx.Rngs(0)), 2, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="'layer': OwnCall has a __call__ of its own"):
        harvest(model)
    stack = Blocks(3)
    stack.mlp.bed.probe.set_value(jnp.zeros((4, 3)))
    with pytest.raises(ValueError, match=r"'mlp/bed'.*first axes"):
        harvest(stack)


def fresh_process(code, *arguments):
    """Runs code where esper_jax cannot be imported."""
    code = "import sys; sys.modules['esper_jax'] = None\n" + code
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=arguments[0],
    )
    assert done.returncode == 0, done.stderr


FOLDED = net(blueprints=["affine", "low_rank"], parts=fossils("affine", "low_rank"))
KEPT = net(parts=fossils("residual_mlp", "affine", "glu", "context"))


def test_safetensors_loads_without_esper_jax(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    for name, model in (("folded", FOLDED), ("kept", KEPT)):
        plain = harvest(model)
        flat = nnx.to_flat_state(nnx.state(plain))
        arrays = {".".join(map(str, p)): np.asarray(v.get_value()) for p, v in flat}
        safetensors.save_file(arrays, tmp_path / f"{name}.safetensors")
        np.save(tmp_path / f"{name}.npy", model(X))
        back = safetensors.load_file(tmp_path / f"{name}.safetensors")
        assert sum(a.size for a in back.values()) == count(plain)
        for key, array in arrays.items():
            same_bits(back[key], array)
    np.save(tmp_path / "x.npy", X)
    fresh_process(
        """
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

class Net(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(6, 11, rngs=rngs)
        self.head = nnx.Linear(11, 3, rngs=rngs)
    def __call__(self, x):
        return self.head(nnx.relu(self.layer(x)))

model = Net(nnx.Rngs(0))
flat = load_file("folded.safetensors")
nested = {}
for name, array in flat.items():
    layer, leaf = name.split(".")
    nested.setdefault(layer, {})[leaf] = array
state = nnx.state(model)
nnx.replace_by_pure_dict(state, nested)
nnx.update(model, state)
got, want = model(np.load("x.npy")), np.load("folded.npy")
assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
kept = load_file("kept.safetensors")
assert kept["layer.base.kernel"].shape == (6, 11)
assert kept["layer.corrections.groups.0.params.w1"].shape == (1, 3, 6)
""",
        tmp_path,
    )


@pytest.mark.parametrize("grown", [FOLDED, KEPT])
def test_orbax_round_trip(grown, tmp_path):
    import orbax.checkpoint as ocp

    plain = harvest(grown)
    pure = nnx.to_pure_dict(nnx.state(plain))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", pure)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "model", pure)
    other = nnx.clone(plain)
    state = jax.tree.map(jnp.zeros_like, nnx.state(other))
    nnx.replace_by_pure_dict(state, back)
    nnx.update(other, state)
    same_bits(other(X), plain(X))


def test_pickle():
    for kinds in (("residual_mlp", "bottleneck", "low_rank", "affine"), ("glu",)):
        kept = net(parts=fossils(*kinds))
        for fold in (True, False):
            plain = harvest(kept, fold=fold)
            same_bits(pickle.loads(pickle.dumps(plain))(X), plain(X))


def test_a_folded_layer_unpickles_without_esper_jax(tmp_path):
    layer = harvest(FOLDED).layer
    (tmp_path / "layer.pkl").write_bytes(pickle.dumps(layer))
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", layer(X))
    fresh_process(
        """
import pickle, numpy as np
layer = pickle.load(open("layer.pkl", "rb"))
assert np.allclose(layer(np.load("x.npy")), np.load("y.npy"), rtol=1e-6)
""",
        tmp_path,
    )


def test_stablehlo_of_any_batch_runs_without_esper_jax(tmp_path):
    pytest.importorskip("flatbuffers", reason="jax.export writes with it")
    plain = harvest(KEPT)
    [rows] = jax.export.symbolic_shape("rows")
    argument = jax.ShapeDtypeStruct((rows, 6), jnp.float32)
    exported = jax.export.export(
        jax.jit(lambda x: plain(x)), platforms=["cpu", "cuda", "tpu"]
    )(argument)
    (tmp_path / "model").write_bytes(exported.serialize())
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", KEPT(X))
    fresh_process(
        """
import jax, jax.export, numpy as np
model = jax.export.deserialize(bytearray(open("model", "rb").read()))
assert model.platforms == ("cpu", "cuda", "tpu")
x, want = np.load("x.npy"), np.load("y.npy")
for rows in (1, 5, 32):
    got = model.call(x[:rows])
    assert np.abs(got - want[:rows]).max() <= 1e-5 * np.abs(want).max()
""",
        tmp_path,
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_corrections_promote_nothing_by_themselves(dtype):
    parts = fossils("residual_mlp", "low_rank", "affine", "bottleneck")
    corrections = harvest(net(parts=parts), fold=False).layer.corrections
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        for shape in ((11,), (0, 11), (2, 3, 11)):
            out = corrections(jnp.ones(shape, dtype))
            assert (out.shape, out.dtype) == (shape, dtype)
