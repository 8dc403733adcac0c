"""Flax Linen: layers that can grow, and whole models, in every transform."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from test_layers import HOST, grown, same_bits

from esper_jax import lifecycle
from esper_jax.growth import linen_growth
from esper_jax.layers import linen
from esper_jax.layers.chunked import ChunkedLayer
from esper_jax.layers.variables import BlueprintParam, GraftProbe, SeedVariable
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.stages import Outcome, Stage
from esper_jax.lifecycle.state import init_seeds, slot_coefficients
from esper_jax.optim import per_slot


def test_the_linen_layer_is_the_nnx_layer() -> None:
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 5)), jnp.float32)
    layer = linen.ChunkedLayer(nn.Dense(6), 4, options={"capacity": 2})
    variables = layer.init(jax.random.key(0), x)
    assert sorted(variables) == ["bank", "params", "probe", "seeds"]
    assert sorted(variables["params"]) == ["base"]
    seeds = variables["seeds"]["bed"]["seeds"]
    assert sorted(seeds) == sorted(linen.write_seeds(init_seeds(4, 2)))
    assert sorted(variables["bank"]["bed"]["bank"]) == ["b1", "b2", "scale", "w1", "w2"]
    assert seeds["steps"] == 0
    same_bits(layer.apply(variables, x), x @ variables["params"]["base"]["kernel"])

    twin = ChunkedLayer(
        nnx.Linear(5, 6, rngs=nnx.Rngs(0)), 4, capacity=2, rngs=nnx.Rngs(1)
    )
    grown(twin.bed, {3: Stage.GRAFTING, 1: Stage.TRAINING})
    base = variables["params"]["base"]
    twin.base.kernel.set_value(base["kernel"])
    twin.base.bias.set_value(base["bias"])
    variables = variables | {
        "bank": {"bed": {"bank": twin.bed.bank.get_arrays()}},
        "seeds": {"bed": {"seeds": twin.bed.seeds.get_arrays()}},
    }

    def linen_loss(params: Any, bank: Any, probe: Any) -> Any:
        given = variables | {"params": params, "bank": bank, "probe": probe}
        out, updated = layer.apply(given, x, mutable=["seeds"])
        return jnp.sum(jnp.sin(out)), (out, updated)

    (_, (out, updated)), grads = jax.jit(
        jax.value_and_grad(linen_loss, argnums=(0, 1, 2), has_aux=True)
    )(variables["params"], variables["bank"], variables["probe"])

    graph, host, bank, probe, rest = nnx.split(
        twin, HOST, BlueprintParam, GraftProbe, ...
    )

    def nnx_loss(host: Any, bank: Any, probe: Any) -> Any:
        m = nnx.merge(graph, host, bank, probe, rest, copy=True)
        out = m(x)
        return jnp.sum(jnp.sin(out)), (out, nnx.state(m, SeedVariable))

    (_, (want, seeds)), want_grads = jax.jit(
        jax.value_and_grad(nnx_loss, argnums=(0, 1, 2), has_aux=True)
    )(host, bank, probe)
    same_bits(out, want)
    same_bits(updated["seeds"], seeds)
    same_bits(grads, want_grads)
    assert jax.tree.leaves(updated)[0].size
    assert updated["seeds"]["bed"]["seeds"]["steps"] == 1
    assert np.any(out != x @ base["kernel"])


def test_a_disabled_linen_layer_is_its_base() -> None:
    x = jnp.ones((2, 5))
    layer = linen.ChunkedLayer(nn.Dense(6), 4, enabled=False)
    variables = layer.init(jax.random.key(0), x)
    assert sorted(variables) == ["params"]
    with pytest.raises(ValueError, match="num_seeds must be from 1"):
        linen.ChunkedLayer(nn.Dense(6), 7).init(jax.random.key(0), x)


class LinenNet(nn.Module):
    """A Linen model with two layers that can grow."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for width, seeds in ((8, 4), (12, 3)):
            x = nn.tanh(
                linen.ChunkedLayer(nn.Dense(width), seeds, options={"capacity": 2})(x)
            )
        return nn.Dense(2)(x)


