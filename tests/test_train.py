"""Step, tick and fit on a small model: the maths of growth inside training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from esper_jax import Growth, lifecycle
from esper_jax.growth.measure import asked_for_worth, measure
from esper_jax.growth.parts import split_model
from esper_jax.hosts import MLP
from esper_jax.layers.bed import SeedBed
from esper_jax.layers.variables import BlueprintParam
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import Outcome, Stage
from esper_jax.lifecycle.state import init_seeds
from esper_jax.optim import scale_by_run_schedule
from esper_jax.policy.config import ControllerConfig
from esper_jax.train import loop
from esper_jax.train.loop import fit
from esper_jax.train.program import build, classification
from esper_jax.trees import state_hash

LAYERS = ("layers/0", "layers/1")
QUICK = LifecycleConfig(
    min_epochs=(0, 0, 2, 2, 1, 1, 1, 0, 1, 0, 1),
    reconstruction_threshold=1e9,
    min_stability=-1e9,
    min_improvement=-1e9,
    min_final_stability=-1e9,
    grafting=lifecycle.GraftConfig(ramp_duration=2),
)
POLICY = ControllerConfig(patience=1, threshold=0.9)


def make_model():
    return MLP(6, (8, 10), 3, num_seeds=4, capacity=2, rngs=nnx.Rngs(0))


def make_data(rows, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 6)).astype(np.float32)
    return x, np.argmax(x[:, :3] * x[:, 3:], axis=1).astype(np.int32)


TRAIN, HELD_OUT = make_data(64, 1), make_data(40, 2)


@pytest.fixture(scope="module")
def program():
    return build(
        make_model(),
        optax.adam(1e-2),
        optax.adam(1e-3),
        lifecycle_config=QUICK,
        controller_config=POLICY,
        eval_batch=32,
    )


def start(program):
    return program.init(jax.random.key(0))


def put(state, layer, seed, stage, slot=0, bank=None):
    """The state with one seed in some stage, owning a slot."""
    seeds = state.seeds[layer]
    seeds = dataclasses.replace(
        seeds,
        stage=seeds.stage.at[seed].set(stage),
        slot_of_seed=seeds.slot_of_seed.at[seed].set(slot),
        seed_of_slot=seeds.seed_of_slot.at[slot].set(seed),
    )
    banks = dict(state.banks)
    if bank is not None:
        banks[layer] = bank
    return dataclasses.replace(state, seeds={**state.seeds, layer: seeds}, banks=banks)


def random_bank(bank, scale=0.3):
    rng = np.random.default_rng(9)  # numpy's: nothing to compile
    return jax.tree.map(
        lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype), bank
    )


def same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(
            np.asarray(x).view(np.uint32), np.asarray(y).view(np.uint32)
        )


def rows_of(step):
    rows = slice(16 * (step % 4), 16 * (step % 4) + 16)
    return TRAIN[0][rows], TRAIN[1][rows]


@functools.cache
def plain_training(most=6):
    """Parameters after each number of steps of the same model without any seed, as a
    Flax user would train it."""
    model = make_model()
    for layer in model.layers:
        layer.enabled = False
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    host = nnx.filter_state(params, lambda path, _: "bed" not in path)
    beds = nnx.filter_state(params, lambda path, _: "bed" in path)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(host, opt_state, x, y):
        def objective(host):
            return jnp.mean(classification(nnx.merge(graph, host, beds, rest)(x), y)[0])

        updates, opt_state = optimizer.update(jax.grad(objective)(host), opt_state)
        return optax.apply_updates(host, updates), opt_state

    def by_name(host):
        flat = nnx.to_flat_state(host)
        return {"/".join(map(str, path)): v.get_value() for path, v in flat}

    opt_state = optimizer.init(host)
    after = [by_name(host)]
    for i in range(most):
        host, opt_state = step(host, opt_state, *rows_of(i))
        after.append(by_name(host))
    return after


def train_steps(program, state, steps):
    for i in range(steps):
        state = program.step(state, rows_of(i))
    return state


def test_dormant_seeds_leave_training_bit_identical(program):
    state = train_steps(program, start(program), 6)
    same_bits(state.params, plain_training()[6])


def test_a_seed_in_training_leaves_the_host_bit_identical_and_learns(program):
    state = put(start(program), "layers/0", 2, Stage.TRAINING)
    before = jax.device_get(state.banks["layers/0"])
    state = train_steps(program, state, 6)
    same_bits(state.params, plain_training()[6])
    moved = np.abs(np.asarray(state.banks["layers/0"].w2) - before.w2).max(axis=(1, 2))
    assert moved[0] > 1e-4
    assert moved[1] == 0
    assert state.seeds["layers/0"].gain[0] != 0


@pytest.mark.parametrize(
    ("stage", "learns", "counts"),
    [
        (Stage.GERMINATED, False, False),
        (Stage.STABILIZATION, False, True),
        (Stage.EVALUATING, False, True),
        (Stage.FINE_TUNING, True, True),
        (Stage.FOSSILIZED, False, True),
    ],
)
def test_what_each_stage_trains(program, stage, learns, counts):
    state = start(program)
    bank = random_bank(state.banks["layers/1"])
    before = jax.device_get(bank)
    state = train_steps(program, put(state, "layers/1", 1, stage, bank=bank), 2)
    moved = not np.array_equal(state.banks["layers/1"].w1[0], before.w1[0])
    assert moved == learns
    plain = plain_training()[2]
    differs = any(not np.array_equal(v, plain[k]) for k, v in state.params.items())
    assert differs == counts


def test_worth_is_the_held_out_loss_without_the_seed_less_the_loss_with_it(program):
    def grown():
        state = start(program)
        for layer in LAYERS:
            bank = random_bank(state.banks[layer], 1.0)
            state = put(state, layer, 3, Stage.EVALUATING, slot=1, bank=bank)
        return state

    as_it_is, _ = program.evaluate(grown(), HELD_OUT)
    _, report = program.tick(grown(), HELD_OUT)
    np.testing.assert_allclose(report.loss, as_it_is, rtol=1e-6)
    for layer in LAYERS:
        without, _ = program.evaluate(
            put(grown(), layer, 3, Stage.TRAINING, 1), HELD_OUT
        )
        delta = report.layers[layer].signals.worth
        np.testing.assert_allclose(delta[3], without - as_it_is, rtol=1e-4, atol=1e-6)
        assert abs(delta[3]) > 1e-3
        assert np.isnan(delta[:3]).all()  # nothing to take away


def test_evaluation_counts_every_row_once(program):
    state = start(program)
    model = program.model(state)
    model.eval()
    loss, accuracy = program.evaluate(state, HELD_OUT)  # 40 rows, 32 at a time
    losses, scores = classification(model(HELD_OUT[0]), HELD_OUT[1])
    np.testing.assert_allclose(loss, losses.mean(), rtol=1e-6)
    np.testing.assert_allclose(accuracy, scores.mean(), rtol=1e-6)


def test_a_newborn_is_the_identity_with_fresh_moments(program):
    state = start(program)
    state = dataclasses.replace(
        state,
        banks={n: random_bank(b) for n, b in state.banks.items()},
        bank_opt=jax.tree.map(lambda leaf: leaf + 1, state.bank_opt),
    )
    for _ in range(3):  # two ticks make a plateau
        state = train_steps(program, state, 1)
        state, report = program.tick(state, HELD_OUT)
        births = [
            (name, seed)
            for name, layer in report.layers.items()
            for seed in np.flatnonzero(np.asarray(layer.stage) == Stage.GERMINATED)
        ]
        if births:
            break
    [(name, seed)] = births
    slot = int(state.seeds[name].slot_of_seed[seed])
    other = 1 - slot
    bank, moments = state.banks[name], state.bank_opt[name]
    assert not np.any(bank.w2[slot])
    assert np.any(bank.w1[slot])
    assert np.any(bank.w2[other])
    for leaf in jax.tree.leaves(moments):
        assert not np.any(leaf[slot])
        assert np.any(leaf[other])


def test_a_whole_life_without_recompiling(program):
    seen = set()

    def watch(state, report):
        for layer in report.layers.values():
            accepted = layer.outcome == Outcome.OK
            seen.update(map(Stage, layer.stage[accepted].tolist()))

    state = fit(program, start(program), TRAIN, HELD_OUT, ticks=1, batch_size=16)
    compiled = program.recompiles()  # other tests call it with other kinds of arrays
    state = fit(program, state, TRAIN, HELD_OUT, ticks=30, batch_size=16, on_tick=watch)
    needed = set(Stage) - {Stage.DORMANT, Stage.CANCELLED, Stage.ROLLED_BACK}
    assert needed - {Stage.CULLED} <= seen
    assert program.recompiles() == compiled
    for seeds in state.seeds.values():
        owners = np.asarray(seeds.seed_of_slot)
        owned = owners[owners >= 0]
        np.testing.assert_array_equal(
            np.asarray(seeds.slot_of_seed)[owned], np.flatnonzero(owners >= 0)
        )


def test_training_goes_on_where_it_stopped(program):
    def through(ticks, state):
        return fit(program, state, TRAIN, HELD_OUT, ticks=ticks, batch_size=16, seed=5)

    whole = state_hash(through(6, start(program)))
    assert state_hash(through(6, through(3, start(program)))) == whole
    assert state_hash(through(5, start(program))) != whole


def test_a_gradient_that_is_not_finite_stops_its_slot_alone(program):
    state = put(start(program), "layers/0", 0, Stage.TRAINING, slot=0)
    state = put(state, "layers/0", 1, Stage.TRAINING, slot=1)
    bank = random_bank(state.banks["layers/0"])
    bank = dataclasses.replace(bank, w1=bank.w1.at[0, 0, 0].set(jnp.nan))
    state = put(state, "layers/0", 0, Stage.TRAINING, slot=0, bank=bank)
    before = jax.device_get(bank)
    moments = jax.device_get(state.bank_opt["layers/0"])
    state = train_steps(program, state, 3)
    bank = state.banks["layers/0"]
    np.testing.assert_array_equal(bank.w2[0], before.w2[0])
    assert np.isfinite(bank.w2[1]).all()
    assert not np.array_equal(bank.w2[1], before.w2[1])
    for old, new in zip(
        jax.tree.leaves(moments),
        jax.tree.leaves(state.bank_opt["layers/0"]),
        strict=True,
    ):
        np.testing.assert_array_equal(new[0], old[0])
    assert state.seeds["layers/0"].errors.tolist() == [3, 0]
    same_bits(state.params, plain_training()[3])
    state, report = program.tick(state, HELD_OUT)
    signals = report.layers["layers/0"].signals
    assert signals.error_rate.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert state.seeds["layers/0"].error_count.tolist() == [3, 0, 0, 0]


def test_signals_of_a_tick(program):
    state = train_steps(program, start(program), 4)
    state, report = program.tick(state, HELD_OUT)
    signals = report.layers["layers/0"].signals
    assert signals.grad_norm > 0
    assert signals.stability == 1
    assert np.isnan(np.asarray(signals.reconstruction_loss)).all()
    health = np.asarray(state.seeds["layers/0"].health)
    assert ((health > 0) & (health <= 1)).all()
    assert int(state.seeds["layers/0"].steps) == 0
    state = train_steps(program, state, 4)
    old, new = report.loss, program.evaluate(state, HELD_OUT)[0]
    weights = jax.device_get(state.params["layers/0/base/linear/kernel"])
    mean = jax.device_get(state.monitor.host_mean["layers/0"])
    bias = jax.device_get(state.params["layers/0/base/linear/bias"])
    kernel_mean = mean["layers/0/base/linear/kernel"]
    bias_mean = mean["layers/0/base/linear/bias"]
    state, report = program.tick(state, HELD_OUT)
    signals = report.layers["layers/0"].signals
    away = np.sqrt(
        ((weights - kernel_mean) ** 2).sum() + ((bias - bias_mean) ** 2).sum()
    )
    scale = np.sqrt((kernel_mean**2).sum() + (bias_mean**2).sum())
    np.testing.assert_allclose(signals.drift, away / scale, rtol=1e-5)
    variance = 0.9 * 0.1 * (new - old) ** 2
    np.testing.assert_allclose(signals.loss_variance, variance, rtol=1e-3)
    np.testing.assert_allclose(
        signals.stability, 1 - np.sqrt(variance) / old, rtol=1e-4
    )


@pytest.mark.parametrize("first", [-2.0, np.inf])
def test_stability_of_a_loss_below_zero_and_after_an_infinite_one(program, first):
    monitor = program.init(jax.random.key(0)).monitor
    monitor = dataclasses.replace(
        monitor,
        initial_loss=jnp.float32(first),
        loss_mean=jnp.float32(-2.0),
        loss_variance=jnp.float32(1.0),
    )
    recipe = Growth(make_model(), optax.adam(1e-3)).recipe
    params = program.init(jax.random.key(0)).params
    measured = measure(recipe, monitor, params, jnp.float32(-2.0), jnp.float32(0.5))
    assert measured.monitor.initial_loss == -2
    stability = measured.common.stability
    np.testing.assert_allclose(stability, 1 - np.sqrt(0.9) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.1, optax.sgd(0.1)), "^optimizer must be an optax optimizer.*got 0.1"),
        ((optax.sgd(0.1), None), "^blueprint_optimizer must be an optax optimizer"),
        ((optax.sgd, optax.sgd(0.1)), "^optimizer must be an optax optimizer"),
    ],
)
def test_what_is_no_optimizer_is_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        build(make_model(), *arguments)


def test_what_is_no_nnx_module_is_refused():
    with pytest.raises(TypeError, match=r"model must be a Flax NNX module.*got Dense"):
        build(linen.Dense(3), optax.sgd(0.1), optax.sgd(0.1))


def test_building_leaves_the_users_model_as_it_was():
    model = make_model()
    frozen = make_model()
    for layer in frozen.layers[1:]:
        layer.eval()
    for made in (model, frozen):
        graph, values = nnx.split(made)
        build(made, optax.sgd(0.1), optax.sgd(0.1), axis_name="data")
        assert nnx.graphdef(made) == graph
        with pytest.raises(ValueError, match="blueprint"):
            build(
                made,
                optax.sgd(0.1),
                optax.sgd(0.1),
                axis_name="data",
                controller_config=ControllerConfig(blueprint=9),
            )
        assert nnx.graphdef(made) == graph
        jax.tree.map(np.testing.assert_array_equal, nnx.state(made), values)


def test_fit_compiles_its_shuffle_once_whatever_the_seed(program):
    before = loop._jitted_order._cache_size()
    for seed in (0, 1, 2**32 - 1):
        fit(
            program,
            start(program),
            TRAIN,
            HELD_OUT,
            ticks=1,
            batch_size=64,
            seed=seed,
        )
    assert loop._jitted_order._cache_size() <= before + 1


def test_a_model_outlives_the_state_it_came_from(program):
    state = start(program)
    model = program.model(state)
    before = np.asarray(model(HELD_OUT[0]))
    train_steps(program, state, 1)
    np.testing.assert_array_equal(model(HELD_OUT[0]), before)


def test_a_model_with_a_bare_bed_batch_norm_and_dropout():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(6, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.dropout = nnx.Dropout(0.3, rngs=rngs)
            self.grown = SeedBed(8, 3, rngs=rngs)
            self.readout = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            y = self.dropout(self.norm(self.linear(x["x"])))
            return self.readout(self.grown(y))

    program = build(
        Model(nnx.Rngs(0)),
        optax.adam(1e-2),
        optax.adam(1e-3),
        lifecycle_config=QUICK,
        controller_config=POLICY,
    )
    train, held_out = (({"x": x}, y) for x, y in (TRAIN, HELD_OUT))
    state = start(program)
    count = int(state.rest["dropout/rngs/count"])
    state = fit(program, state, train, held_out, ticks=12, batch_size=16)
    assert int(state.rest["dropout/rngs/count"]) == count + int(state.step) == 48
    assert np.any(state.rest["norm/mean"])
    assert np.any(state.seeds["grown"].history)
    # Evaluation neither draws from the dropout nor moves the running means.
    assert program.evaluate(state, held_out) == program.evaluate(state, held_out)
    assert program.recompiles() == 0


def test_bad_input(program):
    state = start(program)
    with pytest.raises(ValueError, match=r"batch_size must be from 1 to the 64 rows"):
        fit(program, state, TRAIN, HELD_OUT, ticks=1, batch_size=65)
    with pytest.raises(ValueError, match="held_out must be"):
        fit(
            program, state, TRAIN, (HELD_OUT[0], HELD_OUT[1][:3]), ticks=1, batch_size=8
        )
    with pytest.raises(ValueError, match="model must hold at least one ChunkedLayer"):
        build(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), optax.sgd(1.0), optax.sgd(1.0))
    with pytest.raises(ValueError, match=r"index into the 1 blueprints.*got 3"):
        build(
            make_model(),
            optax.sgd(1.0),
            optax.sgd(1.0),
            controller_config=ControllerConfig(blueprint=3),
        )
    with pytest.raises(ValueError, match="eval_batch must be at least 1, got 0"):
        build(make_model(), optax.sgd(1.0), optax.sgd(1.0), eval_batch=0)
    with pytest.raises(ValueError, match="hold a SeedBed, not be one"):
        build(SeedBed(6, 3, rngs=nnx.Rngs(0)), optax.sgd(1.0), optax.sgd(1.0))
    with pytest.raises(TypeError, match="unknown signal 'los'"):
        Signals.unmeasured(los=1.0)


def test_gradients_of_hosts_chunks_and_seeds(program):
    # One step from a known state; the truth is the gradient of the model as a whole.
    state = put(start(program), "layers/0", 2, Stage.TRAINING, slot=1)
    state = put(
        state,
        "layers/0",
        2,
        Stage.TRAINING,
        slot=1,
        bank=random_bank(state.banks["layers/0"]),
    )
    batch = tuple(a[:16] for a in TRAIN)
    model = program.model(state)
    loss = nnx.grad(
        lambda m: jnp.mean(classification(m(batch[0]), batch[1])[0]),
        argnums=nnx.DiffState(0, nnx.Any(nnx.Param, BlueprintParam)),
    )
    grads = nnx.to_pure_dict(nnx.jit(loss)(model))["layers"][0]
    kernel, bias = grads["base"]["linear"]["kernel"], grads["base"]["linear"]["bias"]
    columns = np.asarray(jnp.sum(kernel**2, axis=0) + bias**2)
    chunks = np.sqrt(columns.reshape(4, 2).sum(axis=1))
    bank = [np.asarray(leaf)[1] for leaf in jax.tree.leaves(grads["bed"]["bank"])]
    seed = np.sqrt(sum((g**2).sum() for g in bank))
    state = program.step(state, batch)
    gain = -np.asarray(state.seeds["layers/0"].gain)
    state, report = program.tick(state, HELD_OUT)
    signals = report.layers["layers/0"].signals
    np.testing.assert_allclose(signals.chunk_gradient, chunks, rtol=1e-4)
    want = [np.nan, np.nan, seed / np.sqrt(columns.sum()), np.nan]
    np.testing.assert_allclose(signals.gradient_ratio, want, rtol=1e-4)
    np.testing.assert_allclose(signals.gain[2], gain[1], rtol=1e-6)
    parameters = float(program.kinds["layers/0"][0].param_count(2))
    np.testing.assert_array_equal(
        signals.parameters, [np.nan, np.nan, parameters, np.nan]
    )
    np.testing.assert_array_equal(signals.operations, 2 * signals.parameters)
    assert np.isnan(report.layers["layers/1"].signals.gradient_ratio).all()
    assert not np.any(state.monitor.gradients["layers/0"].seed)  # cleared


def test_every_seed_on_probation_has_its_own_counterfactual(program):
    state = start(program)
    for layer, seed, slot, stage in (
        ("layers/0", 1, 0, Stage.EVALUATING),
        ("layers/0", 3, 1, Stage.FINE_TUNING),
        ("layers/1", 0, 0, Stage.FOSSILIZED),
        ("layers/1", 2, 1, Stage.STABILIZATION),
    ):
        bank = random_bank(state.banks[layer])
        state = put(state, layer, seed, stage, slot=slot, bank=bank)

    def loss_without(layer, seed):
        seeds = dict(state.seeds)
        stage = seeds[layer].stage.at[seed].set(Stage.GERMINATED)  # alpha 0
        seeds[layer] = dataclasses.replace(seeds[layer], stage=stage)
        return program.evaluate(dataclasses.replace(state, seeds=seeds), HELD_OUT)[0]

    base = program.evaluate(state, HELD_OUT)[0]
    nan = float("nan")
    want = {
        "layers/0": [nan, loss_without("layers/0", 1) - base, nan, nan],
        # A fossil stays whatever it is worth: nobody asks.
        "layers/1": [nan, nan, loss_without("layers/1", 2) - base, nan],
    }
    want["layers/0"][3] = loss_without("layers/0", 3) - base
    _, report = program.tick(state, HELD_OUT)
    for layer, expected in want.items():
        worth = report.layers[layer].signals.worth
        np.testing.assert_allclose(worth, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("age", "measured"), [(46, False), (47, True), (60, True)])
def test_a_seed_that_is_tuned_is_measured_only_when_it_may_be_kept_soon(age, measured):
    gates = LifecycleConfig(worth_window=3)  # of at least 50 ticks
    state = init_seeds(2, 2)
    state = dataclasses.replace(
        state,
        stage=jnp.array([Stage.FINE_TUNING, Stage.EVALUATING], jnp.int8),
        slot_of_seed=jnp.array([1, 0], jnp.int32),
        seed_of_slot=jnp.array([1, 0], jnp.int32),
        epochs_in_stage=jnp.array([age, 0], jnp.uint16),
    )
    assert asked_for_worth(state, gates).tolist() == [True, measured]  # by slot
    assert asked_for_worth(state, LifecycleConfig()).tolist() == [True, True]


def test_worth_is_the_mean_of_the_ticks_that_measured_it(program):
    state = put(start(program), "layers/0", 1, Stage.GRAFTING)
    bank = random_bank(state.banks["layers/0"])
    state = put(state, "layers/0", 1, Stage.GRAFTING, bank=bank)
    measured = []
    for alpha in (0.0, 0.25, 0.5):  # the first tick has nothing to take away
        seeds = state.seeds["layers/0"]
        graft = dataclasses.replace(
            seeds.graft, alpha=seeds.graft.alpha.at[1].set(alpha)
        )
        # Held at the beginning of the ramp, so that it stays in its stage.
        epochs = seeds.epochs_in_stage.at[1].set(0)
        seeds = dataclasses.replace(seeds, graft=graft, epochs_in_stage=epochs)
        state = dataclasses.replace(state, seeds={**state.seeds, "layers/0": seeds})
        state, report = program.tick(state, HELD_OUT)
        signals = report.layers["layers/0"].signals
        measured.append(float(signals.worth[1]))
    assert np.isnan(measured[0])
    assert np.isfinite(measured[1:]).all()
    mean = float(signals.mean_worth[1])
    np.testing.assert_allclose(mean, np.mean(measured[1:]), rtol=1e-4)


def test_a_bare_bed_drifts_with_what_is_around_it():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(6, 8, rngs=rngs)
            self.grown = SeedBed(8, 3, rngs=rngs)
            self.readout = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.readout(self.grown(nnx.relu(self.linear(x))))

    parts = split_model(Model(nnx.Rngs(0)))
    params = {name: name for name in parts.host_params()}
    assert set(parts.host_weights(params, "grown")) == {
        "linear/kernel",
        "linear/bias",
        "readout/kernel",
        "readout/bias",
    }
    assert not parts.has_base("grown")


def test_blueprints_can_follow_a_schedule_of_the_run() -> None:
    late = optax.chain(optax.sgd(0.1), scale_by_run_schedule(lambda step: step >= 2))
    model = MLP(6, (8,), 3, num_seeds=2, rngs=nnx.Rngs(0))
    program = build(model, optax.sgd(0.1), late)
    state = put(start(program), LAYERS[0], 1, Stage.FINE_TUNING)
    before = random_bank(state.banks[LAYERS[0]])
    state = put(state, LAYERS[0], 1, Stage.FINE_TUNING, bank=before)
    held = jax.device_get(before)
    for _ in range(2):
        state = program.step(state, TRAIN)
    same_bits(state.banks[LAYERS[0]], held)
    state = program.step(state, TRAIN)
    after = jax.device_get(state.banks[LAYERS[0]])
    with pytest.raises(AssertionError):
        same_bits(after, held)


def test_what_has_grown_makes_room_for_fresh_seeds_when_the_data_have_changed():
    kept_long = (*QUICK.min_epochs[:6], 65535, *QUICK.min_epochs[7:])  # not for good
    program = build(
        make_model(),
        optax.adam(3e-2),
        optax.adam(1e-3),
        lifecycle_config=dataclasses.replace(QUICK, min_epochs=kept_long),
        controller_config=ControllerConfig(
            when="period", period=1, births=4, max_training=4, shift_tolerance=0.5
        ),
    )
    watched = []

    def watch(state, report):
        watched.append(report)

    def grown(state):
        layers = jax.device_get([s.stage for s in state.seeds.values()])
        return sum(
            np.sum((x >= Stage.GRAFTING) & (x <= Stage.FINE_TUNING)) for x in layers
        )

    ways = dict(batch_size=16, on_tick=watch)
    state = fit(program, start(program), TRAIN, TRAIN, ticks=20, **ways)
    assert grown(state) > 0
    assert not any(  # the data have not changed yet
        np.any(layer.stage == Stage.ROLLED_BACK)
        for report in watched
        for layer in report.layers.values()
    )
    before = jax.device_get(state.banks)
    other = TRAIN[0], (TRAIN[1] + 1) % 3
    state, report = program.tick(state, other)
    assert grown(state) == 0
    assert report.loss > 1.5 * watched[-1].loss
    for layer in report.layers.values():
        counted = (layer.source >= Stage.GRAFTING) & (layer.source <= Stage.FINE_TUNING)
        np.testing.assert_array_equal(layer.stage == Stage.ROLLED_BACK, counted)
    state = fit(program, state, other, other, ticks=31, **ways)
    assert grown(state) > 0
    weights = [
        jax.tree.leaves(b)[0] for b in (before["layers/0"], state.banks["layers/0"])
    ]
    assert not np.any(weights[0] == weights[1])
