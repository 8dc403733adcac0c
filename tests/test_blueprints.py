"""Blueprints: what they read, what they cost, and how they are found by name."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esper_jax import ChunkedLayer
from esper_jax import blueprints as bp
from esper_jax.blueprints import registry as names
from esper_jax.chunks import ChunkLayout
from esper_jax.kernels.blend import blend

GATE = bp.Custom(
    name="gate",
    init=lambda key, width: {"gate": jnp.zeros(width), "slope": jnp.ones(())},
    apply=lambda p, y: p["gate"] * jnp.tanh(p["slope"] * y),
)
KINDS = bp.resolve(
    [
        "residual_mlp",
        bp.residual_mlp(expansion=1.2, activation="relu"),
        bp.bottleneck(),
        bp.low_rank(reduction=2),
        "affine",
        "noop",
        GATE,
    ]
)
WIDTH = 5


def gradients(bank: bp.Bank, layout: ChunkLayout, seeds: Any) -> bp.Bank:
    """Gradients of all slots, slot ``i`` holding blueprint ``i`` on ``seeds[i]``."""
    n = len(KINDS)
    rng = np.random.default_rng(0)
    y, g = (
        jnp.asarray(rng.normal(size=(64, layout.features)), jnp.float32)
        for _ in range(2)
    )

    @jax.jit
    def f(bank: bp.Bank) -> bp.Bank:
        def loss(bank: bp.Bank) -> jax.Array:
            out, *_ = blend(
                y,
                bank,
                jnp.ones(n),
                jnp.ones(n),
                jnp.arange(n),
                jnp.asarray(seeds, jnp.int32),
                layout=layout,
                blueprints=KINDS,
            )
            return jnp.sum(out * g)

        return jax.grad(loss)(bank)

    return f(bank)


def ripe(bank: bp.Bank) -> bp.Bank:
    """The bank with no entry 0, so that nothing hides from the gradient."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.5, 1, x.shape), x.dtype), bank
    )


@pytest.fixture(scope="module")
def newborn() -> bp.Bank:
    n = len(KINDS)
    keys = jax.random.split(jax.random.key(3), n)
    return jax.jit(lambda k, i: bp.init_slots(k, i, KINDS, WIDTH))(keys, jnp.arange(n))


def test_counts_by_hand() -> None:
    c, h = 8, 16
    assert bp.residual_mlp().param_count(c) == 2 * c * h + h + c
    assert bp.bottleneck().param_count(c) == 2 * c * 2 + 2 + c
    assert bp.low_rank().param_count(c) == 2 * c * 2
    assert bp.low_rank().param_count(1) == 2
    assert bp.affine().param_count(c) == 2 * c
    assert bp.noop().param_count(c) == 0
    assert GATE.param_count(c) == c + 1


def test_parts_that_a_blueprint_does_not_use_get_gradients_of_zero(
    newborn: bp.Bank,
) -> None:
    # Also where they hold NaN, left behind by another blueprint.
    n = len(KINDS)
    layout = ChunkLayout(WIDTH * n, n)
    bank = ripe(newborn)
    hidden, bias, scale = bp.dense_masks(KINDS, WIDTH)
    unused = {
        "w1": np.broadcast_to(~hidden[:, None, :], bank.w1.shape),
        "b1": ~(hidden & bias[:, None]),
        "w2": np.broadcast_to(~hidden[:, :, None], bank.w2.shape),
        "b2": np.broadcast_to(~bias[:, None], bank.b2.shape),
        "scale": np.broadcast_to(~scale[:, None], bank.scale.shape),
    }
    spoiled = bank.replace(  # type: ignore[attr-defined]
        **{k: jnp.where(v, jnp.nan, getattr(bank, k)) for k, v in unused.items()}
    )
    got, want = (gradients(b, layout, np.arange(n)) for b in (spoiled, bank))
    for name, mask in unused.items():
        assert np.any(mask)
        assert not np.any(np.asarray(getattr(got, name))[mask]), name
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_slots_are_float32_and_differ_by_key_and_kind(newborn: bp.Bank) -> None:
    with jax.enable_x64(True):
        wide = jax.eval_shape(
            lambda: bp.init_bank(jax.random.key(0), 3, KINDS[:-1], WIDTH)
        )
    for leaf in jax.tree.leaves((newborn, wide)):
        assert leaf.dtype == jnp.float32
    bank = bp.init_bank(jax.random.key(0), 3, KINDS, WIDTH)
    assert len({leaf.shape[0] for leaf in jax.tree.leaves(bank)} - {3}) == 0
    assert not np.any(bank.w1[0] == bank.w1[1])
    # LeCun-normal: the variance of a hidden unit is that of its input.
    big = bp.init_bank(jax.random.key(1), 3, bp.resolve(["residual_mlp"]), 64)
    np.testing.assert_allclose(np.std(big.w1), 1 / 8, rtol=0.05)


