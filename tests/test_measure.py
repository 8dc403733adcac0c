"""What of the host is measured, and when: only what somebody reads."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_own_loops import QUICK

from esper_jax import (
    ChunkedLayer,
    ControllerConfig,
    Growth,
)
from esper_jax.growth.functions import MEASURE_EVERY
from esper_jax.growth.parts import split_model, values_of
from esper_jax.growth.state import Monitor
from esper_jax.growth.watch import StepGradients, start_monitor, watch
from esper_jax.lifecycle import Strategy, no_commands
from esper_jax.policy import Policy
from esper_jax.policy.interface import SAMPLED

INPUTS, FEATURES, ROWS = 5, 6, 7
X = np.random.default_rng(0).normal(size=(ROWS, INPUTS)).astype(np.float32)
AWAY = ControllerConfig(when="period", period=1000)
"""Nothing germinates, so that steps differ in nothing but their batches."""


class Net(nnx.Module):
    def __init__(self, **options: Any) -> None:
        rngs = nnx.Rngs(0)
        linear = nnx.Linear(INPUTS, FEATURES, rngs=rngs)
        self.layer = ChunkedLayer(linear, 2, rngs=rngs, **options)
        self.head = nnx.Linear(FEATURES, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(self.layer(x))


def scaled_loss(model: Any, scale: Any) -> Any:
    """Its gradient grows with ``scale``."""
    return scale * jnp.mean(model(X) * model(X))


def grow(**options: Any) -> Growth:
    options = {"controller_config": AWAY} | options
    return Growth(Net(), optax.sgd(0.1), lifecycle_config=QUICK, **options)


@functools.cache
def step() -> Any:
    """A step that leaves the host as it is, of a loss that is scaled."""

    @nnx.jit
    def run(model: Any, growth: Growth, scale: Any) -> Any:
        grads = nnx.grad(scaled_loss, argnums=growth.argnums)(model, scale)
        growth.update(model, grads)
        return nnx.filter_state(grads, nnx.Param)

    return run


def report_of(growth: Growth, scales: Any, ticks: int = 1) -> tuple[Any, list[Any]]:
    """The last report, and the host's gradients at each step before it."""
    model = Net()
    for _ in range(ticks):
        grads = [step()(model, growth, jnp.float32(scale)) for scale in scales]
        report = growth.tick(model, lambda m: 1.0)
    return report.layers["layer"].signals, grads


def norms(grads: Any) -> tuple[float, np.ndarray]:
    """Norm of all gradients, and of the columns that write each of the two chunks."""
    kernel, bias = (grads["layer"]["base"][n][...] for n in ("kernel", "bias"))
    columns = np.sum(np.square(kernel), 0) + np.square(bias)
    chunks = np.sqrt(np.sum(columns.reshape(2, -1), 1))
    return float(optax.tree.norm(grads)), chunks


ASKED = [(), ("grad_norm",), ("chunk_gradient",), ("drift",), tuple(sorted(SAMPLED))]


@pytest.mark.parametrize("measure", ASKED, ids=str)
def test_what_is_not_measured_is_nan_and_what_is_has_its_value(measure: Any) -> None:
    signals, grads = report_of(grow(measure=measure, measure_every=1), [1, 3])
    taken = [norms(each) for each in grads]
    wanted = {
        "grad_norm": np.mean([norm for norm, _ in taken]),
        "chunk_gradient": np.mean([chunks for _, chunks in taken], 0),
        "drift": 0.0,
    }
    for name, value in wanted.items():
        value = value if name in measure else np.nan
        np.testing.assert_allclose(getattr(signals, name), value, rtol=1e-5)
    assert np.all(np.isnan(signals.gradient_ratio))  # no seed lives
    assert np.all(np.isfinite(signals.held_out_loss))


