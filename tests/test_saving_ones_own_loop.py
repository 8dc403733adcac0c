"""A loop of one's own that is saved and goes on in other objects, bit for bit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_own_loops import CLASSES, HIDDEN, POLICY, QUICK, WIDTH, X, Y, cross_entropy

from esper_jax import Growth, Stage, make_growable
from esper_jax.blueprints import lora
from esper_jax.checkpoint import Checkpointer, CheckpointError
from esper_jax.checkpoint.host_leaves import flatten
from esper_jax.growth import TrainState
from esper_jax.migrations.chain import CURRENT, SCHEMAS
from esper_jax.policy import trial, trial_lives
from esper_jax.policy.interface import SAMPLED
from esper_jax.train import Passes

TICKS, STEPS = 10, 5
ROWS = [slice(i, i + 4) for i in range(0, 16, 4)]


class Net(nnx.Module):
    def __init__(self, seed: int) -> None:
        rngs = nnx.Rngs(seed, dropout=seed)
        self.a = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.norm = nnx.BatchNorm(HIDDEN, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.b = nnx.Linear(HIDDEN, HIDDEN, rngs=rngs)
        self.c = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = self.dropout(self.norm(self.a(x)))
        return self.c(nnx.relu(self.b(x)))


def loss_fn(model: Any, rows: Any) -> Any:
    x, y = rows
    return cross_entropy(model(x), y).mean()


@nnx.jit
def evaluate(model: Any) -> Any:
    view = nnx.view(model, deterministic=True, use_running_average=True)
    return loss_fn(view, (X, Y))


class Loop:
    """Somebody's loop: its objects, and what it does in a tick."""

    def __init__(self, seed: int) -> None:
        self.model = Net(seed)
        layers = ["a", "b"]
        make_growable(self.model, layers, 2, capacity=1, rngs=nnx.Rngs(seed))
        self.growth = Growth(
            self.model,
            optax.adam(2e-2),
            lifecycle_config=QUICK,
            controller_config=POLICY,
            rngs=nnx.Rngs(seed),
        )
        tx = optax.masked(optax.adam(1e-3), lambda p: jax.tree.map(jnp.ndim, p))
        self.optimizer = nnx.ModelAndOptimizer(self.model, tx)
        self.ema = nnx.EMA(self.model, 0.9, only=nnx.Param)
        self.batches = Passes([(X[rows], Y[rows]) for rows in ROWS])

    def objects(self) -> tuple[Any, ...]:
        return self.model, self.optimizer, self.ema

    def steps(self, count: int) -> None:
        for _ in range(count):
            step(self.growth, *self.objects(), next(self.batches))

    def ticks(self, count: int, begun: int = 0) -> list[list[int]]:
        stages = []
        for _ in range(count):
            self.steps(STEPS - begun)
            begun = 0
            report = self.growth.tick(self.model, evaluate)
            stages.append([int(s) for x in report.layers.values() for s in x.stage])
        return stages


@nnx.jit
def step(growth: Growth, model: Any, optimizer: Any, ema: Any, rows: Any) -> None:
    loss, grads = nnx.value_and_grad(loss_fn, argnums=growth.argnums)(model, rows)
    optimizer.update(grads)
    ema.update(nnx.state(model, nnx.Param))
    growth.update(model, grads, loss=loss)


def test_a_loop_that_goes_on_is_the_one_that_never_stopped(tmp_path: Any) -> None:
    whole = Loop(0)
    expected = whole.ticks(TICKS)
    assert Stage.FOSSILIZED in expected[-1]

    first = Loop(0)
    first.ticks(6)
    first.steps(2)  # in the middle of a tick, and of a pass
    first.model.seen = nnx.Intermediate(jnp.ones(3))  # sown: no part of the state
    with Checkpointer(tmp_path) as checkpoints:
        state = first.growth.run_state(*first.objects())
        checkpoints.save(int(state.step), state, data=first.batches)

    again = Loop(1)  # with other numbers everywhere
    with Checkpointer(tmp_path) as checkpoints:
        like = again.growth.run_state(*again.objects())
        state = checkpoints.restore(like, data=again.batches).state
    again.growth.go_on(state, *again.objects())
    assert int(state.ticks) == 6
    assert int(state.step) == 6 * STEPS + 2
    assert again.ticks(TICKS - 6, begun=2) == expected[6:]
    ends = [loop.growth.run_state(*loop.objects()) for loop in (again, whole)]
    jax.tree.map(same, *ends)
    # And in their own objects, the seeds as the model packs them among them.
    both = [nnx.state((*loop.objects(), loop.growth)) for loop in (again, whole)]
    jax.tree.map(same, *both)


