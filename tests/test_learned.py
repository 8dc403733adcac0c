"""The policy `learned`: a network over all seeds, its masks, its file, its fallback."""

import contextlib
import dataclasses
import functools
import json
import logging
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_strict_flags import STRICT, flags

from esper_jax import Growth, build, cli, fit
from esper_jax.groups import Groups
from esper_jax.hosts import MLP
from esper_jax.lifecycle import Stage, gates_pass, init_seeds
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import LEGAL, NO_REQUEST
from esper_jax.policy import (
    ControllerConfig,
    LearnedConfig,
    PolicyFileError,
    Reason,
    heuristic,
    learned,
    learned_lives,
    load,
    network,
)
from esper_jax.policy.germination import Seen
from esper_jax.policy.interface import LayerShape, Setting, barren
from esper_jax.policy.learned import _follow, _within
from esper_jax.policy.learned_file import (
    NUM_FEATURES,
    SHIPPED,
    digest,
    read_policy,
    write_policy,
)
from esper_jax.policy.sight import FEATURES, SIGNALS
from esper_jax.run.build import _form
from esper_jax.run.config import RunConfig
from esper_jax.train import scan_fit
from esper_jax.train.mesh import over_mesh

WEIGHTS = network.init_weights(jax.random.key(3), NUM_FEATURES)
GATES = learned_lives()


def loud(seed: int) -> dict[str, Any]:
    """Weights that say something else of every place."""
    drawn = network.init_weights(jax.random.key(seed), NUM_FEATURES)
    return {**drawn, "say": 5 * drawn["say"], "say_bias": 0 * drawn["say_bias"]}


def shape(seeds: int, blueprints: int = 3) -> LayerShape:
    costs = np.arange(1, 1 + blueprints)[:, None] * np.full(seeds, 10)
    return LayerShape(num_seeds=seeds, capacity=seeds, costs=costs)


def random_seeds(rng: np.random.Generator, num_seeds: int) -> Any:
    """Seeds in any stage, each living one with a slot; ages from 0 to 4."""
    stage = rng.integers(0, len(Stage), num_seeds).astype(np.int8)
    lives = (stage >= Stage.GERMINATED) & (stage <= Stage.FOSSILIZED)
    slot = np.where(lives, np.arange(num_seeds), -1).astype(np.int32)
    return dataclasses.replace(
        init_seeds(num_seeds, num_seeds),
        stage=jnp.asarray(stage),
        epochs_in_stage=jnp.asarray(rng.integers(0, 5, num_seeds), jnp.uint16),
        blueprint=jnp.asarray(rng.integers(0, 3, num_seeds), jnp.int8),
        slot_of_seed=jnp.asarray(slot),
        seed_of_slot=jnp.asarray(slot),
        health=jnp.asarray(rng.uniform(size=num_seeds), jnp.float32),
    )


def random_signals(rng: np.random.Generator, num_seeds: int) -> Signals:
    """Signals of which many are not measured."""
    each = {
        f.name: jnp.asarray(
            np.where(
                rng.uniform(size=num_seeds) < 0.3, np.nan, rng.normal(size=num_seeds)
            ),
            jnp.float32,
        )
        for f in dataclasses.fields(Signals)
    }
    common = {"held_out_loss": 1.25, "held_out_accuracy": 0.5}
    each |= {n: jnp.full(num_seeds, x, jnp.float32) for n, x in common.items()}
    return Signals(**each)


SIZES = {"a": 6, "b": 3, "c": 1}