def test_every_nth_step_is_measured_beginning_with_the_first_after_a_tick() -> None:
    growth = grow(measure=SAMPLED, measure_every=3)
    scales = [1, 7, 7, 3, 7, 7, 8]  # steps 0, 3 and 6: the others would show
    for ticks in (1, 2):
        signals, grads = report_of(growth, scales, ticks)
        norm, chunks = norms(grads[0])
        np.testing.assert_allclose(signals.grad_norm, 4 * norm, rtol=1e-5)
        np.testing.assert_allclose(signals.chunk_gradient, 4 * chunks, rtol=1e-5)
    # One step in a tick is the first, and measured.
    signals, _ = report_of(growth, [2])
    np.testing.assert_allclose(signals.grad_norm, 2 * norm, rtol=1e-5)
    signals, _ = report_of(growth, [])
    assert np.isnan(signals.grad_norm)


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(4, marks=pytest.mark.slow),
        5,
        9,
    ],
)
def test_sums_are_divided_by_the_steps_that_were_measured(steps: int) -> None:
    """A seed is in TRAINING, and its optimizer does not move: gradients stay."""
    found = [
        report_of(grow_by(every), [2] * steps, ticks=3)[0]
        for every in (1, 4, MEASURE_EVERY)
    ]
    for signals in found[1:]:
        for name in sorted(SAMPLED):
            np.testing.assert_allclose(
                getattr(signals, name), getattr(found[0], name), rtol=1e-5
            )
    assert found[0].grad_norm > 0
    assert np.any(found[0].gradient_ratio > 0)


def grow_by(every: int) -> Growth:
    return Growth(
        Net(),
        optax.sgd(0.0),
        lifecycle_config=QUICK,
        controller_config=ControllerConfig(when="period", period=1),
        measure=SAMPLED,
        measure_every=every,
    )


# --- What reads what


def by_default(**options: Any) -> frozenset[str]:
    return grow(**options).recipe.measured


def nothing(**options: Any) -> Policy:
    def decide(seeds: Any, signals: Any, memory: Any) -> Any:
        return {n: no_commands(s.num_seeds) for n, s in seeds.items()}, memory

    return Policy(lambda shapes, key: (), decide, **options)


def own(policy: Any) -> dict[str, Any]:
    return {"controller_config": None, "policy": policy}


def test_by_default_what_is_read_is_measured() -> None:
    assert by_default() == frozenset()
    assert by_default(**own(nothing())) == SAMPLED  # it does not say
    assert by_default(**own(nothing(reads=frozenset()))) == frozenset()
    assert by_default(**own(nothing(reads={"drift"}))) == {"drift"}
    assert by_default(controller_config=ControllerConfig(where="gradient")) == {
        "chunk_gradient"
    }
    assert by_default(controller_config=ControllerConfig(how="conditions")) == {
        "drift",
        "grad_norm",
    }


@pytest.mark.parametrize(
    ("strategy", "read"),
    [
        (Strategy.LINEAR, set()),
        (Strategy.DRIFT_CONTROLLED, {"drift"}),
        (Strategy.ADAPTIVE, {"drift"}),
        (Strategy.STABILITY, {"grad_norm"}),
        (Strategy.GRAD_NORM_GATED, {"grad_norm"}),
    ],
)
def test_what_a_strategy_reads_is_measured(strategy: Strategy, read: Any) -> None:
    growth = Growth(Net(strategy=strategy), optax.sgd(0.1))
    assert growth.recipe.measured == read
    if read:
        with pytest.raises(ValueError, match=f"measure must hold {min(read)}"):
            Growth(Net(strategy=strategy), optax.sgd(0.1), measure=())


