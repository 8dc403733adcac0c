"""Every kind of optimizer for the host and for the banks, beside `Growth`.

What a table entry must do: learn, leave slots that do not learn as they are, bit for
bit, and run in one compiled step while seeds are born, grow and are kept.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from test_own_loops import POLICY, QUICK, Layers, X, Y, pair_loss

from esper_jax import Growth, make_growable

OPTIMIZERS = {
    "sgd": optax.sgd(1e-2, momentum=0.9),
    "adam": optax.adam(1e-2),
    "adamw with masked weight decay": optax.adamw(
        1e-2,
        weight_decay=0.1,
        mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    ),
    "reduce_on_plateau": optax.chain(
        optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=1)
    ),
    "polyak_sgd": optax.polyak_sgd(max_learning_rate=1e-2),
    "schedule_free": optax.contrib.schedule_free_sgd(1e-2),
    "MultiSteps": optax.MultiSteps(
        optax.adam(1e-2), every_k_schedule=2
    ).gradient_transformation(),
    "apply_if_finite": optax.apply_if_finite(optax.adam(1e-2), 3),
    "ema": optax.chain(optax.ema(0.9), optax.sgd(1e-2)),
    "multi_transform": optax.multi_transform(
        {"matrix": optax.adam(1e-2), "vector": optax.sgd(1e-2)},
        lambda params: jax.tree.map(
            lambda p: "matrix" if p.ndim > 1 else "vector", params
        ),
    ),
    "clip_by_global_norm": optax.chain(
        optax.clip_by_global_norm(0.1), optax.adam(1e-2)
    ),
}
NEEDS_VALUE = ("reduce_on_plateau", "polyak_sgd")
"""Need the loss as ``value``."""


def model_and_growth(bank: optax.GradientTransformation) -> tuple[Any, Growth]:
    model = Layers()
    make_growable(model, "a", 4, rngs=nnx.Rngs(5))
    growth = Growth(model, bank, lifecycle_config=QUICK, controller_config=POLICY)
    return model, growth


def train_step(model: Any, optimizer: Any, growth: Growth, batch: Any) -> Any:
    loss, grads = nnx.value_and_grad(pair_loss, argnums=growth.argnums)(model, batch)
    optimizer.update(model, grads, value=loss)
    growth.update(model, grads, loss=loss)
    return loss


def arrays(model: Any, part: str) -> dict[str, np.ndarray]:
    tree = getattr(model.a.bed, part)
    return {name: np.asarray(getattr(tree, name)[...]) for name in tree.names}


def check_run(host: Any, bank: Any) -> None:
    model, growth = model_and_growth(bank)
    optimizer = nnx.Optimizer(model, host, wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model: Any, optimizer: Any, growth: Growth, batch: Any) -> Any:
        traces.append(1)
        return train_step(model, optimizer, growth, batch)

    evaluate = nnx.jit(functools.partial(pair_loss, batch=(X, Y)))
    first = float(evaluate(model))
    start = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    learned = False
    for _ in range(5):
        seeds, before = model.a.bed.seeds.get_value(), arrays(model, "bank")
        for _ in range(4):
            loss = step(model, optimizer, growth, (X, Y))
            assert np.isfinite(loss)
        after = arrays(model, "bank")
        owners = np.asarray(seeds.seed_of_slot)
        busy = np.where(owners >= 0, np.asarray(seeds.stage)[owners], 0) >= 2
        for name, old in before.items():
            # Bits, so that 0.0 and -0.0 differ.
            same = (old.view(np.uint32) == after[name].view(np.uint32)).reshape(
                len(busy), -1
            )
            assert same[~busy].all(), name
            learned |= not same[busy].all()
        growth.tick(model, evaluate)
    assert len(traces) == 1, "growth made the step compile again"
    host_now = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), host_now, start)
    assert min(jax.tree.leaves(moved)) > 0
    assert learned, "no slot learned anything"
    assert float(evaluate(model)) < first


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n not in NEEDS_VALUE])
def test_of_the_host_and_of_the_banks(name: str) -> None:
    check_run(OPTIMIZERS[name], OPTIMIZERS[name])


@pytest.mark.parametrize("name", NEEDS_VALUE)
def test_of_the_host_with_the_loss_as_extra_argument(name: str) -> None:
    check_run(OPTIMIZERS[name], optax.adam(1e-2))


@pytest.mark.parametrize("name", NEEDS_VALUE)
def test_of_the_banks_with_the_loss_as_extra_argument(name: str) -> None:
    check_run(optax.sgd(1e-2), OPTIMIZERS[name])


def test_schedule_free_evaluates_with_its_own_parameters() -> None:
    """The user's evaluate may put other host parameters in; the seeds stay as is."""
    model, growth = model_and_growth(optax.adam(1e-2))
    optimizer = nnx.Optimizer(
        model, optax.contrib.schedule_free_sgd(1e-1), wrt=nnx.Param
    )
    step = nnx.jit(train_step)
    for _ in range(3):
        step(model, optimizer, growth, (X, Y))

    def evaluate(model: Any) -> Any:
        params = nnx.as_pure(nnx.state(model, nnx.Param))
        averaged = optax.contrib.schedule_free_eval_params(
            nnx.as_pure(optimizer.opt_state), params
        )
        nnx.update(model, averaged)
        return pair_loss(model, (X, Y))

    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    report = growth.tick(model, evaluate)
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.to_pure_dict(nnx.state(model, nnx.Param)),
        before,
    )
    assert float(report.loss) == float(evaluate(nnx.clone(model)))
    assert float(report.loss) != float(pair_loss(nnx.clone(model), (X, Y)))


def test_exponential_moving_average_of_the_model_is_evaluated_with_its_seeds() -> None:
    """An average beside the loop, as people keep one, is what ``evaluate`` measures."""
    model, growth = model_and_growth(optax.adam(1e-2))
    optimizer = nnx.Optimizer(model, optax.sgd(1e-1), wrt=nnx.Param)
    average = nnx.state(nnx.clone(model), nnx.Param)
    for _ in range(2):
        train_step(model, optimizer, growth, (X, Y))
        average = jax.tree.map(
            lambda a, b: 0.5 * a + 0.5 * b, average, nnx.state(model, nnx.Param)
        )

    def evaluate(model: Any) -> Any:
        nnx.update(model, average)
        return pair_loss(model, (X, Y))

    report = growth.tick(model, evaluate)
    own = nnx.clone(model)
    nnx.update(own, average)
    assert float(report.loss) == float(pair_loss(own, (X, Y)))
    assert float(report.loss) != float(jnp.asarray(pair_loss(model, (X, Y))))