def drawn(seed: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    seeds = {name: random_seeds(rng, s) for name, s in SIZES.items()}
    return seeds, {name: random_signals(rng, s) for name, s in SIZES.items()}


@functools.cache
def _jitted(names: tuple[str, ...]) -> Any:
    """Some ticks of the policy for layers of `SIZES`, as one program."""

    @functools.partial(jax.jit, static_argnums=4)
    def run(weights: Any, budget: Any, seeds: Any, signals: Any, ticks: int) -> Any:
        groups = Groups.alone(names)
        shapes = {name: shape(SIZES[name]) for name in names}
        make = learned(weights, LearnedConfig(budget=budget))
        policy = make(Setting(layers=shapes, gates=GATES))
        memory = policy.init(shapes, jax.random.key(0))
        given = groups.stack(seeds), groups.stack(signals)
        for _ in range(ticks):
            commands, memory = policy.decide(*given, memory)
        return groups.split(commands), memory

    return run


def decided(
    weights: Any, seeds: Any, signals: Any, budget: int = -1, ticks: int = 1
) -> tuple[dict[str, Any], Any]:
    """Commands by layer of the last of some ticks, and the memory."""
    run = _jitted(tuple(seeds))
    return run(weights, jnp.asarray(budget), seeds, signals, ticks)


def test_the_order_of_seeds_and_layers_does_not_matter() -> None:
    seeds, signals = drawn(0)
    order = np.random.default_rng(1).permutation(6)
    back = np.argsort(order)

    def turned(by_layer: Any) -> Any:
        """Layers in another order, and layer a with its seeds in another one."""
        a = jax.tree.map(lambda x: x[order] if x.ndim else x, by_layer["a"])
        return {"c": by_layer["c"], "b": by_layer["b"], "a": a}

    there = turned(seeds)
    slot = jnp.where(there["a"].slot_of_seed >= 0, jnp.arange(6), -1).astype(jnp.int32)
    there["a"] = dataclasses.replace(there["a"], slot_of_seed=slot, seed_of_slot=slot)
    asked = 0
    for number in range(4):
        one, _ = decided(loud(number), seeds, signals, ticks=2)
        two, _ = decided(loud(number), there, turned(signals), ticks=2)
        for name in SIZES:
            for field in ("target", "blueprint", "strategy"):
                a, b = (np.asarray(getattr(x[name], field)) for x in (one, two))
                np.testing.assert_array_equal(a, b[back] if name == "a" else b)
        asked += int(np.sum(np.asarray(one["a"].target) >= 0))
    assert asked > 4


def test_what_is_asked_is_never_refused_and_keeps_to_the_budget() -> None:
    seen = set()
    passing = jax.jit(functools.partial(gates_pass, config=GATES))
    for number in range(8):
        seeds, signals = drawn(number)
        spent = sum(
            10 * (1 + int(kind))
            for s in seeds.values()
            for kind, slot in zip(s.blueprint, s.slot_of_seed, strict=True)
            if slot >= 0
        )
        budget = spent + 35
        commands, memory = decided(loud(number), seeds, signals, budget, ticks=2)
        assert np.isfinite(memory.remembered).all()
        for name, state in seeds.items():
            asked = commands[name].target
            passes = np.asarray(passing(state, jnp.maximum(asked, 0), signals[name]))
            for i in np.flatnonzero(np.asarray(asked) >= 0):
                source, goal = Stage(int(state.stage[i])), Stage(int(asked[i]))
                seen.add((source, goal))
                assert goal in LEGAL[source]
                assert passes[i]
                if goal not in (Stage.CANCELLED, Stage.ROLLED_BACK):
                    assert state.epochs_in_stage[i] >= GATES.min_epochs[source]
                if goal == Stage.GERMINATED:
                    spent += 10 * (1 + int(commands[name].blueprint[i]))
            born = np.sum(np.asarray(asked) == Stage.GERMINATED)
            assert born <= np.sum(np.asarray(state.seed_of_slot) < 0)
        assert spent <= budget
    assert len(seen) >= 8, seen


def test_a_signal_that_is_ablated_is_as_one_that_was_not_measured() -> None:
    seeds, signals = drawn(5)
    assert set(FEATURES) == set(SIGNALS)
    weights = loud(2)
    _, seeing = decided(weights, seeds, signals, ticks=2)
    for signal in ("worth", "gain", "gradient_ratio", "chunk_gradient", "stability"):
        read = weights["read"].at[FEATURES[signal]].set(0.0)
        unknown = {
            name: dataclasses.replace(s, **{signal: jnp.full_like(s.gain, jnp.nan)})
            for name, s in signals.items()
        }
        one, first = decided({**weights, "read": read}, seeds, signals, ticks=2)
        two, second = decided(weights, seeds, unknown, ticks=2)
        np.testing.assert_allclose(first.remembered, second.remembered, atol=1e-6)
        np.testing.assert_array_equal(one["a"].target, two["a"].target)
        apart = np.abs(np.asarray(first.remembered - seeing.remembered))
        assert apart.max() > 1e-4, signal


@pytest.mark.slow
def test_it_takes_as_long_as_the_heuristic_or_nearly() -> None:
    """Counted in operations of the compiled tick of a model, not in seconds."""

    def work(policy: Any) -> float:
        program = build(
            MLP(8, (16,), 3, num_seeds=4, rngs=nnx.Rngs(0)),
            optax.adam(1e-2),
            optax.adam(1e-2),
            lifecycle_config=GATES,
            policy=policy,
        )
        state = program.init(jax.random.key(0))
        rows = jnp.zeros((256, 8)), jnp.zeros(256, jnp.int32)
        tick = jax.jit(lambda s: program.tick(s, rows)).lower(state).compile()
        cost = tick.cost_analysis()
        return float(cost["flops"])

    ours = work(learned(WEIGHTS, controller=ControllerConfig()))
    assert ours < 1.2 * work(heuristic())


X = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
Y = (X[:, 0] * X[:, 1] > 0).astype(np.int32)


def _program(**options: Any) -> Any:
    return build(
        MLP(4, (6,), 2, num_seeds=2, blueprints=("low_rank",), rngs=nnx.Rngs(0)),
        optax.adam(1e-2),
        optax.adam(1e-2),
        lifecycle_config=GATES,
        policy=learned(WEIGHTS, LearnedConfig(ticks=6), ControllerConfig(patience=1)),
        **options,
    )


@pytest.fixture(scope="module")
def program() -> Any:
    return _program()


def test_a_run_grows_by_it_and_falls_back_to_the_heuristic(
    program: Any, caplog: pytest.LogCaptureFixture
) -> None:
    reports: list[Any] = []

    def go(state: Any, ticks: int) -> Any:
        return fit(
            program,
            state,
            (X, Y),
            (X, Y),
            ticks=ticks,
            batch_size=32,
            on_tick=lambda _, report: reports.append(report),
        )

    state = go(program.init(jax.random.key(0)), 6)
    first = [int(r.reason) for r in reports]
    assert first[0] == Reason.GERMINATED
    stages = np.concatenate([s.stage for s in state.seeds.values()])
    assert (stages >= Stage.GRAFTING).all()
    assert not bool(state.memory.broken)
    assert not caplog.records
    weights = {**state.memory.weights, "say": state.memory.weights["say"] * jnp.nan}
    memory = dataclasses.replace(state.memory, weights=weights)
    with caplog.at_level(logging.WARNING, "esper_jax"):
        state = go(dataclasses.replace(state, memory=memory), 9)
    [warning] = caplog.records
    assert "tick 7: the learned policy decides no longer" in warning.getMessage()
    assert bool(state.memory.broken)
    assert [int(r.reason) == Reason.FELL_BACK for r in reports[6:]] == [
        True,
        False,
        False,
    ]
    # From then on the heuristic counts ticks without a better loss.
    assert int(state.memory.instead.since) == 3
    assert program.recompiles() == 0


@pytest.mark.parametrize(
    ("own", "told", "kept"),
    [(-1, 7, 7), (5, 7, 5), (9, 7, 7), (9, -1, 9), (-1, -1, -1)],
)
def test_the_heuristic_that_takes_over_keeps_to_the_budget(
    own: int, told: int, kept: int
) -> None:
    controller = ControllerConfig(budget=own, patience=3)
    assert _within(controller, told) == dataclasses.replace(controller, budget=kept)
    traced = _within(controller, jnp.asarray(told))
    assert int(traced.budget) == (kept if kept >= 0 else 2**31 - 1)


def test_a_negative_loss_that_falls_is_better() -> None:
    memory = learned(WEIGHTS)(Setting(layers={"a": shape(2)}, gates=GATES)).init(
        {}, jax.random.key(0)
    )
    seen, drawn = [], random_signals(np.random.default_rng(0), 2)
    for loss in (1.0, -1.0, -1.001, -1.02, -1.0):
        layer = dataclasses.replace(drawn, held_out_loss=jnp.asarray(loss, jnp.float32))
        told = Seen(Groups.alone(("a",)), {}, {"a": layer}, {})
        memory, _ = _follow(told, memory, LearnedConfig())
        seen.append((int(memory.stale), round(float(memory.best_loss), 3)))
    assert seen == [(0, 1.0), (0, -1.0), (1, -1.0), (0, -1.02), (1, -1.02)]


def test_scans_and_vmap_decide_as_a_loop_does(program: Any) -> None:
    def run(state: Any) -> Any:
        return scan_fit(program, state, (X, Y), (X, Y), ticks=6, batch_size=32)[0]

    states = jax.vmap(program.init)(jax.random.split(jax.random.key(0), 2))
    alone = fit(
        program,
        jax.tree.map(lambda x: x[1], states),
        (X, Y),
        (X, Y),
        ticks=6,
        batch_size=32,
    )
    many = jax.jit(jax.vmap(run))(states)
    for name, seeds in alone.seeds.items():
        np.testing.assert_array_equal(many.seeds[name].stage[1], seeds.stage)
    np.testing.assert_allclose(
        many.memory.remembered[1], alone.memory.remembered, atol=1e-3
    )


def test_replicas_under_pmap_decide_as_one_device_does(program: Any) -> None:
    many = _program(axis_name="data")
    step, tick = (jax.pmap(f, axis_name="data") for f in (many.step, many.tick))
    apart = tuple(v.reshape(2, 32, *v.shape[1:]) for v in (X, Y))
    one = program.init(jax.random.key(0))
    both = jax.tree.map(lambda x: jnp.stack([x] * 2), many.init(jax.random.key(0)))
    for _ in range(6):
        for _ in range(2):
            one, both = program.step(one, (X, Y)), step(both, apart)
        (one, told), (both, by_both) = program.tick(one, (X, Y)), tick(both, apart)
        assert np.all(by_both.replicas_agree)
        assert by_both.reason.tolist() == [int(told.reason)] * 2
    for name, seeds in one.seeds.items():
        stages = np.asarray(both.seeds[name].stage)
        np.testing.assert_array_equal(stages, [seeds.stage] * 2)
        assert (stages >= Stage.GRAFTING).all()


@pytest.mark.slow
def test_devices_decide_as_one_does(program: Any) -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    many = over_mesh(_program(axis_name="data"), mesh)
    ends = [
        fit(p, p.init(jax.random.key(0)), (X, Y), (X, Y), ticks=6, batch_size=32)
        for p in (program, many)
    ]
    one, other = (end.seeds["layers/0"] for end in ends)
    np.testing.assert_array_equal(one.stage, other.stage)
    np.testing.assert_allclose(*(end.memory.remembered for end in ends), atol=1e-3)


def test_beside_a_loop_of_ones_own(caplog: pytest.LogCaptureFixture) -> None:
    host = MLP(4, (6,), 2, num_seeds=3, capacity=2, rngs=nnx.Rngs(0))
    weights = {**WEIGHTS, "think": WEIGHTS["think"] * jnp.nan}
    growth = Growth(
        host,
        optax.sgd(0.1),
        lifecycle_config=GATES,
        policy=learned(WEIGHTS, controller=ControllerConfig()),
    )
    report = growth.tick(host, lambda m: jnp.mean(m(X) ** 2))
    # As many as there are slots.
    assert sorted(report.layers["layers/0"].stage.tolist()) == [0, 1, 1]
    assert not caplog.records
    held = growth.state.get_value()
    memory = dataclasses.replace(held.growth.memory, weights=weights)
    state = dataclasses.replace(held.growth, memory=memory)
    growth.state.set_value(held._replace(growth=state))
    report = growth.tick(host, lambda m: jnp.mean(m(X) ** 2))
    assert int(report.reason) == Reason.FELL_BACK
    assert "tick 2: the learned policy decides no longer" in caplog.text


def test_a_file_holds_what_was_written_and_others_are_refused(tmp_path: Any) -> None:
    path = tmp_path / "policy.safetensors"
    write_policy(path, WEIGHTS, command="esper-jax policy train x.toml", seed=7)
    found = read_policy(path)
    assert found.made_by["command"] == "esper-jax policy train x.toml"
    assert found.made_by["seed"] == 7
    assert path.stat().st_size < 100_000
    for name, weights in WEIGHTS.items():
        np.testing.assert_array_equal(found.weights[name], weights)
    policy = load(path, budget=5, ticks=3)(Setting(layers={"a": shape(2)}, gates=GATES))
    assert policy.reads >= {"chunk_gradient", "gradient_ratio"}

    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])

    def other(**metadata: str) -> None:
        new = {**header, "__metadata__": {**header["__metadata__"], **metadata}}
        text = json.dumps(new).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    for change, message in (
        ({"version": "9"}, "expected version '1', got '9'"),
        ({"format": "x"}, "expected format 'esper_jax.policy'"),
        ({"signature": '{"reads": ["smell"]}'}, r"whose reads are .*got \['smell'\]"),
        ({"signature": "[1]"}, "signature of this version.*got none"),
        ({"made_by": '{"hash": "0"}'}, "the file was changed after it was written"),
        ({"made_by": "not JSON"}, "expected safetensors with a learned policy"),
        ({"made_by": "[1]"}, "expected safetensors with a learned policy"),
    ):
        other(**change)
        with pytest.raises(PolicyFileError, match=message):
            read_policy(path)
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(PolicyFileError, match="expected safetensors"):
        read_policy(path)
    with pytest.raises(PolicyFileError, match="cannot be read"):
        read_policy(tmp_path / "nothing")


