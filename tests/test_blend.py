"""Blend by its entry point: every kind of blueprint in every stage.

``test_backends.py`` has what every backend promises, for Dense blueprints.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_jax.blueprints import (
    Custom,
    bottleneck,
    context,
    init_bank,
    low_rank,
    residual_mlp,
    resolve,
)
from esper_jax.chunks import ChunkLayout
from esper_jax.kernels.blend import blend, oracle, reference
from esper_jax.kernels.blend.static import Slots, Static
from esper_jax.lifecycle.signals import Statistics
from esper_jax.lifecycle.stages import Stage
from esper_jax.lifecycle.state import coefficients, init_seeds

GATED = Custom(
    name="gated",
    init=lambda key, width: {
        "gate": 0.1 * jax.random.normal(key, (width,)),
        "shift": jnp.zeros(()),
    },
    apply=lambda p, y: p["gate"] * jnp.sin(y) + p["shift"],
)
KINDS = resolve(
    [
        residual_mlp(),
        residual_mlp(expansion=1.5, activation="tanh"),
        bottleneck(reduction=2, activation="silu"),
        low_rank(reduction=3),
        "affine",
        "noop",
        GATED,
        context(expansion=0.75),
        "context_glu",
    ]
)
# TRAINING, GRAFTING at two points of the ramp, EVALUATING, FINE_TUNING, GERMINATED.
COEFFICIENTS = [(0.0, 1.0), (0.3, 1.0), (0.85, 1.0), (1.0, 0.0), (1.0, 1.0), (0.0, 0.0)]
SLOTS = 2 * len(KINDS) + 1
EVEN = ChunkLayout(4 * (SLOTS + 2), SLOTS + 2)
UNEVEN = ChunkLayout(4 * (SLOTS + 2) - 8, SLOTS + 2)
# One kind of each sort, where more would only compile longer.
FEW = (KINDS[0], GATED, KINDS[-1])
SMALL = ChunkLayout(4 * (2 * len(FEW) + 2) - 3, 2 * len(FEW) + 2)
EPS = {"float32": 3e-5, "float16": 6e-3, "bfloat16": 4e-2}


def bits(x: Any) -> np.ndarray:
    """The bits of an array as unsigned integers."""
    x = np.asarray(x)
    return x.view(f"uint{8 * x.dtype.itemsize}")


def filled(tree: Any, seed: int = 0, scale: float = 0.5) -> Any:
    """``tree`` with all floating-point leaves random."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype), tree
    )


