"""Linear fossils become part of the weights of their layer when they fossilise."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from esper_jax import ChunkedLayer, Growth, LifecycleConfig, Stage, build, harvest
from esper_jax.blueprints import Adapter, affine, group, lora, low_rank, residual_mlp
from esper_jax.growth.folds import fold_fossils, folds_of
from esper_jax.growth.parts import put_values, split_model, values_of
from esper_jax.layers import make_growable
from esper_jax.layers.bed import SeedBed
from esper_jax.lifecycle.state import transitions
from esper_jax.monitor.words import drain, folds
from esper_jax.policy import TrialConfig, trial, trial_lives

FOSSILS, LEARNING = (0, 2), 3
"""Seeds of the made-up layers below; seed 1 is dormant."""


def linear(dtype: Any = jnp.float32, use_bias: bool = True) -> nnx.Linear:
    # 10 features in 4 chunks: two of 3, two of 2.
    return nnx.Linear(5, 10, use_bias=use_bias, param_dtype=dtype, rngs=nnx.Rngs(0))


def conv(size: int) -> nnx.Conv:
    return nnx.Conv(5, 10, (size, size), rngs=nnx.Rngs(0))


def stack(kinds: Any) -> Any:
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def make(rngs: nnx.Rngs) -> ChunkedLayer:
        base = nnx.Linear(5, 10, rngs=rngs)
        return ChunkedLayer(base, 4, blueprints=kinds, rngs=rngs)

    return make(nnx.Rngs(0))


biased = Adapter(name="biased", hidden=2, reads="input", bias=True, scaling=0.5)


def filled(base: Any, kinds: Any) -> nnx.List:
    """A model of one layer whose seeds live, with parameters that are not 0."""
    if base is stack:
        layer = stack(kinds)
    else:
        layer = ChunkedLayer(base(), 4, blueprints=kinds, rngs=nnx.Rngs(1))
    bed = layer.bed
    seeds = bed.seeds.get_value()
    of = np.array([2, 0, -1, 3])  # the seed of each slot
    stages = np.full(4, Stage.FOSSILIZED)
    stages[[1, LEARNING]] = Stage.DORMANT, Stage.TRAINING
    kind = np.arange(4) // 2 % len(kinds)  # seeds 0 and 2 hold different ones

    def put(old: Any, new: Any) -> Any:
        return jnp.broadcast_to(jnp.asarray(new, old.dtype), old.shape)

    bed.seeds.set_value(
        seeds.replace(
            stage=put(seeds.stage, stages),
            blueprint=put(seeds.blueprint, kind),
            seed_of_slot=put(seeds.seed_of_slot, of),
            slot_of_seed=put(seeds.slot_of_seed, [1, -1, 0, 3]),
        )
    )
    keys = iter(jax.random.split(jax.random.key(5), 99))
    bed.bank.set_value(
        jax.tree.map(
            lambda x: 0.3 * jax.random.normal(next(keys), x.shape), bed.bank.get_value()
        )
    )
    return nnx.List([layer])


@pytest.mark.parametrize(
    ("base", "kinds", "shape"),
    [
        (linear, [lora(rank=2, scaling=2.0)], (7, 5)),
        (linear, [affine(), low_rank()], (7, 5)),
        (lambda: linear(jnp.bfloat16), [affine()], (7, 5)),
        (lambda: linear(use_bias=False), [low_rank()], (7, 5)),
        (lambda: conv(1), [lora(), biased], (2, 4, 4, 5)),
        (lambda: conv(3), [affine()], (2, 4, 4, 5)),
        (stack, [biased], (2, 7, 5)),
    ],
)
def test_folded_weights_are_those_of_harvest(
    base: Any, kinds: Any, shape: tuple[int, ...]
) -> None:
    model = filled(base, kinds)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)

    def run(layer: Any, x: Any) -> np.ndarray:
        call = nnx.vmap(lambda m, x: m(x)) if base is stack else type(layer).__call__
        return np.asarray(call(layer, x), np.float32)

    plain = harvest(model)[0]  # another implementation, on the host
    parts = split_model(model)
    found = folds_of(model, parts, LifecycleConfig(fold="trained"))
    values = values_of(model)
    seeds, banks = parts.take(values, "seeds"), parts.take(values, "bank")
    before = run(model[0], x)
    folded = jax.jit(lambda *a: fold_fossils(parts, found, *a))(seeds, banks, values)
    for name in ("kernel", "bias"):
        own = getattr(plain, name)
        if own is None:
            continue
        new, was = folded.weights[f"0/base/{name}"], getattr(model[0].base, name)
        assert new.dtype == was.dtype
        assert name == "bias" or np.any(np.asarray(new != was))
        tight = {"rtol": 2e-6, "atol": 2e-6}
        if new.dtype == jnp.bfloat16:  # one rounding to its 8 bits
            tight = {"rtol": 2**-7, "atol": 1e-6}
        np.testing.assert_allclose(
            np.asarray(new, np.float32), np.asarray(own[...], np.float32), **tight
        )
    for layer, which in folded.which.items():
        assert np.flatnonzero(which).tolist() == list(FOSSILS)
        state = folded.seeds[layer]
        assert state.stage.tolist() == [0, 0, 0, Stage.TRAINING]
        assert state.slot_of_seed.tolist() == [-1, -1, -1, 3]
        assert state.seed_of_slot.tolist() == [-1, -1, -1, 3]
        assert transitions(state, 0)[-1] == (Stage.FOSSILIZED, Stage.DORMANT)
    put_values(model, {**folded.weights, **parts.joined("seeds", folded.seeds)})
    after = run(model[0], x)
    size = np.abs(before).max()
    bfloat = getattr(model[0].base.kernel, "dtype", None) == jnp.bfloat16
    assert np.abs(after - before).max() <= (1e-2 if bfloat else 2e-6) * size


def test_what_is_not_finite_stays_a_fossil_and_nothing_folded_keeps_bits() -> None:
    model = filled(linear, [lora(rank=1)])
    bank = model[0].bed.bank.get_value()
    w1 = bank.custom["lora"]["w1"].at[0].set(jnp.nan)  # slot 0, of seed 2
    model[0].bed.bank.set_value(
        bank.replace(custom={"lora": {**bank.custom["lora"], "w1": w1}})
    )
    parts, values = split_model(model), values_of(model)
    found = folds_of(model, parts, LifecycleConfig(fold="trained"))
    banks = parts.take(values, "bank")
    fold = jax.jit(lambda *a: fold_fossils(parts, found, *a))
    folded = fold(parts.take(values, "seeds"), banks, values)
    assert np.flatnonzero(folded.which["0"]).tolist() == [0]
    assert np.all(np.isfinite(folded.weights["0/base/kernel"]))
    zeros = {"0/base/kernel": jnp.full((5, 10), -0.0), "0/base/bias": jnp.zeros(10)}
    again = fold(folded.seeds, banks, zeros)
    assert np.all(np.signbit(again.weights["0/base/kernel"]))


@pytest.mark.parametrize(
    ("kinds", "folded"),
    [
        ([lora(), affine()], [1]),  # an adapter would change what affine reads
        ([lora(), biased], [0, 1]),
        ([affine(), residual_mlp()], [0]),
        ([affine(), group()], None),
        ([residual_mlp()], None),
    ],
)
def test_only_what_changes_nothing_else_is_folded(kinds: Any, folded: Any) -> None:
    model = filled(linear, kinds)
    parts = split_model(model)
    if folded is not None:
        found = folds_of(model, parts, LifecycleConfig(fold="trained"))
        assert list(found["0"].kinds) == folded
        assert not folds_of(model, parts, LifecycleConfig())
        return
    with pytest.raises(ValueError, match="no layer has fossils that can be folded"):
        folds_of(model, parts, LifecycleConfig(fold="trained"))


def test_a_frozen_host_is_changed_on_purpose_alone() -> None:
    model = filled(linear, [lora()])
    config = trial_lives(fold="trained")
    with pytest.raises(
        ValueError, match=r"'0/base/bias' does not: a frozen host keeps"
    ):
        Growth(model, optax.sgd(1.0), wrt=None, lifecycle_config=config)
    Growth(model, optax.sgd(1.0), lifecycle_config=config)
    with pytest.raises(ValueError, match="fold must be one of"):
        LifecycleConfig(fold="always")  # type: ignore[arg-type]
    shared = linear()
    both = nnx.List([ChunkedLayer(shared, 2, rngs=nnx.Rngs(0)), shared])
    with pytest.raises(ValueError, match="nothing else uses"):
        Growth(both, optax.sgd(1.0), lifecycle_config=config)


X = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
Y = np.sin(X @ np.random.default_rng(1).normal(size=(6, 6))).astype(np.float32)


def objective(model: Any, batch: Any = None) -> Any:
    return jnp.mean((model(X) - Y) ** 2)


def host() -> nnx.Sequential:
    rngs = nnx.Rngs(0)
    layers = [nnx.Linear(6, 6, rngs=rngs), nnx.tanh, nnx.Linear(6, 6, rngs=rngs)]
    model = nnx.Sequential(*layers)
    make_growable(model, nnx.Linear, 3, blueprints=[lora(rank=1)], rngs=rngs)
    return model


def test_growth_folds_at_the_tick_and_shrinks_to_the_plain_model() -> None:
    model = host()
    growth = Growth(
        model,
        optax.adam(1e-2),
        policy=trial(TrialConfig(ticks=1, rent=-np.inf)),
        lifecycle_config=trial_lives(
            tuning=1, fold="trained", cull_delta=-np.inf, min_improvement=-np.inf
        ),
    )
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, growth: Any, optimizer: Any) -> None:
        loss, grads = nnx.value_and_grad(objective, argnums=growth.argnums)(model)
        optimizer.update(model, grads)
        growth.update(model, grads, loss=loss)

    loss = nnx.jit(objective)
    for _ in range(20):
        for _ in range(4):
            step(model, growth, optimizer)
        out, moments = np.asarray(model(X)), nnx.to_pure_dict(nnx.state(optimizer))
        report = growth.tick(model, loss)
        if any(np.any(x.folded) for x in report.layers.values()):
            break
    kernels = [layer.kernel[...] for layer in (model.layers[0], model.layers[2])]
    np.testing.assert_allclose(model(X), out, rtol=2e-6, atol=2e-6)
    again = nnx.to_pure_dict(nnx.state(optimizer))
    jax.tree.map(
        np.testing.assert_array_equal, moments["opt_state"], again["opt_state"]
    )
    for layer in report.layers.values():
        assert layer.stage.tolist() == [Stage.DORMANT] * 3
        assert [e.target for e in drain(layer, layer.signals, growth.recipe.gates)] == [
            Stage.FOSSILIZED
        ] * 3
        assert next(e.text for e in folds(layer)).startswith("seed 0: folded into")
    seeds = [n for _, n in nnx.iter_graph(model) if isinstance(n, SeedBed)]
    assert all(np.all(bed.seeds.get_value().seed_of_slot < 0) for bed in seeds)
    assert set(growth.shrink(model).values()) == {(3, 0)}  # the plain model's program
    np.testing.assert_array_equal(harvest(model).layers[0].kernel[...], kernels[0])
    step(model, growth, optimizer)
    growth.tick(model, loss)


def test_a_program_folds_in_its_tick_without_compiling_again() -> None:
    program = build(
        host(),
        optax.adam(1e-3),
        optax.adam(1e-2),
        objective=objective,
        policy=trial(TrialConfig(ticks=1, rent=-np.inf)),
        lifecycle_config=trial_lives(
            tuning=1, fold="trained", cull_delta=-np.inf, min_improvement=-np.inf
        ),
    )
    state = program.init(jax.random.key(0))
    for _ in range(9):
        state = program.step(state, X)
        moments = jax.tree.map(np.asarray, state.opt_state)
        loss = float(program.evaluate(state, X)[0])
        state, report = program.tick(state, X)
        if np.any(report.layers["layers/0"].folded):
            break
    assert np.all(report.layers["layers/0"].folded)
    assert float(program.evaluate(state, X)[0]) == pytest.approx(loss, rel=1e-5)
    jax.tree.map(np.testing.assert_array_equal, moments, state.opt_state)
    assert program.recompiles() == 0
    state, changed = program.shrink(state)
    assert changed == {"layers/0": (3, 1), "layers/2": (3, 1)}
    with pytest.raises(ValueError, match="others than those that train"):
        build(
            host(),
            optax.adam(1e-3),
            optax.adam(1e-2),
            eval_params=lambda opt, params: params,
            lifecycle_config=trial_lives(fold="trained"),
        )


def test_the_program_follows_the_shapes_and_not_the_layers() -> None:
    sizes = []
    for layers in (1, 4):
        model = nnx.List([filled(linear, [lora(), biased])[0] for _ in range(layers)])
        parts, values = split_model(model), values_of(model)
        found = folds_of(model, parts, LifecycleConfig(fold="trained"))
        assert len(found) == layers
        seeds, banks = parts.take(values, "seeds"), parts.take(values, "bank")
        weights = {w: values[w] for fold in found.values() for w in fold.weights}
        traced = jax.make_jaxpr(lambda *a, p=parts, f=found: fold_fossils(p, f, *a))(
            seeds, banks, weights
        )
        [folds_here] = [e for e in traced.eqns if e.primitive.name == "cond"]
        sizes.append(str(folds_here.params["branches"][1]).count("dot_general["))
    assert sizes[0] == sizes[1] > 0
