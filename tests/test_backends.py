"""The contract of every blend backend, against the float64 oracle.

Backends come from the registry: a further one is tested without a change here.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_jax.blueprints import Custom, residual_mlp
from esper_jax.kernels.blend import oracle, registry, vjp
from esper_jax.kernels.blend.arg_specs import KINDS, ArgSpec
from esper_jax.kernels.blend.static import Read, Slots, Static

BACKENDS = registry.backends()
EVERY_BACKEND = pytest.mark.parametrize("name", BACKENDS)
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
SLOT_NAMES = ("alpha", "beta", "blueprint", "seed_of_slot")

# Kernels run in interpret mode, which is slow: widths and blueprints are those of real
# shapes, and rows and seeds few. No block divides the rows.
SPECS = {
    "matrices": ArgSpec(
        name="matrices",
        rows=37,
        features=100,
        num_seeds=7,
        capacity=5,
        blueprints=(*KINDS, residual_mlp(activation="silu")),
        dtype="float32",
    ),
    "matrices, bfloat16": ArgSpec(
        name="bfloat16", rows=40, features=128, num_seeds=4, statistics_rows=7
    ),
    "matrices, reconstruction": ArgSpec(
        name="reconstruction",
        rows=37,
        features=100,
        num_seeds=7,
        capacity=5,
        blueprints=KINDS,
        dtype="float16",
        incubation="reconstruction",
        statistics_rows=7,
    ),
    "wide": ArgSpec(
        name="wide",
        rows=17,
        features=401,
        num_seeds=3,
        blueprints=(residual_mlp(expansion=0.6, activation="relu"),),
        dtype="float32",
    ),
    "wide, reconstruction": ArgSpec(
        name="wide_reconstruction",
        rows=17,
        features=401,
        num_seeds=3,
        blueprints=(residual_mlp(expansion=0.6, activation="tanh"),),
        dtype="float32",
        incubation="reconstruction",
    ),
    "narrow": ArgSpec(
        name="narrow",
        rows=21,
        features=29,
        num_seeds=10,
        capacity=8,
        blueprints=(residual_mlp(expansion=1.0), "affine", "low_rank"),
        dtype="float32",
    ),
    "narrow, reconstruction": ArgSpec(
        name="narrow_reconstruction",
        rows=21,
        features=24,
        num_seeds=12,
        blueprints=(residual_mlp(expansion=1.0, activation="silu"), "noop"),
        dtype="bfloat16",
        incubation="reconstruction",
        statistics_rows=0,
    ),
    # Groups of several slots, of whose tiles nothing is masked; and groups of which few
    # live, and the last is cut short.
    "narrow, exact": ArgSpec(
        name="narrow_exact",
        rows=64,
        features=96,
        num_seeds=48,
        capacity=40,
        dtype="float32",
    ),
    "narrow, few slots": ArgSpec(
        name="narrow_few",
        rows=70,
        features=145,
        num_seeds=50,
        capacity=3,
        blueprints=(residual_mlp(expansion=1.0), "affine"),
        dtype="float32",
        incubation="reconstruction",
    ),
    "no hidden layer": ArgSpec(
        name="affine",
        rows=8,
        features=32,
        num_seeds=2,
        blueprints=("affine",),
        dtype="float32",
    ),
    "bias": ArgSpec(
        name="bias",
        rows=37,
        features=100,
        num_seeds=7,
        capacity=5,
        blueprints=KINDS,
        dtype="float32",
        bias=True,
    ),
    "bias, bfloat16": ArgSpec(
        name="bias_bfloat16",
        rows=40,
        features=128,
        num_seeds=4,
        statistics_rows=7,
        bias=True,
    ),
    "bias, reconstruction": ArgSpec(
        name="bias_reconstruction",
        rows=37,
        features=100,
        num_seeds=7,
        blueprints=("low_rank", "affine"),
        dtype="float16",
        incubation="reconstruction",
        statistics_rows=7,
        bias=True,
    ),
    "bias, wide": ArgSpec(
        name="bias_wide",
        rows=17,
        features=401,
        num_seeds=3,
        blueprints=(residual_mlp(expansion=0.6, activation="relu"), "affine"),
        dtype="float32",
        bias=True,
    ),
    "bias, narrow": ArgSpec(
        name="bias_narrow",
        rows=21,
        features=29,
        num_seeds=10,
        capacity=8,
        blueprints=(residual_mlp(expansion=1.0), "affine", "low_rank"),
        bias=True,
    ),
    "one feature": ArgSpec(
        name="one", rows=7, features=3, num_seeds=3, dtype="float32"
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> None:
    """Its first use imports what changes JAX's configuration, and so retraces."""
    from jax.experimental import pallas as pl

    def copy(x_ref: Any, out_ref: Any) -> None:
        out_ref[...] = x_ref[...]

    x = jnp.ones(8)
    pl.pallas_call(copy, out_shape=x, interpret=True)(x)


