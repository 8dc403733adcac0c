"""Trials whose births are not heard, and parts that come by commands from outside."""

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

from esper_jax import Growth, Stage, init_seeds, make_growable
from esper_jax.blueprints import lora
from esper_jax.growth.outside import nothing_asked
from esper_jax.lifecycle import commands_for
from esper_jax.lifecycle.signals import Signals
from esper_jax.monitor.words import why
from esper_jax.policy import Reason, TrialConfig, trial, trial_lives
from esper_jax.policy.interface import LayerShape, Policy, Setting, barren, idle
from esper_jax.run.config import ConfigError, parse_config
from esper_jax.run.features import Features, apply_features
from esper_jax.run.folder import read_lines
from esper_jax.run.run import train_run

X = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
Y = np.sin(X @ np.random.default_rng(1).normal(size=(6, 6))).astype(np.float32)
COST = 12  # of a part


def loss_fn(model: Any) -> Any:
    return jnp.mean((model(X) - Y) ** 2)


evaluate = nnx.jit(loss_fn)


@nnx.jit
def step(model: Any, growth: Any) -> None:
    loss, grads = nnx.value_and_grad(loss_fn, argnums=growth.argnums)(model)
    growth.update(model, grads, loss=loss)


def host() -> Any:
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(6, 6, rngs=rngs), nnx.tanh, nnx.Linear(6, 6, rngs=rngs)
    )
    make_growable(model, nnx.Linear, 3, blueprints=[lora(rank=1)], rngs=rngs)
    return model


def stages(report: Any) -> np.ndarray:
    return np.stack([layer.stage for layer in report.layers.values()])


def test_a_part_that_comes_by_a_command_runs_and_is_judged() -> None:
    model = host()
    policy = trial(TrialConfig(ticks=1, budget=COST, rent=-np.inf))
    lives = trial_lives(tuning=9, cull_delta=-np.inf)
    optimizer = optax.adam(1e-2)
    growth = Growth(model, optimizer, wrt=None, policy=policy, lifecycle_config=lives)

    def tick(commands: Any = None) -> Any:
        for _ in range(4):
            step(model, growth)
        return growth.tick(model, evaluate, commands or quiet)

    quiet = nothing_asked({"layers/0": 3, "layers/2": 3})
    mute = dataclasses.replace(quiet, germination=np.asarray(False))
    for _ in range(2):  # a trial that is not let begin has not begun
        report = tick(mute)
        assert np.all(stages(report) == Stage.DORMANT)
        assert int(report.reason) == Reason.DISABLED
        assert not growth.settled
    assert np.all(stages(tick()) == Stage.GERMINATED)
    while not growth.settled:
        report = tick()
    assert np.sum(stages(report) == Stage.FINE_TUNING) == 1  # all of the budget
    whole = growth.run_state(model)
    off = [name for name, (_, slots) in growth.shrink(model).items() if not slots]
    [layer] = [model.layers[i] for i in (0, 2) if not model.layers[i].enabled]

    born = {off[0]: commands_for(3, {1: Stage.GERMINATED})}
    report = tick(born)
    assert report.layers[off[0]].stage[1] == Stage.GERMINATED
    assert layer.enabled  # or it would never learn nor count
    after = []
    for _ in range(5):
        report = tick()
        after.append(int(report.layers[off[0]].stage[1]))
        assert growth.settled  # a run that is resumed gives back the same slots
    assert Stage.GRAFTING in after
    assert Stage.ROLLED_BACK in after  # it is judged, as all are
    assert np.sum(stages(report) == Stage.FINE_TUNING) == 1  # the budget holds

    # So does a state that is gone back to.
    growth.shrink(model)
    assert not layer.enabled
    living = jax.tree.map(jnp.copy, whole.seeds[off[0]])
    one = dataclasses.replace(
        living,
        stage=living.stage.at[0].set(Stage.FOSSILIZED),
        slot_of_seed=living.slot_of_seed.at[0].set(0),
        seed_of_slot=living.seed_of_slot.at[0].set(0),
    )
    whole = dataclasses.replace(whole, seeds={**whole.seeds, off[0]: one})
    growth.go_on(whole, model)
    assert layer.enabled


