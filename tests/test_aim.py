"""Parts that start in the direction of the gradient."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from esper_jax import Growth, build, make_growable
from esper_jax.blueprints import Adapter, aim, collected, group, lora
from esper_jax.hosts import MLP
from esper_jax.layers.bed import SeedBed
from esper_jax.lifecycle.stages import Stage
from esper_jax.policy import TrialConfig, trial, trial_lives

RNG = np.random.default_rng(0)
BATCHES = RNG.integers(0, 7, (3, 32, 2))
TARGETS = RNG.normal(size=(3, 32, 5)).astype(np.float32)


class Host(nnx.Module):
    """An embedding of 7 ids and a linear layer, 2 x 6 to 5 features."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(7, 6, rngs=rngs)
        self.out = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, ids: Any) -> Any:
        return self.out(jnp.tanh(self.embed(ids)).reshape(len(ids), 12))


def grown(**config: Any) -> tuple[Any, ...]:
    model = Host(nnx.Rngs(0))
    plain = nnx.clone(model)
    parts = [lora(rank=2, start="gradient")]
    make_growable(model, (nnx.Linear, nnx.Embed), 2, blueprints=parts, rngs=nnx.Rngs(1))
    growth = Growth(
        model,
        optax.adam(1e-2),
        wrt=None,
        policy=trial(TrialConfig(**config)),
        lifecycle_config=trial_lives(),
        rngs=nnx.Rngs(2),
    )

    @nnx.jit
    def step(model: Any, growth: Any, ids: Any, target: Any) -> Any:
        def loss_fn(model: Any) -> Any:
            return jnp.mean((model(ids) - target) ** 2)

        loss, grads = nnx.value_and_grad(loss_fn, argnums=growth.argnums)(model)
        growth.update(model, grads, loss=loss)

    return plain, model, growth, step


def held_out(model: Any) -> Any:
    return jnp.mean((model(BATCHES[0]) - TARGETS[0]) ** 2)


def sums_of_gradients(plain: Any) -> dict[str, np.ndarray]:
    """Of the kernels, over the batches, by JAX's own derivative of the plain host."""

    def loss(params: Any, rest: Any, ids: Any, target: Any) -> Any:
        return jnp.mean((nnx.merge(graph, params, rest)(ids) - target) ** 2)

    graph, params, rest = nnx.split(plain, nnx.Param, ...)
    total = jax.tree.map(jnp.zeros_like, params)
    for ids, target in zip(BATCHES, TARGETS, strict=True):
        total = jax.tree.map(jnp.add, total, jax.grad(loss)(params, rest, ids, target))
    return {"embed": total.embed.embedding[...], "out": total.out.kernel[...]}


def bank_of(model: Any, name: str) -> Any:
    return getattr(model, name).bed.bank.get_value().custom["lora"]


def test_parts_begin_as_the_left_singular_vectors() -> None:
    plain, model, growth, step = grown(ticks=1)
    before = model(BATCHES[0])
    growth.tick(model, held_out)
    for ids, target in zip(BATCHES, TARGETS, strict=True):
        step(model, growth, ids, target)
    np.testing.assert_array_equal(model(BATCHES[0]), before)  # to the bit
    sums, directions, squares = sums_of_gradients(plain), {}, {}
    for name, total in sums.items():
        bank = bank_of(model, name)
        sketch = jnp.einsum("df,khf->kdh", total, bank["w2"])
        np.testing.assert_allclose(-bank["w1"], sketch, rtol=2e-4, atol=1e-7)
        directions[name] = np.linalg.svd(np.concatenate(sketch, axis=-1))[0][:, :4]
        squares[name] = float(jnp.sum(sketch**2))
    report = growth.tick(model, held_out)
    for name, total in sums.items():
        layer, bank = report.layers[name], bank_of(model, name)
        assert layer.stage.tolist() == [Stage.TRAINING] * 2
        w1 = np.concatenate(list(bank["w1"]), axis=-1)  # 4 of 5 directions
        np.testing.assert_allclose(abs(directions[name].T @ w1), np.eye(4), atol=1e-2)
        np.testing.assert_allclose(w1.T @ w1, np.eye(4), atol=1e-5)
        np.testing.assert_array_equal(bank["w2"], 0)
        # Most of what any 4 directions can hold; the first part has the larger.
        values = np.linalg.svd(total, compute_uv=False) ** 2
        held = np.sum((w1.T @ total) ** 2, axis=1)
        assert held.sum() > 0.8 * values[:4].sum()
        assert held[:2].sum() > held[2:].sum()
        weight = float(layer.signals.weight_gradient[0])
        # Of 4 columns of the sketch and 3 steps.
        np.testing.assert_allclose(weight, squares[name] / 4 / 9, rtol=1e-3)
    moments = jax.tree.leaves(growth.state.get_value().moments)
    assert all(not np.any(m) for m in moments)
    np.testing.assert_array_equal(model(BATCHES[0]), before)


