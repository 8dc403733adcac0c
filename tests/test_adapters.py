"""Blueprints that write the whole layer: `blend` against the float64 oracle."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_triton import for_cuda

from esper_jax.blueprints import (
    Adapter,
    bound,
    group,
    init_bank,
    lora,
    neurons,
    param_counts,
    registered,
    residual_mlp,
    resolve,
)
from esper_jax.chunks import ChunkLayout
from esper_jax.kernels.blend import blend, oracle
from esper_jax.kernels.blend.static import Slots, Static

LAYOUT = ChunkLayout(22, 11)
INPUTS = 5
KINDS = (
    residual_mlp(),
    group(hidden=3),
    neurons(hidden=2, activation="tanh").bound(INPUTS),
    lora(rank=2, scaling=0.5).bound(INPUTS),
)
PAIRS = ((0.0, 1.0), (0.6, 1.0), (1.0, 0.0), (0.0, 0.0), (-0.3, 0.5))


def arguments(dtype: Any, turn: int, ids: bool, kinds: Any = KINDS) -> dict[str, Any]:
    """Every blueprint in two slots; a free slot, in which anything may stand."""
    rng = np.random.default_rng(1)
    slots = [
        (k, PAIRS[(k + turn + n) % len(PAIRS)])
        for k in range(len(kinds))
        for n in (0, 2)
    ]
    slots.append((1, (0.7, 1.0)))
    owners = rng.permutation(LAYOUT.num_seeds)[: len(slots)].astype(np.int32)
    owners[-1] = -1
    bank = init_bank(
        jax.random.key(0), len(slots), kinds, LAYOUT.width, LAYOUT.features
    )

    def fill(leaf: Any) -> Any:
        return jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32)

    x = rng.integers(0, INPUTS, (2, 3)) if ids else rng.normal(size=(2, 3, INPUTS))
    return {
        "y": jnp.asarray(rng.normal(size=(2, 3, LAYOUT.features)), dtype),
        "x": jnp.asarray(x, jnp.int32 if ids else dtype),
        "bank": jax.tree.map(fill, bank),
        "alpha": jnp.asarray([a for _, (a, _) in slots], jnp.float32),
        "beta": jnp.asarray([b for _, (_, b) in slots], jnp.float32),
        "blueprint": jnp.asarray([k for k, _ in slots], jnp.int32),
        "seed_of_slot": jnp.asarray(owners),
    }


LEARNED = ("y", "x", "bank", "alpha")


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def outputs_and_gradients(
    args: Any, g: Any, incubation: Any, kinds: Any = KINDS, implementation: Any = None
) -> Any:
    fixed = {k: v for k, v in args.items() if k not in LEARNED}
    given = {k: args[k] for k in LEARNED}

    def f(given: Any) -> Any:
        out, *rest = blend(
            **given,
            **fixed,
            layout=LAYOUT,
            blueprints=kinds,
            incubation=incubation,
            implementation=implementation,
        )
        return out, rest

    out, pull, rest = jax.vjp(f, given, has_aux=True)
    return {"out": out, "rest": rest, **pull(g)[0]}


def truth(args: Any, g: Any, incubation: Any, kinds: Any = KINDS) -> Any:
    with jax.enable_x64(True):

        def wide(v: Any) -> Any:
            return jnp.asarray(
                np.asarray(v), jnp.int32 if v.dtype.kind == "i" else float
            )

        args, g = jax.tree.map(wide, (args, g))

        def f(given: Any) -> Any:
            slots = Slots(
                given["alpha"], args["beta"], args["blueprint"], args["seed_of_slot"]
            )
            s = Static(layout=LAYOUT, blueprints=kinds, incubation=incubation)
            out, *rest = oracle.blend(s, given["y"], given["bank"], slots, given["x"])
            return out, rest

        out, pull, rest = jax.vjp(f, {k: args[k] for k in LEARNED}, has_aux=True)
        return jax.tree.map(np.asarray, {"out": out, "rest": rest, **pull(g)[0]})


def cotangent(dtype: Any) -> Any:
    return jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 22)), dtype)


@pytest.mark.parametrize(
    ("dtype", "incubation", "ids", "turns", "kinds"),
    [
        ("float32", "task", False, range(5), KINDS),
        ("float32", "reconstruction", True, (0, 3), KINDS),
        ("float32", "bounded", True, (0, 3), KINDS),
        ("bfloat16", "task", False, (1,), KINDS[1:]),  # which no backend computes
    ],
)
def test_values_and_gradients_are_the_oracles(
    dtype: str, incubation: str, ids: bool, turns: Any, kinds: Any
) -> None:
    eps = {"float32": 3e-5, "bfloat16": 4e-2}[dtype]
    for turn in turns:
        args, g = arguments(dtype, turn, ids, kinds), cotangent(dtype)
        got = outputs_and_gradients(args, g, incubation, kinds)
        expected = truth(args, g, incubation, kinds)
        assert got["out"].dtype == got["y"].dtype == jnp.dtype(dtype)
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        leaves = jax.tree_util.tree_leaves_with_path(expected)
        for (path, want), have in zip(leaves, jax.tree.leaves(got), strict=True):
            if want.dtype == jax.dtypes.float0:  # of ids
                assert have.dtype == want.dtype
                continue
            scale = max(1.0, np.abs(want).max(initial=0))
            np.testing.assert_allclose(
                np.asarray(have, np.float64),
                want,
                rtol=eps,
                atol=eps * scale,
                err_msg=str(path),
            )


def bits(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.view(f"uint{8 * x.dtype.itemsize}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_output_and_gradient_keep_their_bits_until_an_adapter_counts(
    dtype: str,
) -> None:
    args, g = arguments(dtype, 0, False), cotangent(dtype)
    args["y"] = args["y"].at[0, 0, ::2].set(-0.0)
    g = g.at[0, 1, ::2].set(-0.0)
    args["alpha"] = jnp.zeros_like(args["alpha"])
    # A part that has gone wrong while it learns harms nobody.
    bank = args["bank"]
    bank.custom["group"]["w1"] = bank.custom["group"]["w1"].at[2].set(jnp.nan)
    bank.custom["lora"]["w2"] = bank.custom["lora"]["w2"].at[6].set(jnp.inf)
    for beta in (0.0, 1.0):
        args["beta"] = jnp.full_like(args["beta"], beta)
        got = outputs_and_gradients(args, g, "task")
        np.testing.assert_array_equal(bits(got["out"]), bits(args["y"]))
        np.testing.assert_array_equal(bits(got["y"]), bits(g))
        assert not np.any(got["x"])
        learned = jax.tree.leaves(got["bank"].custom)
        assert all(np.any(leaf) == (beta == 1) for leaf in learned)


def test_a_broken_slot_spoils_no_other() -> None:
    args, g = arguments("float32", 1, False), cotangent("float32")
    sound = outputs_and_gradients(args, g, "task")
    custom = args["bank"].custom
    spoiled = [k for k in range(8) if args["alpha"][k] == 0]
    assert len(spoiled) >= 2
    for params in custom.values():
        for name, leaf in params.items():
            params[name] = leaf.at[np.array([*spoiled, 8])].set(jnp.nan)
    broken = outputs_and_gradients(args, g, "task")
    for name in ("out", "y", "x"):
        np.testing.assert_array_equal(bits(broken[name]), bits(sound[name]))
    others = np.array([k for k in range(9) if k not in spoiled])
    for a, b in zip(
        jax.tree.leaves(broken["bank"]), jax.tree.leaves(sound["bank"]), strict=True
    ):
        np.testing.assert_array_equal(a[others], b[others])


REGISTERED = {n: b for n, b in registered().items() if isinstance(b, Adapter)}


@pytest.mark.parametrize("name", REGISTERED)
def test_a_newborn_corrects_nothing_and_can_learn(name: str) -> None:
    kinds = bound(resolve([name]), INPUTS)
    args, g = arguments("float32", 1, False, kinds), cotangent("float32")
    slots, width = len(args["alpha"]), LAYOUT.width
    args["bank"] = init_bank(jax.random.key(1), slots, kinds, width, LAYOUT.features)
    args["beta"] = jnp.ones(slots)
    newborn = outputs_and_gradients(args, g, "task", kinds)
    np.testing.assert_array_equal(newborn["out"], args["y"])
    np.testing.assert_array_equal(newborn["y"], g)
    assert not np.any(newborn["rest"][1])
    learned = newborn["bank"].custom[name]
    assert np.any(learned["w2"][0])
    ripe = {**args, "bank": arguments("float32", 1, False, kinds)["bank"]}
    ripe["bank"] = jax.tree.map(lambda v: jnp.abs(v) + 0.1, ripe["bank"])
    of_first = jax.tree.map(
        lambda v: v[0], outputs_and_gradients(ripe, g, "task", kinds)["bank"].custom
    )
    entries = sum(np.count_nonzero(v) for v in jax.tree.leaves(of_first))
    assert entries == param_counts(kinds, LAYOUT.sizes)[0, 0]


def test_forward_mode_follows_the_same_rules() -> None:
    args = arguments("float32", 1, False)
    fixed = {k: v for k, v in args.items() if k not in LEARNED}
    given = {k: args[k] for k in LEARNED}

    def f(forward_mode: bool, given: Any) -> Any:
        return blend(
            **given,
            **fixed,
            layout=LAYOUT,
            blueprints=KINDS,
            forward_mode=forward_mode,
        )[0]

    rng = np.random.default_rng(5)
    dots = jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape), v.dtype), given)
    out, tangent = jax.jit(lambda g, d: jax.jvp(lambda v: f(True, v), (g,), (d,)))(
        given, dots
    )
    g = cotangent("float32")
    expected = outputs_and_gradients(args, g, "task")
    np.testing.assert_allclose(out, expected["out"], rtol=1e-5, atol=1e-5)
    along = sum(
        float(jnp.sum(a * b))
        for a, b in zip(
            jax.tree.leaves(dots),
            jax.tree.leaves({k: expected[k] for k in LEARNED}),
            strict=True,
        )
    )
    np.testing.assert_allclose(float(jnp.sum(tangent * g)), along, rtol=1e-4)


def test_kernels_leave_adapters_to_plain_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jax.experimental.pallas.triton")
    kinds = (
        residual_mlp(expansion=8.0),
        neurons(hidden=2).bound(INPUTS),
        group(hidden=3),
    )
    args, g = arguments("float32", 1, False, kinds), cotangent("float32")
    with for_cuda():
        call = jax.jit(lambda a: outputs_and_gradients(a, g, "task", kinds, "triton"))
        lowered = call.trace(args).lower(lowering_platforms=("cuda",))
    assert "dot_general" in lowered.as_text()
    assert "triton" in lowered.as_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, r"x must be given: blueprint 'neurons' reads the layer's input"),
        ({"x": jnp.ones((2, 4, INPUTS))}, r"x must be .* \(2, 3, 5\), .*\(2, 4, 5\)"),
        ({"x": jnp.ones((2, 3, 7))}, r"x must be .* \(2, 3, 5\), .*\(2, 3, 7\)"),
        ({"x": jnp.ones((2, 3), bool)}, r"x must be .* got bool of shape \(2, 3\)"),
        ({"x": jnp.ones((2, 2), int)}, r"ids of shape \(2, 3\), .* got int32"),
    ],
)
def test_input_that_does_not_fit_is_refused(change: Any, message: str) -> None:
    args = {**arguments("float32", 0, False), **change}
    with pytest.raises(ValueError, match=message):
        blend(**args, layout=LAYOUT, blueprints=KINDS)
