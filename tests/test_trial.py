"""The policy `trial`: births everywhere, then the best for their parameters stay."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from esper_jax import ChunkedLayer, Growth, build, harvest, make_growable
from esper_jax.blueprints import lora
from esper_jax.hosts import MLP
from esper_jax.layers.variables import BlueprintParam
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import Stage
from esper_jax.policy import Reason, TrialConfig, trial, trial_lives
from esper_jax.policy.interface import LayerShape, Setting

X = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)


def grown(config: TrialConfig, **lives: Any) -> tuple[Any, Any, Any, Any]:
    """A frozen host of two layers, its growth, a step and its held-out loss."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(6, 12, rngs=rngs), nnx.tanh, nnx.Linear(12, 3, rngs=rngs)
    )
    y = np.sin(X @ np.random.default_rng(1).normal(size=(6, 3))).astype(np.float32)
    make_growable(model, nnx.Linear, 3, blueprints=[lora(rank=1)], rngs=rngs)
    growth = Growth(
        model,
        optax.adam(1e-2),
        wrt=None,
        policy=trial(config),
        lifecycle_config=trial_lives(**lives),
    )

    def loss_fn(m: Any) -> Any:
        return jnp.mean((m(X) - y) ** 2)

    @nnx.jit
    def step(model: Any, growth: Any) -> Any:
        loss, grads = nnx.value_and_grad(loss_fn, argnums=growth.argnums)(model)
        growth.update(model, grads, loss=loss)

    return model, growth, step, nnx.jit(loss_fn)


def stages(report: Any) -> np.ndarray:
    return np.concatenate([layer.stage for layer in report.layers.values()])


COSTS = np.array([18, 18, 18, 15, 15, 15])


@pytest.mark.parametrize("budget", [40, pytest.param(-1, marks=pytest.mark.slow)])
def test_the_best_for_their_parameters_stay_within_the_budget(budget: int) -> None:
    model, growth, step, loss = grown(TrialConfig(ticks=2, budget=budget), tuning=2)
    seen = []
    for want in (Stage.GERMINATED, Stage.TRAINING, Stage.GRAFTING):
        report = growth.tick(model, loss)
        seen.append(int(report.reason))
        assert set(stages(report).tolist()) == {want}
    assert seen == [Reason.GERMINATED, Reason.NOT_YET, Reason.NOT_YET]
    start = float(loss(model))
    for _ in range(20):
        step(model, growth)
    assert set(stages(growth.tick(model, loss)).tolist()) == {Stage.GRAFTING}
    for _ in range(20):
        step(model, growth)
    tried = float(loss(model))
    assert tried < 0.8 * start
    report = growth.tick(model, loss)
    worth = np.concatenate([x.signals.worth for x in report.layers.values()])
    expected, left = set(), budget if budget >= 0 else 1000
    for i in np.argsort(-worth / COSTS):
        if worth[i] > 0 and COSTS[i] <= left:
            expected.add(int(i))
            left -= COSTS[i]
    now = stages(report)
    assert expected == set(np.flatnonzero(now == Stage.STABILIZATION).tolist())
    assert 0 < len(expected) <= (2 if budget > 0 else 6)
    assert set(now.tolist()) <= {Stage.STABILIZATION, Stage.ROLLED_BACK}
    for _ in range(6):
        for _ in range(10):
            step(model, growth)
        report = growth.tick(model, loss)
    now = stages(report)
    assert set(np.flatnonzero(now == Stage.FOSSILIZED).tolist()) <= expected
    assert Stage.FOSSILIZED in now
    assert set(now.tolist()) <= {Stage.FOSSILIZED, Stage.DORMANT}
    assert int(report.reason) == Reason.SETTLED  # nothing is born again
    assert float(loss(harvest(model))) < start
    harvested = harvest(model)
    assert all(isinstance(harvested.layers[i], nnx.Linear) for i in (0, 2))


def test_places_are_gone_through_only_when_parts_are_judged() -> None:
    model = grown(TrialConfig())[0]
    layer = LayerShape(num_seeds=3, capacity=3, costs=np.full((1, 3), 18))
    setting = Setting(layers={"a": layer}, gates=trial_lives())
    policy = trial(TrialConfig(budget=40))(setting)
    seeds = jax.tree.map(lambda x: x[None], model.layers[0].bed.seeds.get_value())
    nan = np.full((1, 3), np.nan, np.float32)
    signals = jax.tree.map(lambda _: nan, Signals.unmeasured())
    memory = policy.init(setting.layers, jax.random.key(0))
    traced = jax.make_jaxpr(policy.decide)({"a": seeds}, {"a": signals}, memory)
    steps = [e for e in traced.eqns if e.primitive.name in ("scan", "cond")]
    assert [e.primitive.name for e in steps] == ["cond"]
    inside = [str(branch) for branch in steps[0].params["branches"]]
    assert ["scan[" in branch for branch in inside] == [False, True]


def test_a_share_of_the_places_and_a_rent() -> None:
    model, growth, step, loss = grown(TrialConfig(ticks=1, share=0.5, rent=1e3))
    report = growth.tick(model, loss)
    born = int(np.sum(stages(report) == Stage.GERMINATED))
    assert 0 < born < 6
    for _ in range(3):
        report = growth.tick(model, loss)
        step(model, growth)
    report = growth.tick(model, loss)
    assert int(np.sum(stages(report) == Stage.DORMANT)) >= 6 - born
    assert not np.any(stages(report) == Stage.STABILIZATION)  # none pays that rent