def static(spec: ArgSpec, **changes: Any) -> Static:
    """The static description of a call, with kernels interpreted."""
    s = Static(**spec.options, dtype=spec.dtype, interpret=True)
    return dataclasses.replace(s, **changes)


def call_of(name: str, s: Static) -> Callable[[dict[str, Any]], Any]:
    """One backend as a function of the array arguments."""

    def call(args: dict[str, Any]) -> Any:
        slots = Slots(**{field: args[field] for field in SLOT_NAMES})
        y, bias = args["y"], args.get("bias")
        if bias is not None:
            bias = bias.astype(y.dtype)
        return vjp.blend(
            BACKENDS[name], s, Read(y, None), args["bank"], slots, bias=bias
        )

    return call


def biased(args: dict[str, Any]) -> Any:
    """What a layer that cannot grow returns."""
    return (args["y"] + args["bias"].astype(args["y"].dtype),)


def forward_and_back(call: Callable[..., Any], args: dict[str, Any], g: Any) -> Any:
    """Outputs, and gradients of y, bank and alpha; and of the bias, if there is one."""
    names = [name for name in ("y", "bank", "alpha", "bias") if name in args]

    def f(*given: Any) -> Any:
        out, *rest = call({**args, **dict(zip(names, given, strict=True))})
        return out, rest

    out, pull, rest = jax.vjp(f, *(args[name] for name in names), has_aux=True)
    return {"out": out, "rest": rest, "gradients": pull(g)}


class Compiled:
    """`forward_and_back` of a backend on one shape, compiled once for all tests."""

    def __init__(self, name: str, spec: ArgSpec, **options: Any) -> None:
        self.traces = 0
        call = call_of(name, static(spec))

        def traced(args: dict[str, Any]) -> Any:
            self.traces += 1
            return call(args)

        f = functools.partial(forward_and_back, traced)
        self.run = jax.jit(f, compiler_options=options)


@functools.cache
def compiled(name: str, spec_name: str) -> Compiled:
    # With less, XLA may round a product in one loop differently from that in another,
    # and tiles with NaN have a loop of their own.
    full = {"xla_backend_optimization_level": 3}
    options = full if spec_name in ("narrow", "narrow, exact") else {}
    return Compiled(name, SPECS[spec_name], **options)


def cotangent(spec: ArgSpec) -> Any:
    rng = np.random.default_rng(9)
    return jnp.asarray(rng.normal(size=(spec.rows, spec.features)), spec.dtype)


ARGUMENTS = ("y", "bank", "alpha", "beta", "blueprint", "seed_of_slot")


