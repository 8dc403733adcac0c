"""Failures that growth must not have, each provoked on purpose."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from esper_jax.blueprints import Custom
from esper_jax.hosts import MLP
from esper_jax.lifecycle.grafting import GraftConfig
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.stages import Stage
from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.memory import Reason
from esper_jax.train.program import build
from esper_jax.train.scan import scan_fit

# Short lives; the gates of worth are those of the original system.
LIFE = LifecycleConfig(
    min_epochs=(0, 0, 3, 3, 1, 3, 5, 0, 3, 0, 3),
    reconstruction_threshold=1e9,
    min_stability=-1e9,
    min_final_stability=-1e9,
    grafting=GraftConfig(ramp_duration=3),
)
EAGER = ControllerConfig(
    when="period",
    period=2,
    births=2,
    max_training=4,
    evaluation_limit=8,
    tuning_limit=8,
)
ROWS = 128


def table_lookup(rows):
    """A blueprint that knows the training rows by heart: it learns a correction for
    each by its number, which stands in the first feature of the chunk.

    On other rows, whose number is another's, what it adds is noise.
    """

    def init(key, width):
        return jnp.zeros((rows, width))

    def apply(table, y):
        number = jnp.clip(jnp.round(y[:, 0] * rows), 0, rows - 1).astype(jnp.int32)
        return table[number]

    return Custom(name="table", init=init, apply=apply)


class Numbered(nnx.Module):
    """A linear model beside which a chunk carries the row's number to the seeds."""

    def __init__(self, rngs):
        self.inner = MLP(
            4,
            (4,),
            2,
            num_seeds=1,
            capacity=1,
            blueprints=[table_lookup(ROWS)],
            activation="identity",
            rngs=rngs,
        )
        # The first feature is the number, and is left alone.
        self.inner.layers[0].base = _KeepFirst(rngs)

    def __call__(self, x):
        return self.inner(x)


class _KeepFirst(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.linear(x).at[:, 0].set(x[:, 0])


def numbered(seed, noise):
    """Rows with their number first; the label is a line's side, some flipped."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, 4)).astype(np.float32)
    y = (x[:, 1] + x[:, 2] > 0).astype(np.int32)
    y = np.where(rng.uniform(size=ROWS) < noise, 1 - y, y).astype(np.int32)
    x[:, 0] = np.arange(ROWS) / ROWS
    return jnp.asarray(x), jnp.asarray(y)


def run(model, data, held_out, policy, ticks, life=LIFE, rate=1e-2):
    program = build(
        model,
        optax.adam(rate),
        optax.adam(3e-2),
        lifecycle_config=life,
        controller_config=policy,
    )
    fit = functools.partial(
        scan_fit, program, data=data, held_out=held_out, ticks=ticks, batch_size=32
    )
    return jax.jit(fit)(program.init(jax.random.key(0)))


def stages(report):
    """By tick, over the seeds of all layers."""
    return np.concatenate(
        [np.asarray(layer.stage) for layer in report.ticks.layers.values()], axis=1
    )


def test_a_seed_that_helps_on_training_data_only_is_culled():
    train, held_out = numbered(1, 0.3), numbered(2, 0.3)
    model = Numbered(nnx.Rngs(0))
    _, report = run(model, train, held_out, EAGER, ticks=40)
    layer = next(iter(report.ticks.layers.values()))
    evaluated = np.asarray(layer.stage) == Stage.EVALUATING
    assert evaluated.any(), "no seed came as far as being judged"
    worth = np.asarray(layer.signals.worth)[1:][evaluated[:-1]]
    assert np.all(worth < 0)
    lived = stages(report)
    assert (lived >= Stage.CULLED).any()
    assert not (lived == Stage.FOSSILIZED).any()
    # It did help on the training data: without it, their loss is higher.
    grafting = np.flatnonzero((lived == Stage.EVALUATING).any(axis=1))[0]
    before = np.flatnonzero((lived == Stage.TRAINING).any(axis=1))[0]
    losses = np.asarray(report.ticks.train_loss)
    assert losses[grafting] < losses[before] - 0.1


def test_worth_is_a_paired_counterfactual_and_not_before_against_after():
    # A useless seed lives while the host learns fast: the loss falls by much, and none
    # of it is the seed's.
    model = MLP(4, (8,), 2, num_seeds=4, blueprints=["noop"], rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(256, 4)), jnp.float32)
    y = (x[:, 0] * x[:, 1] > 0).astype(jnp.int32)
    _, report = run(model, (x[:128], y[:128]), (x[128:], y[128:]), EAGER, ticks=30)
    layer = next(iter(report.ticks.layers.values()))
    counted = np.asarray(layer.stage) == Stage.EVALUATING
    worth = np.asarray(layer.signals.worth)[1:][counted[:-1]]
    assert worth.size
    np.testing.assert_array_equal(worth, 0.0)
    loss = np.asarray(report.ticks.loss)
    assert loss[-1] < loss[0] - 0.1
    assert not (stages(report) == Stage.FOSSILIZED).any()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_random_labels_end_with_no_fossil(seed):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(256, 8)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 4, 256), jnp.int32)
    model = MLP(
        8,
        (16,),
        4,
        num_seeds=4,
        capacity=4,
        blueprints=["context"],
        rngs=nnx.Rngs(seed),
    )
    _, report = run(model, (x[:128], y[:128]), (x[128:], y[128:]), EAGER, ticks=60)
    lived = stages(report)
    assert (lived == Stage.EVALUATING).any()
    assert not (lived == Stage.FOSSILIZED).any()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"budget": 0}, Reason.BUDGET_SPENT),
        pytest.param(
            {"target_accuracy": 0.0}, Reason.TARGET_MET, marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_that_may_not_grow_does_not_and_says_why(changes, reason):
    model = MLP(4, (8,), 2, num_seeds=4, rngs=nnx.Rngs(0))
    data = numbered(1, 0.0)
    policy = dataclasses.replace(EAGER, **changes)
    _, report = run(model, data, data, policy, ticks=4)
    assert not stages(report).any()
    assert set(np.asarray(report.ticks.reason)) == {reason}
    layer = next(iter(report.ticks.layers.values()))
    assert np.all(np.asarray(layer.target) == -1)
