"""What parts are worth by one's own `evaluate`, vmapped where it can be."""

import dataclasses
import logging
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from esper_jax import Growth, Stage, make_growable
from esper_jax.growth.worth import AT_ONCE
from esper_jax.lifecycle import no_commands
from esper_jax.policy import Policy

X = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
IDLE = Policy(
    init=lambda shapes, key: (),
    decide=lambda seeds, signals, memory: (
        {name: no_commands(layer.num_seeds) for name, layer in seeds.items()},
        memory,
    ),
    reads=frozenset(),
)
SEEDS = (5, 5)
"""Of the two layers, all of which count: one call of eight, and two by themselves."""


def grown() -> tuple[nnx.Sequential, Growth]:
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(6, 6, rngs=rngs), nnx.tanh, nnx.Linear(6, 6, rngs=rngs)
    )
    for layer, seeds in zip(("layers/0", "layers/2"), SEEDS, strict=True):
        make_growable(model, layer, seeds, capacity=seeds, rngs=rngs)
        bed = model.layers[int(layer[-1])].bed
        state = bed.seeds.get_value()
        every = jnp.arange(seeds, dtype=jnp.int32)
        bed.seeds.set_value(
            dataclasses.replace(
                state,
                stage=jnp.full_like(state.stage, Stage.EVALUATING),
                seed_of_slot=every[::-1],
                slot_of_seed=every[::-1],
            )
        )
        bank = bed.bank.get_value()
        draw = np.random.default_rng(int(layer[-1])).normal
        w2 = jnp.asarray(draw(size=bank.w2.shape), jnp.float32)
        bed.bank.set_value(dataclasses.replace(bank, w2=w2))
    return model, Growth(model, optax.sgd(1.0), policy=IDLE)


def loss_of(model: Any) -> Any:
    return jnp.mean((model(X) - 1) ** 2)


def worth(report: Any) -> np.ndarray:
    return np.concatenate([layer.signals.worth for layer in report.layers.values()])


def test_vmapped_and_one_by_one_give_the_same(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "esper_jax.growth.worth")
    model, growth = grown()
    calls, traces = [], []
    jitted = nnx.jit(lambda m: (traces.append(1), loss_of(m))[1])

    def evaluate(model: Any) -> Any:
        calls.append(1)
        return jitted(model)

    together = worth(growth.tick(model, evaluate))
    assert len(calls) == 1 + 1 + (sum(SEEDS) - AT_ONCE)
    assert not caplog.records
    compiled = len(traces)
    again = worth(growth.tick(model, evaluate))
    np.testing.assert_array_equal(together, again)
    assert len(traces) == compiled <= 2  # nothing is traced anew at a tick

    calls.clear()
    model, growth = grown()

    def on_the_host(model: Any) -> float:
        calls.append(1)
        return float(jitted(model)), 0.5  # no number while it is vmapped

    alone = worth(growth.tick(model, on_the_host))
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-6)
    assert np.all(np.isfinite(alone))
    assert np.unique(alone).size == sum(SEEDS)
    [record] = caplog.records
    assert "cannot be vmapped" in record.getMessage()
    tried = len(calls) - (1 + sum(SEEDS))
    assert tried == 1
    growth.tick(model, on_the_host)
    assert len(calls) == tried + 2 * (1 + sum(SEEDS))  # vmap is not tried again
    assert len(caplog.records) == 1

    # Each is the loss without the part, less the loss as it is.
    seed = 2
    seeds = model.layers[0].bed.seeds.get_value()
    stage = seeds.stage.at[seed].set(Stage.DORMANT)
    model.layers[0].bed.seeds.set_value(dataclasses.replace(seeds, stage=stage))
    without = float(loss_of(model))
    model.layers[0].bed.seeds.set_value(seeds)
    assert without - float(loss_of(model)) == pytest.approx(together[seed], rel=1e-3)