@functools.cache
def truth(spec_name: str, seed: int) -> Any:
    """What the oracle says, in float64."""
    spec = SPECS[spec_name]

    def wide(x: Any) -> Any:
        x = np.asarray(x)
        return jnp.asarray(x, jnp.int32 if x.dtype.kind == "i" else jnp.float64)

    def call(args: dict[str, Any]) -> Any:
        y, bank, *slots = (args[name] for name in ARGUMENTS)
        if "bias" in args:
            y = y + args["bias"]
        return oracle.blend(Static(**spec.options), y, bank, Slots(*slots))

    args, g = spec.arrays(seed, mixed=True), cotangent(spec)
    if "bias" in args:
        # Blueprints and statistics see the sum as layers round it.
        low = args["bias"].astype(spec.dtype)
        args["y"] = np.float64(args["y"] + low) - np.float64(low)
        args["bias"] = np.float64(low)
    with jax.enable_x64(True):
        args, g = jax.tree.map(wide, (args, g))
        return jax.tree.map(np.asarray, forward_and_back(call, args, g))


def relative_errors(actual: Any, expected: Any) -> dict[str, float]:
    """``|actual - expected| / |expected|`` of each leaf."""
    errors = {}
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, want), got in zip(paths, jax.tree.leaves(actual), strict=True):
        key = jax.tree_util.keystr(path)
        want, got = np.asarray(want, np.float64), np.asarray(got, np.float64)
        assert got.shape == want.shape, key
        norm = np.linalg.norm(want)
        error = float(np.linalg.norm(got - want) / (norm or 1.0))
        errors[key] = error if np.isfinite(error) else np.inf
    return errors


def bits(x: Any) -> np.ndarray:
    """The bits of an array as unsigned integers."""
    x = np.asarray(x)
    return x.view(f"uint{8 * x.dtype.itemsize}")


@EVERY_BACKEND
@pytest.mark.parametrize("spec_name", SPECS)
def test_values_gradients_and_statistics_are_the_oracles(
    spec_name: str, name: str
) -> None:
    spec, f = SPECS[spec_name], compiled(name, spec_name)
    for seed in range(2):
        args = spec.arrays(seed, mixed=True)
        got = f.run(args, cotangent(spec))
        assert got["out"].dtype == got["gradients"][0].dtype == args["y"].dtype
        assert {x.dtype for x in jax.tree.leaves(got["rest"])} == {jnp.dtype("float32")}
        errors = relative_errors(got, truth(spec_name, seed))
        worst = max(errors, key=lambda k: errors[k])
        assert errors[worst] < TOLERANCE[spec.dtype], (worst, errors[worst])
        # Statistics are sums in float32, whatever the dtype of y. XLA may leave out the
        # rounding of y + bias before it; kernels may not.
        statistics = relative_errors(got["rest"][0], truth(spec_name, seed)["rest"][0])
        loose = spec.bias and not BACKENDS[name].takes_bias
        limit = TOLERANCE[spec.dtype] if loose else 1e-5
        assert max(statistics.values()) < limit, statistics
    # Stages, blueprints and owners are run-time values: nothing retraces.
    assert f.traces == 1


@EVERY_BACKEND
@pytest.mark.parametrize(
    "spec_name",
    [
        "matrices, bfloat16",
        "narrow, reconstruction",
        "bias, bfloat16",
        "bias, wide",
        "bias, narrow",
    ],
)
def test_incubation_changes_no_bit(spec_name: str, name: str) -> None:
    spec = SPECS[spec_name]
    args, g = spec.arrays(0), cotangent(spec)
    special = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40]
    spread = jnp.asarray(special * 3, spec.dtype)
    args["y"] = args["y"].at[0, : spread.size].set(spread)
    g = g.at[1, : spread.size].set(spread)
    # One slot's parameters are broken altogether.
    args["bank"] = jax.tree.map(lambda x: x.at[0].set(jnp.nan), args["bank"])
    args["alpha"] = jnp.zeros_like(args["alpha"])
    beta = np.arange(spec.slots) % 2
    args["beta"] = jnp.asarray(beta, jnp.float32)
    got = compiled(name, spec_name).run(args, g)
    dy, d_bank, d_alpha, *d_bias = got["gradients"]
    base: Any = {"out": args["y"]}
    if spec.bias:
        base = jax.jit(functools.partial(forward_and_back, biased))(args, g)
        np.testing.assert_array_equal(bits(d_bias[0]), bits(base["gradients"][3]))
    np.testing.assert_array_equal(bits(got["out"]), bits(base["out"]))
    np.testing.assert_array_equal(bits(dy), bits(g))
    for leaf in jax.tree.leaves(d_bank):
        assert not np.any(np.asarray(leaf)[beta == 0])
    assert np.any(np.asarray(d_bank.b2)[beta == 1])
    assert not np.any(np.asarray(d_alpha)[beta == 0])


