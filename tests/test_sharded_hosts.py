"""Hosts whose parameters lie on a mesh keep their shardings while they grow."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_own_loops import POLICY, QUICK, X, Y, pair_loss

from esper_jax import Growth, build, fit, harvest, make_growable
from esper_jax.checkpoint.checkpointer import Checkpointer
from esper_jax.layers.corrections import CorrectedLayer
from esper_jax.lifecycle.stages import Stage
from esper_jax.policy.interface import SAMPLED

ADAM = optax.adam(1e-2)
HOW = {
    "a/base/kernel": PartitionSpec(None, "model"),
    "a/base/bias": PartitionSpec("model"),
    "b/kernel": PartitionSpec("model", None),
}


class Net(nnx.Module):
    def __init__(self, rngs, divided=True):
        def over(init, *axes):
            return nnx.with_partitioning(init, axes) if divided else init

        kernel, zeros = nnx.initializers.lecun_normal(), nnx.initializers.zeros
        self.a = nnx.Linear(
            4,
            8,
            kernel_init=over(kernel, None, "model"),
            bias_init=over(zeros, "model"),
            rngs=rngs,
        )
        self.b = nnx.Linear(8, 3, kernel_init=over(kernel, "model", None), rngs=rngs)

    def __call__(self, x):
        h = nnx.relu(self.a(x))
        rows = jax.typeof(h).sharding
        if not rows.mesh.explicit_axes:
            return self.b(h)
        # On explicit axes, a sum over a divided axis must say where it goes.
        spec = PartitionSpec(rows.spec[0])
        return jnp.dot(h, self.b.kernel[...], out_sharding=spec) + self.b.bias[...]


BOTH_KINDS = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(AxisType.Auto, id="auto", marks=pytest.mark.slow),
        pytest.param(AxisType.Explicit, id="explicit"),
    ],
)


def mesh(kind):
    return jax.make_mesh((2, 2), ("data", "model"), (kind, kind))


def growable(**options):
    model = Net(nnx.Rngs(0), **options)
    make_growable(model, "a", 2, rngs=nnx.Rngs(1))
    return model


def check(arrays, on):
    for name, spec in HOW.items():
        array = arrays[name]
        assert array.sharding.is_equivalent_to(NamedSharding(on, spec), array.ndim), (
            name,
            array.sharding,
        )


def params_of(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(path): variable.get_value() for path, variable in flat}


def policies():
    return {"lifecycle_config": QUICK, "controller_config": POLICY}


@BOTH_KINDS
def test_growth_beside_a_loop_keeps_them(kind):
    on = mesh(kind)
    with jax.set_mesh(on):
        model = growable()
        check(params_of(model), on)
        growth = Growth(model, ADAM, measure=SAMPLED, measure_every=1, **policies())
        optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)

        traces = []

        @nnx.jit
        def step(model, optimizer, growth, batch):
            traces.append(1)
            grad = nnx.value_and_grad(pair_loss, argnums=growth.argnums)
            loss, grads = grad(model, batch)
            optimizer.update(model, grads)
            growth.update(model, grads, loss=loss)

        batch = jax.device_put((X, Y), NamedSharding(on, PartitionSpec("data")))
        for _ in range(3):
            step(model, optimizer, growth, batch)
            report = growth.tick(model, lambda model: pair_loss(model, batch))
        check(params_of(model), on)
    assert Stage.GRAFTING in report.layers["a"].stage
    signals = report.layers["a"].signals
    assert np.isfinite(
        [*signals.chunk_gradient, signals.grad_norm, signals.drift]
    ).all()
    assert len(traces) == 1, "growth made the step compile again"


@BOTH_KINDS
def test_build_and_fit_and_checkpoints_keep_them(tmp_path, kind):
    def run(model):
        program = build(model, ADAM, ADAM, **policies())
        state = program.init(jax.random.key(0))
        first = state.params, state.opt_state[0].mu
        state = fit(program, state, (X, Y), (X, Y), ticks=10, batch_size=8)
        return program, first, state

    _, _, alone = run(growable(divided=False))
    on = mesh(kind)
    with jax.set_mesh(on):
        program, first, state = run(growable())
        # The moments lie as their parameters do, from the beginning.
        for arrays in (*first, state.params, state.opt_state[0].mu):
            check(arrays, on)
        with Checkpointer(tmp_path) as checkpoints:
            checkpoints.save(1, state)
            back = checkpoints.restore(program.init(jax.random.key(1))).state
        check(back.params, on)
        check(back.opt_state[0].nu, on)
        # Batches may be divided too.
        batch = jax.device_put((X, Y), NamedSharding(on, PartitionSpec("data")))
        check(program.step(back, batch).params, on)
        grown = program.model(state)
        check_harvested(grown, batch[0])
    assert Stage.FOSSILIZED in state.seeds["a"].stage
    np.testing.assert_array_equal(state.seeds["a"].stage, alone.seeds["a"].stage)
    for name, value in alone.params.items():
        np.testing.assert_allclose(state.params[name], value, rtol=1e-3, atol=1e-4)


def check_harvested(grown, x):
    plain = harvest(grown)
    assert any(isinstance(node, CorrectedLayer) for _, node in nnx.iter_graph(plain))
    expected = nnx.view(grown, deterministic=True)(x)
    out = plain(x)
    assert out.sharding == expected.sharding
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
