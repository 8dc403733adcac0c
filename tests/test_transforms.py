"""Layers that can grow inside JAX's own transforms, in every mode of differentiation,
precision and export."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import export
from test_blend import EVEN, KINDS, UNEVEN, arguments

from esper_jax import lifecycle
from esper_jax.blueprints import Custom
from esper_jax.kernels.blend import blend
from esper_jax.layers import (
    BlueprintParam,
    ChunkedLayer,
    SeedBed,
    grow_capacity,
    make_growable,
)
from esper_jax.lifecycle.grafting import Strategy
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import Outcome, Stage
from esper_jax.lifecycle.state import init_seeds
from esper_jax.train.program import build

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)


def live(bed, stages=(Stage.GRAFTING, Stage.TRAINING, Stage.FOSSILIZED), alpha=0.4):
    """Seeds in the given stages, in the first slots, with random parameters."""
    rng, count = np.random.default_rng(1), len(stages)
    seeds, at = bed.seeds.get_value(), np.arange(count)
    graft = dataclasses.replace(seeds.graft, alpha=seeds.graft.alpha.at[at].set(alpha))
    bed.seeds.set_value(
        dataclasses.replace(
            seeds,
            stage=seeds.stage.at[at].set(np.array(stages, np.int8)),
            slot_of_seed=seeds.slot_of_seed.at[at].set(at.astype(np.int32)),
            seed_of_slot=seeds.seed_of_slot.at[at].set(at.astype(np.int32)),
            graft=graft,
        )
    )
    bed.bank.set_value(
        jax.tree.map(
            lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype),
            bed.bank.get_value(),
        )
    )


class Net(nnx.Module):
    """Uses its layers inside the transform that ``how`` names."""

    def __init__(self, how=""):
        self.how = how
        self.a = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
        self.b = nnx.Linear(8, 3, rngs=nnx.Rngs(1))

    def one(self, v):
        return self.b(nnx.tanh(self.a(v)))

    def __call__(self, x):
        if not self.how:
            return self.one(x)
        return TRANSFORMS[self.how](self, x)


def over_time(net, x):
    def step(carry, v):
        carry = jnp.tanh(net.a(v) + carry)
        return carry, net.b(carry)

    return jax.lax.scan(step, jnp.zeros(8), x)[1]


def unrolled(net, x):
    carry, outs = jnp.zeros(8), []
    for v in x:
        carry = jnp.tanh(net.a(v) + carry)
        outs.append(net.b(carry))
    return jnp.stack(outs)


def grad_of_input(net, x):
    return jax.grad(lambda v: jnp.sum(net.one(v) ** 2))(x)


TRANSFORMS = {
    "vmap": lambda net, x: jax.vmap(net.one)(x),
    "map": lambda net, x: jax.lax.map(net.one, x),
    "scan": over_time,
    "unrolled": unrolled,
    "grad": grad_of_input,
    "cond": lambda net, x: jax.lax.cond(
        jnp.sum(x) < 1e9, net.one, lambda v: -net.one(v), x
    ),
    "checkpoint": lambda net, x: jax.checkpoint(net.one)(x),
    "jit": lambda net, x: jax.jit(net.one)(x),
    "checkpoint of vmap": lambda net, x: jax.checkpoint(jax.vmap(net.one))(x),
    "scan of checkpoint": lambda net, x: jax.lax.scan(
        lambda c, v: (c, jax.checkpoint(net.one)(v)), 0.0, x
    )[1],
    "vmap of grad": lambda net, x: jax.vmap(functools.partial(grad_of_input, net))(x),
    "jit of scan": lambda net, x: jax.jit(functools.partial(over_time, net))(x),
}
OUTSIDE = {"scan": "unrolled", "jit of scan": "unrolled", "vmap of grad": "grad"}


def value_and_grads(net):
    """Output, and gradients of the host's parameters and of the bank by path."""
    graph, params, bank, rest = nnx.split(net, nnx.Param, BlueprintParam, ...)

    def loss(params, bank):
        out = nnx.merge(graph, params, bank, rest, copy=True)(X)
        return jnp.sum(jnp.sin(out)), out

    (_, out), (host, bank) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        params, bank
    )
    host = {
        tuple(k for k in path if k != "base"): leaf.get_value()
        for path, leaf in nnx.to_flat_state(host)
    }
    return out, host, jax.tree.leaves(bank)