@EVERY_BACKEND
@pytest.mark.parametrize("spec_name", ["matrices, bfloat16", "narrow"])
def test_nan_in_a_slot_stays_in_its_own_chunk(spec_name: str, name: str) -> None:
    # Slot 0 is dead and holds NaN, which reaches nothing. So does slot 1, which lives.
    spec, f = SPECS[spec_name], compiled(name, spec_name)
    args, g = spec.arrays(0), cotangent(spec)
    args["alpha"] = args["alpha"].at[0].set(0.0)
    args["beta"] = args["beta"].at[0].set(0.0)
    good = f.run(args, g)
    bank = jax.tree.map(lambda x: x.at[:2].set(jnp.nan), args["bank"])
    bad = f.run({**args, "bank": bank}, g)
    mine = np.asarray(spec.layout.owners) == int(args["seed_of_slot"][1])
    for got, want in (
        (bad["out"], good["out"]),
        (bad["gradients"][0], good["gradients"][0]),
    ):
        assert np.all(np.isnan(np.asarray(got, np.float32)[:, mine]))
        np.testing.assert_array_equal(bits(got)[:, ~mine], bits(want)[:, ~mine])
    others = np.arange(spec.slots) != 1
    for got, want in zip(
        jax.tree.leaves((bad["rest"][1], bad["gradients"][1:])),
        jax.tree.leaves((good["rest"][1], good["gradients"][1:])),
        strict=True,
    ):
        np.testing.assert_array_equal(bits(got)[others], bits(want)[others])
    # Statistics are those of the input.
    jax.tree.map(np.testing.assert_array_equal, bad["rest"][0], good["rest"][0])


@EVERY_BACKEND
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_broken_activation_stays_in_its_own_chunk(value: float, name: str) -> None:
    # Not a number, or so large that it overflows: in y, and elsewhere in its cotangent.
    spec, f = SPECS["narrow, exact"], compiled(name, "narrow, exact")
    args, g = spec.arrays(1), cotangent(spec)
    owners = np.asarray(args["seed_of_slot"])
    dormant = np.setdiff1d(np.arange(spec.num_seeds), owners)[:1]
    assert dormant.size
    seeds = [owners[0], *dormant]
    good = f.run(args, g)
    columns = np.isin(np.asarray(spec.layout.owners), seeds)
    other = np.asarray(spec.layout.owners) == owners[1]
    y = args["y"].at[5, columns].set(value)
    bad = f.run({**args, "y": y}, g.at[40, other].set(value))
    for i, at in (("out", 5), ("gradients", 40)):
        got, want = (x[i] if i == "out" else x[i][0] for x in (bad, good))
        mine = columns if i == "out" else other
        assert not np.all(np.abs(np.asarray(got)[at, mine]) < 1e30)
        kept = np.ones(got.shape, bool)
        kept[:, columns | other] = False
        np.testing.assert_array_equal(bits(got)[kept], bits(want)[kept])
        kept[:, mine] = True
        kept[[5, 40]] = False
        np.testing.assert_array_equal(bits(got)[kept], bits(want)[kept])
    sound = np.arange(spec.slots) > 1
    for got, want in zip(
        jax.tree.leaves((bad["rest"][1], bad["gradients"][1:])),
        jax.tree.leaves((good["rest"][1], good["gradients"][1:])),
        strict=True,
    ):
        np.testing.assert_allclose(got[sound], want[sound], rtol=1e-4, atol=1e-5)


