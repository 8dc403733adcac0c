"""Blueprints: identity at birth, and parameters that are what they are said to be."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_jax import blueprints as bp
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


def test_a_newborn_is_the_identity_but_can_learn(newborn: bp.Bank) -> None:
    n = len(KINDS)
    layout = ChunkLayout(WIDTH * n - 3, n)
    y = jax.random.normal(jax.random.key(0), (64, layout.features))
    out, _, loss = blend(
        y,
        newborn,
        jnp.ones(n),
        jnp.ones(n),
        jnp.arange(n),
        jnp.arange(n),
        layout=layout,
        blueprints=KINDS,
    )
    np.testing.assert_array_equal(out, y)
    assert not np.any(loss)
    moved = [
        any(bool(np.any(leaf[i])) for leaf in jax.tree.leaves(g))
        for g in [jax.device_get(gradients(newborn, layout, np.arange(n)))]
        for i in range(n)
    ]
    assert moved == [b.name != "noop" for b in KINDS]


def test_parameter_counts_are_the_entries_that_learn(newborn: bp.Bank) -> None:
    # Chunks of width 5 and 4: a slot on a narrow chunk has entries it cannot use.
    n = len(KINDS)
    layout = ChunkLayout(WIDTH * 2 * n - n, 2 * n)
    counts = bp.param_counts(KINDS, layout.sizes)
    assert counts.shape == (n, 2 * n)
    for seeds in (np.arange(n), np.arange(n, 2 * n)):
        g = jax.device_get(gradients(ripe(newborn), layout, seeds))
        learning = [
            sum(np.count_nonzero(leaf[i]) for leaf in jax.tree.leaves(g))
            for i in range(n)
        ]
        # Of a custom blueprint only its own init knows, whatever the chunk.
        expected = [int(counts[i, seed]) for i, seed in enumerate(seeds)]
        assert learning[:-1] == expected[:-1]
        assert expected[-1] == WIDTH + 1
    assert expected[0] < counts[0, 0]
    assert learning[-1] == WIDTH  # Four of the five gates, and the slope.
    assert [b.param_count(WIDTH) for b in KINDS] == list(counts[:, 0])


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
    monkeypatch.setattr(bp, "_REGISTRY", dict(bp._REGISTRY))


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
        ([bp.noop], TypeError, "blueprints must hold names, Dense or Custom"),
        ([GATE, GATE], ValueError, "two custom blueprints are named 'gate'"),
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
    ],
)
def test_bad_numbers_are_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