def close(a, b, rtol=2e-5, atol=2e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


@pytest.mark.parametrize("how", [how for how in TRANSFORMS if how != "unrolled"])
def test_a_layer_in_training_works_in_every_transform(how: str) -> None:
    net = Net(how)
    plain = value_and_grads(net)
    make_growable(net, "a", 4, rngs=nnx.Rngs(2))
    dormant = value_and_grads(net)
    close(dormant[:2], plain[:2])
    assert not any(np.any(leaf) for leaf in dormant[2])

    live(net.a.bed)
    inside = value_and_grads(net)
    outside = Net({"grad": "grad"}.get(how, OUTSIDE.get(how, "")))
    outside.a, outside.b = net.a, net.b
    close(inside, value_and_grads(outside))
    assert np.abs(inside[0] - plain[0]).max() > 1e-2
    # Such calls leave statistics out; that the variables stay as they were is seen by
    # a call from outside of all of them.
    net(X)
    seeds = net.a.bed.seeds.get_value()
    assert int(seeds.steps) == 0
    assert not np.any(seeds.statistics.count)


def test_transforms_of_nnx_carry_the_statistics() -> None:
    net = Net()
    make_growable(net, "a", 4, rngs=nnx.Rngs(2))
    nnx.jit(lambda net, x: net(x))(net, X)
    nnx.grad(lambda net: jnp.sum(net(X)))(net)
    nnx.remat(lambda net, x: net(x))(net, X)
    seeds = net.a.bed.seeds.get_value()
    assert int(seeds.steps) == 3
    np.testing.assert_array_equal(seeds.statistics.count, 3 * 2 * len(X))


# --- Forward mode.

ROOM = Custom(
    name="room",
    init=lambda key, width, features: {"w": jnp.zeros((features, width))},
    apply=lambda p, y: jnp.tanh(y @ p["w"]),
    reads="layer",
)


@pytest.mark.parametrize("layout", [EVEN, UNEVEN])
@pytest.mark.parametrize("turn", [0, 1, 2])
def test_both_rules_have_the_same_gradients(layout, turn) -> None:
    args = arguments(layout, (6,), "float32", turn)
    kinds = {"blueprint": args["blueprint"], "seed_of_slot": args["seed_of_slot"]}
    given = [args[name] for name in ("y", "bank", "alpha")]

    def f(forward_mode, y, bank, alpha):
        return blend(
            y,
            bank,
            alpha,
            args["beta"],
            **kinds,
            layout=layout,
            blueprints=KINDS,
            forward_mode=forward_mode,
        )[0]

    g = jnp.asarray(np.random.default_rng(2).normal(size=args["y"].shape), jnp.float32)
    out, pull = jax.vjp(functools.partial(f, False), *given)
    both, pull_both = jax.vjp(functools.partial(f, True), *given)
    np.testing.assert_array_equal(both, out)
    want = pull(g)
    close(pull_both(g), want, rtol=1e-4, atol=1e-5)
    # Forward and backward are transposes: <g, J v> = <J^T g, v>.
    v = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(3).normal(size=x.shape), x.dtype),
        given,
    )
    _, dot = jax.jvp(functools.partial(f, True), given, v)
    leaves = map(jax.tree.leaves, (want, v))
    products = [jnp.vdot(a, b) for a, b in zip(*leaves, strict=True)]
    np.testing.assert_allclose(jnp.vdot(g, dot), sum(products), rtol=1e-4)


@pytest.mark.parametrize("living", [False, True])
def test_forward_mode_works_in_evaluation(living: bool) -> None:
    net = Net()
    make_growable(net, "a", 4, blueprints=["residual_mlp", ROOM], rngs=nnx.Rngs(2))
    if living:
        live(net.a.bed, [Stage.FOSSILIZED, Stage.GRAFTING, Stage.TRAINING])
        seeds = net.a.bed.seeds.get_value()
        net.a.bed.seeds.set_value(
            dataclasses.replace(seeds, blueprint=seeds.blueprint.at[0].set(1))
        )
    net.eval()
    x = X[0]
    want = jax.jacrev(net)(x)
    close(jax.jacfwd(net)(x), want)
    close(jax.jit(jax.jacfwd(net))(x), want)
    close(jax.jvp(net, (x,), (jnp.ones(4),))[1], want.sum(1))
    close(jax.linearize(net, x)[1](jnp.ones(4)), want.sum(1))
    step = 1e-2 * jnp.eye(4)
    measured = [(net(x + d) - net(x - d)) / 2e-2 for d in step]
    np.testing.assert_allclose(jnp.stack(measured, 1), want, atol=2e-4)

    def loss(v):
        return jnp.sum(jnp.sin(net(v)))

    hessian = jax.hessian(loss)(x)
    close(hessian, jax.jacrev(jax.jacrev(loss))(x))
    close(hessian, hessian.T)
    assert np.abs(hessian).max() > 1e-2


def test_a_broken_blueprint_that_does_not_count_spoils_no_tangent() -> None:
    layer = ChunkedLayer(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), 4, rngs=nnx.Rngs(1))
    live(layer.bed, [Stage.TRAINING])
    layer.bed.bank.set_value(
        jax.tree.map(lambda x: x.at[0].set(jnp.inf), layer.bed.bank.get_value())
    )
    layer.eval()
    np.testing.assert_array_equal(jax.jacfwd(layer)(X[0]), jax.jacfwd(layer.base)(X[0]))
    close(jax.jacrev(layer)(X[0]), jax.jacrev(layer.base)(X[0]))


def test_forward_mode_in_training_is_refused_with_the_way_out() -> None:
    layer = ChunkedLayer(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), 4, rngs=nnx.Rngs(1))
    with pytest.raises(TypeError, match=r"call model\.eval\(\) .* in training mode"):
        jax.jvp(layer, (X,), (X,))
    view = nnx.view(layer, deterministic=True)
    close(jax.jvp(view, (X,), (X,))[1], X @ layer.kernel[...])


