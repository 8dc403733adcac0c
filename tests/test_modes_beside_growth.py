"""Train and evaluation modes are the user's: `Growth` keeps what was set."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_own_loops import POLICY, QUICK, X, Y, pair_loss

from esper_jax import Growth, SeedBed, Stage, make_growable

BATCH = (X, Y)


class Net(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0, dropout=1)
        self.a = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.b = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.b(self.dropout(self.norm(self.a(x))))


def made() -> tuple[Any, Growth]:
    model: Any = Net()
    make_growable(model, "a", 2, rngs=nnx.Rngs(5))
    growth = Growth(
        model, optax.adam(2e-2), lifecycle_config=QUICK, controller_config=POLICY
    )
    return model, growth


@nnx.jit
def learn(model: Any, growth: Growth) -> None:
    """A step in which the host does not train."""
    loss, grads = nnx.value_and_grad(pair_loss, argnums=growth.argnums)(model, BATCH)
    growth.update(model, grads, loss=loss)


@nnx.jit
def held_out(model: Any) -> Any:
    return pair_loss(model, BATCH)


def mode(model: Any) -> tuple[Any, ...]:
    return (
        model.norm.use_running_average,
        model.dropout.deterministic,
        model.a.bed.deterministic,
    )


def variables(model: Any, kind: Any) -> list[np.ndarray]:
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, kind)))
    return [
        np.asarray(
            jax.random.key_data(leaf)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else leaf
        )
        for leaf in leaves
    ]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(map(np.array_equal, a, b))


def counted(model: Any) -> float:
    return float(model.a.bed.seeds.get_value().statistics.count.sum())


def call(model: Any) -> Any:
    return model(X)


VIEW = {"deterministic": True, "use_running_average": True}


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda m: call(nnx.view(m, **VIEW)), id="view"),
        pytest.param(lambda m: nnx.jit(call)(nnx.view(m, **VIEW)), id="view into jit"),
        pytest.param(
            lambda m: nnx.jit(lambda m: call(nnx.view(m, **VIEW)))(m), id="view in jit"
        ),
        pytest.param(
            lambda m: call(nnx.view(m, deterministic=True, only=SeedBed)),
            id="view of the beds alone",
        ),
    ],
)
def test_a_view_for_evaluation_counts_nothing(use: Any) -> None:
    model, _ = made()
    call(model)
    before = counted(model)
    assert before == X.shape[0] * 8  # every row and feature once
    use(model)
    assert counted(model) == before
    assert mode(model) == (False, False, False)
    call(model)
    assert counted(model) == 2 * before


def test_evaluation_mode_counts_nothing_and_is_kept() -> None:
    model, growth = made()
    model.eval()
    statistics = variables(model, nnx.BatchStat)
    learn(model, growth)
    growth.tick(model, held_out)
    assert mode(model) == (True, True, True)
    assert counted(model) == 0
    assert same(statistics, variables(model, nnx.BatchStat))


def test_a_frozen_batch_norm_stays_frozen() -> None:
    model, growth = made()
    model.norm.use_running_average = True
    optimizer = nnx.Optimizer(model, optax.sgd(1e-2), wrt=nnx.Param)
    statistics, seen = variables(model, nnx.BatchStat), []

    @nnx.jit
    def train_step(model: Any, optimizer: Any, growth: Growth) -> None:
        loss, grads = nnx.value_and_grad(pair_loss, argnums=growth.argnums)(
            model, BATCH
        )
        optimizer.update(model, grads)
        growth.update(model, grads, loss=loss)

    def evaluate(model: Any) -> Any:
        seen.append(mode(model))
        model.eval()
        return held_out(model)

    for _ in range(5):
        train_step(model, optimizer, growth)
        stage = growth.tick(model, evaluate).layers["a"].stage
        assert mode(model) == (True, False, False)
    assert Stage.EVALUATING in stage
    assert same(statistics, variables(model, nnx.BatchStat))
    # The user's mode comes to evaluate each time, but for the beds, which rest.
    assert len(seen) > 5
    assert set(seen) == {(True, False, True)}


def test_what_evaluate_does_to_the_model_is_lost() -> None:
    """Batch statistics, random streams and written parameters are as before."""
    model, growth = made()
    everything = nnx.Not(nnx.Any(nnx.PathContains("seeds"), nnx.PathContains("bank")))

    def evaluate(model: Any) -> Any:
        model.train()  # even the beds
        loss = pair_loss(model, BATCH)
        model.b.kernel[...] = jnp.zeros_like(model.b.kernel[...])
        return loss

    before = variables(model, everything)
    growth.tick(model, evaluate)
    assert same(before, variables(model, everything))
    assert counted(model) == 0


def test_worth_is_the_loss_without_the_seed_under_the_same_noise() -> None:
    """And the next step trains the model with the seed, not without it."""
    model, growth = made()
    for _ in range(4):
        learn(model, growth)
        report = growth.tick(model, held_out)
    stage = report.layers["a"].stage
    seed = int(np.flatnonzero(stage == Stage.STABILIZATION)[0])
    slot = int(model.a.bed.seeds.get_value().slot_of_seed[seed])
    alpha = report.layers["a"].alpha[seed]
    assert alpha == 1
    full, without = nnx.clone(model), nnx.clone(model)
    without.a.bed.probe[...] = without.a.bed.probe[...].at[slot].add(-alpha)
    # Dropout is on: both draw the same noise.
    expected = held_out(without) - held_out(full)
    report = growth.tick(model, held_out)
    np.testing.assert_allclose(
        report.layers["a"].signals.worth[seed], expected, rtol=1e-5
    )
    assert expected != 0
    np.testing.assert_array_equal(model.a.bed.probe[...], 0)