def test_a_linen_model_is_trained_and_grows() -> None:
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(32, 5)), jnp.float32)
    y = jnp.asarray(rng.normal(size=(32, 2)), jnp.float32)
    model, host, slots = LinenNet(), optax.adam(1e-2), per_slot(optax.adam(1e-2))
    variables = model.init(jax.random.key(0), x)
    gates = lifecycle.LifecycleConfig(min_epochs=(0,) * 11)
    names = list(variables["seeds"])
    assert len(names) == 2
    age_and_move = jax.jit(lifecycle.step, static_argnums=3)

    @jax.jit
    def step(variables: Any, states: Any) -> Any:
        def loss(params: Any, bank: Any) -> Any:
            given = variables | {"params": params, "bank": bank}
            out, updated = model.apply(given, x, mutable=["seeds"])
            return jnp.mean((out - y) ** 2), updated["seeds"]

        grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        params, bank = variables["params"], variables["bank"]
        (value, seeds), grads = grad(params, bank)
        updates, first = host.update(grads[0], states[0])
        new, second = {}, {}
        for name in names:
            learns = (
                slot_coefficients(linen.read_seeds(seeds[name]["bed"]["seeds"]))[1] > 0
            )
            change, second[name] = slots.update(
                grads[1][name], states[1][name], bank[name], active=learns
            )
            new[name] = optax.apply_updates(bank[name], change)
        params = optax.apply_updates(params, updates)
        grown = variables | {"params": params, "bank": new, "seeds": seeds}
        return grown, (first, second), value

    states = (
        host.init(variables["params"]),
        {name: slots.init(variables["bank"][name]) for name in names},
    )
    plan = [Stage.GERMINATED, Stage.TRAINING, Stage.GRAFTING, None, None]
    losses = []
    for target in plan:
        seeds = dict(variables["seeds"])
        for name in names:
            state = linen.read_seeds(seeds[name]["bed"]["seeds"])
            commands = lifecycle.commands_for(
                state.num_seeds, {2: target} if target is not None else {}
            )
            signals = Signals.unmeasured(reconstruction_loss=0.0)
            state, outcome = age_and_move(state, commands, signals, gates)
            assert outcome[2] == (Outcome.NONE if target is None else Outcome.OK)
            seeds[name] = {"bed": {"seeds": linen.write_seeds(state)}}
        variables = variables | {"seeds": seeds}
        for _ in range(10):
            variables, states, value = step(variables, states)
        losses.append(float(value))
    assert np.all(np.diff(losses) < 0)
    for name in names:
        state = linen.read_seeds(variables["seeds"][name]["bed"]["seeds"])
        assert float(state.graft.alpha[2]) > 0
        assert np.any(np.asarray(variables["bank"][name]["bed"]["bank"]["w2"][0]))
    assert step._cache_size() == 1


def fossil(variables: Any) -> Any:
    """The variables with seed 1 of every layer a fossil in slot 0 that adds 1."""

    def change(tree: Any) -> Any:
        if "steps" not in tree:
            return {
                key: jnp.ones_like(value)
                if key == "b2"
                else change(value)
                if isinstance(value, dict)
                else value
                for key, value in tree.items()
            }
        seeds = linen.read_seeds(jax.tree.map(jnp.asarray, tree))
        return linen.write_seeds(
            dataclasses.replace(
                seeds,
                stage=seeds.stage.at[..., 1].set(Stage.FOSSILIZED),
                slot_of_seed=seeds.slot_of_seed.at[..., 1].set(0),
                seed_of_slot=seeds.seed_of_slot.at[..., 0].set(1),
            )
        )

    return change(variables)


X = jnp.asarray(np.random.default_rng(5).normal(size=(2, 3, 8)), jnp.float32)
BIASED = {"capacity": 2, "blueprints": ("bottleneck",)}


@pytest.mark.parametrize("missing", ["bank", "seeds", "bank and seeds"])
@pytest.mark.parametrize("mutable", [False, ["seeds"], True])
def test_fossils_are_never_dropped_in_silence(missing: str, mutable: Any) -> None:
    model = LinenNet()
    variables = dict(model.init(jax.random.key(0), X[0]))
    for name in missing.split(" and "):
        del variables[name]
    with pytest.raises(ValueError, match=f"{missing} must be given to apply"):
        model.apply(variables, X[0], mutable=mutable)