@pytest.mark.parametrize("scaling", [1.0, 0.25])
def test_the_norm_of_the_gradient_is_estimated_without_bias(scaling: float) -> None:
    plain, model, growth, _ = grown()
    growth.tick(model, held_out)
    bed = model.out.bed
    bank, state = bed.bank.get_value(), bed.seeds.get_value()
    gradient = sums_of_gradients(plain)["out"]
    exact = np.sum(gradient**2)
    parts = [lora(rank=2, start="gradient", scaling=scaling).bound(12)]

    def estimate(key: Any) -> Any:
        w2 = parts[0].fresh(key, 5, 5)["w2"]
        w1 = -scaling * gradient @ w2.T
        slots = {**bank.custom["lora"], "w1": jnp.stack([w1, -w1])}
        return collected(bank.replace(custom={"lora": slots}), state, parts)

    estimates = jax.vmap(estimate)(jax.random.split(jax.random.key(0), 4000))
    assert abs(estimates.mean() / exact - 1) < 4 * estimates.std() / exact / 4000**0.5


def test_newborns_wait_for_a_gradient() -> None:
    _, model, growth, step = grown(ticks=1)
    for _ in range(3):
        report = growth.tick(model, held_out)
        assert set(report.layers["out"].stage.tolist()) == {Stage.GERMINATED}
    bad = jnp.full_like(TARGETS[0], jnp.nan)  # a step that must not be collected
    step(model, growth, BATCHES[0], bad)
    step(model, growth, BATCHES[1], TARGETS[1])
    report = growth.tick(model, held_out)
    assert set(report.layers["out"].stage.tolist()) == {Stage.TRAINING}
    assert np.all(np.isfinite(bank_of(model, "out")["w1"]))


@pytest.mark.parametrize("budget", [46, 100])
def test_placement_keeps_the_steepest_for_their_parameters(budget: int) -> None:
    _, model, growth, step = grown(judge="gradient", budget=budget, ticks=2)
    growth.tick(model, held_out)
    for ids, target in zip(BATCHES, TARGETS, strict=True):
        step(model, growth, ids, target)
    report = growth.tick(model, held_out)
    costs = {"embed": 2 * (7 + 6), "out": 2 * (12 + 5)}
    rates = {
        (name, i): float(layer.signals.weight_gradient[i]) / costs[name] / (i + 1)
        for name, layer in report.layers.items()
        for i in range(2)
    }
    expected, left = set(), budget
    for name, i in sorted(rates, key=rates.__getitem__, reverse=True):
        if costs[name] <= left:
            expected.add((name, i))
            left -= costs[name]
    kept = {
        (name, i)
        for name, layer in report.layers.items()
        for i in np.flatnonzero(layer.stage == Stage.TRAINING)
    }
    assert kept == expected
    stages = np.concatenate([layer.stage for layer in report.layers.values()])
    assert set(stages.tolist()) == {Stage.TRAINING, Stage.CANCELLED}
    start = float(held_out(model))
    for _ in range(12):
        for ids, target in zip(BATCHES, TARGETS, strict=True):
            step(model, growth, ids, target)
        report = growth.tick(model, held_out)
    stages = np.concatenate([layer.stage for layer in report.layers.values()])
    assert np.sum(stages == Stage.FINE_TUNING) == len(expected)
    assert float(held_out(model)) < 0.9 * start


