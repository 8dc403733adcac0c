"""Layers of several axes, as those of attention: read, grown and folded."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from test_folds import filled
from test_harvest import fossils, grow, is_plain, same_bits

from esper_jax import ChunkedLayer, Growth, LifecycleConfig, harvest, make_growable
from esper_jax.blueprints import group, lora, low_rank, neurons
from esper_jax.growth import linen_growth
from esper_jax.growth.folds import fold_fossils, folds_of
from esper_jax.growth.parts import put_values, split_model, values_of
from esper_jax.layers import BlueprintParam, CorrectedLayer, linen
from esper_jax.layers.matrix_form import PLAIN, form_over, matrix_form
from esper_jax.lifecycle.stages import Stage

NOISE = nnx.initializers.normal(0.5)


def general(*args: Any, **options: Any) -> Any:
    return lambda r: nnx.LinearGeneral(*args, bias_init=NOISE, rngs=r, **options)


def einsum(*args: Any) -> Any:
    return lambda r: nnx.Einsum(*args, bias_init=NOISE, rngs=r)


# What makes a layer, the shape of its input, and input, A (contracted axes, r), B
# (r, axes of features) to the output of the layer, by hand.
LAYERS = {
    "out": (general((2, 3), 7, axis=(-2, -1)), (2, 4, 2, 3), "abhd,hdr,rf->abf"),
    "query": (general(6, (2, 4)), (3, 5, 6), "btd,dr,rnh->btnh"),
    "axes apart": (
        general((2, 3), (4, 5), axis=(1, -1)),
        (6, 2, 4, 3),
        "axby,xyr,rnh->abnh",
    ),
    "axes turned": (
        general((2, 3), 5, axis=(-1, -2), use_bias=False),
        (4, 2, 3),
        "axy,xyr,rf->af",
    ),
    "attn_vec": (
        einsum("BTNH,NHD->BTD", (2, 3, 7)),
        (2, 4, 2, 3),
        "btnh,nhr,rd->btd",
    ),
    "qkv": (
        einsum("BTD, SNDH->SBTNH", (3, 2, 6, 4), (3, 2, 4)),
        (2, 5, 6),
        "btd,dr,rsnh->sbtnh",
    ),
    "ellipsis": (
        einsum("...hd,hdfg->...gf", (2, 3, 4, 5), (5, 4)),
        (2, 3, 2, 3),
        "abhd,hdr,rgf->abgf",
    ),
    "features first": (
        einsum("h...d,dfh->f...", (3, 7, 2), (7,)),
        (2, 4, 3),
        "hbd,hdr,rf->fb",
    ),
}


def grown(name: str) -> Any:
    """A layer with two fossils, its input, and what the two add to its output."""
    make, shape, equation = LAYERS[name]
    rngs = nnx.Rngs(0)
    kinds = [lora(rank=2, scaling=0.5)]
    layer = ChunkedLayer(make(rngs), 3, blueprints=kinds, rngs=rngs)
    grow(layer.bed, fossils("lora", "lora"))
    layer.eval()
    x = np.random.default_rng(0).normal(size=shape)
    bank = jax.tree.map(
        lambda a: np.asarray(a, np.float64), layer.bed.bank.get_value().custom["lora"]
    )
    factors, _ = equation.split("->")
    axes = dict(zip(factors.split(",")[0], shape, strict=True))
    out = nnx.eval_shape(layer.base, jnp.asarray(x, jnp.float32)).shape
    axes |= dict(zip(equation.split("->")[1], out, strict=True))
    _, first, last = factors.split(",")
    want = 0.5 * sum(
        np.einsum(
            equation,
            x,
            bank["w1"][slot].reshape(*(axes[a] for a in first[:-1]), 2),
            bank["w2"][slot].reshape(2, *(axes[a] for a in last[1:])),
        )
        for slot in (1, 2)
    )
    return layer, x.astype(np.float32), want


def off(got: Any, want: Any) -> float:
    """Distance relative to the largest number."""
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())


@pytest.mark.parametrize("name", LAYERS)
def test_lora_is_the_explicit_product_and_becomes_part_of_the_kernel(name: str) -> None:
    layer, x, added = grown(name)
    before = np.asarray(layer.base(x), np.float64)
    assert np.abs(added).max() > 0.1
    got = layer(x)
    assert off(got, before + added) < 2e-6
    kept = harvest(nnx.List([layer]), fold=False)[0]
    assert isinstance(kept, CorrectedLayer)
    assert off(kept(x), before + added) < 2e-6
    folded = harvest(nnx.List([layer]))[0]
    assert type(folded) is type(layer.base)
    assert off(folded(x), before + added) < 2e-6
    for weight in ("kernel", "bias"):
        if getattr(layer.base, weight) is not None:
            assert getattr(folded, weight).shape == getattr(layer.base, weight).shape


@pytest.mark.parametrize("name", ["out", "qkv"])
def test_while_nothing_counts_output_and_gradients_keep_their_bits(name: str) -> None:
    layer, x, _ = grown(name)
    grow(layer.bed, {0: ("lora", Stage.TRAINING)})
    layer.bed.seeds.set_value(
        layer.bed.seeds.get_value().replace(
            stage=jnp.full(3, Stage.DORMANT).at[0].set(Stage.TRAINING).astype("int8")
        )
    )

    @nnx.jit
    def slopes(m: Any, x: Any) -> Any:
        trained = nnx.DiffState(0, nnx.Any(nnx.Param, BlueprintParam))
        return nnx.grad(lambda m, x: jnp.sum(jnp.sin(m(x))), argnums=(trained, 1))(m, x)

    same_bits(layer(x), layer.base(x))
    own, by_input = slopes(layer.base, x)
    grads, wrt_x = slopes(layer, x)
    for weight in ("kernel", "bias"):
        same_bits(grads["base"][weight][...], own[weight][...])
    np.testing.assert_array_equal(wrt_x, by_input)
    bank = jax.tree.leaves(grads["bed"])
    assert any(np.any(np.asarray(leaf)) for leaf in bank)  # it learns


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", ["out", "qkv"])
def test_kernels_that_add_in_place_get_the_rows_and_give_their_gradient(
    name: str,
) -> None:
    layer, x, added = grown(name)
    form = form_over(layer.base, layer.bed.layout.features)
    assert layer.bed.tapped(form.input_rows(x))[1] is None  # in evaluation
    layer.train()
    rows, hook = layer.bed.tapped(form.input_rows(x))
    assert hook is not None
    same_bits(form.input_from(rows), x)

    @nnx.jit
    def slope(m: Any, x: Any) -> Any:
        def loss(x: Any) -> Any:
            y = m(x)
            return jnp.sum(jnp.sin(y)), y

        return nnx.grad(loss, has_aux=True)(x)

    (by_input, y) = slope(layer, x)
    assert off(y, np.asarray(layer.base(x), np.float64) + added) < 1e-5
    layer.bed.implementation = "xla"
    assert off(by_input, np.asarray(slope(layer, x)[0], np.float64)) < 1e-5


@pytest.mark.parametrize("name", LAYERS)
def test_the_tick_folds_what_harvest_folds(name: str) -> None:
    make, shape, _ = LAYERS[name]
    kinds = [lora(rank=2)]
    model = filled(lambda: make(nnx.Rngs(0)), kinds)
    layer = model[0]
    layer.eval()
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    parts, values = split_model(model), values_of(model)
    found = folds_of(model, parts, LifecycleConfig(fold="trained"))
    seeds, banks = parts.take(values, "seeds"), parts.take(values, "bank")
    plain = harvest(model)[0]
    before = np.asarray(layer(x), np.float64)
    folded = jax.jit(lambda *a: fold_fossils(parts, found, *a))(seeds, banks, values)
    put_values(model, {**folded.weights, **parts.joined("seeds", folded.seeds)})
    assert np.all(np.asarray(layer.bed.seeds.get_value().stage) != Stage.FOSSILIZED)
    kernel = np.asarray(plain.kernel[...], np.float64)
    assert off(layer.base.kernel[...], kernel) < 1e-6
    assert off(layer(x), before) < 2e-6


@pytest.mark.parametrize(("seeds", "features"), [(2, 8), (2, None)])
def test_chunks_of_several_axes_are_heads_or_parts_of_each_head(
    seeds: int, features: int | None
) -> None:
    """All features on one axis are cut by head; the last axis alone in every head."""
    rngs = nnx.Rngs(0)
    base = general(6, (2, 4))(rngs)
    layer = ChunkedLayer(
        base, seeds, features=features, blueprints=[low_rank()], rngs=rngs
    )
    grow(layer.bed, {1: ("low_rank", Stage.FOSSILIZED)})
    layer.eval()
    x = np.random.default_rng(0).normal(size=(3, 5, 6)).astype(np.float32)
    y, got = np.asarray(base(x), np.float64), layer(x)
    bank = layer.bed.bank.get_value()
    matrix = np.asarray(bank.w1[-1], np.float64) @ np.asarray(bank.w2[-1], np.float64)
    want = y.copy()
    at = (..., 1, slice(None)) if features else (..., slice(2, 4))
    want[at] += y[at] @ matrix
    assert off(got, want) < 2e-6
    folded = harvest(nnx.List([layer]))[0]
    assert type(folded) is nnx.LinearGeneral
    assert off(folded(x), want) < 2e-6


def test_attention_of_flax_takes_lora_in_all_its_projections() -> None:
    rngs = nnx.Rngs(0)
    attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
    model = nnx.Dict(attention=attention)
    x = np.random.default_rng(0).normal(size=(2, 3, 6)).astype(np.float32)
    plain = np.asarray(attention(x))
    found = make_growable(
        model, nnx.LinearGeneral, 2, blueprints=[lora(rank=2)], rngs=rngs
    )
    assert [name.split("/")[-1] for name in sorted(found)] == sorted(
        ["query", "key", "value", "out"]
    )
    same_bits(attention(x), plain)
    for name in ("query", "key", "value", "out"):
        grow(getattr(attention, name).bed, fossils("lora", "lora"))
    attention.eval()
    harvested = harvest(model)
    is_plain(harvested)
    assert type(harvested.attention.query) is nnx.LinearGeneral
    want = np.asarray(attention(x), np.float64)
    assert off(want, np.asarray(plain, np.float64)) > 0.1
    assert off(harvested.attention(x), want) < 1e-5


@pytest.mark.parametrize(
    "kinds", [[lora(rank=1)], [neurons(hidden=2), group(hidden=1)]]
)
def test_a_stack_of_products_under_scan(kinds: Any) -> None:
    class Deep(nnx.Module):
        def __init__(self) -> None:
            @nnx.split_rngs(splits=2)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def make(rngs: nnx.Rngs) -> nnx.Einsum:
                return einsum("btd,dnh->btnh", (6, 2, 3), (2, 3))(rngs)

            self.layer = make(nnx.Rngs(0))

        def __call__(self, x: Any) -> Any:
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def through(x: Any, layer: Any) -> Any:
                return nnx.tanh(layer(x)).reshape(x.shape)

            return through(x, self.layer)

    model = Deep()
    make_growable(model, "layer", 2, stack=2, blueprints=kinds, rngs=nnx.Rngs(1))
    bed = model.layer.bed
    bed.bank.set_value(
        jax.tree.map(
            lambda v: 0.3 * jax.random.normal(jax.random.key(1), v.shape),
            bed.bank.get_value(),
        )
    )
    x = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
    before = np.asarray(model(x), np.float64)
    for layer in range(2):
        grow(bed, fossils(*(kind.name for kind in kinds)), at=(layer,))
    model.eval()
    want = np.asarray(model(x), np.float64)
    assert off(want, before) > 0.05
    harvested = harvest(model)
    assert isinstance(harvested.layer, nnx.Einsum) == (len(kinds) == 1)
    assert off(harvested(x), want) < 1e-5


def test_lora_in_bfloat16_with_its_start_by_the_gradient_learns() -> None:
    rngs, low = nnx.Rngs(0), {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    base = nnx.Einsum("btnh,nhd->btd", (2, 3, 4), **low, rngs=rngs)
    kinds = [lora(rank=1, start="gradient")]
    model = nnx.List([ChunkedLayer(base, 2, blueprints=kinds, rngs=rngs)])
    growth = Growth(model, optax.adam(1e-2), wrt=None)
    x = np.random.default_rng(0).normal(size=(2, 4, 2, 3)).astype(np.float32)
    grow(model[0].bed, {0: ("lora", Stage.GERMINATED)})

    def loss_fn(m: Any) -> Any:
        return jnp.mean((m[0](x).astype(jnp.float32) - 1) ** 2)

    host = np.asarray(base.kernel[...])
    loss, grads = nnx.value_and_grad(loss_fn, argnums=growth.argnums)(model)
    growth.update(model, grads, loss=loss)
    same_bits(base.kernel[...], host)
    assert np.isfinite(float(loss))


REFUSED = [
    einsum("bhd,hdf->bhf", (2, 3, 4)),  # a product for each h
    einsum("abd,df->baf", (3, 4)),  # rows in another order
    einsum("bd,de->b", (3, 4)),  # an axis of the kernel alone
    einsum("bcd,df->bf", (3, 4)),  # an axis of the input alone
    einsum("b...,...f->bf", (3, 4)),  # the kernel's axes are not named
    general((3,), (4,), axis=(-1,), batch_axis={0: 2}),
]


@pytest.mark.parametrize("make", REFUSED)
def test_what_is_not_one_product_is_refused_by_name(make: Any) -> None:
    rngs = nnx.Rngs(0)
    base = make(rngs)
    assert matrix_form(base) is None
    with pytest.raises(
        ValueError, match=r"'lora' reads the input of its layer, and th"
    ):
        ChunkedLayer(base, 2, features=4, blueprints=[lora()], rngs=rngs)


def test_the_last_axis_alone_has_no_input_of_its_own() -> None:
    rngs = nnx.Rngs(0)
    base = general(6, (2, 4))(rngs)
    with pytest.raises(ValueError, match="if features= is left out or all of theirs"):
        ChunkedLayer(base, 2, features=4, blueprints=["lora"], rngs=rngs)
    assert form_over(base, 4) is PLAIN
    for blueprints, features in ((["low_rank"], 4), (["low_rank", "lora"], 8)):
        layer = ChunkedLayer(base, 2, blueprints=blueprints, rngs=rngs)
        assert layer.bed.layout.features == features


def test_another_equation_in_a_call_is_refused() -> None:
    layer, x, _ = grown("attn_vec")
    for each in (layer, harvest(nnx.List([layer]), fold=False)[0]):
        same_bits(each(x, einsum_str="BTNH, NHD -> BTD"), each(x))
        with pytest.raises(ValueError, match="einsum_str must be 'BTNH,NHD->BTD'"):
            each(x, "BTNH,NHD->TBD")


def test_products_that_nothing_may_change_are_kept_beside() -> None:
    rngs = nnx.Rngs(0)
    own = nnx.Einsum(
        "bd,df->bf", (6, 4), einsum_op=lambda *a, **k: jnp.einsum(*a, **k), rngs=rngs
    )
    other = nnx.LinearGeneral(
        6, 4, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k), rngs=rngs
    )
    for base in (own, other):
        layer = ChunkedLayer(base, 2, blueprints=[lora()], rngs=rngs)
        grow(layer.bed, fossils("lora"))
        assert isinstance(harvest(nnx.List([layer]))[0], CorrectedLayer)


def test_dense_general_of_linen_reads_its_input() -> None:
    class Attend(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            heads = nn.DenseGeneral((2, 3), name="query")(x)
            return nn.DenseGeneral(5, axis=(-2, -1), name="out")(heads)

    options = {"blueprints": [lora(rank=2)]}
    model = linen.Growable(Attend(), nn.DenseGeneral, 2, options)
    x = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
    variables = model.init(jax.random.key(0), x)
    host = Attend().apply({"params": variables["params"]}, x)
    same_bits(model.apply(variables, x), host)
    beds = linen.beds_in(lambda v: model.apply(v, x), variables)
    widths = {n: b.bank.get_value().custom["lora"]["w1"].shape for n, b in beds.items()}
    assert widths == {"query/bed": (2, 6, 2), "out/bed": (2, 6, 2)}
    bed = beds["query/bed"]
    grow(bed, fossils("lora"))
    for name in ("bank", "seeds"):
        variables[name]["query"]["bed"][name] = getattr(bed, name).get_arrays()
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    bank = jax.tree.map(
        lambda a: np.asarray(a, np.float64), bed.bank.get_value().custom["lora"]
    )
    heads = np.einsum("btd,dnh->btnh", x, params["query"]["kernel"])
    b = bank["w2"][1].reshape(2, 2, 3)
    heads += np.einsum("btd,dr,rnh->btnh", x, bank["w1"][1], b)
    want = np.einsum("btnh,nhf->btf", heads, params["out"]["kernel"])
    assert off(model.apply(variables, x), want) < 2e-6
    assert off(host, want) > 0.1
    growth = linen_growth(lambda v: model.apply(v, x), variables, optax.sgd(0.1))
    new, folded, which = growth.fold(
        growth.init(jax.random.key(1)), {"query": variables["params"]["query"]}
    )
    assert which["query"].tolist() == [True, False]
    assert folded["query"]["kernel"].shape == (6, 2, 3)
    params = {**variables["params"], **folded}
    assert off(model.apply({**new, "params": params}, x), want) < 2e-6
    assert off(Attend().apply({"params": params}, x), want) < 2e-6