def test_the_probe_may_be_left_out() -> None:
    model = LinenNet()
    variables = dict(model.init(jax.random.key(0), X[0]))
    want = model.apply(variables, X[0])
    del variables["probe"]
    same_bits(model.apply(variables, X[0]), want)


class Cell(nn.RNNCellBase):
    """A recurrent cell of 8 features with a layer that can grow."""

    @nn.compact
    def __call__(self, carry: Any, x: Any) -> Any:
        layer = linen.ChunkedLayer(nn.Dense(8, name="dense"), 4, options=BIASED)
        carry = nn.tanh(layer(carry + x))
        return carry, carry

    @nn.nowrap
    def initialize_carry(self, rng: Any, shape: Any) -> Any:
        return jnp.zeros(shape)

    @property
    def num_feature_axes(self) -> int:
        return 1


HELD = ["params", "bank", "seeds", "probe"]


def test_seeds_ride_through_nn_rnn() -> None:
    with pytest.raises(ValueError, match=r"init would drop .* variable_broadcast"):
        nn.RNN(Cell()).init(jax.random.key(0), X)
    rnn = nn.RNN(Cell(), variable_broadcast=HELD)
    variables = fossil(rnn.init(jax.random.key(0), X))
    cell = {name: held["cell"] for name, held in variables.items()}
    carry, want = jnp.zeros((2, 8)), []
    for t in range(3):
        carry, out = Cell().apply(cell, carry, X[:, t])
        want.append(out)
    out = rnn.apply(variables, X)
    np.testing.assert_allclose(out, jnp.stack(want, 1), rtol=1e-5, atol=1e-6)
    grads = jax.grad(lambda v: jnp.sum(rnn.apply(variables | v, X)))(
        {"params": variables["params"]}
    )
    assert all(map(np.any, jax.tree.leaves(grads)))
    with pytest.raises(ValueError, match="bank and seeds must be given to apply"):
        nn.RNN(Cell()).apply(variables, X)

    counting = nn.RNN(
        Cell(), variable_broadcast=["params", "bank", "probe"], variable_carry="seeds"
    )
    again, updated = counting.apply(variables, X, mutable=["seeds"])
    np.testing.assert_allclose(again, out, rtol=1e-6)
    (seeds,) = (layer["bed"]["seeds"] for layer in updated["seeds"]["cell"].values())
    assert seeds["steps"] == 3
    counted = linen.read_seeds(seeds).statistics.count
    np.testing.assert_array_equal(counted, 3 * 2 * 2)


class Block(nn.Module):
    """A layer of a stack."""

    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        layer = linen.ChunkedLayer(nn.Dense(8, name="dense"), 4, options=BIASED)
        return nn.tanh(layer(x)), None


def test_seeds_ride_through_nn_scan_over_layers() -> None:
    def stack(held: Any) -> Any:
        scan = nn.scan(
            Block, dict.fromkeys(held, 0), split_rngs={"params": True}, length=2
        )
        return scan()

    with pytest.raises(ValueError, match=r"init would drop .* variable_axes"):
        stack(["params"]).init(jax.random.key(0), X, None)
    model = stack(HELD)
    variables = fossil(model.init(jax.random.key(0), X, None))
    (out, _), updated = model.apply(variables, X, None, mutable=["seeds"])
    want = X
    for i in range(2):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], variables)
        want, _ = Block().apply(layer, want, None)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
    (seeds,) = (layer["bed"]["seeds"] for layer in updated["seeds"].values())
    np.testing.assert_array_equal(seeds["steps"], [1, 1])
    with pytest.raises(ValueError, match="bank and seeds must be given to apply"):
        stack(["params"]).apply(variables, X, None)


