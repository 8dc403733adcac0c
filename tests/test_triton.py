"""The Triton kernels: against the float64 oracle in interpret mode, and lowered."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from esper_jax.blueprints import (
    ACTIVATIONS,
    Custom,
    hidden_width,
    residual_mlp,
    resolve,
)
from esper_jax.kernels.blend import blend, oracle, triton
from esper_jax.kernels.blend.arg_specs import ARG_SPECS, KINDS, ArgSpec
from esper_jax.kernels.blend.config import TUNED, Blocks, choose
from esper_jax.kernels.blend.triton import static

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
NAMES = ("y", "bank", "alpha", "beta", "blueprint", "seed_of_slot")
CALL = "__gpu$xla.gpu.triton"
H100 = "NVIDIA H100 80GB HBM3"

# Interpret mode is slow: widths and blueprints are those of the real shapes, and rows
# and seeds few. No block divides the rows.
SMALL = {
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
    "no hidden layer": ArgSpec(
        name="affine",
        rows=8,
        features=32,
        num_seeds=2,
        blueprints=("affine",),
        dtype="float32",
    ),
    "one feature": ArgSpec(
        name="one", rows=7, features=3, num_seeds=3, dtype="float32"
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> None:
    """Its first use imports what changes JAX's configuration, and so retraces."""

    def copy(x_ref: Any, out_ref: Any) -> None:
        out_ref[...] = x_ref[...]

    x = jnp.ones(8)
    pl.pallas_call(copy, out_shape=x, interpret=True)(x)


def with_triton(spec: ArgSpec, **options: Any) -> Callable[..., Any]:
    """The kernels in interpret mode, as a function of the array arguments."""
    o = spec.options

    def call(args: dict[str, Any]) -> Any:
        return triton.blend(
            *(args[name] for name in NAMES),
            o["layout"],
            o["blueprints"],
            o["incubation"],
            o["statistics_rows"],
            interpret=True,
            **options,
        )

    return call


def with_oracle(spec: ArgSpec) -> Callable[..., Any]:
    """The oracle, likewise."""
    return lambda args: oracle.blend(
        *(args[name] for name in NAMES), *spec.options.values()
    )


def with_reference(spec: ArgSpec) -> Callable[..., Any]:
    """The reference, likewise."""
    return lambda args: blend(**args, **spec.options, implementation="xla")


def forward_and_back(call: Callable[..., Any], args: dict[str, Any], g: Any) -> Any:
    """Outputs, and gradients of y, bank and alpha."""

    def f(y: Any, bank: Any, alpha: Any) -> Any:
        out, *rest = call({**args, "y": y, "bank": bank, "alpha": alpha})
        return out, rest

    out, pull, rest = jax.vjp(f, args["y"], args["bank"], args["alpha"], has_aux=True)
    return {"out": out, "rest": rest, "gradients": pull(g)}


def relative_errors(actual: Any, expected: Any) -> dict[str, float]:
    """``|actual - expected| / |expected|`` of each leaf."""
    errors = {}
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, want), got in zip(paths, jax.tree.leaves(actual), strict=True):
        name = jax.tree_util.keystr(path)
        want, got = np.asarray(want, np.float64), np.asarray(got, np.float64)
        assert got.shape == want.shape, name
        norm = np.linalg.norm(want)
        errors[name] = float(np.linalg.norm(got - want) / (norm or 1.0))
    return errors


def in_float64(spec: ArgSpec, args: dict[str, Any], g: Any) -> Any:
    """What the oracle says, in float64."""

    def wide(x: Any) -> Any:
        x = np.asarray(x)
        return jnp.asarray(x, jnp.int32 if x.dtype.kind == "i" else jnp.float64)

    with jax.enable_x64(True):
        args, g = jax.tree.map(wide, (args, g))
        return jax.tree.map(np.asarray, forward_and_back(with_oracle(spec), args, g))


def cotangent(spec: ArgSpec) -> Any:
    rng = np.random.default_rng(9)
    return jnp.asarray(rng.normal(size=(spec.rows, spec.features)), spec.dtype)


