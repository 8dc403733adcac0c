"""The NNX loop with `Growth`, `jax.jit` on split states and `fit`: the same run.

The rows come in the order of `fit`. The newborns are drawn from one key, and the policy
draws nothing with these numbers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_own_loops import POLICY, QUICK, products, rows

from esper_jax import Growth, Stage, build, fit
from esper_jax.growth.parts import values_of
from esper_jax.hosts import MLP
from esper_jax.policy.interface import SAMPLED
from esper_jax.train.loop import epoch_order

ROWS, BATCH, TICKS = 32, 8, 8
X = rows(ROWS, 4)
TRAIN = (X, products(X))
HELD_OUT = (rows(24, 4, seed=1), products(rows(24, 4, seed=1)))


def make_model() -> MLP:
    return MLP(4, (8,), 3, num_seeds=2, rngs=nnx.Rngs(0))


def make_growth(model: Any) -> Growth:
    return Growth(
        model,
        optax.adam(2e-2),
        lifecycle_config=QUICK,
        controller_config=POLICY,
        measure=SAMPLED,  # as `build` does
        measure_every=1,
    )


def loss_fn(model: Any, batch: Any) -> Any:
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def evaluate(model: Any) -> Any:
    x, y = HELD_OUT
    return loss_fn(model, HELD_OUT), jnp.mean(model(x).argmax(-1) == y)


def train_step(model: Any, optimizer: Any, growth: Growth, batch: Any) -> None:
    loss, grads = nnx.value_and_grad(loss_fn, argnums=growth.argnums)(model, batch)
    optimizer.update(model, grads)
    growth.update(model, grads, loss=loss)


def batches(epoch: int) -> Any:
    order = np.asarray(epoch_order(0, jnp.int32(epoch), jnp.int32(0), ROWS))
    for start in range(0, ROWS, BATCH):
        taken = order[start : start + BATCH]
        yield TRAIN[0][taken], TRAIN[1][taken]


Run = tuple[list[Any], dict[str, Any]]


def nnx_run() -> Run:
    model = make_model()
    growth, reports = make_growth(model), []
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    step = nnx.jit(train_step)
    for epoch in range(TICKS):
        for batch in batches(epoch):
            step(model, optimizer, growth, batch)
        reports.append(growth.tick(model, evaluate))
    return reports, values_of(model)


def split_run() -> Run:
    model = make_model()
    growth, reports = make_growth(model), []
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer, growth))

    @jax.jit
    def step(state: Any, batch: Any) -> Any:
        parts = nnx.merge(graph, state)
        train_step(*parts, batch)
        return nnx.state(parts)

    for epoch in range(TICKS):
        for batch in batches(epoch):
            state = step(state, batch)
        model, optimizer, growth = nnx.merge(graph, state)
        reports.append(growth.tick(model, evaluate))
        state = nnx.state((model, optimizer, growth))
    return reports, values_of(model)


def fit_run() -> Run:
    program = build(
        make_model(),
        optax.adam(1e-2),
        optax.adam(2e-2),
        lifecycle_config=QUICK,
        controller_config=POLICY,
    )
    births = make_growth(make_model()).state.get_value().growth.rng
    state = dataclasses.replace(program.init(jax.random.key(0)), rng=births)
    reports: list[Any] = []
    state = fit(
        program,
        state,
        TRAIN,
        HELD_OUT,
        ticks=TICKS,
        batch_size=BATCH,
        on_tick=lambda state, report: reports.append(report),
    )
    return reports, values_of(program.model(state))


@functools.cache
def run_of(loop: Callable[[], Run]) -> Run:
    return loop()


def test_the_run_keeps_a_seed() -> None:
    reports, _ = run_of(nnx_run)
    assert Stage.FOSSILIZED in reports[-1].layers["layers/0"].stage


@pytest.mark.parametrize("loop", [split_run, fit_run])
def test_same_stages_at_every_tick_and_same_numbers(loop: Callable[[], Run]) -> None:
    (reports, values), (others, other_values) = run_of(nnx_run), run_of(loop)
    assert len(reports) == len(others) == TICKS
    for report, other in zip(reports, others, strict=True):
        for name, layer in report.layers.items():
            np.testing.assert_array_equal(layer.stage, other.layers[name].stage)
            np.testing.assert_array_equal(layer.outcome, other.layers[name].outcome)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
            report,
            other,
        )
    assert values.keys() == other_values.keys()
    for name, value in values.items():
        np.testing.assert_allclose(
            np.asarray(value, np.float64),
            np.asarray(other_values[name], np.float64),
            rtol=1e-3,
            atol=1e-5,
            err_msg=name,
        )