class Plain(nn.Module):
    """A model of somebody else; its attention returns a tuple."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.tanh(nn.Dense(8)(x))
        return nn.Dense(3, name="head")(x)


class GrowingState(TrainState):
    """A `TrainState` that keeps the seeds beside the parameters."""

    bank: Any
    seeds: Any


def test_a_plain_linen_model_grows_in_a_train_state() -> None:
    plain = Plain()
    model = linen.Growable(plain, "Dense_0", 4, BIASED)
    variables = model.init(jax.random.key(0), X)
    want = plain.init(jax.random.key(0), X)
    assert jax.tree.structure(variables["params"]) == jax.tree.structure(want["params"])
    same_bits(model.apply(variables, X), plain.apply(variables, X))
    state = GrowingState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=optax.sgd(0.1),
        bank=variables["bank"],
        seeds=variables["seeds"],
    )
    state = state.replace(
        **{n: fossil(variables)[n] for n in ("bank", "seeds")},
    )

    @jax.jit
    def step(state: Any) -> Any:
        def loss(params: Any) -> Any:
            given = {"params": params, "bank": state.bank, "seeds": state.seeds}
            out, updated = state.apply_fn(given, X, mutable=["seeds"])
            return jnp.sum(out**2), updated["seeds"]

        (value, seeds), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, seeds=seeds), value

    kernel, bias = (variables["params"]["Dense_0"][n] for n in ("kernel", "bias"))
    hidden = X @ kernel + bias + jnp.repeat(jnp.array([0.0, 1, 0, 0]), 2)
    head = variables["params"]["head"]
    by_hand = jnp.sum((jnp.tanh(hidden) @ head["kernel"] + head["bias"]) ** 2)
    state, value = step(state)
    np.testing.assert_allclose(value, by_hand, rtol=1e-5)
    assert state.seeds["Dense_0"]["bed"]["seeds"]["steps"] == 1
    with pytest.raises(ValueError, match="bank and seeds must be given"):
        state.apply_fn({"params": state.params}, X)


@pytest.mark.parametrize(
    ("where", "found"),
    [
        (nn.Dense, ["Dense_0", "head"]),
        (("head",), ["head"]),
        (lambda path, layer: getattr(layer, "features", 0) == 8, ["Dense_0"]),
    ],
)
def test_layers_of_a_linen_model_are_chosen(where: Any, found: list[str]) -> None:
    model = linen.Growable(Plain(), where, 3, {"capacity": 1})
    assert sorted(model.init(jax.random.key(0), X)["seeds"]) == found


def test_what_does_not_fit_a_linen_model_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"no layer .* by 'Dense_7'.*'Dense_0', 'head'"
    ):
        linen.Growable(Plain(), "Dense_7", 4).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="layer 'head': num_seeds must be from 1 to"):
        linen.Growable(Plain(), "head", 4).init(jax.random.key(0), X)


class Pair(nn.Module):
    """Returns what it computes, and something else beside."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return {"out": nn.Dense(8)(x), "length": 3}


def test_one_of_several_outputs_of_a_linen_layer_grows() -> None:
    layer = linen.ChunkedLayer(Pair(), 4, BIASED, features=8, output="out")
    variables = layer.init(jax.random.key(0), X)
    plain = layer.apply(variables, X)
    out = layer.apply(fossil(variables), X)
    assert out["length"] == 3
    want = jnp.broadcast_to(jnp.repeat(jnp.array([0.0, 1, 0, 0]), 2), X.shape)
    np.testing.assert_allclose(out["out"] - plain["out"], want, atol=1e-6)
    with pytest.raises(ValueError, match="features must be given: Pair returned dict"):
        linen.ChunkedLayer(Pair(), 4).init(jax.random.key(0), X)


def test_layers_of_a_sequential_have_the_paths_of_their_parameters() -> None:
    x = jnp.ones((2, 3))
    model = linen.Growable(
        nn.Sequential([nn.Sequential([nn.Dense(4)]), nn.Dense(2)]),
        ("layers_0/layers_0", "layers_1"),
        2,
    )
    variables = model.init(jax.random.key(0), x)
    for collection in ("params", "bank"):
        assert sorted(variables[collection]) == ["layers_0", "layers_1"]
        assert list(variables[collection]["layers_0"]) == ["layers_0"]
    growth = linen_growth(lambda v: model.apply(v, x), variables, optax.sgd(0.1))
    collections = {**variables, **growth.init(jax.random.key(1))}
    _, report = growth.tick(collections, lambda v: jnp.sum(model.apply(v, x)))
    assert sorted(report.layers) == ["layers_0/layers_0", "layers_1"]


def test_a_model_that_is_one_layer_is_refused_with_advice() -> None:
    model = linen.Growable(nn.Dense(3), nn.Dense, 3)
    with pytest.raises(ValueError, match=r"model must hold layers.*Dense called none"):
        model.init(jax.random.key(0), jnp.ones((2, 3)))