@pytest.mark.parametrize("name", SMALL)
def test_values_and_gradients_are_the_oracles(name: str) -> None:
    spec = SMALL[name]
    g = cotangent(spec)
    traces = 0

    def traced(args: dict[str, Any]) -> Any:
        nonlocal traces
        traces += 1
        return with_triton(spec)(args)

    run = jax.jit(functools.partial(forward_and_back, traced))
    for seed in range(2):
        args = spec.arrays(seed, mixed=True)
        got = run(args, g)
        assert got["out"].dtype == got["gradients"][0].dtype == args["y"].dtype
        errors = relative_errors(got, in_float64(spec, args, g))
        worst = max(errors, key=lambda k: np.nan_to_num(errors[k], nan=np.inf))
        assert errors[worst] < TOLERANCE[spec.dtype], (worst, errors[worst])
    # Stages, blueprints and owners are run-time values.
    assert traces == 1


@pytest.mark.parametrize("name", ["matrices, bfloat16", "matrices"])
def test_a_sample_is_what_the_activations_were(name: str) -> None:
    # A forward pass alone keeps sampled rows aside; one with gradients has all rows.
    spec = dataclasses.replace(SMALL[name], statistics_rows=7)
    args = spec.arrays(0, mixed=True)
    call = with_triton(spec)
    alone = jax.jit(call)(args)
    both = jax.jit(functools.partial(forward_and_back, call))(args, cotangent(spec))
    jax.tree.map(np.testing.assert_array_equal, alone, (both["out"], *both["rest"]))
    errors = relative_errors(alone, jax.jit(with_reference(spec))(args))
    assert max(errors.values()) < TOLERANCE[spec.dtype]


def test_dead_and_incubating_slots_change_nothing_to_the_bit() -> None:
    spec = dataclasses.replace(SMALL["matrices, bfloat16"], statistics_rows=None)
    args = spec.arrays(0)
    # A NaN in parameters that are not used reaches nothing.
    args["bank"] = jax.tree.map(lambda x: x.at[0].set(jnp.nan), args["bank"])
    args["alpha"] = jnp.array([0.0, 0.0, 0.0, 0.0])
    args["beta"] = jnp.array([0.0, 1.0, 0.0, 1.0])
    g = cotangent(spec)
    got = jax.jit(functools.partial(forward_and_back, with_triton(spec)))(args, g)
    np.testing.assert_array_equal(got["out"], args["y"])
    dy, d_bank, d_alpha = got["gradients"]
    np.testing.assert_array_equal(dy, g)
    for leaf in jax.tree.leaves(d_bank):
        assert np.all(np.isfinite(leaf))
        assert not np.any(leaf[jnp.array([0, 2])])
    assert np.any(d_bank.w1[1])
    assert np.isfinite(d_alpha).all()
    assert not d_alpha[0]


@pytest.mark.parametrize("name", ["matrices, bfloat16", "one feature"])
def test_vmap_is_a_loop(name: str) -> None:
    spec = dataclasses.replace(SMALL[name], rows=5)
    args = spec.arrays(0, mixed=True)
    call = jax.jit(with_triton(spec))
    many = {
        "alpha": jnp.stack([args["alpha"], jnp.zeros_like(args["alpha"])]),
        "y": jnp.stack([args["y"], args["y"][::-1]]),
    }
    for field, values in many.items():
        together = jax.jit(
            jax.vmap(lambda x, field=field: with_triton(spec)({**args, field: x}))
        )(values)
        for i, value in enumerate(values):
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6),
                jax.tree.map(lambda x, i=i: x[i], together),
                call({**args, field: value}),
            )


def test_a_second_derivative_is_refused() -> None:
    spec = dataclasses.replace(SMALL["one feature"], rows=2)
    args = spec.arrays(0)

    def loss(alpha: Any) -> Any:
        return jnp.sum(with_triton(spec)({**args, "alpha": alpha})[0] ** 2)

    with pytest.raises(NotImplementedError, match="no second derivative"):
        jax.grad(lambda alpha: jnp.sum(jax.grad(loss)(alpha)))(args["alpha"])