def same(a: Any, b: Any) -> None:
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a, b)


def test_the_form_is_the_frozen_one_and_adapts_to_another_capacity(
    tmp_path: Any,
) -> None:
    loop = Loop(0)
    loop.ticks(2)
    state = loop.growth.run_state(*loop.objects())
    assert isinstance(state, TrainState)
    names = {
        "/".join("<layer>" if key in ("a", "b") else key for key in keys)
        for keys, _ in flatten(state).values()
    }
    closed = [n for n in SCHEMAS[CURRENT].state if "<" not in n.replace("<layer>", "")]
    assert not set(closed) - names, "the heuristic's run has all leaves of the schema"
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        assert not checkpoints.migrate(1), "nothing is missing from it"
        wide = Net(1)
        make_growable(wide, ["a", "b"], 2, capacity=2, rngs=nnx.Rngs(1))
        growth = Growth(
            wide,
            optax.adam(2e-2),
            lifecycle_config=QUICK,
            controller_config=POLICY,
        )
        optimizer = nnx.ModelAndOptimizer(wide, loop.optimizer.tx)
        ema = nnx.EMA(wide, 0.9, only=nnx.Param)
        restored = checkpoints.restore(growth.run_state(wide, optimizer, ema))
        assert restored.resized == {"a": (1, 2), "b": (1, 2)}
        growth.go_on(restored.state, wide, optimizer, ema)
        for name, layer in (("a", wide.a), ("b", wide.b)):
            seeds = layer.bed.seeds.get_value()
            np.testing.assert_array_equal(seeds.stage, state.seeds[name].stage)
            assert seeds.capacity == 2
        step(growth, wide, optimizer, ema, (X, Y))
        growth.tick(wide, evaluate)


def test_what_does_not_fit_is_refused_and_nothing_changes(tmp_path: Any) -> None:
    loop, other = Loop(0), Net(0)
    state = loop.growth.run_state(*loop.objects())
    before = nnx.to_pure_dict(nnx.state(loop.model, nnx.Param))
    state = state.replace(params=jax.tree.map(lambda x: x + 1, state.params))
    make_growable(other, "a", 2, rngs=nnx.Rngs(0))
    growth = Growth(other, optax.adam(1e-2), measure=SAMPLED)
    with pytest.raises(ValueError, match="of the layers 'a'; got one of 'a', 'b'"):
        growth.go_on(state, other, loop.optimizer, loop.ema)
    with pytest.raises(ValueError, match="must be the 2 that run_state was given; g"):
        loop.growth.go_on(state, loop.model)
    with pytest.raises(ValueError, match="must be the one that Growth was made for"):
        loop.growth.run_state(other)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(0, state)
        with pytest.raises(CheckpointError, match="does not fit"):
            checkpoints.restore(growth.run_state(other))
    after = nnx.to_pure_dict(nnx.state(loop.model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def made(width: int = 8, seeds: int = 2, **options: Any) -> tuple[Any, Growth]:
    model = nnx.List([nnx.Linear(4, width, rngs=nnx.Rngs(0))])
    blueprints = [options.pop("blueprint", lora(rank=1))]
    rngs = nnx.Rngs(0)
    make_growable(model, nnx.Linear, seeds, blueprints=blueprints, rngs=rngs)
    return model, Growth(
        model, options.pop("optimizer", optax.adam(0.1)), wrt=None, **options
    )


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"width": 6}, r"state.rest.*base.* must have shape \(8,\).*got \(6,\)"),
        ({"seeds": 3}, r"state\..* must .*as in this loop; got"),
        ({"blueprint": lora(rank=2)}, "state.banks.*Make the blueprints as"),
        ({"optimizer": optax.sgd(0.1)}, "state.bank_opt must have.*make the optimizer"),
        (
            {"policy": trial(), "lifecycle_config": trial_lives()},
            "state.memory must have.*make the policy as it was",
        ),
    ],
    ids=["width", "seeds", "blueprint", "optimizer", "policy"],
)
def test_a_state_of_another_loop_is_refused(other: Any, message: str) -> None:
    model, growth = made()
    different, its_own = made(**other)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    with pytest.raises(ValueError, match=message):
        growth.go_on(its_own.run_state(different), model)
    with pytest.raises(ValueError, match="state must be a TrainState"):
        growth.go_on(None, model)  # type: ignore[arg-type]
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    jax.tree.map(np.testing.assert_array_equal, before, after)
