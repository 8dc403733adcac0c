"""JAX's strict flags over whole lives: nothing raises, and no bit changes."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_own_loops import POLICY, QUICK, X, Y, pair_loss

from esper_jax import Governor, Growth, build, fit, harvest, make_growable
from esper_jax.blueprints import group, lora, neurons
from esper_jax.growth import growth_functions
from esper_jax.lifecycle.stages import Stage
from esper_jax.policy import TrialConfig, trial, trial_lives
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


def own_life(jit=True, ticks=10):
    """Growth beside a loop of one's own: what is left, and the stages."""
    model = growable()
    growth = Growth(model, SGD, lifecycle_config=QUICK, controller_config=POLICIES)
    optimizer = nnx.Optimizer(model, SGD, wrt=nnx.Param)

    def step(model, optimizer, growth, x=X):
        loss, grads = nnx.value_and_grad(pair_loss, argnums=growth.argnums)(
            model, (x, Y)
        )
        optimizer.update(model, grads)
        growth.update(model, grads, loss=loss)

    step = nnx.jit(step) if jit else step
    for _ in range(ticks):
        for _ in range(5 if jit else 1):
            step(model, optimizer, growth)
        report = growth.tick(model, lambda model: pair_loss(model, (X, Y)))
    stages = np.concatenate([layer.stage for layer in report.layers.values()])
    return (model, optimizer, growth), stages, step


def test_a_whole_life_beside_a_loop_under_debug_nans():
    plain, stages, _ = own_life()
    assert Stage.FOSSILIZED in stages
    with flags({"jax_debug_nans": True}):
        own, _, step = own_life()
        assert state_hash(nnx.state(own)) == state_hash(nnx.state(plain))
        own_life(jit=False, ticks=2)
    # The flag still finds what is wrong, and where: no NaN of growth is in its way.
    x = X.copy()
    x[3] = np.nan
    with (
        flags({"jax_debug_nans": True}),
        pytest.raises(FloatingPointError) as error,
    ):
        step(*own, x)
    if jax.__version_info__ < (0, 11):  # later ones find it in the compiled step alone
        assert "de-optimized function did not produce" not in str(error.value)


def test_dictionaries_under_debug_nans():
    growth = growth_functions(
        {"hidden": {"features": 8, "num_seeds": 2}},
        SGD,
        lifecycle_config=QUICK,
        controller_config=POLICY,
    )
    first = jax.random.normal(jax.random.key(0), (X.shape[-1], 8))

    def loss(learned, grown, train=True):
        h, seeds = growth.apply({**grown, **learned}, "hidden", X @ first, train)
        return pair_loss(lambda x: h[:, :3], (X, Y)), seeds

    @jax.jit
    def step(grown):
        learned = {name: grown[name] for name in ("bank", "probe")}
        grad = jax.value_and_grad(loss, has_aux=True)
        (value, seeds), grads = grad(learned, grown)
        return growth.update({**grown, "seeds": seeds}, grads, value)

    with flags({"jax_debug_nans": True}):
        grown = growth.init(jax.random.key(0))
        for _ in range(3):
            grown, report = growth.tick(step(grown), lambda g: loss({}, g, False)[0])
    assert Stage.GRAFTING in report.layers["hidden"].stage
    assert np.isfinite(report.train_loss)


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


def trial_life(blueprints, incubation):
    """A trial of adapters, what it keeps to the end, folded where it can be."""
    rngs, x = nnx.Rngs(0), np.float32(X[:9])
    y = np.sin(x @ np.ones((x.shape[-1], 3), np.float32))
    model = nnx.Sequential(
        nnx.Linear(x.shape[-1], 6, rngs=rngs), nnx.relu, nnx.Linear(6, 3, rngs=rngs)
    )
    options = {"blueprints": blueprints, "incubation": incubation, "rngs": rngs}
    make_growable(model, nnx.Linear, 2, capacity=2, **options)
    anything = -np.inf
    growth = Growth(
        model,
        SGD,
        wrt=nnx.Param,
        policy=trial(TrialConfig(ticks=1, budget=60, rent=anything)),
        lifecycle_config=trial_lives(
            tuning=1,
            cull_delta=anything,
            min_improvement=anything,
            fold="trained" if incubation == "task" else "never",
        ),
    )

    def loss(model):
        return jnp.mean((model(x) - y) ** 2)

    @nnx.jit
    def step(model, growth):
        value, grads = nnx.value_and_grad(loss, argnums=growth.argnums)(model)
        growth.update(model, grads, loss=value)

    measure, stages = nnx.jit(loss), []
    for _ in range(9):
        step(model, growth)
        report = growth.tick(model, measure)
        stages += [int(s) for layer in report.layers.values() for s in layer.stage]
    return state_hash(nnx.state(model)), stages


@pytest.mark.parametrize(
    ("blueprints", "incubation"),
    [
        ([lora(rank=2, start="gradient")], "task"),
        ([group(hidden=3)], "reconstruction"),
        ([neurons(hidden=3)], "bounded"),
    ],
)
def test_a_trial_of_adapters_under_strict_flags_is_the_same(blueprints, incubation):
    plain = trial_life(blueprints, incubation)
    assert Stage.FOSSILIZED in plain[1] or Stage.FINE_TUNING in plain[1]
    with flags(STRICT):
        assert trial_life(blueprints, incubation) == plain
