"""The Triton kernels' block sizes, activations and programs, lowered for a GPU.

``test_backends.py`` compares their values with the oracle, in interpret mode.
"""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_backends import (
    SPECS,
    call_of,
    compiled,
    cotangent,
    forward_and_back,
    static,
)

from esper_jax.blueprints import ACTIVATIONS, hidden_width, residual_mlp, resolve
from esper_jax.kernels.blend import activations, blend, registry
from esper_jax.kernels.blend.arg_specs import ARG_SPECS, ArgSpec
from esper_jax.kernels.blend.static import Static
from esper_jax.kernels.blend.triton.blocks import Blocks
from esper_jax.kernels.blend.triton.config import choose, of_groups
from esper_jax.kernels.blend.triton.tuned import TUNED

CALL = "__gpu$xla.gpu.triton"
H100 = "NVIDIA H100 80GB HBM3"


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

    if spec.bias:
        shapes["bias"] = jax.ShapeDtypeStruct((spec.features,), "float32")
    for name in set(shapes) - {"y", "bias"}:
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


# Of widths that differ in block sizes alone, one is enough for every day.
SLOW = ("width_4", "width_16", "width_32", "width_256")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
        for name in ARG_SPECS
    ],
)
def test_every_kernel_lowers_for_cuda(name: str) -> None:
    spec = ARG_SPECS[name]
    text = lowered(spec, "triton")
    config = choose(Static(**spec.options, dtype=spec.dtype), spec.rows, "")
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
    # In place, on the activation and on the cotangent. The kernel that overwrites the
    # cotangent gets the sum of it, and so comes after it.
    assert text.count("output_operand_alias") >= 2
    if spec.bias:
        total = f"tensor<{spec.features}xbf16>"
        (backward,) = (line for line in text.splitlines() if "blend_backward" in line)
        inputs, outputs = backward.rsplit("->", 1)
        assert total in inputs
        assert total in outputs