def arguments(
    layout: ChunkLayout,
    batch: tuple[int, ...],
    dtype: Any,
    turn: int = 0,
    blueprints: Any = KINDS,
) -> dict[str, Any]:
    """Every blueprint in two slots, and one free slot at the end.

    Turns 0, 1 and 2 give every blueprint every pair of coefficients.
    """
    rng = np.random.default_rng(1)
    count = len(COEFFICIENTS)
    slots = [
        (kind, COEFFICIENTS[(kind + turn + half) % count])
        for kind in range(len(blueprints))
        for half in (0, count // 2)
    ]
    # The free slot must be ignored whatever stands in it.
    slots.append((0, (0.7, 1.0)))
    kinds, pairs = zip(*slots, strict=True)
    owners = rng.permutation(layout.num_seeds)[: len(slots)]
    owners[-1] = -1
    bank = init_bank(
        jax.random.key(0), len(slots), blueprints, layout.width, layout.features
    )
    return {
        "y": jnp.asarray(rng.normal(size=(*batch, layout.features)), dtype),
        "bank": filled(bank),
        "alpha": jnp.asarray([a for a, _ in pairs], jnp.float32),
        "beta": jnp.asarray([b for _, b in pairs], jnp.float32),
        "blueprint": jnp.asarray(kinds, jnp.int32),
        "seed_of_slot": jnp.asarray(owners, jnp.int32),
    }


def run(
    args: dict[str, Any], g: Any, layout: ChunkLayout, incubation: str, **options: Any
) -> Any:
    """All outputs and all gradients of `blend`, from one jitted function."""

    kinds = options.get("blueprints", KINDS)
    return _forward_and_back(args, g, layout, incubation, kinds)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _forward_and_back(
    args: dict[str, Any], g: Any, layout: ChunkLayout, incubation: Any, kinds: Any
) -> Any:
    def f(y: Any, bank: Any, alpha: Any, beta: Any) -> Any:
        out, *rest = blend(
            y,
            bank,
            alpha,
            beta,
            args["blueprint"],
            args["seed_of_slot"],
            layout=layout,
            blueprints=kinds,
            incubation=incubation,
        )
        return out, rest

    given = [args[name] for name in ("y", "bank", "alpha", "beta")]
    out, pull, rest = jax.vjp(f, *given, has_aux=True)
    return out, *rest, *pull(g)


def truth(args: dict[str, Any], g: Any, layout: ChunkLayout, incubation: str) -> Any:
    """The same from the oracle, in float64."""

    def wide(x: Any) -> Any:
        x = np.asarray(x)
        return jnp.asarray(x, jnp.int32 if x.dtype.kind == "i" else jnp.float64)

    with jax.enable_x64(True):
        args, g = jax.tree.map(wide, (args, g))

        def f(y: Any, bank: Any, alpha: Any) -> Any:
            slots = Slots(alpha, args["beta"], args["blueprint"], args["seed_of_slot"])
            s = Static(layout=layout, blueprints=KINDS, incubation=incubation)
            out, *rest = oracle.blend(s, y, bank, slots)
            return out, rest

        given = [args[name] for name in ("y", "bank", "alpha")]
        out, pull, rest = jax.vjp(f, *given, has_aux=True)
        results = out, *rest, *pull(g)
        return jax.tree.map(np.asarray, results)


def close(actual: Any, expected: Any, eps: float) -> None:
    """Equal up to ``eps`` of the largest entry; structures and shapes exactly."""
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, want), got in zip(paths, jax.tree.leaves(actual), strict=True):
        assert got.shape == want.shape, path
        scale = max(1.0, np.abs(want).max(initial=0))
        np.testing.assert_allclose(
            np.asarray(got, np.float64), want, rtol=eps, atol=eps * scale, err_msg=path
        )


# Each is a compilation, which the tests of bits below use again.
CASES = [
    (EVEN, (6,), "float32", "task"),
    (UNEVEN, (2, 3), "float32", "reconstruction"),
    (UNEVEN, (6,), "bfloat16", "task"),
    (UNEVEN, (2, 3), "float32", "bounded"),
]
MORE_CASES = [
    (EVEN, (2, 3), "float32", "reconstruction"),
    (UNEVEN, (2, 3), "float32", "task"),
    (EVEN, (6,), "bfloat16", "reconstruction"),
    (EVEN, (6,), "float16", "task"),
]


# The coefficients are run-time values: all of them in one case, one turn elsewhere.
@pytest.mark.parametrize(
    ("case", "turns"), [(0, (0, 1, 2)), (1, (0,)), (2, (1,)), (3, (0,))]
)
def test_values_and_gradients_are_the_oracles(
    case: int, turns: tuple[int, ...]
) -> None:
    for turn in turns:
        check_against_the_oracle(*CASES[case], turn)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES + MORE_CASES)
def test_all_values_and_gradients_are_the_oracles(case: Any) -> None:
    for turn in range(3):
        check_against_the_oracle(*case, turn)


def check_against_the_oracle(
    layout: ChunkLayout, batch: tuple[int, ...], dtype: str, incubation: str, turn: int
) -> None:
    args = arguments(layout, batch, dtype, turn)
    g = jnp.asarray(np.random.default_rng(2).normal(size=args["y"].shape), dtype)
    out, stats, loss, dy, d_bank, d_alpha, d_beta = run(args, g, layout, incubation)
    expected = truth(args, g, layout, incubation)

    assert out.dtype == dy.dtype == jnp.dtype(dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves((stats, loss))} == {
        jnp.dtype("float32")
    }
    eps = EPS[dtype]
    close(out, expected[0], eps)
    close(stats, expected[1], 1e-5)
    close(loss, expected[2], eps)
    close(dy, expected[3], eps)
    close(d_bank, expected[4], eps)
    close(d_alpha, expected[5], eps)
    assert not np.any(d_beta)