# --- The registry.


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "_REGISTRY", dict(names._REGISTRY))


@pytest.mark.usefixtures("registry")
def test_a_registered_blueprint_is_found_by_its_name() -> None:
    bp.register("gate", lambda: GATE)
    assert bp.resolve(["noop", "gate"]) == (bp.noop(), GATE)
    with pytest.raises(ValueError, match="already a blueprint named 'gate'"):
        bp.register("gate", lambda: GATE)
    with pytest.raises(ValueError, match="already a blueprint named 'affine'"):
        bp.register("affine", lambda: GATE)


@pytest.mark.parametrize(
    ("entries", "error", "match"),
    [
        ([], ValueError, "blueprints must number 1 to 127, got 0"),
        (["noop"] * 128, ValueError, "got 128"),
        (["nop"], ValueError, "unknown blueprint 'nop'; expected one of .*affine"),
        ("noop", TypeError, r"write \['noop'\]"),
        ([bp.noop], TypeError, "names, Dense, Custom or Adapter.*; call it, as in"),
        (bp.lora(), TypeError, "blueprints must be a sequence .*write \\[Adapter"),
        ([GATE, GATE], ValueError, "two blueprints are named 'gate'"),
    ],
)
def test_bad_lists_of_blueprints_are_refused(
    entries: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        bp.resolve(entries)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: bp.residual_mlp(activation="gelo"), "activation must be one of"),
        (lambda: bp.residual_mlp(expansion=-1), "expansion must be"),
        (lambda: bp.residual_mlp(expansion=float("nan")), "expansion must be"),
        (lambda: bp.bottleneck(reduction=0), "reduction must be above 0, got 0"),
        (lambda: bp.low_rank(reduction=-2), "reduction must be above 0, got -2"),
        (lambda: bp.lora(rank=0), "rank must be an int, at least 1 unit; got 0"),
        (lambda: bp.lora(rank=True), "rank must be an int, at least 1 unit; got True"),
        (lambda: bp.lora(scaling="a"), "scaling must be a finite number"),  # type: ignore[arg-type]
        (lambda: bp.group(hidden=1.0), "hidden must be an int"),  # type: ignore[arg-type]
    ],
)
def test_bad_numbers_are_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


GATED = ["glu", "context", "context_glu"]


def test_which_features_gated_and_whole_layer_blueprints_read() -> None:
    kinds = bp.resolve(GATED)
    layout = ChunkLayout(7, 3)  # chunks of 3, 2 and 2
    keys = jax.random.split(jax.random.key(3), 3)
    bank = bp.init_slots(keys, jnp.arange(3), kinds, layout.width, layout.features)
    y = jax.random.normal(jax.random.key(0), (16, layout.features))

    @jax.jit
    def run(bank: bp.Bank, y: jax.Array) -> jax.Array:
        options = {"layout": layout, "blueprints": kinds}
        ones, index = jnp.ones(3), jnp.arange(3)
        return blend(y, bank, ones, ones, index, index, **options)[0]

    np.testing.assert_array_equal(run(bank, y), y)
    # Ripe, what reads the layer sees other chunks; glu sees its own alone.
    other = y.at[:, 3:].add(1.0)
    moved = run(ripe(bank), other) - run(ripe(bank), y)
    assert not np.any(moved[:, :3])
    slopes = jax.jit(jax.jacobian(lambda x: run(ripe(bank), x[None])[0]))(y[0])
    reads = np.abs(np.asarray(slopes)) > 0
    np.testing.assert_array_equal(reads[:3], [[True] * 3 + [False] * 4] * 3)
    assert reads[3:].all()


