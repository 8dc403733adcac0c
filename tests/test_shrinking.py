"""After a trial, slots are given back: fewer arrays, the same numbers, told of."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

from esper_jax import ChunkedLayer, Growth, Stage, make_growable
from esper_jax.blueprints import lora
from esper_jax.bus import CapacityChanged, decode
from esper_jax.checkpoint import Checkpointer
from esper_jax.policy import Reason, TrialConfig, heuristic, trial, trial_lives
from esper_jax.run import run
from esper_jax.run.config import ConfigError, load_config, parse_config, to_dict
from esper_jax.run.folder import read_lines
from esper_jax.run.run import train_run
from esper_jax.train.governor import Governor
from esper_jax.trees import state_hash

ROOT = pathlib.Path(__file__).parents[1]
X = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
Y = np.sin(X @ np.random.default_rng(1).normal(size=(6, 6))).astype(np.float32)


def loss_fn(model: Any) -> Any:
    return jnp.mean((model(X) - Y) ** 2)


evaluate = nnx.jit(loss_fn)


@nnx.jit
def step(model: Any, growth: Any) -> None:
    loss, grads = nnx.value_and_grad(loss_fn, argnums=growth.argnums)(model)
    growth.update(model, grads, loss=loss)


class Loop:
    """A frozen host of two layers, of which the budget leaves one without parts."""

    def __init__(self, **options: Any) -> None:
        rngs = nnx.Rngs(0)
        first, last = nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)
        self.model = nnx.Sequential(first, nnx.tanh, last)
        make_growable(self.model, nnx.Linear, 3, blueprints=[lora(rank=1)], rngs=rngs)
        if not options:
            options = {
                "policy": trial(TrialConfig(ticks=1, budget=12)),
                "lifecycle_config": trial_lives(tuning=4),
            }
        self.growth = Growth(self.model, optax.adam(1e-2), wrt=None, **options)

    def ticks(self, count: int) -> Any:
        for _ in range(count):
            for _ in range(4):
                step(self.model, self.growth)
            report = self.growth.tick(self.model, evaluate)
        return report

    def parts(self) -> dict[int, Any]:
        """Bank and moments of what lives, by layer and seed."""
        state = self.growth.run_state(self.model)
        return {
            (name, int(seed)): jax.tree.map(
                lambda x, k=slot: np.asarray(x[k]),
                (state.banks[name], state.bank_opt[name]),
            )
            for name, seeds in state.seeds.items()
            for slot, seed in enumerate(seeds.seed_of_slot)
            if seed >= 0
        }


def test_slots_are_given_back_and_no_value_changes(tmp_path: Any) -> None:
    small = Loop()
    assert not small.growth.settled
    assert small.growth.shrink(small.model) == {}  # not before the policy says so
    report = small.ticks(7)
    assert int(report.reason) == Reason.SETTLED
    before, out = small.parts(), np.asarray(small.model(X))
    assert len(before) == 1
    with jax.debug_nans(True):  # NaN is what was not measured
        changed = small.growth.shrink(small.model)
    of_layer = [name for name, _ in before]
    living = {name: of_layer.count(name) for name in changed}
    assert changed == {name: (3, n) for name, n in living.items()}
    assert 0 in living.values()  # a layer of which nothing was kept
    # Parts of a layer are one product over their hidden units, of which fewer are left.
    np.testing.assert_allclose(small.model(X), out, rtol=1e-6, atol=1e-6)
    assert small.growth.shrink(small.model) == {}
    jax.tree.map(np.testing.assert_array_equal, before, small.parts())
    layers = dict(zip(living, (small.model.layers[i] for i in (0, 2)), strict=True))
    for name, layer in layers.items():
        assert layer.bed.seeds.get_value().capacity == max(1, living[name])
        assert layer.enabled == (living[name] > 0)
    # The layer that kept nothing computes nothing but its base.
    empty = next(layer for name, layer in layers.items() if not living[name])
    jaxpr = str(jax.make_jaxpr(lambda x: empty(x))(X))
    assert jaxpr == str(jax.make_jaxpr(lambda x: empty.base(x))(X))

    # Restored into all slots, as a new process makes them, and shrunk to the same.
    same = Loop()
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, small.growth.run_state(small.model))
        checkpoints.wait()
        like = same.growth.run_state(same.model)
        same.growth.go_on(checkpoints.restore(like).state, same.model)
    assert same.growth.shrink(same.model) == changed
    hashes = [state_hash(x.growth.run_state(x.model)) for x in (small, same)]
    assert hashes[0] == hashes[1]
    report = small.ticks(4)
    stages = np.concatenate([x.stage for x in report.layers.values()])
    assert np.sum(stages == Stage.FOSSILIZED) == len(before)
    assert float(loss_fn(small.model)) < float(jnp.mean((out - Y) ** 2))


def test_a_state_of_fewer_slots_goes_on_without_a_checkpointer() -> None:
    """Layers of one shape have different numbers of slots in it."""
    budget = {"policy": trial(TrialConfig(ticks=1, budget=36))}
    small, fresh = (
        Loop(lifecycle_config=trial_lives(tuning=4), **budget) for _ in range(2)
    )
    small.ticks(7)
    small.growth.shrink(small.model)
    state = small.growth.run_state(small.model)
    assert len({seeds.capacity for seeds in state.seeds.values()}) == 2
    fresh.growth.go_on(state, fresh.model)
    losses = [float(loop.ticks(2).loss) for loop in (small, fresh)]
    assert losses[0] == losses[1]
    hashes = [state_hash(x.growth.run_state(x.model)) for x in (small, fresh)]
    assert hashes[0] == hashes[1]


def test_a_policy_that_may_let_something_be_born_keeps_its_slots() -> None:
    loop = Loop(policy=heuristic())
    loop.growth.tick(loop.model, lambda m: 1.0)
    assert not loop.growth.settled
    assert loop.growth.shrink(loop.model) == {}
    assert [bed.seeds.get_value().capacity for bed in beds(loop.model)] == [3, 3]
    with pytest.raises(ValueError, match="shrink must be called between steps"):
        nnx.jit(lambda model, growth: growth.shrink(model))(loop.model, loop.growth)


def beds(model: Any) -> list[Any]:
    return [n.bed for _, n in nnx.iter_graph(model) if isinstance(n, ChunkedLayer)]


TABLES: dict[str, Any] = {
    "policy": "trial",
    "data": {"name": "spirals"},
    "model": {"hidden": [6]},
    "growth": {"num_seeds": 3, "capacity": 3, "blueprints": ["lora"]},
    "train": {
        "ticks": 10,
        "batch_size": 300,
        "frozen": True,
        "blueprint_learning_rate": 1e-2,
    },
    "trial": {"ticks": 1, "budget": 60, "rent": float("-inf")},
    "lifecycle": {"cull_delta": float("-inf"), "min_epochs": {"FINE_TUNING": 2}},
    "checkpoint": {"every": 2, "keep": 9},
}


@pytest.mark.filterwarnings("ignore:blueprints. 'lora' has rank 4:UserWarning")
def test_a_run_shrinks_by_itself_and_goes_on_across_it(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(TABLES)
    program = run.build_run(config, run.load_data(config))
    monkeypatch.setattr(run, "build_run", lambda *_: program)  # compiled once
    quiet = Console(quiet=True)
    # All with a bus: a tick that takes commands is a program of its own, which XLA may
    # round otherwise.
    bus = tmp_path / "bus"
    told_on: Any = {"bus": f"file:{bus}", "console": quiet}
    ended = train_run(config, tmp_path / "a", **told_on)
    assert ended["recompiles"] == 2  # step and tick, once each
    assert ended["host_params"] == (2 + 1) * 6 + (6 + 1) * 2  # all of them frozen
    events = read_lines(tmp_path / "a" / "events.jsonl")
    told = [e for e in events if "slots" in e]
    assert {e["tick"] for e in told} == {7}
    assert sum(e["slots"][0] - e["slots"][1] for e in told) > 0
    assert "gives back 2 of 3 slots" in told[0]["text"]
    said = [decode(x).message for x in (bus / "out.jsonl").read_bytes().splitlines()]
    assert [
        {"tick": m.tick, "layer": m.layer, "slots": [m.before, m.after], "text": m.text}
        for m in said
        if isinstance(m, CapacityChanged)
    ] == [{key: e[key] for key in ("tick", "layer", "slots", "text")} for e in told]
    assert [e["to"] for e in events].count("FOSSILIZED") > 0

    # A loss that rises because parts were taken out is no jump to a governor.
    state = program.init(jax.random.key(0))
    governor = Governor(program)
    governor.start(state)
    data = run.load_data(config).held_out
    losses = jnp.arange(32.0).reshape(16, 2)
    state = dataclasses.replace(
        state, governor=dataclasses.replace(state.governor, losses=losses)
    )
    _, report = program.tick(program.init(jax.random.key(0)), data)
    lower = dataclasses.replace(report, loss=report.loss - 0.5)
    raised = governor.allow_for(state, lower, data).governor.losses - losses
    np.testing.assert_allclose(raised, 0.5, rtol=1e-4)
    np.testing.assert_array_equal(governor.restore().governor.losses - losses, raised)

    # Stopped before the parts are judged, and after: the same run.
    for stop in (2, 8):
        out = tmp_path / f"b{stop}"
        tables = {**TABLES, "train": {**TABLES["train"], "ticks": stop}}
        train_run(parse_config(tables), out, **told_on)
        again = train_run(config, out, resume=True, **told_on)
        assert again["state_hash"] == ended["state_hash"]
        assert again["events"] == ended["events"]


@pytest.mark.filterwarnings("ignore:blueprints. 'lora' has rank 4:UserWarning")
def test_a_trial_s_lifecycle_is_the_default_of_its_config(tmp_path: Any) -> None:
    config = parse_config({"policy": "trial"})
    assert config.lifecycle == trial_lives()
    assert parse_config(to_dict(config)) == config
    adapt = load_config(ROOT / "configs" / "adapt.toml")
    assert (adapt.policy, adapt.train.frozen) == ("trial", True)
    assert adapt.lifecycle.min_improvement == 0
    other = parse_config(TABLES).lifecycle
    ages = list(trial_lives().min_epochs)
    ages[Stage.FINE_TUNING] = 2
    assert other == dataclasses.replace(
        trial_lives(), min_epochs=tuple(ages), cull_delta=-np.inf
    )
    few = {**TABLES, "growth": {**TABLES["growth"], "capacity": 2}}
    fold = {**TABLES, "lifecycle": {"fold": "frozen"}}  # behind an activation
    for tables, message in ((few, "2 for 3 seeds"), (fold, "fold must be 'never'")):
        with pytest.raises(ConfigError, match=message):
            train_run(parse_config(tables), tmp_path / "none")
        assert not (tmp_path / "none").exists()
    for table, message in (
        ({"policy": "tril"}, "policy must be one of heuristic, trial"),
        ({"trial": {"judge": 3}}, "trial.judge: expected str, got 3"),
        ({"trial": {"blueprint": 1}}, "trial.blueprint must be an index"),
        ({"policy": "trial", "lifecycle": 3}, "lifecycle: expected a table"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(table)