@pytest.mark.parametrize(
    ("seeds", "bias"), [(4, False), (4, True), (128, True)], ids=str
)
@pytest.mark.parametrize("how", ["check_vma", "no check", "sharding"])
def test_kernels_lower_for_cuda_on_several_devices(
    how: str, seeds: int, bias: bool
) -> None:
    spec = dataclasses.replace(
        ARG_SPECS["width_64"], rows=512, features=256, num_seeds=seeds, bias=bias
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
    assert text.count(CALL) >= (4 if seeds == 4 else 3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_packed_activations_lower_for_cuda(dtype: str, activation: str) -> None:
    blueprints = (residual_mlp(activation=activation),)
    spec = dataclasses.replace(ARG_SPECS["width_64"], rows=64, blueprints=blueprints)
    spec = dataclasses.replace(spec, dtype=dtype, features=256, num_seeds=4)
    s = static(spec, interpret=False)
    h100, other = (choose(s, 64, device) for device in (H100, "other"))
    assert h100.packed
    assert not other.packed
    args = jax.eval_shape(lambda: spec.arrays(0))

    def text(config: Any) -> str:
        call = call_of("triton", dataclasses.replace(s, config=config))
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


@pytest.mark.parametrize("platform", ["gpu", "cuda", "cpu", "tpu"])
def test_every_width_runs_where_it_was_measured_to_be_fastest(
    platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # benchmarks/RESULTS.md: the kernels, up to 128 features; plain JAX beyond.
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    for width in range(1, 515):
        spec = ArgSpec(name="width", rows=8, features=4 * width, num_seeds=4)
        s = Static(**spec.options, dtype="bfloat16")
        fast = platform in ("gpu", "cuda") and width <= 128
        expected = "triton" if fast else "xla"
        assert registry.choose(None, s, 8192, 4).name == expected, width
        if width <= 128:  # whether or not it is faster: it exists
            assert choose(s, 8192, H100).narrow == (width <= 4)
    s = dataclasses.replace(
        s, layout=ArgSpec(name="", rows=1, features=8, num_seeds=1).layout
    )
    assert (
        registry.choose(None, dataclasses.replace(s, dtype="float64"), 8, 4).name
        == "xla"
    )


def test_chunks_that_share_tiles_fit_them() -> None:
    for dtype in ("bfloat16", "float16", "float32"):
        for features, seeds in ((4096, 4096), (4096, 2048), (1000, 400), (4096, 1024)):
            spec = ArgSpec(name="narrow", rows=64, features=features, num_seeds=seeds)
            s = static(dataclasses.replace(spec, dtype=dtype), interpret=False)
            config = choose(s, 64, H100)
            columns, units = (32, 64) if dtype == "float32" else (64, 128)
            assert columns // 2 <= config.group * s.width <= columns
            assert config.group * s.hidden <= units == config.forward.across
    wide = static(ArgSpec(name="wide", rows=64, features=128, num_seeds=2))
    with pytest.raises(ValueError, match="64 features and 128 hidden units cannot"):
        of_groups(wide, 64, H100)


def test_a_program_does_bad_tiles_again_and_no_others() -> None:
    spec = SPECS["narrow, exact"]
    s = static(spec)
    config = choose(s, spec.rows, "")
    one = {
        name: dataclasses.replace(getattr(config, name), rows=16, programs=1)
        for name in ("forward", "backward")
    }
    s = dataclasses.replace(s, config=dataclasses.replace(config, **one))
    # Four tiles a program. Of these one goes wrong in y, and another in its cotangent.
    args, g = spec.arrays(0), cotangent(spec)
    first, second = (
        np.asarray(spec.layout.owners) == int(args["seed_of_slot"][i]) for i in (0, 1)
    )
    args["y"] = args["y"].at[20, first].set(np.nan)
    g = g.at[40, second].set(np.nan)
    got = jax.jit(functools.partial(forward_and_back, call_of("triton", s)))(args, g)
    want = compiled("xla", "narrow, exact").run(args, g)
    assert np.isnan(want["out"][20, first]).all()
    assert np.isnan(want["gradients"][0][40, second]).all()
    assert np.isnan(want["gradients"][1].w1).sum() == 2 * spec.layout.width * s.hidden
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, want
    )


def test_no_derivative_of_an_activation_is_forgotten() -> None:
    x = jnp.linspace(-4.0, 4.0, 101)
    assert set(activations.ACTIVATIONS) == set(ACTIVATIONS)

    @jax.jit
    def expected() -> Any:
        return {n: (f(x), jax.vmap(jax.grad(f))(x)) for n, f in ACTIVATIONS.items()}

    for name, (value, slope) in expected().items():
        got = activations.ACTIVATIONS[name](x, activations.EXACT)
        np.testing.assert_allclose(got[0], value, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[1], slope, rtol=1e-5, atol=3e-6)


def test_blocks_are_validated() -> None:
    with pytest.raises(ValueError, match="power of two"):
        Blocks(rows=24, programs=1, across=16)
    with pytest.raises(ValueError, match="programs must be at least 1"):
        Blocks(rows=16, programs=0, across=16)


@pytest.mark.parametrize("key", TUNED)
def test_tuned_blocks_suit_any_batch(key: Any) -> None:
    device, dtype, width, hidden = key
    blueprints = (residual_mlp(expansion=hidden / width),)
    spec = ArgSpec(
        name="tuned", rows=1, features=4 * width, num_seeds=4, blueprints=blueprints
    )
    s = Static(**spec.options, dtype=dtype)
    assert (s.width, s.hidden) == (width, hidden)
    for rows in (1, 32, 1000, 8192):
        config = choose(s, rows, device)
        assert config.packed
        for name in ("forward", "backward", "input"):
            assert 16 <= getattr(config, name).rows <= max(16, 2 * rows)