def for_cuda() -> Any:
    """What newer versions need to lower for a GPU where there is none."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    device = AbstractDevice(device_kind=H100, num_cores=132, platform="cuda")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def lowered(spec: ArgSpec, implementation: Any, gradients: bool = True) -> str:
    """The program of `blend` for a GPU."""
    shapes = jax.eval_shape(lambda: spec.small().arrays(0))
    shapes = dict(
        shapes, y=jax.ShapeDtypeStruct((spec.rows, spec.features), spec.dtype)
    )
    slots = spec.slots

    def resized(x: Any) -> Any:
        return jax.ShapeDtypeStruct((slots, *x.shape[1:]), x.dtype)

    for name in set(shapes) - {"y"}:
        shapes[name] = jax.tree.map(resized, shapes[name])

    def call(args: dict[str, Any]) -> Any:
        return blend(**args, **spec.options, implementation=implementation)

    f = call
    if gradients:
        f = functools.partial(forward_and_back, call)
    g = (shapes["y"],) if gradients else ()
    with for_cuda():
        traced = jax.jit(f).trace(shapes, *g)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", ARG_SPECS)
def test_every_kernel_lowers_for_cuda(name: str) -> None:
    spec = ARG_SPECS[name]
    text = lowered(spec, "triton")
    config = choose(
        spec.rows,
        spec.features,
        spec.layout.width,
        hidden_width(resolve(spec.blueprints), spec.layout.width),
        spec.dtype,
        "",
    )
    names = ["blend_forward", "blend_backward"]
    hidden = hidden_width(resolve(spec.blueprints), spec.layout.width)
    if config.narrow:
        names += ["blend_statistics"]
    else:
        names += ["blend_finish", "blend_gradients"]
        if hidden > config.backward.across:
            names += ["blend_input"]
    assert text.count(CALL) == len(names)
    for kernel in names:
        assert f'name = "{kernel}"' in text
    # In place, on the activation and on the cotangent.
    assert text.count("output_operand_alias") >= 2


@pytest.mark.parametrize("how", ["check_vma", "no check", "sharding"])
def test_kernels_lower_for_cuda_on_several_devices(how: str) -> None:
    spec = dataclasses.replace(
        ARG_SPECS["width_64"], rows=512, features=256, num_seeds=4, capacity=None
    )
    names, sizes = ("data", "model"), (2, 2)
    auto = (jax.sharding.AxisType.Auto,) * 2
    if jax.__version_info__ < (0, 11):
        mesh: Any = jax.sharding.AbstractMesh(sizes, names, axis_types=auto)
        context: Any = contextlib.nullcontext()
    else:
        device = jax.sharding.AbstractDevice(
            device_kind=H100, num_cores=132, platform="cuda"
        )
        mesh = jax.sharding.AbstractMesh(
            sizes, names, axis_types=auto, abstract_device=device
        )
        context = jax.sharding.use_abstract_mesh(mesh)
    rows = jax.sharding.PartitionSpec("data")
    everywhere = jax.sharding.PartitionSpec()

    def loss(y: Any, bank: Any, rest: Any, **options: Any) -> Any:
        out, *others = blend(
            y, bank, **rest, **spec.options, implementation="triton", **options
        )
        return jnp.sum(out.astype(jnp.float32) ** 2), others

    def local(y: Any, bank: Any, rest: Any) -> Any:
        (value, others), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(
            y, bank, rest
        )
        return jax.lax.psum((value, others), "data"), grads[0], grads[1]

    def program(y: Any, bank: Any, rest: Any) -> Any:
        if how == "sharding":
            place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))
            grad = jax.value_and_grad(loss, (0, 1), has_aux=True)
            return grad(y, bank, rest, sharding=place)
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(rows, everywhere, everywhere),
            out_specs=(everywhere, rows, everywhere),
            check_vma=how == "check_vma",
        )(y, bank, rest)

    shapes = jax.eval_shape(lambda: spec.arrays(0))
    y, bank = shapes.pop("y"), shapes.pop("bank")
    with context:
        traced = jax.jit(program).trace(y, bank, shapes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Each device computes its own rows, and columns.
    local_rows, columns = (256, 128) if how == "sharding" else (256, 256)
    assert f"tensor<{local_rows}x{columns}xbf16>" in text
    assert text.count(CALL) >= 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_packed_activations_lower_for_cuda(dtype: str, activation: str) -> None:
    blueprints = (residual_mlp(activation=activation),)
    spec = dataclasses.replace(ARG_SPECS["width_64"], rows=64, blueprints=blueprints)
    spec = dataclasses.replace(spec, dtype=dtype, features=256, num_seeds=4)
    h100, other = (
        choose(64, 256, 64, 128, dtype, device) for device in (H100, "other")
    )
    assert h100.packed
    assert not other.packed
    o = spec.options
    args = jax.eval_shape(lambda: spec.arrays(0))

    def text(config: Any) -> str:
        def call(args: dict[str, Any]) -> Any:
            arrays = [args[name] for name in NAMES]
            static = (o["layout"], o["blueprints"], o["incubation"])
            return triton.blend(*arrays, *static, config=config)

        with for_cuda():
            traced = jax.jit(call).trace(args)
            return traced.lower(lowering_platforms=("cuda",)).as_text()

    packed = "tanh.approx." + ("bf16x2" if dtype == "bfloat16" else "f16x2")
    assert packed in text(h100)
    assert packed not in text(other)


def test_the_program_tells_which_implementation_runs() -> None:
    spec = ARG_SPECS["uneven"]
    assert CALL in lowered(spec, "triton", gradients=False)
    assert CALL not in lowered(spec, "xla", gradients=False)
    assert CALL in lowered(spec, ("triton", "xla"), gradients=False)
    # This machine's default device has no kernels.
    assert jax.default_backend() != "cpu" or CALL not in lowered(
        spec, None, gradients=False
    )


def test_an_automatic_choice_follows_the_platform(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    spec = ARG_SPECS["uneven"]
    assert CALL in lowered(spec, None, gradients=False)
    too_wide = dataclasses.replace(spec, features=3000, num_seeds=3, capacity=2)
    assert CALL not in lowered(too_wide, None, gradients=False)
    # Plain JAX is faster on these, so that they must be asked for.
    wide = dataclasses.replace(spec, features=1024, num_seeds=4, capacity=2)
    assert CALL not in lowered(wide, None, gradients=False)
    assert CALL in lowered(wide, "triton", gradients=False)


def test_a_name_never_falls_back_and_says_why() -> None:
    own = Custom(name="own", init=lambda key, width: {}, apply=lambda p, y: 0 * y)
    spec = dataclasses.replace(SMALL["matrices"], blueprints=("affine", own))
    args = spec.arrays(0)
    with pytest.raises(ValueError, match="'triton': blueprint 'own' is Custom"):
        blend(**args, **spec.options, implementation="triton")
    with pytest.raises(ValueError, match="must be one of"):
        blend(**args, **spec.options, implementation="cuda")
    out, _, _ = blend(**args, **spec.options, implementation=("triton", "xla"))
    assert out.shape == args["y"].shape


def test_statistics_rows_are_validated() -> None:
    spec = SMALL["one feature"]
    options = {**spec.options, "statistics_rows": -1}
    with pytest.raises(ValueError, match="statistics_rows must be"):
        blend(**spec.arrays(0), **options)


def test_no_derivative_of_an_activation_is_forgotten() -> None:
    x = jnp.linspace(-4.0, 4.0, 101)
    assert set(static.ACTIVATIONS) == set(ACTIVATIONS)
    for name, f in ACTIVATIONS.items():
        value, slope = static.ACTIVATIONS[name](x, False)
        np.testing.assert_allclose(value, f(x), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            slope, jax.vmap(jax.grad(f))(x), rtol=1e-5, atol=3e-6
        )


def test_blocks_are_validated() -> None:
    with pytest.raises(ValueError, match="power of two"):
        Blocks(rows=24, programs=1, across=16)
    with pytest.raises(ValueError, match="programs must be at least 1"):
        Blocks(rows=16, programs=0, across=16)


@pytest.mark.parametrize("key", TUNED)
def test_tuned_blocks_suit_any_batch(key: Any) -> None:
    device, dtype, width, hidden = key
    for rows in (1, 32, 1000, 8192):
        config = choose(rows, 4 * width, width, hidden, dtype, device)
        for name in ("forward", "backward", "input"):
            assert 16 <= getattr(config, name).rows <= max(16, 2 * rows)