def decided(
    policy: Policy, memory: Any, stage: Any, worth: Any, blueprint: Any = 0
) -> tuple[list[int], Any]:
    """What is asked of the seeds of one layer, and the new memory."""
    count = len(stage)
    nothing = init_seeds(num_seeds=count, capacity=count)
    slots = jnp.where(jnp.asarray(stage) > 0, jnp.arange(count), -1)
    seeds = dataclasses.replace(
        nothing,
        stage=jnp.asarray(stage, nothing.stage.dtype),
        blueprint=jnp.full(count, 0, nothing.blueprint.dtype) + blueprint,
        epochs_in_stage=jnp.full(count, 9, nothing.epochs_in_stage.dtype),
        slot_of_seed=slots.astype(nothing.slot_of_seed.dtype),
    )
    signals = Signals.unmeasured(worth=jnp.asarray(worth, jnp.float32))
    signals = jax.tree.map(
        lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.float32), (1, count)), signals
    )
    stacked = jax.tree.map(lambda x: x[None], seeds)
    commands, memory = policy.decide({"a": stacked}, {"a": signals}, memory)
    return commands["a"].target[0].tolist(), memory


LAYER = LayerShape(
    num_seeds=2, capacity=2, costs=np.full((2, 2), COST), aims=(True, False)
)
SETTING = Setting(layers={"a": LAYER}, gates=trial_lives())


def test_what_is_not_measured_when_others_are_judged_is_judged_later() -> None:
    config = TrialConfig(ticks=1, budget=2 * COST)
    policy = trial(config)(SETTING)
    memory = policy.init(SETTING.layers, jax.random.key(0)).replace(
        begun=jnp.asarray(True)
    )
    asked, memory = decided(policy, memory, [3, 3], [1.0, np.nan])
    assert asked == [Stage.STABILIZATION, -1]
    assert bool(memory.judged)
    asked, memory = decided(policy, memory, [4, 3], [np.nan, 1.0])
    assert asked[1] == Stage.STABILIZATION
    small = trial(dataclasses.replace(config, budget=2 * COST - 1))(SETTING)
    asked, _ = decided(small, memory, [4, 3], [np.nan, 1.0])  # the first has its share
    assert asked[1] == Stage.ROLLED_BACK


def test_only_parts_that_wait_for_a_gradient_wait() -> None:
    policy = trial(TrialConfig())(SETTING)
    memory = policy.init(SETTING.layers, jax.random.key(0)).replace(
        begun=jnp.asarray(True)
    )
    asked, _ = decided(policy, memory, [1, 1], np.nan, blueprint=jnp.int8([0, 1]))
    assert asked == [-1, Stage.TRAINING]


@pytest.mark.parametrize("less", [idle, barren])
def test_a_trial_that_may_not_begin_begins_when_it_may(less: Any) -> None:
    policy = less(trial())(SETTING)
    memory = policy.init(SETTING.layers, jax.random.key(0))
    asked, memory = decided(policy, memory, [0, 0], np.nan)
    assert asked == [-1, -1]
    assert (bool(memory.begun), int(memory.reason)) == (False, Reason.DISABLED)
    asked, _ = decided(trial()(SETTING), memory, [0, 0], np.nan)
    assert asked == [Stage.GERMINATED] * 2
    asked, _ = decided(policy, memory, [5, 0], np.nan)  # what lives goes on, or not
    assert asked == [-1 if less is idle else Stage.FINE_TUNING, -1]


def test_layers_that_run_their_base_alone_have_nothing_to_fold() -> None:
    model, lives = host(), trial_lives(fold="frozen")
    apply_features(model, Features(chunked_layers=False))  # of a config that folds
    policy = idle(trial())
    growth = Growth(
        model, optax.sgd(1.0), wrt=None, policy=policy, lifecycle_config=lives
    )
    assert growth.recipe.folds == {}


TABLES: dict[str, Any] = {
    "policy": "trial",
    "data": {"name": "spirals"},
    "model": {"hidden": [6]},
    "growth": {"num_seeds": 3, "capacity": 3, "blueprints": ["lora"]},
    "train": {"ticks": 2, "batch_size": 300, "frozen": True},
    "trial": {"ticks": 1, "rent": -np.inf},
    "checkpoint": {"every": 1},
    "features": {"growth": False},
}


@pytest.mark.filterwarnings("ignore:blueprints. 'lora' has rank 4:UserWarning")
def test_without_the_feature_growth_a_run_tries_nothing_until_it_may(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run = functools.partial(train_run, out=tmp_path, console=Console(quiet=True))
    ended = run(parse_config(TABLES))
    assert read_lines(tmp_path / "events.jsonl") == []
    assert ended["controller"] == why(Reason.DISABLED)
    more = TABLES | {"features": {}, "train": TABLES["train"] | {"ticks": 4}}
    allowed = ("features.growth",)
    run(parse_config(more), resume=True, allow_change=allowed)
    born = [e for e in read_lines(tmp_path / "events.jsonl") if e["to"] == "GERMINATED"]
    assert [e["tick"] for e in born] == [3, 3, 3]


def test_a_frozen_host_has_no_static_twin() -> None:
    with pytest.raises(ConfigError, match=r"static.*train\.frozen must be false"):
        parse_config(TABLES | {"compare": {"static": True}})
