"""JAX's strict flags over whole lives: nothing raises, and no bit changes."""

import contextlib
import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from test_own_loops import POLICY, QUICK, X, Y, pair_loss

from esper_jax import Governor, Growth, build, fit, harvest, make_growable
from esper_jax.lifecycle.stages import Stage
from esper_jax.trees import state_hash

SGD = optax.sgd(0.05, momentum=0.9)  # Adam itself promotes: decay**count
STRICT = {
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
}


@contextlib.contextmanager
def flags(values):
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.a = nnx.Linear(X.shape[-1], 8, rngs=rngs)
        self.bn = nnx.BatchNorm(8, rngs=rngs)
        self.b = nnx.Linear(8, 8, rngs=rngs)
        self.out = nnx.Linear(8, int(Y.max()) + 1, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.b(nnx.relu(self.bn(self.a(x))))))


def growable():
    model = Net()
    options = {"blueprints": ("residual_mlp", "glu")}
    make_growable(model, "a", 2, rngs=nnx.Rngs(1), **options)
    make_growable(model, "b", 2, rngs=nnx.Rngs(2), blueprints=("glu",))
    return model


POLICIES = dataclasses.replace(
    POLICY, what="hybrid", budget=200, max_training=2, births=2
)
"""What the policy computes of, as far as one run goes."""


def made():
    return build(
        growable(), SGD, SGD, lifecycle_config=QUICK, controller_config=POLICIES
    )


def life(program):
    state = fit(
        program,
        program.init(jax.random.key(0)),
        (X, Y),
        [(X[:12], Y[:12]), (X[12:], Y[12:])],
        ticks=10,
        batch_size=8,
        governor=Governor(program, num_classes=3),
    )
    harvest(program.model(state))(X)
    return state


def test_whole_lives_under_strict_flags_are_the_same():
    program = made()
    state = life(program)
    stages = np.concatenate([s.stage for s in state.seeds.values()])
    assert Stage.FOSSILIZED in stages
    with flags({"jax_debug_nans": True}):
        made()  # growable layers too
        assert state_hash(life(program)) == state_hash(state)
    with flags(STRICT):
        assert state_hash(life(made())) == state_hash(state)


def test_growth_beside_a_loop_under_strict_promotion():
    with flags(STRICT):
        model = growable()
        growth = Growth(model, SGD, lifecycle_config=QUICK, controller_config=POLICY)
        optimizer = nnx.Optimizer(model, SGD, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, growth):
            loss, grads = nnx.value_and_grad(pair_loss, argnums=growth.argnums)(
                model, (X, Y)
            )
            optimizer.update(model, grads)
            growth.update(model, grads, loss=loss)

        for _ in range(3):
            step(model, optimizer, growth)
            report = growth.tick(model, lambda model: pair_loss(model, (X, Y)))
        assert Stage.GRAFTING in report.layers["a"].stage


def test_debug_nans_tells_which_parameter_became_nan():
    program = build(growable(), SGD, SGD)
    state = program.init(jax.random.key(0))
    x = X.copy()
    x[3] = np.nan
    with (
        flags({"jax_debug_nans": True}),
        pytest.raises(FloatingPointError, match=r"parameter 'a/base/.*' became NaN"),
    ):
        program.step(state, (x, Y))
