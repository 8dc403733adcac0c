"""A policy of one's own, as a pair of functions, in `build` and in `Growth`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct

from esper_jax import ControllerConfig, Growth, build
from esper_jax.hosts import MLP
from esper_jax.lifecycle import Commands, LifecycleConfig, Stage
from esper_jax.monitor.words import why
from esper_jax.policy import Policy, Reason, heuristic

SOON = LifecycleConfig(min_epochs=(0,) * 11)


@struct.dataclass
class Turns:
    """Ticks so far, and a number drawn when the run began."""

    ticks: jax.Array
    drawn: jax.Array


def one_by_one():
    """Germinates seed after seed of every layer, a tick each."""

    def init(shapes, key):
        assert {name: s.num_seeds for name, s in shapes.items()} == {"layers/0": 3}
        assert [s.capacity for s in shapes.values()] == [2]
        (costs,) = (s.costs for s in shapes.values())
        assert costs.shape == (1, 3)
        return Turns(jnp.zeros((), jnp.int32), jax.random.uniform(key))

    def decide(seeds, signals, memory):
        commands = {}
        for name, state in seeds.items():
            assert signals[name].held_out_loss.shape == ()
            turn = jnp.arange(state.num_seeds) == memory.ticks
            nothing = jnp.full(state.stage.shape, -1, jnp.int8)
            target = jnp.where(turn, jnp.int8(Stage.GERMINATED), nothing)
            commands[name] = Commands(target, jnp.zeros_like(nothing), nothing)
        return commands, memory.replace(ticks=memory.ticks + 1)

    return Policy(init, decide)


def model():
    return MLP(4, (6,), 3, num_seeds=3, capacity=2, rngs=nnx.Rngs(0))


X, Y = np.ones((8, 4), np.float32), np.zeros(8, np.int32)
EXPECTED = [[1, 0, 0], [1, 1, 0], [1, 1, 0]]  # two slots


def test_in_our_own_loop():
    program = build(
        model(),
        optax.sgd(0.1),
        optax.sgd(0.1),
        lifecycle_config=SOON,
        policy=one_by_one(),
    )
    state, stages = program.init(jax.random.key(0)), []
    drawn = float(state.memory.drawn)
    for _ in range(3):
        state, report = program.tick(state, (X, Y))
        stages.append(state.seeds["layers/0"].stage.tolist())
    assert stages == EXPECTED
    assert report.reason == -1
    assert why(int(report.reason)) == "the policy gives no reason"
    assert (int(state.memory.ticks), float(state.memory.drawn)) == (3, drawn)


def test_beside_a_loop_of_ones_own():
    host = model()
    growth = Growth(host, optax.sgd(0.1), lifecycle_config=SOON, policy=one_by_one())
    stages = []
    for _ in range(3):
        report = growth.tick(host, lambda m: jnp.mean(m(X) ** 2))
        stages.append(report.layers["layers/0"].stage.tolist())
    assert stages == EXPECTED
    assert np.isnan(report.accuracy)


def test_the_heuristic_is_a_policy_like_any_other():
    def ticked(**options):
        program = build(model(), optax.sgd(0.1), optax.sgd(0.1), **options)
        state = program.init(jax.random.key(0))
        for _ in range(3):
            state, report = program.tick(state, (X, Y))
        return state, report

    config = ControllerConfig(when="period", period=2)
    by_config, one = ticked(controller_config=config)
    by_policy, other = ticked(policy=heuristic(config))
    jax.tree.map(np.testing.assert_array_equal, by_config.seeds, by_policy.seeds)
    assert one.reason == other.reason == Reason.UNMEASURED


def test_what_is_no_policy_is_refused():
    with pytest.raises(TypeError, match=r"policy must be a Policy\(init, decide\)"):
        Growth(model(), optax.sgd(0.1), policy="heuristic")
    with pytest.raises(TypeError, match="policy must be"):
        Growth(model(), optax.sgd(0.1), policy=lambda setting: None)
    with pytest.raises(ValueError, match="policy must be given alone"):
        Growth(
            model(),
            optax.sgd(0.1),
            policy=one_by_one(),
            controller_config=ControllerConfig(),
        )
    with pytest.raises(ValueError, match="blueprint must be an index into the 1"):
        Growth(model(), optax.sgd(0.1), policy=heuristic(ControllerConfig(blueprint=1)))
