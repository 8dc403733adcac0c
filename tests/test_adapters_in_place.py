"""What adapters add by a kernel, in place: against the oracle and plain JAX."""

import functools
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_adapters import KINDS, arguments, cotangent, truth
from test_adapters import outputs_and_gradients as of_blend
from test_bias import output_and_gradients
from test_harvest import grow
from test_layers import same_bits
from test_triton import for_cuda

from esper_jax.blueprints import group, lora, neurons
from esper_jax.chunks import ChunkLayout
from esper_jax.kernels.blend import registry
from esper_jax.kernels.blend.adapters import split
from esper_jax.kernels.blend.backend import Product
from esper_jax.kernels.blend.static import Static
from esper_jax.layers.chunked import ChunkedLayer
from esper_jax.layers.variables import SeedVariable
from esper_jax.lifecycle.stages import Stage

pytest.importorskip("jax.experimental.pallas.triton")
pytestmark = pytest.mark.usefixtures("kernels")

KERNEL = "esper_add_product"


@pytest.mark.parametrize(
    ("shape", "dtype", "to_dtype"),
    [
        ((70, 80, 150), "float32", "float32"),  # more than a tile on every axis
        ((128, 64, 128), "bfloat16", "bfloat16"),  # whole tiles
        ((5, 3, 17), "bfloat16", "float32"),
    ],
)
def test_a_product_is_added_or_nothing_is(shape: Any, dtype: str, to_dtype: str):
    rng, (rows, units, columns) = np.random.default_rng(0), shape
    to = jnp.asarray(rng.normal(size=(rows, columns)), to_dtype).at[0].set(-0.0)
    product = Product(
        jnp.asarray(rng.normal(size=(rows, units)), dtype),
        jnp.asarray(rng.normal(size=(units, columns)), dtype),
        jnp.asarray(rng.normal(size=columns), jnp.float32),
    )
    s = split(
        Static(layout=ChunkLayout(columns, 1), blueprints=(group(),), dtype=dtype)
    )
    backend = registry.choose("triton", s, rows, 1)
    s = backend.prepare(s, rows)
    add = jax.jit(functools.partial(backend.products.add, s))
    same_bits(add(to, product, jnp.asarray(False)), to)
    got = add(to, product, jnp.asarray(True))
    assert got.dtype == to.dtype
    left, right, row, before = (np.asarray(v, np.float64) for v in (*product, to))
    want = before + left @ right + row
    eps = 1e-2 if to_dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=eps, atol=eps)
    # One flag for each of a batch, as under jax.vmap.
    each = jax.vmap(add, in_axes=(None, None, 0))(to, product, jnp.array([True, False]))
    same_bits(each, jnp.stack([got, to]))


@pytest.mark.parametrize(
    ("dtype", "turns", "kinds"),
    [("float32", (0, 3), KINDS[1:]), ("bfloat16", (1,), KINDS)],
)
def test_values_and_gradients_are_the_oracles(dtype: str, turns: Any, kinds: Any):
    eps = {"float32": 3e-5, "bfloat16": 4e-2}[dtype]
    for turn in turns:
        args, g = arguments(dtype, turn, False, kinds), cotangent(dtype)
        got = of_blend(args, g, "task", kinds, "triton")
        expected = truth(args, g, "task", kinds)
        leaves = jax.tree_util.tree_leaves_with_path(expected)
        for (path, want), have in zip(leaves, jax.tree.leaves(got), strict=True):
            have = np.asarray(have, np.float64)
            atol = eps * max(1.0, np.abs(want).max(initial=0))
            np.testing.assert_allclose(have, want, eps, atol, err_msg=str(path))


NOISE = nnx.initializers.normal(0.5)
MAKES = {
    "Linear": lambda r: nnx.Linear(5, 32, bias_init=NOISE, rngs=r),
    "bfloat16": lambda r: nnx.Linear(5, 32, bias_init=NOISE, dtype="bfloat16", rngs=r),
    "no bias": lambda r: nnx.Linear(5, 32, use_bias=False, rngs=r),
    "Conv": lambda r: nnx.Conv(5, 32, (1,), bias_init=NOISE, rngs=r),
}
PARTS = (lora(rank=2, scaling=0.5), group(hidden=3), neurons(hidden=2))
X = jnp.asarray(np.random.default_rng(3).normal(size=(2, 9, 5)), jnp.float32)


@pytest.mark.parametrize("name", MAKES)
def test_layers_keep_their_bits_and_compute_what_plain_jax_does(name: str) -> None:
    base = MAKES[name](nnx.Rngs(0, params=1))
    plain, _ = output_and_gradients(base, X)
    layer = ChunkedLayer(base, 4, blueprints=PARTS, rngs=nnx.Rngs(1))
    _, hook = layer.bed.tapped(X)
    assert hook.shape == (2, 9, 4 * (2 + 2))
    assert not np.any(hook)
    grow(layer.bed, {1: ("lora", Stage.TRAINING), 2: ("group", Stage.TRAINING)})
    same_bits(output_and_gradients(layer, X)[0], plain)
    kinds = ("lora", "group", "neurons")
    grow(layer.bed, {n: (kind, Stage.GRAFTING) for n, kind in enumerate(kinds)})
    got = output_and_gradients(layer, X)
    assert np.linalg.norm(np.asarray(got[0][2] - plain[2])) > 0.1
    layer.bed.implementation = "xla"
    assert layer.bed.tapped(X) == (X, None)
    want = output_and_gradients(layer, X)
    # The cotangent is a cosine of three times the output, and magnifies its rounding.
    alike(got, want, 5e-2 if name == "bfloat16" else 2e-5)