def test_the_shipped_policy_says_what_made_it() -> None:
    found = read_policy()
    assert SHIPPED.stat().st_size < 100_000
    assert found.made_by["command"].startswith("esper-jax policy train configs/policy")
    assert found.made_by["seed"] == 0
    assert found.made_by["hash"] == digest(found.weights)
    assert all(np.isfinite(w).all() for w in found.weights.values())
    seeds, signals = drawn(1)
    commands, memory = decided(found.weights, seeds, signals)
    assert not bool(memory.broken)
    asked = np.concatenate([c.target for c in commands.values()])
    assert (asked == Stage.GERMINATED).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"budget": -2}, "budget must be an int"), ({"ticks": 1.5}, "ticks must be an")],
)
def test_bad_numbers_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnedConfig(**change)


def test_a_run_of_a_config(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It falls back at its first tick, which its events tell."""

    def esper(*words: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["esper-jax", *map(str, words)])
        with contextlib.suppress(SystemExit):
            cli.main()
        said = capsys.readouterr()
        return said.out + said.err

    path = tmp_path / "broken.safetensors"
    write_policy(path, {**WEIGHTS, "say_bias": WEIGHTS["say_bias"] * np.nan}, seed=7)
    config = tmp_path / "run.toml"
    config.write_text(
        f'policy = "learned"\n[learned]\npath = "{path}"\n[model]\nhidden = [8]\n'
        "[growth]\nnum_seeds = 2\ncapacity = 2\n[train]\nticks = 2\nbatch_size = 500\n"
    )
    out = tmp_path / "run"
    assert "the heuristic decides" in esper("train", config, "--out", out)
    lines = (out / "events.jsonl").read_text().splitlines()
    told = [e for e in map(json.loads, lines) if e["to"] == "the heuristic"]
    assert [e["tick"] for e in told] == [1]
    assert "not finite" in told[0]["text"]
    assert "seed: 7" in esper("policy", "show", path)
    # It goes on with the weights that the checkpoint holds.
    write_policy(path, loud(1))
    esper("train", config, "--out", out, "--resume", "--set", "train.ticks=3")
    lines = (out / "events.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["to"] == "the heuristic" for line in lines) == 1
    ticks = (out / "ticks.jsonl").read_text().splitlines()
    assert json.loads(ticks[-1])["tick"] == 3
    change = ("train", config, "--out", out, "--resume", "--allow-change", "learned")
    assert "the saved state has the form that this key gave it" in esper(*change)
    path.write_bytes(b"nothing")
    for words in (("train", config, "--out", tmp_path / "b"), ("policy", "show", path)):
        assert f"{path}: expected safetensors" in esper(*words)


def test_runs_that_share_programs_share_those_of_their_length_alone() -> None:
    def form(policy: str, ticks: int) -> Any:
        base = RunConfig(policy=policy)
        return _form(
            dataclasses.replace(
                base, train=dataclasses.replace(base.train, ticks=ticks)
            )
        )

    assert form("heuristic", 5) == form("heuristic", 6)
    assert form("learned", 5) != form("learned", 6)


def test_growth_that_is_off_is_told() -> None:
    shapes, groups = {"a": shape(3)}, Groups.alone(("a",))
    policy = barren(learned(WEIGHTS))(Setting(layers=shapes, gates=GATES))
    seeds = groups.stack({"a": init_seeds(3, 3)})
    signals = groups.stack({"a": random_signals(np.random.default_rng(0), 3)})
    asked, memory = policy.decide(
        seeds, signals, policy.init(shapes, jax.random.key(0))
    )
    assert np.all(groups.split(asked)["a"].target == NO_REQUEST)
    assert int(memory.reason) == Reason.DISABLED


def test_decisions_under_strict_promotion_are_the_same() -> None:
    seeds, signals = drawn(3)
    plain = jax.device_get(decided(WEIGHTS, seeds, signals, budget=90)[0])
    with flags(STRICT):
        strict = jax.device_get(decided(WEIGHTS, seeds, signals, budget=90)[0])
    assert any(np.any(c.target != NO_REQUEST) for c in plain.values())
    jax.tree.map(np.testing.assert_array_equal, strict, plain)