def test_what_is_not_measured_removes_nothing() -> None:
    ages = [0] * len(Stage)
    ages[Stage.GRAFTING], ages[Stage.FINE_TUNING] = 3, 2
    config = TrialConfig(ticks=1)  # less than the gates ask for: theirs holds
    model, growth, step, loss = grown(config, min_epochs=tuple(ages))
    seen = []
    for number in range(12):
        unknown = number in (5, 10)  # where they would be judged, and become fossils
        report = growth.tick(model, (lambda m: jnp.nan) if unknown else loss)
        seen.append(stages(report))
        for _ in range(8):
            step(model, growth)
    assert set(seen[5].tolist()) == {Stage.GRAFTING}
    assert Stage.STABILIZATION in seen[6]
    tuned = seen[9] == Stage.FINE_TUNING
    assert np.any(tuned)
    assert set(seen[10][tuned].tolist()) == {Stage.FINE_TUNING}
    assert set(seen[11][tuned].tolist()) <= {Stage.FOSSILIZED, Stage.CULLED}


def test_slots_can_be_given_back() -> None:
    model = MLP(6, (8, 8), 3, num_seeds=2, blueprints=["lora"], rngs=nnx.Rngs(0))
    program = build(
        model,
        optax.adam(1e-2),
        optax.adam(1e-2),
        policy=trial(TrialConfig(ticks=1, rent=1e3)),
        lifecycle_config=trial_lives(),
    )
    data = X, np.zeros(len(X), np.int32)
    state = program.init(jax.random.key(0))
    for _ in range(6):
        state, report = program.tick(program.step(state, data), data)
    assert set(stages(report).tolist()) == {Stage.DORMANT}
    state = program.grow_capacity(state, {"layers/0": 1})  # no longer one group
    _, report = program.tick(program.step(state, data), data)
    assert int(report.reason) == Reason.SETTLED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ticks": 0}, "ticks must be an int from 1"),
        ({"budget": -2}, "budget must be an int from -1"),
        ({"budget": jnp.ones(2, int)}, "budget must be an int from -1"),
        ({"budget": jnp.ones(())}, "budget must be an int from -1"),
        ({"blueprint": True}, "blueprint must be an int from 0"),
        ({"rent": -1.0}, "rent must be finite and at least 0"),
        ({"share": 0}, "share must be above 0 and at most 1"),
        ({"share": "1"}, "share must be a number, got '1'"),
        ({"rent": "1"}, "rent must be a number, got '1'"),
        ({"budget": 10.0}, "budget must be an int from -1"),
    ],
)
def test_bad_numbers_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrialConfig(**change)


def test_a_budget_may_be_an_integer_of_numpy() -> None:
    """As sums of ``np.prod(shape)`` are."""
    config = TrialConfig(budget=np.int64(100))  # type: ignore[arg-type]
    assert config == TrialConfig(budget=100)
    assert type(config.budget) is int


def test_what_would_never_begin_is_refused() -> None:
    rngs = nnx.Rngs(0)
    model = nnx.List([ChunkedLayer(nnx.Linear(4, 8, rngs=rngs), 4, rngs=rngs)])
    with pytest.raises(ValueError, match=r"lifecycle_config=policy.trial_lives\(\)"):
        Growth(model, optax.sgd(1.0), policy=trial())
    Growth(model, optax.sgd(1.0), policy=trial(), lifecycle_config=trial_lives())
    with pytest.raises(TypeError, match="config must be a TrialConfig, got 100"):
        trial(100)  # type: ignore[arg-type]


def test_a_model_that_has_no_room_is_refused() -> None:
    rngs = nnx.Rngs(0)
    layer = ChunkedLayer(nnx.Linear(4, 8, rngs=rngs), 4, capacity=2, rngs=rngs)
    model = nnx.List([layer])
    with pytest.raises(ValueError, match=r"layer '0' has 2 for 4 seeds. Make it grow"):
        Growth(model, optax.sgd(1.0), policy=trial())
    with pytest.raises(ValueError, match="blueprint must be an index into the 1 blue"):
        Growth(model, optax.sgd(1.0), policy=trial(TrialConfig(blueprint=1)))


def test_a_rent_of_minus_infinity_fills_the_budget() -> None:
    """Parts that do harm are kept then, too. A budget may be an array."""
    kept = {}
    for rent, budget in ((0.0, 40), (-np.inf, jnp.asarray(40))):
        config = TrialConfig(ticks=1, budget=budget, rent=rent)
        model, growth, step, loss = grown(config, cull_delta=-np.inf)
        for _ in range(3):
            growth.tick(model, loss)
        for _ in range(3):
            step(model, growth)
        growth.tick(model, lambda m, f=loss: -f(m))  # each part seems to do harm
        kept[rent] = int(np.sum(stages(growth.tick(model, loss)) != Stage.DORMANT))
    assert kept == {0.0: 0, -np.inf: 2}


@pytest.mark.parametrize("least", [0.0, -np.inf])
def test_what_is_kept_whatever_it_is_worth_learns(least: float) -> None:
    """Parts that do harm when they are judged, under a rent of minus infinity."""
    config = TrialConfig(ticks=1, rent=-np.inf)
    lives = {"cull_delta": -np.inf, "min_worth": least}
    model, growth, step, loss = grown(config, **lives)
    for _ in range(3):
        growth.tick(model, loss)
    for _ in range(3):
        step(model, growth)
    for _ in range(3):  # each part seems to do harm
        report = growth.tick(model, lambda m: -loss(m))
    learns = least < 0
    expected = Stage.FINE_TUNING if learns else Stage.EVALUATING
    assert np.all(stages(report) == expected)
    bank = nnx.state(model, BlueprintParam)
    before = jax.tree.map(jnp.copy, bank)
    step(model, growth)
    after = nnx.state(model, BlueprintParam)
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    moved = [bool(jnp.any(a != b)) for a, b in pairs]
    assert any(moved) == learns