def alike(got: Any, want: Any, eps: float) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))  # not measured
        a, b = np.nan_to_num(a), np.nan_to_num(b)
        assert np.linalg.norm(a - b) <= eps * np.linalg.norm(b)


def test_an_input_is_tapped_only_where_that_gains_something() -> None:
    def hook(x: Any = X, base: Any = None, **options: Any) -> Any:
        base = base or nnx.Linear(5, 8, rngs=nnx.Rngs(0))
        options = {"blueprints": ["lora"], **options}
        layer = ChunkedLayer(base, 2, rngs=nnx.Rngs(1), **options)
        return layer.bed.tapped(x)[1]

    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec("d"))
    assert hook() is not None
    assert hook(blueprints=["group"]) is None  # which reads the output
    assert hook(implementation="xla") is None
    assert hook(incubation="bounded") is None  # which has no kernel
    assert hook(sharding=place) is None
    assert hook(deterministic=True) is None  # forward-mode derivatives work there
    assert hook(np.arange(5), nnx.Embed(9, 8, rngs=nnx.Rngs(0))) is None
    assert hook(np.ones((2, 5), np.int32)) is None


class Stack(nnx.Module):
    """Layers under `nnx.scan`, each under `nnx.remat`."""

    def __init__(self, **options: Any) -> None:
        @nnx.vmap(in_axes=0)
        def layers(rngs: nnx.Rngs) -> Any:
            base = nnx.Linear(8, 8, bias_init=NOISE, rngs=rngs)
            return ChunkedLayer(base, 3, blueprints=PARTS, rngs=rngs, **options)

        self.layers = layers(nnx.Rngs(0).split(2))
        for at in (0, 1):
            parts = {at: ("lora", Stage.GRAFTING), 2: ("group", Stage.GRAFTING)}
            grow(self.layers.bed, parts, at=(at,))
        bank = self.layers.bed.bank
        bank.set_value(jax.tree.map(lambda v: jnp.cos(50 * v), bank.get_value()))

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def through(layer: Any, x: Any) -> Any:
            return nnx.remat(lambda layer, x: nnx.tanh(layer(x)))(layer, x)

        return through(self.layers, x)


def test_stacks_compute_what_plain_jax_does() -> None:
    x = jnp.cos(jnp.arange(64.0)).reshape(8, 8)
    results = []
    for implementation in ("triton", "xla"):
        model = Stack(implementation=implementation)

        @nnx.jit
        def step(model: Any, x: Any) -> Any:
            wrt = nnx.DiffState(0, nnx.Not(SeedVariable))
            loss = nnx.value_and_grad(lambda m, x: jnp.sum(m(x) ** 2), argnums=(wrt, 1))
            return loss(model, x)

        results.append(step(model, x))
    alike(*results, 1e-5)


def test_every_device_adds_to_its_own_rows() -> None:
    rngs = nnx.Rngs(0)
    layer = ChunkedLayer(nnx.Linear(5, 8, rngs=rngs), 3, blueprints=PARTS, rngs=rngs)
    grow(layer.bed, {0: ("lora", Stage.GRAFTING), 2: ("group", Stage.GRAFTING)})
    x = jnp.cos(jnp.arange(40.0)).reshape(8, 5)

    def slope(x: Any) -> Any:
        return jax.grad(lambda x: jnp.sum(layer(x) ** 2))(x)

    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("d")
    apart = jax.shard_map(
        slope, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    np.testing.assert_allclose(jax.jit(apart)(x), jax.jit(slope)(x), 1e-5, 1e-6)


def test_what_a_layer_of_adapters_computes_is_added_in_place() -> None:
    """To the output, and the gradients of ``y``, of its bias and of the input."""
    base = nnx.Linear(5, 32, bias_init=NOISE, rngs=nnx.Rngs(0))
    layer = ChunkedLayer(base, 4, blueprints=PARTS, rngs=nnx.Rngs(1))

    def f(x: Any) -> Any:
        return output_and_gradients(layer, x)[0]

    found = list(primitives(jax.make_jaxpr(f)(X).jaxpr))
    assert found.count(KERNEL) == 4
    assert "cond" not in found


def test_derivatives_that_do_not_work_say_what_to_do() -> None:
    rngs = nnx.Rngs(0)
    for part in PARTS[:2]:  # which read the input, and the output
        layer = ChunkedLayer(
            nnx.Linear(5, 8, rngs=rngs), 2, blueprints=[part], rngs=rngs
        )
        grow(layer.bed, {0: (part.name, Stage.GRAFTING)})

        def f(x: Any, layer: Any = layer) -> Any:
            return jnp.sum(layer(x) ** 2)

        x = jnp.cos(jnp.arange(10.0)).reshape(2, 5)
        with pytest.raises(TypeError, match=r"forward-mode .* 'triton' in training"):
            jax.jvp(f, (x,), (x,))
        with pytest.raises(NotImplementedError, match=r"no second derivative; pass"):
            jax.grad(lambda x: jnp.sum(jax.grad(f)(x) ** 2))(x)
        layer.bed.deterministic = True
        with pytest.raises(NotImplementedError, match=r"no second derivative; pass"):
            jax.grad(lambda x: jnp.sum(jax.grad(f)(x) ** 2))(x)


def primitives(jaxpr: Any) -> Any:
    """Names of all operations of a program; of kernels, their own."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield str(eqn.params["name"])
            continue
        yield eqn.primitive.name
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from primitives(inner)


def test_the_kernel_lowers_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    args, g = arguments("bfloat16", 1, False, KINDS[1:]), cotangent("bfloat16")
    with for_cuda():
        f = jax.jit(lambda a: of_blend(a, g, "task", KINDS[1:], "triton"))
        text = f.trace(args).lower(lowering_platforms=("cuda",)).as_text()
    assert KERNEL in text
