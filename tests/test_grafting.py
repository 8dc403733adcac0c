"""The seven grafting strategies, as one update over seeds of different settings."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import lifecycle_oracle as oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_jax.lifecycle import grafting
from esper_jax.lifecycle.grafting import GraftConfig, GraftMemory, Strategy
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.state import init_seeds

EPOCHS = 100
CALM = {
    "drift": 0.0,
    "worth": 0.0,
    "loss_variance": 0.0,
    "accuracy_variance": 0.0,
    "grad_norm": 0.5,
    "reconstruction_loss": 0.25,
}
VALUES = {
    "drift": [0.0, 0.01, 0.0625, 0.07, 0.125, 0.13, 0.5, math.nan, math.inf],
    "worth": [0.0, 0.01, 0.02, 0.3, -0.3, -5.0, math.nan, math.inf],
    "loss_variance": [0.0, 0.05, 0.1, 0.2, math.nan, math.inf],
    "accuracy_variance": [0.0, 0.01, 0.05, 0.1, math.nan],
    "grad_norm": [0.0, 0.1, 0.5, 1.0, 1.1, 10.0, 20.0, math.nan, math.inf],
    "reconstruction_loss": [0.0, 0.1, 0.2, 0.4, 1.0, -1.0, math.nan, math.inf],
}
GRID = [
    {
        "ramp_duration": duration,
        "min_alpha": low,
        "max_alpha": high,
        "pause_duration": pause,
        "stability_window": window,
        "momentum_factor": factor,
    }
    for duration, (low, high), pause, window, factor in itertools.product(
        (1, 8, 50), ((0.0, 1.0), (0.125, 0.75)), (0, 3), (1, 4), (0.0, 0.875)
    )
]
ROWS = [(strategy, fields) for strategy in Strategy for fields in GRID]
STRATEGIES = np.array([strategy for strategy, _ in ROWS], np.int8)
CONFIG = GraftConfig(**{k: np.array([f[k] for _, f in ROWS]) for k in GRID[0]})
"""One row for each strategy and each setting: all of them are updated at once."""


@functools.partial(jax.jit, static_argnums=2)
def _climb(signals: Any, strategies: Any, rows: int) -> tuple[GraftMemory, GraftMemory]:
    """Memory after the entry epoch, and after each later one: [EPOCHS - 1, rows]."""
    config = CONFIG if rows == len(ROWS) else GraftConfig()
    first = grafting.begin(init_seeds(rows, rows).graft, jnp.ones(rows, bool), config)

    def epoch(memory: GraftMemory, xs: Any) -> Any:
        t, s, strategy = xs
        s = Signals.unmeasured(**s)
        memory = grafting.update(memory, strategy, s, t, config)
        return memory, memory

    t = jnp.arange(1, EPOCHS, dtype=jnp.uint16)[:, None] * jnp.ones(rows, jnp.uint16)
    return first, jax.lax.scan(epoch, first, (t, signals, strategies))[1]


def climb(signals: dict[str, np.ndarray], strategies: np.ndarray) -> GraftMemory:
    """Memory at each epoch, the entry first: [EPOCHS, rows]."""
    first, later = jax.device_get(_climb(signals, strategies, strategies.shape[1]))
    return jax.tree.map(lambda a, b: np.concatenate([a[None], b]), first, later)


def constant(rows: int = len(ROWS), **values: float) -> dict[str, np.ndarray]:
    shape = (EPOCHS - 1, rows)
    return {k: np.full(shape, v, np.float32) for k, v in (CALM | values).items()}


def repeated(strategies: Any) -> np.ndarray:
    strategies = np.asarray(strategies, np.int8)
    return np.broadcast_to(strategies, (EPOCHS - 1, strategies.size))


def random_signals(number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    shape = (EPOCHS - 1, len(ROWS))
    calm = rng.choice([0.3, 0.6, 0.9])
    return {
        name: np.where(
            rng.random(shape) < calm, CALM[name], rng.choice(values, shape)
        ).astype(np.float32)
        for name, values in VALUES.items()
    }


def model(
    signals: dict[str, np.ndarray], strategies: np.ndarray
) -> dict[str, np.ndarray]:
    """The same epochs one seed at a time, in plain Python."""
    fields = ("alpha", "velocity", "remembered", "previous", "pause", "unstable")
    out = {name: np.zeros((EPOCHS, len(ROWS))) for name in fields}
    for row, (_, overrides) in enumerate(ROWS):
        config = GraftConfig(**overrides)
        seed = oracle.Seed()
        seed.enter_grafting(config)
        for t in range(EPOCHS):
            if t:
                seed.epochs, seed.strategy = t, int(strategies[t - 1, row])
                measured = {k: float(v[t - 1, row]) for k, v in signals.items()}
                oracle.climb(seed, measured, config)
            for name in fields:
                out[name][t, row] = getattr(seed, name)
    return out


def assert_equals_model(signals: dict[str, np.ndarray], strategies: np.ndarray) -> None:
    ours, theirs = climb(signals, strategies), model(signals, strategies)
    np.testing.assert_array_equal(ours.pause, theirs["pause"])
    np.testing.assert_array_equal(ours.unstable_checks, theirs["unstable"])
    for got, name in (
        (ours.alpha, "alpha"),
        (ours.velocity, "velocity"),
        (ours.stable_alpha, "remembered"),
        (ours.previous_loss, "previous"),
    ):
        np.testing.assert_allclose(got, theirs[name], rtol=0, atol=1e-5, err_msg=name)


few = settings(max_examples=8, deadline=None)
numbers = st.integers(0, 2**31)


@few
@given(numbers)
def test_every_strategy_equals_the_scalar_model(number: int) -> None:
    assert_equals_model(random_signals(number), repeated(STRATEGIES))


@few
@given(numbers)
def test_a_strategy_may_change_in_the_middle_of_a_ramp(number: int) -> None:
    rng = np.random.default_rng(number)
    shape = (EPOCHS - 1, len(ROWS))
    now = rng.integers(0, len(Strategy), shape)
    lasting = np.maximum.accumulate(
        np.where(rng.random(shape) < 0.1, np.arange(EPOCHS - 1)[:, None], 0)
    )
    strategies = np.take_along_axis(now, lasting, axis=0).astype(np.int8)
    assert_equals_model(random_signals(number), strategies)


@few
@given(numbers)
def test_no_pause_is_skipped(number: int) -> None:
    signals = random_signals(number)
    rows = np.flatnonzero(STRATEGIES == Strategy.DRIFT_CONTROLLED)
    alpha = climb(signals, repeated(STRATEGIES)).alpha
    for row in rows:
        pause = np.asarray(CONFIG.pause_duration)[row]
        t = 1
        while t < EPOCHS:
            if signals["drift"][t - 1, row] > 0.125:
                # The epoch of the drift and the whole pause after it stand still.
                waits = alpha[t - 1 : t + pause + 1, row]
                assert np.all(waits == waits[0])
                t += pause + 1
            else:
                assert (
                    alpha[t, row] > alpha[t - 1, row]
                    or alpha[t, row] == CONFIG.max_alpha[row]  # type: ignore[index]
                )
                t += 1


# The page's numbers, worked by hand with the default settings: base = 1 / 50.


def ramp(strategy: Strategy, **series: list[float]) -> np.ndarray:
    """Alpha over the base step, from the entry on, for as long as the series are."""
    rows = len(Strategy)
    signals = constant(rows)
    for name, values in series.items():
        signals[name][: len(values)] = np.asarray(values, np.float32)[:, None]
    length = max(len(values) for values in series.values())
    alpha = climb(signals, repeated(list(Strategy))).alpha
    return alpha[: length + 1, strategy] * 50


def expect(got: np.ndarray, steps: list[float]) -> None:
    np.testing.assert_allclose(np.diff(got), steps, rtol=0, atol=1e-4)


def test_linear_reads_no_signal() -> None:
    expect(ramp(Strategy.LINEAR, drift=[9.0] * 4, grad_norm=[99.0] * 4), [1.0] * 4)


def test_drift_waits_out_its_pause_and_resumes() -> None:
    drift = [0.0, 0.126] + [9.0] * 10 + [0.125, 0.0]
    expect(ramp(Strategy.DRIFT_CONTROLLED, drift=drift), [1.0] + [0.0] * 11 + [1.0] * 2)


def test_momentum_gathers_and_decays() -> None:
    delta = [0.1, 0.0, -1.0, -9.0, 0.0]
    velocity = [0.001, 0.000875, -0.009234375, -0.098080078, -0.085820068]
    steps = [max(0.0, 1 + 50 * v) for v in velocity]
    expect(ramp(Strategy.MOMENTUM, worth=delta), steps)


def test_adaptive_waits_then_hurries_then_walks() -> None:
    drift = [0.0, 0.0, 0.07, 0.126] + [0.0] * 11
    delta = [0.1, 0.01, 0.1, 0.1] + [0.1] * 10 + [0.2]
    # Drift between half the threshold and the threshold: as drift_controlled, walks.
    velocity = 0.875 * 0.001 + 0.002
    expect(
        ramp(Strategy.ADAPTIVE, drift=drift, worth=delta),
        [1.05, 1.0, 1.0, 0.0] + [0.0] * 10 + [1 + 50 * velocity],
    )


def test_stability_halves_then_reverts() -> None:
    variance = [0.0] * 5 + [0.1] * 15 + [0.0] * 5
    # Checks at 5 (stable: remembers 4), 10 and 15 (count), 20 (back to 4).
    got = ramp(Strategy.STABILITY, loss_variance=variance)
    expect(got[:20], [1.0] * 9 + [0.5] * 10)
    assert got[20] == pytest.approx(got[4], abs=1e-4)
    expect(got[20:], [1.0] * 5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("loss_variance", 0.1), ("grad_norm", 10.0), ("accuracy_variance", 0.05)],
)
def test_each_measure_of_stability_is_strict(name: str, value: float) -> None:
    below = np.nextafter(np.float32(value), np.float32(0))
    series = [value] * 5 + [0.0] * 4 + [float(below)]
    expect(ramp(Strategy.STABILITY, **{name: series}), [1.0] * 4 + [0.5] * 5 + [1.0])
    series[0:5] = [math.nan] * 5
    expect(ramp(Strategy.STABILITY, **{name: series}), [1.0] * 4 + [0.5] * 5 + [1.0])


def test_a_falling_loss_hurries_the_ramp() -> None:
    loss = [1.0, 0.5, 0.75, math.nan, 0.0, 0.5]
    expect(
        ramp(Strategy.PERFORMANCE_LINKED, reconstruction_loss=loss),
        [1.0, 1.25, 1.0, 1.0, 1.5, 1.0],
    )


def test_the_gradient_norm_opens_and_shuts() -> None:
    norm = [0.1, 1.0, 0.0999, 1.001, math.nan, math.inf, 0.5]
    expect(ramp(Strategy.GRAD_NORM_GATED, grad_norm=norm), [1, 1, 0, 0, 0, 0, 1])


def test_entry_touches_only_those_that_enter() -> None:
    rng = np.random.default_rng(0)
    old = init_seeds(4, 4).graft
    memory = jax.tree.map(
        lambda x: jnp.asarray(rng.integers(1, 5, 4).astype(x.dtype)), old
    )
    entered = jnp.array([True, False, True, False])
    new = grafting.begin(memory, entered, GraftConfig(min_alpha=0.25))
    assert new.alpha[::2].tolist() == new.stable_alpha[::2].tolist() == [0.25, 0.25]
    assert np.all(np.isnan(new.previous_loss[::2]))
    for name in ("velocity", "pause", "unstable_checks"):
        assert getattr(new, name)[::2].tolist() == [0, 0]
    for field in dataclasses.fields(GraftMemory):
        a, b = getattr(new, field.name), getattr(memory, field.name)
        np.testing.assert_array_equal(a[1::2], b[1::2])
        assert a.dtype == b.dtype


@pytest.mark.parametrize("code", [-1, 7, 127])
def test_an_unknown_strategy_walks_the_linear_ramp(code: int) -> None:
    noisy = random_signals(5)
    odd = climb(noisy, repeated(np.full(len(ROWS), code)))
    linear = climb(noisy, repeated(np.zeros(len(ROWS))))
    np.testing.assert_array_equal(odd.alpha, linear.alpha)


# Settings.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ramp_duration", 0),
        ("ramp_duration", math.nan),
        ("min_alpha", -0.1),
        ("min_alpha", 1.5),
        ("max_alpha", 1.1),
        ("max_alpha", math.nan),
        ("drift_threshold", -1.0),
        ("pause_duration", -1),
        ("pause_duration", 65_536),
        ("momentum_factor", 1.0),
        ("momentum_factor", -0.1),
        ("stability_window", 0),
        ("stability_window", 65536),
        ("max_loss_variance", math.nan),
        ("max_grad_norm", -1.0),
        ("max_accuracy_variance", -1.0),
        ("performance_gain", -0.5),
        ("grad_norm_lower", -0.5),
        ("grad_norm_upper", 0.05),
        ("max_alpha", np.array([1.0, 2.0])),
    ],
)
def test_config_errors_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} must be"):
        GraftConfig(**{field: value})


def test_max_alpha_below_min_alpha() -> None:
    with pytest.raises(ValueError, match="max_alpha must be from min_alpha to 1"):
        GraftConfig(min_alpha=0.5, max_alpha=0.25)