@EVERY_BACKEND
@pytest.mark.parametrize(
    "spec_name", ["matrices, bfloat16", "matrices, reconstruction", "bias, bfloat16"]
)
def test_the_forward_pass_alone_gives_the_same(spec_name: str, name: str) -> None:
    # Alone it need not keep the chunks: the kernels then keep sampled rows aside.
    spec = SPECS[spec_name]
    args = spec.arrays(0, mixed=True)
    alone = jax.jit(call_of(name, static(spec)))(args)
    both = compiled(name, spec_name).run(args, cotangent(spec))
    jax.tree.map(np.testing.assert_array_equal, alone, (both["out"], *both["rest"]))


@EVERY_BACKEND
@pytest.mark.parametrize(
    ("spec_name", "field"),
    [("matrices, bfloat16", "y"), ("one feature", "alpha"), ("bias, narrow", "bias")],
)
def test_vmap_is_a_loop(spec_name: str, field: str, name: str) -> None:
    spec = dataclasses.replace(SPECS[spec_name], rows=5)
    args = spec.arrays(0, mixed=True)
    call = call_of(name, static(spec))
    values = jnp.stack([args[field], 0.5 * args[field][::-1]])
    together = jax.jit(jax.vmap(lambda x: call({**args, field: x})))(values)
    one = jax.jit(call)
    for i, value in enumerate(values):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6),
            jax.tree.map(lambda x, i=i: x[i], together),
            one({**args, field: value}),
        )


@EVERY_BACKEND
def test_a_second_derivative_is_right_or_refused(name: str) -> None:
    spec = dataclasses.replace(SPECS["one feature"], rows=2)
    args = spec.arrays(0)
    call = call_of(name, static(spec))

    def slope(alpha: Any) -> Any:
        def loss(alpha: Any) -> Any:
            return jnp.sum(call({**args, "alpha": alpha})[0] ** 2)

        return jnp.sum(jax.grad(loss)(alpha))

    if not BACKENDS[name].differentiable:
        with pytest.raises(NotImplementedError, match=f"'{name}' has no second deriv"):
            jax.grad(slope)(args["alpha"])
        return
    # out = y + alpha r, so the second derivative of sum(out**2) is 2 sum(r**2).
    mean = call(args)[2]
    np.testing.assert_allclose(
        jax.grad(slope)(args["alpha"]), 2 * spec.rows * mean, rtol=1e-5
    )


OWN = Custom(name="own", init=lambda key, width: {}, apply=lambda p, y: 0 * y)
ODD = {
    "custom": (static(dataclasses.replace(SPECS["wide"], blueprints=(OWN,))), 4, 2),
    "wide": (static(ArgSpec(name="w", rows=1, features=1026, num_seeds=2)), 1, 2),
    "no rows": (static(SPECS["wide"]), 0, 2),
    "no slots": (static(SPECS["wide"]), 4, 0),
    "bounded": (
        static(dataclasses.replace(SPECS["wide"], incubation="bounded")),
        4,
        2,
    ),
}


@EVERY_BACKEND
@pytest.mark.parametrize("odd", ODD)
def test_a_refusal_is_the_reason_in_the_error(odd: str, name: str) -> None:
    why = BACKENDS[name].refusal(*ODD[odd])
    if why is None:
        assert registry.choose(name, *ODD[odd]) is BACKENDS[name]
    else:
        with pytest.raises(ValueError, match="pass None to let blend") as error:
            registry.choose(name, *ODD[odd])
        assert f"'{name}': {why}" in str(error.value)
    assert registry.choose((name, "xla"), *ODD[odd]).refusal(*ODD[odd]) is None
    assert BACKENDS[name].refusal(static(SPECS["wide"]), 4, 2) is None