def test_counts_of_gated_and_whole_layer_blueprints_by_hand() -> None:
    c, h, f = 8, 16, 32
    out = h * c + c
    assert bp.glu().param_count(c) == 2 * (c * h + h) + out
    assert bp.context().param_count(c, features=f) == f * h + h + out
    assert bp.context_glu().param_count(c, features=f) == 2 * (f * h + h) + out
    counts = bp.param_counts(bp.resolve(GATED), np.array([8, 8, 8, 8]))
    assert counts[1].tolist() == [f * h + h + out] * 4


@pytest.mark.parametrize("name", GATED)
def test_kernels_refuse_what_is_not_dense(name: str) -> None:
    kinds = bp.resolve([name])
    layout = ChunkLayout(8, 2)
    bank = bp.init_bank(jax.random.key(0), 1, kinds, layout.width, layout.features)
    one, first = jnp.ones(1), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match=f"'{name}' is Custom.*None to let"):
        blend(
            jnp.ones((4, 8)),
            bank,
            one,
            one,
            first,
            first,
            layout=layout,
            blueprints=kinds,
            implementation="triton",
        )


def test_a_whole_layer_cannot_be_read_where_devices_divide_it() -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    kinds = bp.resolve(["context"])
    layout = ChunkLayout(8, 2)
    bank = bp.init_bank(jax.random.key(0), 1, kinds, layout.width, layout.features)
    one, first = jnp.ones(1), jnp.zeros(1, jnp.int32)

    def run(spec: jax.sharding.PartitionSpec) -> jax.Array:
        sharding = jax.sharding.NamedSharding(mesh, spec)
        options = {"layout": layout, "blueprints": kinds, "sharding": sharding}
        return blend(jnp.ones((4, 8)), bank, one, one, first, first, **options)[0]

    with pytest.raises(ValueError, match="'context' reads the whole layer"):
        run(jax.sharding.PartitionSpec(None, "x"))
    np.testing.assert_array_equal(run(jax.sharding.PartitionSpec("x")), 1.0)


def test_whole_layer_blueprints_need_the_width_and_known_words() -> None:
    with pytest.raises(ValueError, match="features must be given"):
        bp.init_bank(jax.random.key(0), 1, bp.resolve(["context"]), 4)
    with pytest.raises(ValueError, match="reads must be"):
        bp.Custom(name="x", init=lambda k, w: 0, apply=lambda p, y: y, reads="all")
    with pytest.raises(ValueError, match="expansion"):
        bp.glu(expansion=0.0)
    with pytest.raises(ValueError, match="activation"):
        bp.context(activation="nope")
    assert bp.context() == bp.context() != bp.context(expansion=3.0)
    assert hash(bp.context()) == hash(bp.context())


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (bp.lora(rank=5), "'lora' has rank 5, and maps 6 to 4 features, .*rank 4 is"),
        (bp.lora(rank=5, start="gradient"), "10 of its 50 parameters"),
        (bp.low_rank(reduction=0.5), "'low_rank' has rank 4, and maps 2 to 2 features"),
    ],
)
def test_a_rank_that_the_widths_cannot_use_is_told_of(kind, words):
    linear = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    with pytest.warns(UserWarning, match=words):
        layer = ChunkedLayer(linear, 2, blueprints=[kind], rngs=nnx.Rngs(1))
    # It is made as it always was, so that old checkpoints restore.
    bank = layer.bed.bank.get_value()
    w1 = bank.w1 if kind.name == "low_rank" else bank.custom["lora"]["w1"]
    assert w1.shape == ((2, 2, 4) if kind.name == "low_rank" else (2, 6, 5))
    costs = bp.param_counts(layer.bed.blueprints, layer.bed.layout.sizes)
    assert costs[0, 0] == (16 if kind.name == "low_rank" else 50)


def test_ranks_and_hidden_units_that_are_of_use_are_not_told_of():
    linear = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    kinds = [bp.lora(rank=4), "neurons", "group", "residual_mlp", "low_rank", "noop"]
    ChunkedLayer(linear, 2, blueprints=kinds, rngs=nnx.Rngs(1))