def test_every_stage_means_what_the_coefficients_say() -> None:
    # One seed in each stage; the last slot is free.
    layout = ChunkLayout(4 * len(Stage), len(Stage))
    state = init_seeds(len(Stage), len(Stage))
    state = dataclasses.replace(
        state,
        stage=jnp.arange(len(Stage), dtype=jnp.int8),
        graft=dataclasses.replace(
            state.graft, alpha=jnp.full(len(Stage), 0.6, jnp.float32)
        ),
    )
    alpha, beta = coefficients(state)
    table = {
        stage: (float(a), float(b))
        for stage, a, b in zip(Stage, alpha, beta, strict=True)
    }
    assert table == {
        Stage.DORMANT: (0, 0),
        Stage.GERMINATED: (0, 0),
        Stage.TRAINING: (0, 1),
        Stage.GRAFTING: (np.float32(0.6), 1),
        Stage.STABILIZATION: (1, 0),
        Stage.EVALUATING: (1, 0),
        Stage.FINE_TUNING: (1, 1),
        Stage.FOSSILIZED: (1, 0),
        Stage.CULLED: (0, 0),
        Stage.CANCELLED: (0, 0),
        Stage.ROLLED_BACK: (0, 0),
    }
    rng = np.random.default_rng(3)
    slots = len(Stage)
    kinds = KINDS[:1]
    bank = filled(init_bank(jax.random.key(0), slots, kinds, layout.width))
    args = {
        "y": jnp.asarray(rng.normal(size=(6, layout.features)), jnp.float32),
        "bank": bank,
        "alpha": alpha,
        "beta": beta,
        "blueprint": jnp.zeros(slots, jnp.int32),
        "seed_of_slot": jnp.arange(slots, dtype=jnp.int32),
    }
    g = jnp.asarray(rng.normal(size=args["y"].shape), jnp.float32)
    actual = run(args, g, layout, "task", blueprints=kinds)
    close(actual[:-1], truth(args, g, layout, "task"), EPS["float32"])
    # What each stage must change, and what not.
    y, out = (np.asarray(layout.split(x)) for x in (args["y"], actual[0]))
    gradient = np.asarray(actual[4].w2)
    for stage, (a, b) in table.items():
        touched = not np.array_equal(bits(out[:, stage]), bits(y[:, stage]))
        assert touched == (a > 0), stage
        assert np.any(gradient[stage]) == (b > 0), stage


def test_gradients_by_hand_for_an_affine_blueprint() -> None:
    # out = y + a (s y + b), so d_out/dy = 1 + a s, d/ds = beta y, d/da = s y + b.
    layout, kinds = ChunkLayout(4, 2), resolve(["affine"])
    bank = init_bank(jax.random.key(0), 1, kinds, 2)
    bank = dataclasses.replace(
        bank, scale=jnp.asarray([[2.0, 3.0]]), b2=jnp.asarray([[0.5, -1.0]])
    )
    y, g = jnp.asarray([[9.0, 8.0, 1.0, 2.0]]), jnp.asarray([[1.0, 1.0, 10.0, 100.0]])
    args = {
        "y": y,
        "bank": bank,
        "alpha": jnp.asarray([0.5]),
        "beta": jnp.asarray([0.25]),
        "blueprint": jnp.asarray([0]),
        "seed_of_slot": jnp.asarray([1]),
    }
    out, stats, loss, dy, d_bank, d_alpha, _ = run(
        args, g, layout, "task", blueprints=kinds
    )
    r = np.array([2.5, 5.0])
    np.testing.assert_allclose(out, [[9, 8, 1 + 0.5 * r[0], 2 + 0.5 * r[1]]])
    np.testing.assert_allclose(dy, [[1, 1, 10 * 2, 100 * 2.5]])
    np.testing.assert_allclose(d_bank.scale, [[0.25 * 10, 0.25 * 200]])
    np.testing.assert_allclose(d_bank.b2, [[2.5, 25]])
    np.testing.assert_allclose(d_alpha, [10 * r[0] + 100 * r[1]])
    np.testing.assert_allclose(loss, [np.mean(r**2)])
    np.testing.assert_allclose(stats.total, [17, 3])
    np.testing.assert_allclose(stats.squares, [145, 5])


