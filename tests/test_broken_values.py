"""NaN and infinity in each leaf of a state: the governor finds them, or they pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from esper_jax.hosts import MLP
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.stages import Stage
from esper_jax.train import Governor, build
from esper_jax.train.faults import first_wrong, sound_values
from esper_jax.trees import copy_state, is_key

LAYER = "layers/0"
GATES = LifecycleConfig(min_epochs=(0, 500, 500, 500, 500, 500, 500, 0, 3, 0, 3))
STAGES = (Stage.GRAFTING, Stage.FOSSILIZED, Stage.TRAINING, Stage.DORMANT)
BATCH, STEPS = 16, 2
LOWEST = optax.GradientTransformation(
    lambda params: {"lowest": jnp.asarray(jnp.inf)},
    lambda updates, lowest, params=None: (updates, lowest),
)
"""An optimizer whose state is infinite in the beginning, as some are."""

PASSES = {
    "nan": {
        "sums of a tick, which each tick clears": (
            *(".statistics.", ".reconstruction", ".gain", ".monitor.gradients["),
        ),
        "known in GRAFTING alone, where NaN is not measured": (".graft.previous_loss",),
        "not measured, and measured again by the next tick": (
            *(".health", ".worth", ".monitor.initial_loss"),
            *(".loss_mean", ".accuracy_mean", ".governor.losses", ".memory.before["),
        ),
    },
    "inf": {
        "sums of a tick, which each tick clears": (
            *(".statistics.", ".reconstruction", ".gain", ".monitor.gradients["),
        ),
        "measured again by the next tick": (*(".health", ".monitor.initial_loss"),),
        "known in GRAFTING alone, which sets it before it reads it": (
            ".graft.previous_loss",
        ),
        "a seed without which the loss is infinite": (".worth",),
        "nothing was measured yet": (".governor.best", ".memory.best_loss"),
    },
}
"""Leaves that are not checked for a value, and why it hurts nothing there."""


@pytest.fixture(scope="module")
def program():
    class Normed(MLP):
        """With batch statistics, and a mask that holds infinity from the start."""

        def __init__(self, rngs):
            super().__init__(6, (8,), 3, num_seeds=4, capacity=4, rngs=rngs)
            self.norm = nnx.BatchNorm(6, rngs=rngs)
            self.mask = nnx.Variable(jnp.array([0.0, -jnp.inf]))

        def __call__(self, x):
            return super().__call__(self.norm(x))

    return build(
        Normed(nnx.Rngs(0)),
        optax.chain(optax.adam(1e-2), LOWEST),
        optax.adam(1e-3),
        lifecycle_config=GATES,
        eval_batch=32,
    )


@functools.cache
def data(rows):
    rng = np.random.default_rng(rows)
    y = rng.integers(0, 3, rows).astype(np.int32)
    x = rng.normal(size=(rows, 6)) + 3.0 * np.eye(6)[y]
    return jnp.asarray(x.astype(np.float32)), jnp.asarray(y)


def ticked(program, state):
    order = jnp.arange(BATCH * STEPS, dtype=jnp.int32)
    for _ in range(STEPS):
        state = program.step_from(state, data(BATCH * STEPS), order, BATCH)
    return program.tick(state, data(24))[0]


@pytest.fixture(scope="module")
def state(program):
    """After two ticks, with seeds that learn, count and sleep."""
    start = program.init(jax.random.key(0))
    layer = dataclasses.replace(
        start.seeds[LAYER],
        stage=jnp.asarray(STAGES, jnp.int8),
        slot_of_seed=jnp.arange(4, dtype=jnp.int32).at[3].set(-1),
        seed_of_slot=jnp.arange(4, dtype=jnp.int32).at[3].set(-1),
    )
    start = dataclasses.replace(start, seeds={LAYER: layer})
    return ticked(program, ticked(program, start))


def floats(state):
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if not is_key(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
    }


def written(state, name, value):
    """A copy of the state with a value all over one leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            jnp.full_like(leaf, value) if jax.tree_util.keystr(path) == name else leaf
        ),
        copy_state(state),
    )


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_what_the_governor_does_not_see_hurts_nothing(program, state, value):
    governor = Governor(program)
    governor.start(state)
    check = jax.jit(functools.partial(sound_values, infinite=governor._infinite))
    assert bool(check(state))
    expected = ticked(program, copy_state(state))
    infinite = {n for n, x in floats(expected).items() if np.isinf(x).any()}
    passing = [end for ends in PASSES[str(value)].values() for end in ends]
    seen, unseen, used = [], [], set()
    for name, leaf in floats(state).items():
        broken = written(state, name, value)
        allowed = [end for end in passing if end in name]
        kept = np.isinf(leaf).any() and value == np.inf  # the mask, as it may be
        if not bool(check(broken)):
            assert first_wrong(broken, governor._infinite)
            seen.append(name)
            assert not allowed, f"{name}: is checked, take it off the list"
            continue
        assert allowed or kept, f"{name}: {value} is not found"
        used |= set(allowed)
        unseen.append(name)
        if kept:
            continue
        after = ticked(program, broken)
        assert bool(check(after)), name
        for part in ("params", "opt_state", "banks", "bank_opt", "rest"):
            jax.tree.map(
                functools.partial(np.testing.assert_array_equal, err_msg=name),
                floats(getattr(after, part)),
                floats(getattr(expected, part)),
            )
        left = floats(ticked(program, after))
        left = {n for n, x in left.items() if np.isinf(x).any()}
        # Only in GRAFTING is the one read; the other begins anew in each stage.
        stays = (f"{LAYER}'].worth", f"{LAYER}'].graft.previous_loss")
        assert {n for n in left if not n.endswith(stays)} <= infinite, name
    assert used == set(passing)
    assert len(seen) > 2 * len(unseen)
