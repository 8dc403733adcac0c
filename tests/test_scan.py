"""A run inside one scan is the run of the ordinary loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from esper_jax.hosts import MLP
from esper_jax.lifecycle.grafting import GraftConfig
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.stages import Stage
from esper_jax.policy.config import ControllerConfig
from esper_jax.train.loop import fit
from esper_jax.train.program import build
from esper_jax.train.scan import scan_fit, start_from

TICKS = 24
QUICK = LifecycleConfig(
    min_epochs=(0, 0, 2, 2, 1, 1, 1, 0, 1, 0, 1),
    reconstruction_threshold=1e9,
    min_stability=-1e9,
    min_improvement=-1e9,
    min_final_stability=-1e9,
    grafting=GraftConfig(ramp_duration=2),
)


def make_model(rngs):
    return MLP(6, (8,), 3, num_seeds=4, capacity=2, rngs=rngs)


def make_data(rows, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 6)).astype(np.float32)
    y = np.argmax(x[:, :3] * x[:, 3:], axis=1).astype(np.int32)
    return jnp.asarray(x), jnp.asarray(y)


TRAIN, HELD_OUT = make_data(70, 1), make_data(40, 2)


@pytest.fixture(scope="module")
def program():
    return build(
        make_model(nnx.Rngs(0)),
        optax.adam(1e-2),
        optax.adam(1e-2),
        lifecycle_config=QUICK,
        controller_config=ControllerConfig(patience=2, threshold=0.5),
        eval_batch=32,
    )


@pytest.fixture(scope="module")
def run(program):
    return jax.jit(
        functools.partial(
            scan_fit,
            program,
            data=TRAIN,
            held_out=HELD_OUT,
            ticks=TICKS,
            batch_size=16,
            watched=HELD_OUT,
        )
    )


def test_every_tick_is_that_of_the_ordinary_loop(program, run):
    reports = []
    state = fit(
        program,
        program.init(jax.random.key(0)),
        TRAIN,
        HELD_OUT,
        ticks=TICKS,
        batch_size=16,
        seed=5,
        on_tick=lambda state, report: reports.append(report),
    )
    scanned, report = run(program.init(jax.random.key(0)), seed=5)
    want = jax.tree.map(lambda *leaves: np.stack(leaves), *reports)
    stages = np.concatenate([layer.stage for layer in want.layers.values()], axis=1)
    assert np.any(stages == Stage.FOSSILIZED)
    paths = jax.tree_util.tree_leaves_with_path((want, state))
    got = jax.tree.leaves((report.ticks, scanned))
    for (path, a), b in zip(paths, got, strict=True):
        name = jax.tree_util.keystr(path)
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(b, a, rtol=2e-3, atol=2e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(b, a, err_msg=name)
    np.testing.assert_allclose(report.watched[:, 0], report.ticks.loss, rtol=1e-4)


@pytest.mark.slow
def test_vmapped_runs_are_the_single_ones(program, run):
    keys = jax.random.split(jax.random.key(1), 3)
    start = start_from(program, make_model)
    seeds = jnp.arange(3)
    many, reports = jax.jit(jax.vmap(lambda s, seed: run(s, seed=seed)))(
        jax.vmap(start)(keys), seeds
    )
    assert not np.allclose(reports.ticks.loss[0], reports.ticks.loss[1])
    one, report = run(start(keys[1]), seed=1)
    for name, layer in report.ticks.layers.items():
        np.testing.assert_array_equal(reports.ticks.layers[name].stage[1], layer.stage)
        np.testing.assert_array_equal(
            many.seeds[name].seed_of_slot[1], one.seeds[name].seed_of_slot
        )
    np.testing.assert_allclose(
        reports.ticks.loss[1], report.ticks.loss, rtol=2e-3, atol=2e-4
    )


@pytest.mark.parametrize(
    ("name", "value"), [("ticks", 0), ("batch_size", 0), ("batch_size", 71)]
)
def test_arguments_that_do_not_fit_are_named(program, name, value):
    options = {"ticks": 1, "batch_size": 16, name: value}
    with pytest.raises(ValueError, match=name):
        scan_fit(program, None, TRAIN, HELD_OUT, **options)