def test_one_example_without_a_batch_axis_is_a_batch_of_one() -> None:
    args = arguments(SMALL, (), "float32", blueprints=FEW)
    g = jnp.cos(args["y"])
    alone = run(args, g, SMALL, "task", blueprints=FEW)
    args["y"] = args["y"][None]
    batch = run(args, g[None], SMALL, "task", blueprints=FEW)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(batch), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b).reshape(a.shape))


@pytest.mark.parametrize("batch", [(0,), (2, 0)])
def test_an_empty_batch_gives_zeros(batch: tuple[int, ...]) -> None:
    args = arguments(SMALL, batch, "float32", blueprints=FEW)
    g = jnp.zeros(args["y"].shape)
    out, stats, loss, dy, *gradients = run(
        args, g, SMALL, "reconstruction", blueprints=FEW
    )
    assert out.shape == dy.shape == args["y"].shape
    for leaf in jax.tree.leaves((stats, loss, gradients)):
        assert not np.any(leaf)


@pytest.mark.parametrize(("rows", "step"), [(3, 4), (6, 2), (10, 2), (11, 1), (99, 1)])
def test_a_sample_of_the_rows_leaves_no_part_of_the_batch_out(
    rows: int, step: int
) -> None:
    layout = ChunkLayout(4, 2)
    y = jax.random.normal(jax.random.key(1), (11, 4))
    got = reference.statistics(y, layout, rows)
    want = reference.statistics(y[::step], layout)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert got.count[0] <= 2 * rows


def test_statistics_count_near_zeros_and_ignore_the_seeds() -> None:
    args = arguments(UNEVEN, (2, 3), "float32")
    y = np.array(args["y"])
    y[..., :7] = [0.0, -0.0, 9e-7, -9e-7, 1.1e-6, 1.0, 0.0]
    args["y"] = jnp.asarray(y)
    _, stats, *_ = run(args, args["y"], UNEVEN, "reconstruction")
    y = y.reshape(6, -1)
    near = (np.abs(y) < 1e-6).astype(np.float32)
    expected = Statistics(
        count=np.bincount(UNEVEN.owners) * 6.0,
        total=np.add.reduceat(y, UNEVEN.starts, 1).sum(0),
        squares=np.add.reduceat(y * y, UNEVEN.starts, 1).sum(0),
        near_zero=np.add.reduceat(near, UNEVEN.starts, 1).sum(0),
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5), stats, expected
    )


# --- Bit identity.


def awkward(shape: tuple[int, ...], dtype: str, seed: int) -> jax.Array:
    """Numbers with NaN, infinities, both zeros and subnormals among them."""
    x = np.random.default_rng(seed).normal(size=shape)
    special = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40]
    x.reshape(-1)[: 3 * len(special) : 3] = special
    return jnp.asarray(x.astype(jnp.dtype(dtype)))


@pytest.mark.parametrize("case", CASES)
def test_alpha_zero_leaves_every_bit(case: Any) -> None:
    layout, batch, dtype, incubation = case
    args = arguments(layout, batch, dtype)
    args["y"] = awkward(args["y"].shape, dtype, 4)
    g = awkward(args["y"].shape, dtype, 5)
    args["alpha"] = jnp.zeros_like(args["alpha"])
    # Some blueprints are broken altogether.
    args["bank"] = jax.tree.map(lambda leaf: leaf.at[::3].set(jnp.nan), args["bank"])
    for beta in (0.0, 1.0):
        args["beta"] = jnp.full_like(args["beta"], beta)
        out, _, _, dy, d_bank, _, _ = run(args, g, layout, incubation)
        np.testing.assert_array_equal(bits(out), bits(args["y"]))
        np.testing.assert_array_equal(bits(dy), bits(g))
        if beta == 0:
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(d_bank))