def test_reading_what_is_not_measured_is_refused_at_construction() -> None:
    gradient = {"controller_config": ControllerConfig(where="gradient")}
    everything = "chunk_gradient, drift, grad_norm, gradient_ratio"
    for options, message in (
        (gradient | {"measure": ()}, "measure must hold chunk_gradient: the policy"),
        (gradient | {"measure": ["drift"]}, r"got \['drift'\]. Add it, or leave"),
        (own(nothing()) | {"measure": ()}, f"measure must hold {everything}:"),
        ({"measure": ["drifts"]}, f"measure must be names out of {everything}"),
        ({"measure": "drift"}, "measure must be names out of .*got 'drift'"),
        (own(nothing(reads={"worth"})), r"Policy\(reads=...\) must be names out of"),
        (own(nothing(reads="drift")), r"Policy\(reads=...\) must be names out of"),
        (own(lambda setting: nothing(reads={"x"})), r"Policy\(reads=...\) must be"),
        ({"measure_every": 0}, "measure_every must be an int of at least 1, got 0"),
        ({"measure_every": 2.0}, "measure_every must be an int .* got 2.0"),
        ({"measure_every": True}, "measure_every must be an int .* got True"),
    ):
        with pytest.raises(ValueError, match=message):
            grow(**options)
    assert grow(measure={"drift"}).recipe.measured == {"drift"}  # more than is read


# --- The program of a step


def equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def watched(**options: Any) -> Any:
    """The program of what a step does with the host's gradients."""
    model = Net()
    recipe = grow(**options).recipe
    values = values_of(model)
    params = {name: values[name] for name in recipe.parts.host_params()}
    banks = recipe.parts.take_beds(values, "bank")
    seeds = recipe.parts.take_beds(values, "seeds")

    def run(monitor: Monitor, host: Any) -> Monitor:
        return watch(recipe, monitor, StepGradients(host, banks, seeds), None)

    return jax.make_jaxpr(run)(start_monitor(recipe, params), params).jaxpr


HOST = {(INPUTS, FEATURES), (FEATURES, 3)}


def reads(jaxpr: Any) -> list[str]:
    """Operations that take an array of the shape of the host's kernels."""
    return [
        equation.primitive.name
        for equation in equations(jaxpr)
        if HOST & {getattr(v.aval, "shape", None) for v in equation.invars}
    ]


def test_without_a_reader_no_step_reads_the_host_s_gradients() -> None:
    assert not reads(watched())
    assert not reads(watched(measure=["drift"]))  # of weights, at a tick
    assert reads(watched(measure=["grad_norm"], measure_every=1))


def test_other_steps_read_nothing_of_the_host() -> None:
    """All that reads the host's gradients is inside one branch of one condition."""
    jaxpr = watched(measure=SAMPLED, measure_every=4)
    outside = [e for e in jaxpr.eqns if HOST & {v.aval.shape for v in e.invars}]
    assert [e.primitive.name for e in outside] == ["cond"]
    (condition,) = outside
    branches = [reads(branch.jaxpr) for branch in condition.params["branches"]]
    assert sorted(map(bool, branches)) == [False, True]


def test_a_frozen_host_has_no_gradients_to_measure() -> None:
    model = Net()
    both = {"grad_norm", "drift"}
    growth = Growth(model, optax.sgd(0.1), wrt=None, measure=both, measure_every=1)
    assert split_model(model, wrt=None).host_params() == []

    @nnx.jit
    def run(model: Any, growth: Growth) -> None:
        growth.update(model, nnx.grad(scaled_loss, argnums=growth.argnums)(model, 1.0))

    run(model, growth)
    signals = growth.tick(model, lambda m: 1.0).layers["layer"].signals
    assert np.all(signals.grad_norm == 0)  # there are none, and that is known
    assert np.all(np.isnan(signals.chunk_gradient))
    assert np.all(signals.drift == 0)
    words = r"measure must not hold chunk_gradient: .*wrt trains none.*Leave it out"
    for asked in (["chunk_gradient"], ["chunk_gradient", "drift"]):
        with pytest.raises(ValueError, match=words):
            Growth(model, optax.sgd(0.1), wrt=None, measure=asked)
    with pytest.raises(ValueError, match="hold chunk_gradient and gradient_ratio: "):
        Growth(model, optax.sgd(0.1), wrt=nnx.PathContains("head"), measure=SAMPLED)
