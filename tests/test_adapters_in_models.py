"""Blueprints that write the whole layer, in layers, models and what is harvested."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from test_harvest import close, count, fossils, grow, is_plain, net, same_bits

from esper_jax import (
    GraftConfig,
    Growth,
    LifecycleConfig,
    grow_capacity,
    harvest,
    make_growable,
)
from esper_jax.blueprints import Adapter, group, lora, neurons, param_counts
from esper_jax.hosts import MLP
from esper_jax.layers import ChunkedLayer, CorrectedLayer, SeedBed, linen
from esper_jax.lifecycle.stages import Stage
from esper_jax.policy import TrialConfig, trial, trial_lives
from esper_jax.policy.config import ControllerConfig

KINDS = (group(hidden=3), neurons(hidden=2), lora(rank=2, scaling=0.5), "low_rank")
X = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
AFFINE = Adapter(name="affine_input", hidden=2, reads="input", bias=True)


@pytest.mark.parametrize(
    ("kinds", "parts", "folds"),
    [
        (KINDS, fossils("group", "neurons", "lora", "low_rank"), False),
        (KINDS, fossils("lora", "low_rank", "lora"), True),
        (KINDS, fossils("lora", "neurons"), False),
        # A chunk's reader that is not folded must not find what lora adds.
        (("residual_mlp", lora(rank=2)), fossils("residual_mlp", "lora"), False),
        ((AFFINE,), fossils("affine_input", "affine_input"), True),
    ],
)
def test_what_is_harvested_computes_the_same(kinds: Any, parts: Any, folds: bool):
    model = net(kinds, parts=parts)
    want = model(X)
    folded, plain = harvest(model), harvest(model, fold=False)
    for harvested in (folded, plain):
        is_plain(harvested)
        close(harvested(X), want)
    assert isinstance(plain.layer, CorrectedLayer)
    assert isinstance(folded.layer, nnx.Linear) == folds
    bed = model.layer.bed
    costs = param_counts(bed.blueprints, bed.layout.sizes)
    names = [b.name for b in bed.blueprints]
    grown = sum(costs[names.index(b), seed] for seed, (b, _) in parts.items())
    host = count(model, nnx.All(nnx.Param, nnx.Not(nnx.PathContains("bed"))))
    shared = {"group": 11, "neurons": 11, "affine_input": 11}
    kept = [b for b, _ in parts.values()]
    twice = sum((kept.count(b) - 1) * shared.get(b, 0) for b in set(kept))
    assert count(plain) == host + grown - twice  # one b2 for all parts of an adapter


def test_a_newborn_is_the_identity_and_learns_alone() -> None:
    model = net(KINDS, parts={i: (b, Stage.TRAINING) for i, b in enumerate(names())})
    plain = harvest(model)
    same_bits(model(X), plain(X))


def names() -> list[str]:
    return ["group", "neurons", "lora"]


LAYERS = [
    (lambda r: nnx.Conv(6, 11, (1, 1), rngs=r), X.reshape(2, 4, 4, 6), True),
    (
        lambda r: nnx.Conv(6, 11, (1, 1), padding=0, strides=1, rngs=r),
        X.reshape(2, 4, 4, 6),
        True,
    ),
    (
        lambda r: nnx.Conv(6, 11, (1,), padding=((0, 0),), rngs=r),
        X.reshape(2, 16, 6),
        True,
    ),
    (lambda r: nnx.LinearGeneral(6, 11, rngs=r), X.reshape(2, 16, 6), True),
    (lambda r: nnx.Embed(9, 11, rngs=r), np.arange(12).reshape(3, 4) % 9, False),
]


@pytest.mark.parametrize(("make", "x", "folds"), LAYERS)
def test_inputs_of_other_layers_are_read(make: Any, x: Any, folds: bool) -> None:
    rngs = nnx.Rngs(0)
    layer = ChunkedLayer(make(rngs), 4, blueprints=[lora(rank=2)], rngs=rngs)
    model = nnx.List([layer])
    grow(layer.bed, fossils("lora", "lora"))
    layer.eval()
    before = layer.base(x)
    want = layer(x)
    assert np.abs(np.asarray(want - before)).max() > 0.1
    harvested = harvest(model)[0]
    close(harvested(x), want)
    assert isinstance(harvested, CorrectedLayer) != folds


def test_layers_whose_input_cannot_be_read_are_refused_by_name() -> None:
    class Own(nnx.Module):
        out_features = 4

        def __call__(self, x: Any) -> Any:
            return x[..., :4]

    rngs = nnx.Rngs(0)
    conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
    model = nnx.Sequential(conv, Own())
    for where in ("layers/0", "layers/1"):
        with pytest.raises(ValueError, match=r"'neurons' reads the input of its layer"):
            make_growable(model, where, 2, blueprints=["neurons"], rngs=rngs)
    assert model.layers[0] is conv
    make_growable(model, "layers/1", 2, blueprints=["neurons"], inputs=8, rngs=rngs)
    assert model(np.ones((1, 5, 5, 3), np.float32)).shape == (1, 5, 5, 4)
    with pytest.raises(ValueError, match=r"layer 'layers/0'.* Conv as it is"):
        make_growable(model, "layers/0", 2, blueprints=["lora"], rngs=rngs)


def test_a_stack_of_layers_has_its_own_parts_in_each() -> None:
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stack(rngs: nnx.Rngs) -> nnx.Linear:
        return nnx.Linear(6, 6, rngs=rngs)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def through(x: Any, layer: Any) -> Any:
        return nnx.tanh(layer(x))

    class Deep(nnx.Module):
        def __init__(self) -> None:
            self.layer = stack(nnx.Rngs(0))

        def __call__(self, x: Any) -> Any:
            return through(x, self.layer)

    model = Deep()
    kinds = (group(hidden=3), lora(rank=2))
    make_growable(model, "layer", 3, stack=3, blueprints=kinds, rngs=nnx.Rngs(1))
    bed = model.layer.bed
    values = jax.tree.map(
        lambda v: 0.3 * jax.random.normal(jax.random.key(1), v.shape),
        bed.bank.get_value(),
    )
    bed.bank.set_value(values)
    grow(bed, fossils("lora"), at=(0,))
    grow(bed, fossils("lora", "group", "lora"), at=(2,))
    model.eval()
    want = model(X)
    for fold in (True, False):
        close(harvest(model, fold=fold)(X), want)


def test_capacity_changes_keep_adapters() -> None:
    model = net(KINDS, parts=fossils("group", "lora"))
    want = model(X)
    grow_capacity(model, 3, rngs=nnx.Rngs(5))
    same_bits(model(X), want)


def test_linen_layers_too() -> None:
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, ids: Any) -> Any:
            return nn.Conv(4, (1,))(nn.tanh(nn.Dense(8)(nn.Embed(9, 6)(ids))))

    plain = Plain()
    options = {"blueprints": [lora(rank=2), group(hidden=2)]}
    model = linen.Growable(plain, (nn.Embed, nn.Dense, nn.Conv), 2, options)
    ids = np.arange(10).reshape(2, 5) % 9
    variables = model.init(jax.random.key(0), ids)
    want = plain.apply({"params": variables["params"]}, ids)
    same_bits(model.apply(variables, ids), want)
    beds = linen.beds_in(lambda v: model.apply(v, ids), variables)
    assert [b.bank.get_value().custom["lora"]["w1"].shape for b in beds.values()] == [
        (2, 9, 2),
        (2, 6, 2),
        (2, 8, 2),
    ]

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(4)(x), x.astype("i4")

    pair = linen.ChunkedLayer(Two(), 2, features=4)
    with jax.numpy_dtype_promotion("strict"):  # outputs of two dtypes
        out, rest = pair.init_with_output(jax.random.key(0), np.ones((2, 3), "f4"))[0]
    assert (out.dtype, rest.dtype) == (np.float32, np.int32)
    wide = linen.ChunkedLayer(nn.Conv(4, (3,)), 2, options)
    with pytest.raises(ValueError, match=r"'lora' reads the input of its layer"):
        wide.init(jax.random.key(0), np.ones((1, 5, 3)))


@pytest.mark.parametrize("spec", [("data",), ("data", "model")])
def test_sharded_rows_give_the_same_and_sharded_features_are_refused(spec: Any):
    mesh = jax.make_mesh(
        (2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    model = net((neurons(hidden=2), group(hidden=2)), parts=fossils("neurons", "group"))
    want = model(X)
    model.layer.bed.sharding = sharding
    call = nnx.jit(lambda m, x: m(x))
    if len(spec) > 1:
        with pytest.raises(ValueError, match="'neurons' writes the whole layer"):
            call(model, X)
        return
    close(
        call(model, jax.device_put(X, NamedSharding(mesh, PartitionSpec("data")))), want
    )


LIVES = LifecycleConfig(
    min_epochs=(0, 0, 1, 2, 1, 1, 1, 0, 1, 0, 1),
    reconstruction_threshold=1e9,
    min_improvement=0.0,
    min_stability=-1e9,
    min_final_stability=-1e9,
    grafting=GraftConfig(ramp_duration=2),
)


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        pytest.param("group", "float32", marks=pytest.mark.slow),
        pytest.param("neurons", "bfloat16", marks=pytest.mark.slow),
        ("lora", "bfloat16"),
    ],
)
@pytest.mark.filterwarnings("ignore:blueprints. 'lora' has rank 4:UserWarning")
def test_a_frozen_host_learns_by_what_grows(kind: str, base: str) -> None:
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(6, 12, param_dtype=base, dtype=base, rngs=rngs), nnx.relu,
        nnx.Linear(12, 3, param_dtype=base, dtype=base, rngs=rngs),
    )  # fmt: skip
    y = np.argmax(X @ np.random.default_rng(1).normal(size=(6, 3)), axis=1)
    make_growable(model, nnx.Linear, 2, blueprints=[kind], rngs=rngs)
    host = jax.tree.map(np.asarray, nnx.state(model, nnx.Param))
    controller = ControllerConfig(when="period", period=1, max_training=1)
    growth = Growth(
        model,
        optax.adam(2e-2),
        wrt=None,
        lifecycle_config=LIVES,
        controller_config=controller,
    )

    def loss_fn(m: Any) -> Any:
        losses = optax.softmax_cross_entropy_with_integer_labels(
            m(X).astype(jnp.float32), y
        )
        return losses.mean()

    @nnx.jit
    def step(model: Any, growth: Any) -> Any:
        loss, grads = nnx.value_and_grad(loss_fn, argnums=growth.argnums)(model)
        growth.update(model, grads, loss=loss)
        return loss

    evaluate = nnx.jit(loss_fn)
    first = float(evaluate(model))
    for _ in range(14):
        for _ in range(6):
            step(model, growth)
        growth.tick(model, evaluate)
    kept = float(loss_fn(harvest(model)))
    stages = np.concatenate([b.bed.seeds.get_value().stage for b in beds(model)])
    assert Stage.FOSSILIZED in stages
    assert kept < 0.95 * first
    jax.tree.map(np.testing.assert_array_equal, host, nnx.state(model, nnx.Param))
    model.set_attributes(ChunkedLayer, enabled=False)
    same_bits(evaluate(model), np.float32(first))


def beds(model: Any) -> list[Any]:
    return [n for _, n in nnx.iter_graph(model) if isinstance(n, ChunkedLayer)]


def test_a_bare_bed_reads_what_it_is_given() -> None:
    bed = SeedBed(8, 2, blueprints=["neurons"], inputs=5, rngs=nnx.Rngs(0))
    y, x = np.ones((3, 8), np.float32), np.ones((3, 5), np.float32)
    same_bits(bed(y, x=x), y)
    with pytest.raises(ValueError, match="x must be given: blueprint 'neurons'"):
        bed(y)
    with pytest.raises(ValueError, match="inputs must be given: blueprint 'neurons'"):
        SeedBed(8, 2, blueprints=["neurons"], rngs=nnx.Rngs(0))


def test_a_layer_that_takes_integers_takes_them_with_adapters_too() -> None:
    rngs = nnx.Rngs(0)
    layer = ChunkedLayer(
        nnx.Linear(6, 8, rngs=rngs), 2, blueprints=[neurons(hidden=2)], rngs=rngs
    )
    grow(layer.bed, fossils("neurons"))
    layer.eval()
    x = np.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(layer(x), layer(x.astype(np.float32)))
    close(harvest(nnx.List([layer]))[0](x), layer(x))


def test_a_layer_called_by_keywords_is_read_whatever_their_order() -> None:
    rngs = nnx.Rngs(0)
    layer = ChunkedLayer(
        nnx.Linear(6, 8, rngs=rngs), 2, blueprints=[neurons(hidden=2)], rngs=rngs
    )
    grow(layer.bed, fossils("neurons"))
    layer.eval()
    plain = harvest(nnx.List([layer]))[0]
    close(layer(out_sharding=None, inputs=X), layer(X))
    close(plain(out_sharding=None, inputs=X), layer(X))


def test_a_frozen_host_in_evaluation_mode_keeps_its_batch_statistics() -> None:
    """What grows learns there as well; in training mode averages would move."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(6, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.relu
    )
    model.eval()
    before, host = np.asarray(model(X)), jax.tree.map(np.asarray, nnx.state(model))
    bed = {"blueprints": [lora(rank=1, start="gradient")], "rngs": rngs}
    make_growable(model, nnx.Linear, 2, **bed)
    growth = Growth(
        model,
        optax.adam(2e-2),
        wrt=None,
        policy=trial(TrialConfig(ticks=1)),
        lifecycle_config=trial_lives(),
    )

    def loss_fn(m: Any) -> Any:
        return jnp.mean((m(X) - 1) ** 2)

    for _ in range(6):
        grads = nnx.grad(loss_fn, argnums=growth.argnums)(model)
        growth.update(model, grads)
        growth.tick(model, loss_fn)
    assert float(loss_fn(model)) < np.mean((before - 1) ** 2) - 1e-3
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    jax.tree.map(
        np.testing.assert_array_equal, jax.tree.leaves(host), jax.tree.leaves(state)
    )
    model.set_attributes(ChunkedLayer, enabled=False)
    same_bits(model(X), before)