def test_a_broken_blueprint_harms_only_its_own_chunk() -> None:
    args = arguments(UNEVEN, (2, 3), "float32")
    g = jnp.asarray(np.random.default_rng(6).normal(size=args["y"].shape), jnp.float32)
    args["alpha"] = jnp.ones_like(args["alpha"])
    args["beta"] = jnp.ones_like(args["beta"])
    good = run(args, g, UNEVEN, "reconstruction")
    broken = 2
    args["bank"] = jax.tree.map(lambda leaf: leaf.at[broken].set(jnp.nan), args["bank"])
    bad = run(args, g, UNEVEN, "reconstruction")
    mine = np.asarray(UNEVEN.owners) == int(args["seed_of_slot"][broken])
    for name, i in (("out", 0), ("dy", 3)):
        assert np.all(np.isnan(bad[i][..., mine])), name
        np.testing.assert_array_equal(
            bits(bad[i])[..., ~mine], bits(good[i])[..., ~mine], err_msg=name
        )
    others = np.arange(SLOTS) != broken
    for got, want in zip(
        jax.tree.leaves((bad[2], bad[4], bad[5])),
        jax.tree.leaves((good[2], good[4], good[5])),
        strict=True,
    ):
        np.testing.assert_array_equal(bits(got)[others], bits(want)[others])


def test_a_free_slot_is_ignored_whatever_it_holds() -> None:
    args = arguments(EVEN, (6,), "float32")
    g = jnp.ones_like(args["y"])
    want = run(args, g, EVEN, "task")
    args["bank"] = jax.tree.map(lambda leaf: leaf.at[-1].set(jnp.nan), args["bank"])
    got = run(args, g, EVEN, "task")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))
    for leaf in jax.tree.leaves((got[2], got[4], got[5])):
        assert not np.any(leaf[-1])


def test_a_blueprint_not_chosen_cannot_spoil_the_gradients_of_one_that_is() -> None:
    # The root's slope at 0 is infinite, and there are zeros in a free slot's chunk.
    root = Custom(
        name="root",
        init=lambda key, width: jnp.zeros(width),
        apply=lambda p, y: p * jnp.sqrt(y),
    )
    layout, kinds = ChunkLayout(6, 3), resolve(["affine", root])
    args = {
        "y": jnp.asarray([[0.0, -1.0, 0.0, -4.0, 0.0, 1.0]]),
        "bank": init_bank(jax.random.key(0), 2, kinds, 2),
        "alpha": jnp.ones(2),
        "beta": jnp.ones(2),
        "blueprint": jnp.zeros(2, jnp.int32),
        "seed_of_slot": jnp.asarray([1, -1], jnp.int32),
    }
    g = jnp.ones((1, 6))
    out, _, _, dy, d_bank, _, _ = run(args, g, layout, "task", blueprints=kinds)
    np.testing.assert_array_equal(out, args["y"])
    np.testing.assert_array_equal(dy, g)
    np.testing.assert_array_equal(d_bank.scale[0], args["y"][0, 2:4])
    assert not np.any(d_bank.custom["root"])


# --- Cost.


@functools.cache
def _flops(seeds: int, slots: int, *, whole: bool = True) -> float:
    layout, kinds = ChunkLayout(8 * seeds, seeds), resolve([residual_mlp(expansion=4)])
    bank = init_bank(jax.random.key(0), slots, kinds, 8)
    y = jnp.zeros((16, layout.features))
    owners = jnp.arange(slots)
    ones = jnp.ones(slots)

    def f(y: Any, bank: Any, alpha: Any) -> Any:
        if not whole:
            return reference.statistics(y, layout)

        def split(*learned: Any) -> Any:
            out, *rest = blend(
                *learned, ones, 0 * owners, owners, layout=layout, blueprints=kinds
            )
            return out, rest

        out, pull, rest = jax.vjp(split, y, bank, alpha, has_aux=True)
        return out, rest, pull(out)

    lowered = jax.jit(f).lower(y, bank, ones)
    return float(lowered.compile().cost_analysis()["flops"])


def test_the_cost_of_the_blueprints_follows_slots_not_seeds() -> None:
    def blueprints(seeds: int, slots: int) -> float:
        return _flops(seeds, slots) - _flops(seeds, slots, whole=False)

    few, many = blueprints(8, 4), blueprints(512, 4)
    assert many < 1.05 * few
    assert blueprints(8, 8) > 1.8 * few