# --- Precision and strict flags.


def test_float64_goes_through_in_float64() -> None:
    with jax.enable_x64(True):
        wide = X.astype(jnp.float64)
        linear = nnx.Linear(
            4, 7, param_dtype=jnp.float64, dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
        layer = ChunkedLayer(
            linear, 3, blueprints=["residual_mlp", ROOM], rngs=nnx.Rngs(1)
        )
        before = jax.tree.map(lambda v: v.dtype, nnx.state(layer.bed))
        np.testing.assert_array_equal(layer(wide), linear(wide))
        live(layer.bed)
        out = layer(wide)
        assert out.dtype == jnp.float64
        assert jax.tree.map(lambda v: v.dtype, nnx.state(layer.bed)) == before
        # Derivatives to more than float32 knows.
        layer.eval()
        jacobian = jax.jacrev(layer)(wide[0])
        assert jacobian.dtype == jnp.float64
        np.testing.assert_allclose(jax.jacfwd(layer)(wide[0]), jacobian, rtol=1e-12)
        step = 1e-5 * jnp.eye(4)
        measured = [(layer(wide[0] + d) - layer(wide[0] - d)) / 2e-5 for d in step]
        np.testing.assert_allclose(jnp.stack(measured, 1), jacobian, atol=1e-9)
        layer.train()
        back = jax.grad(lambda v: jnp.sum(layer(v)))(wide)
        np.testing.assert_allclose(
            back, jax.vmap(jax.jacrev(layer))(wide).sum(1), rtol=1e-12
        )


@pytest.fixture
def strict():
    flags = {
        "jax_numpy_dtype_promotion": ("strict", "standard"),
        "jax_numpy_rank_promotion": ("raise", "allow"),
        "jax_debug_nans": (True, False),
    }
    for name, (value, _) in flags.items():
        jax.config.update(name, value)
    yield
    for name, (_, default) in flags.items():
        jax.config.update(name, default)


@pytest.mark.parametrize("incubation", ["task", "reconstruction"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strict_promotion_changes_nothing(strict, incubation, dtype) -> None:
    kinds = ["residual_mlp", "affine", ROOM]
    bed = SeedBed(7, 3, blueprints=kinds, incubation=incubation, rngs=nnx.Rngs(0))
    y = jnp.ones((5, 7), dtype)
    for stages in ([], [Stage.TRAINING, Stage.GRAFTING, Stage.FOSSILIZED]):
        live(bed, stages)
        for mode in (bed.train, bed.eval):
            mode()
            grads = nnx.grad(
                lambda bed, y: jnp.sum(bed(y)),
                argnums=(nnx.DiffState(0, BlueprintParam), 1),
            )(bed, y)
            assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    assert np.any(np.asarray(bed(y) != y))


def test_the_lifecycle_takes_strict_promotion(strict) -> None:
    config = lifecycle.LifecycleConfig(min_epochs=(0,) * len(Stage))
    signals = Signals.unmeasured(
        reconstruction_loss=0.0, worth=1.0, stability=1.0, mean_worth=1.0
    )
    step = jax.jit(lifecycle.step, static_argnums=3)
    for strategy in Strategy:
        seeds = init_seeds(40, 33, strategy)
        for stage in range(Stage.GERMINATED, Stage.FOSSILIZED + 1):
            with jax.debug_nans(False):  # NaN is "not measured" here
                commands = lifecycle.commands_for(40, {2: Stage(stage)})
                seeds, outcome = step(seeds, commands, signals, config)
            assert outcome[2] == Outcome.OK


def test_a_model_without_values_is_refused() -> None:
    abstract = nnx.eval_shape(
        lambda: ChunkedLayer(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), 4, rngs=nnx.Rngs(1))
    )
    for use in (
        lambda: build(nnx.Sequential(abstract), optax.sgd(0.1), optax.sgd(0.1)),
        lambda: grow_capacity(abstract, 2, rngs=nnx.Rngs(0)),
    ):
        with pytest.raises(
            ValueError, match=r"model must hold arrays, and .* shapes o"
        ):
            use()


# --- Export.


@pytest.mark.parametrize("living", [False, True])
def test_a_symbolic_batch_is_exported_for_every_platform(living: bool) -> None:
    net = Net()
    make_growable(net, "a", 4, implementation="xla", rngs=nnx.Rngs(2))
    if living:
        live(net.a.bed)
    net.eval()
    batch, length = export.symbolic_shape("batch, length")
    for shape, given in {(batch, 4): X, (batch, length, 4): X[None]}.items():
        exported = export.export(
            jax.jit(lambda x: net(x)), platforms=["cpu", "cuda", "tpu"]
        )(jax.ShapeDtypeStruct(shape, jnp.float32))
        assert exported.out_avals[0].shape == (*shape[:-1], 3)
        for rows in (given, given[:1]):
            close(exported.call(rows), net(rows))
