"""Frozen hosts: tied tables, averages that move, and what cannot be measured."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from esper_jax import ChunkedLayer, Growth, build, harvest, make_growable
from esper_jax.blueprints import lora
from esper_jax.growth.showing import shown
from esper_jax.lifecycle.stages import Stage
from esper_jax.policy import TrialConfig, trial, trial_lives

ROWS = np.random.default_rng(0)


def trial_of(model: Any, **options: Any) -> Growth:
    """A trial beside a frozen host."""
    return Growth(
        model,
        optax.adam(3e-2),
        wrt=None,
        policy=trial(TrialConfig(ticks=1)),
        lifecycle_config=trial_lives(tuning=2),
        **options,
    )


class Unembed(nnx.Module):
    """As the docs have it: the unembedding, which shares the table of the lookup."""

    def __init__(self, embed: Any) -> None:
        self.table = embed.embedding

    def __call__(self, x: Any) -> Any:
        return jnp.dot(x, self.table[...].T)


class Tied(nnx.Module):
    def __init__(self) -> None:
        self.embed = nnx.Embed(11, 6, rngs=nnx.Rngs(0))
        self.unembed = Unembed(self.embed)

    def __call__(self, tokens: Any) -> Any:
        return self.unembed(nnx.tanh(self.embed(tokens)))


TOKENS = ROWS.integers(11, size=(8, 5))


def next_token(model: Any) -> Any:
    labels = (TOKENS * 7 + 3) % 11
    losses = optax.softmax_cross_entropy_with_integer_labels(model(TOKENS), labels)
    return losses.mean()


def test_a_frozen_tied_table_grows_in_lookup_and_unembedding() -> None:
    model: Any = Tied()
    plain = np.asarray(model(TOKENS))
    tied = model.embed.attend(nnx.tanh(model.embed(TOKENS)))
    np.testing.assert_array_equal(plain, tied)
    options = {"blueprints": [lora(rank=2)], "rngs": nnx.Rngs(1)}
    make_growable(model, "embed", 2, **options)
    make_growable(model, "unembed", 2, features=11, inputs=6, **options)
    np.testing.assert_array_equal(model(TOKENS), plain)
    table = np.asarray(model.embed.embedding[...])
    growth, evaluate = trial_of(model), nnx.jit(next_token)

    @nnx.jit
    def step(model: Any, growth: Growth) -> None:
        grads = nnx.grad(next_token, argnums=growth.argnums)(model)
        growth.update(model, grads)

    for _ in range(3):
        growth.tick(model, evaluate)
    for _ in range(20):
        step(model, growth)
    # Worth by hand: the loss with one part's alpha taken out, less the loss.
    without = nnx.clone(model)
    without.unembed.bed.probe[...] = jnp.array([-1.0, 0.0])
    worth = float(evaluate(without) - evaluate(model))
    report = growth.tick(model, evaluate)
    signals = report.layers["unembed"].signals
    np.testing.assert_allclose(signals.worth[0], worth, rtol=1e-4)
    assert worth > 0.1
    for _ in range(4):
        growth.tick(model, evaluate)
    for name in ("embed", "unembed"):
        stage = getattr(model, name).bed.seeds.get_value().stage
        assert stage.tolist() == [Stage.FOSSILIZED] * 2
    assert model.unembed.table is model.embed.base.embedding
    np.testing.assert_array_equal(model.unembed.table[...], table)
    np.testing.assert_allclose(harvest(model)(TOKENS), model(TOKENS), atol=1e-5)
    assert np.max(np.abs(model(TOKENS) - plain)) > 0.1
    model.set_attributes(ChunkedLayer, enabled=False)
    np.testing.assert_array_equal(model(TOKENS), plain)


def test_attend_of_a_growable_table_says_how_to_let_it_grow() -> None:
    model: Any = Tied()
    make_growable(model, "embed", 2, rngs=nnx.Rngs(1))
    with pytest.warns(UserWarning, match=r"Embed\.attend .* 'Tied embeddings' in docs"):
        nnx.eval_shape(lambda m: m.embed.attend(jnp.ones(6)), model)


class Normed(nnx.Module):
    def __init__(self) -> None:
        self.a = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(6, rngs=nnx.Rngs(1))
        self.b = nnx.Linear(6, 2, rngs=nnx.Rngs(2))

    def __call__(self, x: Any) -> Any:
        return self.b(nnx.relu(self.norm(self.a(x))))


X = ROWS.normal(size=(16, 4)).astype(np.float32)
MOVES = (
    r"host is frozen .*layer 'norm' is in training .*set_attributes\(nnx\.BatchNorm, "
    r"use_running_average=True\)"
)


def squares(model: Any) -> Any:
    return jnp.mean((model(X) - 1) ** 2)


def learn(model: Any, growth: Growth) -> None:
    grads = nnx.grad(squares, argnums=growth.argnums)(model)
    growth.update(model, grads)


def means(model: Any) -> np.ndarray:
    return np.array(model.norm.mean[...])


@pytest.mark.parametrize("compiled", [False, True])
def test_averages_that_move_in_a_frozen_host_are_told_of_once(compiled: bool) -> None:
    model: Any = Normed()
    make_growable(model, "a", 2, rngs=nnx.Rngs(3))
    growth, step = trial_of(model), nnx.jit(learn) if compiled else learn
    before = means(model)
    with pytest.warns(UserWarning, match=MOVES):
        step(model, growth)
    step(model, growth)  # warnings are errors here
    assert np.any(means(model) != before)


def test_averages_that_stay_are_not_told_of() -> None:
    frozen: Any = Normed()
    make_growable(frozen, "a", 2, rngs=nnx.Rngs(3))
    frozen.set_attributes(nnx.BatchNorm, use_running_average=True)
    before = means(frozen)
    learn(frozen, trial_of(frozen))
    np.testing.assert_array_equal(means(frozen), before)
    trained: Any = Normed()
    make_growable(trained, "a", 2, rngs=nnx.Rngs(3))
    learn(trained, Growth(trained, optax.adam(1e-2)))


def test_build_tells_of_averages_that_move_in_a_frozen_host() -> None:
    model = Normed()
    make_growable(model, "a", 2, rngs=nnx.Rngs(3))
    optimizers = optax.identity(), optax.adam(1e-2)
    with pytest.warns(UserWarning, match=MOVES):
        build(model, *optimizers, wrt=None)
    model.set_attributes(nnx.BatchNorm, use_running_average=True)
    build(model, *optimizers, wrt=None)


def test_what_a_trial_kept_is_shown_with_where_its_worth_is() -> None:
    model: Any = nnx.Sequential(nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
    options = {"blueprints": [lora(rank=1)], "rngs": nnx.Rngs(3)}
    make_growable(model, nnx.Linear, 1, **options)
    growth, evaluate = trial_of(model), nnx.jit(squares)
    for _ in range(3):
        growth.tick(model, evaluate)
    for _ in range(20):
        learn(model, growth)
    reports = [growth.tick(model, evaluate).layers["layers/0"] for _ in range(6)]
    kept = next(r for r in reports if r.stage[0] == Stage.FOSSILIZED)
    assert kept.signals.mean_worth[0] > 0
    assert repr(shown(model)).endswith(
        "worth judged when it was kept: mean_worth in that tick's report"
    )


def linear_net() -> Any:
    return nnx.Sequential(nnx.Linear(4, 2, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    "rngs",
    [0, 7, None, jax.random.key(0), nnx.Rngs(dropout=0)],
    ids=["0", "7", "None", "key", "no params"],
)
def test_random_streams_of_another_kind_are_refused(rngs: Any) -> None:
    words = r"rngs must be nnx\.Rngs with a key for params, such as nnx\.Rngs\(0\); got"
    model = linear_net()
    with pytest.raises(TypeError, match=words):
        make_growable(model, "layers/0", 2, rngs=rngs)
    assert isinstance(model.layers[0], nnx.Linear)
    with pytest.raises(TypeError, match=words):
        ChunkedLayer(model.layers[0], 2, rngs=rngs)
    make_growable(model, "layers/0", 2, rngs=nnx.Rngs(0))
    if rngs is not None:
        with pytest.raises(TypeError, match=words):
            Growth(model, optax.adam(1e-2), rngs=rngs)


def test_a_model_or_streams_of_outside_are_refused_inside_jit() -> None:
    model, rngs = linear_net(), nnx.Rngs(0)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    before = jax.tree.structure(nnx.state(optimizer))
    options = {"optimizer": optimizer}

    def outer_model(x: Any) -> Any:
        make_growable(model, "layers/0", 2, rngs=nnx.Rngs(0), **options)
        return model(x)

    with pytest.raises(ValueError, match=r"^model is of outside .* between steps"):
        jax.jit(outer_model)(X)
    assert jax.tree.structure(nnx.state(optimizer)) == before

    @nnx.jit
    def outer_rngs(model: Any) -> None:
        make_growable(model, "layers/0", 2, rngs=rngs)

    with pytest.raises(ValueError, match=r"rngs are of outside .* as well"):
        outer_rngs(model)
    assert isinstance(model.layers[0], nnx.Linear)

    @nnx.jit
    def made() -> Any:
        model = linear_net()
        make_growable(model, "layers/0", 2, rngs=nnx.Rngs(0))
        return model

    assert isinstance(made().layers[0], ChunkedLayer)


def test_settled_is_not_asked_while_it_is_traced() -> None:
    model = linear_net()
    make_growable(model, "layers/0", 2, rngs=nnx.Rngs(0))
    growth = trial_of(model)
    with pytest.raises(ValueError, match="settled must be asked between steps"):
        nnx.jit(lambda growth: growth.settled)(growth)
    assert not growth.settled


def pair() -> Any:
    model = nnx.Sequential(
        nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1))
    )
    make_growable(model, nnx.Linear, 1, rngs=nnx.Rngs(2))
    return model


@pytest.mark.parametrize(
    ("off", "words"),
    [
        ([1], "^layer 'layers/1' is switched off"),
        ([0, 1], "^layers 'layers/0', 'layers/1' are switched off"),
    ],
)
def test_a_trial_over_layers_that_are_switched_off_is_told_of_once(
    off: list[int], words: str
) -> None:
    model = pair()
    for layer in off:
        model.layers[layer].enabled = False
    growth, evaluate = trial_of(model), nnx.jit(squares)
    with pytest.warns(UserWarning, match=words):
        growth.tick(model, evaluate)
    assert growth.tick(model, evaluate).tick == 2


def test_layers_that_were_switched_off_by_shrink_are_no_oversight() -> None:
    model = pair()
    growth, evaluate = trial_of(model), nnx.jit(lambda model: 1.0)
    while not growth.settled:  # nothing is worth anything
        growth.tick(model, evaluate)
    assert growth.shrink(model) == {"layers/0": (1, 0), "layers/1": (1, 0)}
    assert growth.tick(model, evaluate).layers["layers/0"].stage[0] == Stage.DORMANT