def test_a_program_does_as_a_loop_of_ones_own() -> None:
    parts = [lora(rank=1, start="gradient")]
    model = MLP(6, (8, 8), 3, num_seeds=2, blueprints=parts, rngs=nnx.Rngs(0))
    lives = trial_lives()
    policy = trial(TrialConfig(judge="gradient", budget=30))
    program = build(
        model, optax.sgd(0.0), optax.adam(1e-2), policy=policy, lifecycle_config=lives
    )
    rows = RNG.normal(size=(32, 6)).astype(np.float32)
    data = rows, (rows[:, 0] > 0).astype(np.int32)
    state = program.init(jax.random.key(0))
    seen = []
    for _ in range(4):
        state, report = program.tick(state, data)
        seen.append(np.concatenate([x.stage for x in report.layers.values()]))
        for _ in range(4):
            state = program.step(state, data)
    assert set(seen[0].tolist()) == {Stage.GERMINATED}
    assert set(seen[1].tolist()) == {Stage.TRAINING, Stage.CANCELLED}
    assert set(seen[3].tolist()) == {Stage.GRAFTING, Stage.DORMANT}
    w1 = next(iter(state.banks.values())).custom["lora"]["w1"]
    assert np.all(np.isfinite(w1))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="start must be 'random' or 'gradient'"):
        lora(start="steepest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes a part of two matrices"):
        Adapter(name="a", hidden=2, bias=True, start="gradient")
    with pytest.raises(ValueError, match="judge must be one of"):
        TrialConfig(judge="luck")  # type: ignore[arg-type]
    model = Host(nnx.Rngs(0))
    for incubation in ("reconstruction", "bounded"):
        with pytest.raises(ValueError, match="incubation must be 'task'"):
            make_growable(
                model,
                nnx.Linear,
                2,
                blueprints=[lora(start="gradient")],
                incubation=incubation,
                rngs=nnx.Rngs(1),
            )
    make_growable(model, nnx.Linear, 2, blueprints=[group()], rngs=nnx.Rngs(1))
    policy = trial(TrialConfig(judge="gradient"))
    with pytest.raises(ValueError, match="reads what parts with start='gradient'"):
        Growth(model, optax.adam(1e-2), policy=policy)


def two_kinds() -> tuple[Any, Any, Any, list[Any]]:
    """A layer of whose four seeds two hold each kind, all newborn; its kernel's sum."""
    kinds = [
        lora(rank=2, start="gradient").bound(12),
        Adapter(name="other", hidden=1, reads="input", scaling=0.5, start="gradient"),
    ]
    kinds[1] = kinds[1].bound(12)
    bed = SeedBed(9, 4, blueprints=kinds, inputs=12, rngs=nnx.Rngs(0))
    every = jnp.arange(4, dtype=jnp.int32)
    state = bed.seeds.get_value()
    state = dataclasses.replace(
        state,
        stage=jnp.full_like(state.stage, Stage.GERMINATED),
        blueprint=jnp.asarray([1, 0, 1, 0], state.blueprint.dtype),
        slot_of_seed=every,
        seed_of_slot=every,
    )
    gradient = jnp.asarray(np.random.default_rng(3).normal(size=(12, 9)), jnp.float32)
    bank, custom = bed.bank.get_value(), {}
    for kind in kinds:
        keys = jax.random.split(jax.random.key(1), 4)
        w2 = jax.vmap(lambda key, kind=kind: kind.fresh(key, 3, 9)["w2"])(keys)
        w1 = -kind.scaling * jnp.einsum("df,khf->kdh", gradient, w2)
        custom[kind.name] = {"w1": w1, "w2": w2}
    return gradient, dataclasses.replace(bank, custom=custom), state, kinds


def test_kinds_of_one_layer_share_the_directions() -> None:
    _, bank, state, kinds = two_kinds()
    starts = jnp.ones(4, bool)
    new = aim(bank, jax.random.key(0), state, starts, kinds).custom
    w1 = np.concatenate(
        [
            *np.asarray(new["lora"]["w1"])[[1, 3]],
            *np.asarray(new["other"]["w1"])[[0, 2]],
        ],
        axis=-1,
    )
    np.testing.assert_allclose(w1.T @ w1, np.eye(6), atol=1e-5)
    sketch = np.concatenate(
        [
            *np.asarray(bank.custom["lora"]["w1"])[[1, 3]],
            *np.asarray(bank.custom["other"]["w1"] / 0.5)[[0, 2]],
        ],
        axis=-1,
    )
    expected = np.linalg.svd(sketch, full_matrices=False)[0]
    np.testing.assert_allclose(abs(expected.T @ w1), np.eye(6), atol=1e-3)


def test_the_norm_is_that_of_a_tick_however_long_a_newborn_waits() -> None:
    _, bank, state, kinds = two_kinds()
    once = float(collected(bank, state, kinds))
    thrice = jax.tree.map(lambda x: x, bank)
    for kind in kinds:
        own = thrice.custom[kind.name]
        thrice.custom[kind.name] = {**own, "w1": 3 * own["w1"]}
    older = dataclasses.replace(
        state, epochs_in_stage=jnp.full_like(state.epochs_in_stage, 2)
    )
    np.testing.assert_allclose(float(collected(thrice, older, kinds)), once, rtol=1e-5)
