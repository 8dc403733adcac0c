"""A layer's bias apart from its output: by blend's kernels, interpreted, and by layers.

``test_backends.py`` compares the kernels with the oracle.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_layers import grown, same_bits

from esper_jax.kernels.blend import blend, takes_bias
from esper_jax.kernels.blend.arg_specs import ArgSpec
from esper_jax.layers.bias import without_bias
from esper_jax.layers.chunked import ChunkedLayer
from esper_jax.layers.variables import SeedVariable
from esper_jax.lifecycle.stages import Stage

FEATURES = 32


def bases() -> dict[str, tuple[Any, tuple[int, ...], Any]]:
    """Layers, and the shape and dtype of their input."""
    rngs, low = nnx.Rngs(0, params=1), jnp.bfloat16
    noise = nnx.initializers.normal(0.5)
    of = {"bias_init": noise, "rngs": rngs}
    return {
        "Linear": (nnx.Linear(5, FEATURES, dtype=low, **of), (2, 9, 5), jnp.float32),
        "promoted by its bias": (
            nnx.Linear(5, FEATURES, param_dtype=low, **of),
            (9, 5),
            low,
        ),
        "LinearGeneral": (
            nnx.LinearGeneral((3, 5), FEATURES, axis=(-2, -1), **of),
            (9, 3, 5),
            low,
        ),
        "Conv": (nnx.Conv(5, FEATURES, (3,), **of), (2, 2, 6, 5), jnp.float32),
        "Einsum": (
            nnx.Einsum("...hd,hdf->...f", (3, 5, FEATURES), (FEATURES,), **of),
            (9, 3, 5),
            jnp.float32,
        ),
    }


def input_of(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.asarray(np.random.default_rng(3).normal(size=shape), dtype)


BASES = bases()
BASES["promoted by its bias"][0].bias.set_value(jnp.ones(FEATURES, jnp.float32))


@pytest.mark.parametrize("name", BASES)
def test_a_layer_without_its_bias_is_the_layer_but_for_the_last_step(name: str) -> None:
    base, shape, dtype = BASES[name]
    x, before = input_of(shape, dtype), nnx.graphdef(base)
    held = nnx.state(base)
    split = without_bias(base, x, FEATURES)
    assert split is not None
    bare, bias = split
    y, want = bare(x), base(x)
    assert bias.dtype == y.dtype == want.dtype
    same_bits(y + bias, want)
    assert np.any(np.asarray(y) != np.asarray(want))
    # The layer itself is what it was, and no array was copied.
    assert nnx.graphdef(base) == before
    assert bare.kernel is base.kernel
    same_bits(nnx.state(base), held)


def _odd(**changes: Any) -> Any:
    return nnx.Linear(5, FEATURES, rngs=nnx.Rngs(0), **changes)


class _Own(nnx.Linear):
    """May do anything after the bias."""


@pytest.mark.parametrize(
    "base",
    [
        nnx.relu,
        _Own(5, FEATURES, rngs=nnx.Rngs(0)),
        _odd(use_bias=False),
        _odd(preferred_element_type=jnp.float32),
        _odd(promote_dtype=lambda args, dtype: args),
        nnx.LinearGeneral(5, (2, FEATURES), rngs=nnx.Rngs(0)),
        nnx.Conv(5, FEATURES, (3,), mask=jnp.ones((3, 5, FEATURES)), rngs=nnx.Rngs(0)),
        nnx.Einsum("bd,dhf->bhf", (5, 2, 16), (2, 16), rngs=nnx.Rngs(0)),
        nnx.Einsum("bd,fd->fb", (FEATURES, 5), (FEATURES,), rngs=nnx.Rngs(0)),
    ],
)
def test_other_layers_keep_their_bias(base: Any) -> None:
    assert without_bias(base, jnp.ones((2, 6, 5)), FEATURES) is None


def output_and_gradients(layer: Any, x: jax.Array) -> Any:
    """Output, gradients of the base layer, of the bed, and of the input."""
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def f(params: Any, rest: Any, x: Any) -> Any:
        def run(params: Any, x: Any) -> Any:
            m = nnx.merge(graph, params, rest, copy=True)
            out = m(x)
            return out, nnx.state(m, SeedVariable)

        out, pull, seeds = jax.vjp(run, params, x, has_aux=True)
        d_params, dx = pull(jnp.cos(3 * out))
        base = d_params.get("base", d_params)
        return (out, base, dx), (d_params.get("bed", {}), seeds)

    return jax.jit(f)(params, rest, x)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", ["Linear", "Conv"])
def test_seeds_that_do_not_count_leave_a_layer_its_bits(name: str) -> None:
    base, shape, dtype = BASES[name]
    x = input_of(shape, dtype)
    plain, _ = output_and_gradients(base, x)
    layer = ChunkedLayer(base, 2, rngs=nnx.Rngs(1))
    assert layer._base_output(x)[1] is not None
    grown(layer.bed, {1: Stage.TRAINING})
    same_bits(output_and_gradients(layer, x)[0], plain)
    # A seed that counts: as plain JAX, which the layer's own bias is left to.
    grown(layer.bed, {1: Stage.TRAINING, 0: Stage.GRAFTING})
    got = output_and_gradients(layer, x)
    layer.bed.implementation = "xla"
    assert layer._base_output(x)[1] is None
    want = output_and_gradients(layer, x)
    eps = 2e-2 if got[0][0].dtype == jnp.bfloat16 else 2e-5
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))  # not measured
        a, b = np.nan_to_num(a), np.nan_to_num(b)
        assert np.linalg.norm(a - b) <= eps * np.linalg.norm(b)


class Stack(nnx.Module):
    """Layers under `nnx.scan`, each under `nnx.remat`."""

    def __init__(self, **options: Any) -> None:
        @nnx.vmap(in_axes=0)
        def layers(rngs: nnx.Rngs) -> Any:
            base = nnx.Linear(8, 8, rngs=rngs)
            base.bias.set_value(jnp.linspace(-1.0, 1.0, 8))
            return ChunkedLayer(base, 2, rngs=rngs, **options)

        self.layers = layers(nnx.Rngs(0).split(2))

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def through(layer: Any, x: Any) -> Any:
            return nnx.remat(lambda layer, x: nnx.tanh(layer(x)))(layer, x)

        return through(self.layers, x)


@pytest.mark.usefixtures("kernels")
def test_a_bias_goes_apart_under_scan_remat_grad_and_jit() -> None:
    x = input_of((6, 8), jnp.float32)
    results = []
    for implementation in ("triton", "xla"):
        model = Stack(implementation=implementation)
        graph = nnx.graphdef(model)

        @nnx.jit
        def step(model: Any, x: Any) -> Any:
            return nnx.value_and_grad(lambda m: jnp.sum(m(x) ** 2))(model)

        results.append((step(model, x), nnx.state(model, SeedVariable)))
        assert nnx.graphdef(model) == graph
        assert model.layers.base.bias.shape == (2, 8)
    got, want = (jax.tree.leaves(result) for result in results)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    (_, grads), _ = results[0]
    assert np.all(grads.layers.base.bias.get_value())


SPEC = ArgSpec(
    name="sharded",
    rows=16,
    features=32,
    num_seeds=4,
    statistics_rows=8,
    dtype="float32",
    bias=True,
)


@pytest.mark.usefixtures("kernels")
def test_a_bias_apart_over_several_devices() -> None:
    auto = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=auto)
    place = NamedSharding(mesh, PartitionSpec("data", "model"))
    args = SPEC.arrays(0)

    @functools.partial(jax.jit, static_argnums=1)
    def run(args: dict[str, Any], sharding: Any) -> Any:
        def loss(y: Any, bank: Any, bias: Any) -> Any:
            given = {**args, "y": y, "bank": bank, "bias": bias}
            out, *rest = blend(**given, **SPEC.options, sharding=sharding)
            return jnp.sum(jnp.sin(out)), (out, rest)

        f = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
        return f(args["y"], args["bank"], args["bias"])

    (want, _), (got, _) = run(args, None), run(args, place)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_plain_jax_adds_the_bias_first_as_a_layer_does() -> None:
    args = SPEC.arrays(0)
    y, bias = args.pop("y").reshape(4, 4, 32), args.pop("bias")
    options = {**args, **SPEC.options, "implementation": "xla"}

    def apart(y: Any, bias: Any) -> Any:
        return blend(y, bias=bias, **options)

    def before(y: Any, bias: Any) -> Any:
        return blend(y + bias.reshape(1, 1, -1), **options)

    programs = [str(jax.make_jaxpr(f)(y, bias)) for f in (apart, before)]
    assert programs[0] == programs[1]


def test_who_takes_a_bias_apart() -> None:
    options = {name: SPEC.options[name] for name in ("layout", "blueprints")}
    assert takes_bias("bfloat16", 4, implementation="triton", **options)
    assert not takes_bias("bfloat16", 4, implementation="xla", **options)
    # The kernels refuse it; so will blend, with its own words.
    assert not takes_bias("float64", 4, implementation="triton", **options)
    assert takes_bias("bfloat16", 4, **options) == (jax.default_backend() == "gpu")