@pytest.mark.filterwarnings("ignore:blueprints. 'lora' has rank 4:UserWarning")
def test_a_convolution_read_through_inputs_is_not_folded() -> None:
    rngs = nnx.Rngs(0)
    layer = ChunkedLayer(
        nnx.Conv(3, 8, (3, 3), rngs=rngs), 2, blueprints=["lora"], inputs=3, rngs=rngs
    )
    grow(layer.bed, fossils("lora"))
    layer.eval()
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 3)).astype(np.float32)
    close(harvest(nnx.List([layer]))[0](x), layer(x))


def test_gradients_in_evaluation_over_a_mapped_axis() -> None:
    rngs = nnx.Rngs(0)
    kinds = [lora(rank=2), group(hidden=2)]
    layer = ChunkedLayer(nnx.Linear(6, 8, rngs=rngs), 2, blueprints=kinds, rngs=rngs)
    grow(layer.bed, fossils("lora", "group"))
    layer.eval()
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def slope(x: Any) -> Any:
        return jax.grad(lambda x: jnp.sum(jnp.sin(layer(x))))(x)

    spec = PartitionSpec("d")
    apart = jax.jit(jax.shard_map(slope, mesh=mesh, in_specs=spec, out_specs=spec))
    close(apart(X), slope(X))


def test_the_perceptron_of_the_command_line_takes_adapters() -> None:
    kinds = ["lora", "group"]
    model = MLP(6, (8, 8), 3, num_seeds=2, blueprints=kinds, rngs=nnx.Rngs(0))
    for layer in model.layers:
        grow(layer.bed, fossils("lora", "group"))
    model.eval()
    close(harvest(model)(X), model(X))
