"""What `build` takes: calls of the model, parameters to evaluate, loss and aux."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from jax.sharding import AxisType

from esper_jax.layers import ChunkedLayer, harvest
from esper_jax.train import build, classification, fit, over_mesh

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 4)).astype(np.float32)
Z = RNG.normal(size=(16, 3)).astype(np.float32)
Y = RNG.integers(0, 3, size=16).astype(np.int32)
SGD = optax.sgd(0.1)


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.a = ChunkedLayer(nnx.Linear(4, 8, rngs=rngs), num_seeds=2, rngs=rngs)
        self.b = nnx.Linear(8, 3, rngs=rngs)

    def logits(self, x):
        return self.b(nnx.relu(self.a(x)))

    def __call__(self, x):
        return self.logits(x)


class Both(Net):
    def __call__(self, x, z, *, mask=None):
        return self.logits(x) + z


class Pair(Net):
    def __call__(self, pair):
        return self.logits(pair[0]) + pair[1]


class Keys(Net):
    def __call__(self, x, *, rngs):
        return self.logits(x)


def start(program):
    return program.init(jax.random.key(0))


@pytest.mark.parametrize(
    ("model", "x"),
    [(Both, (X, Z)), (Both, {"z": Z, "x": X}), (Pair, (X, Z))],
    ids=["a tuple", "a dictionary", "one argument that is a tuple"],
)
def test_a_model_is_called_as_its_signature_says(model, x):
    program = build(model(), SGD, SGD)
    logits = np.asarray(Net()(X)) + Z
    truth = jnp.mean(classification(logits, Y)[0])
    loss, _ = program.evaluate(start(program), (x, Y))
    np.testing.assert_allclose(loss, truth, rtol=1e-6)
    assert int(program.step(start(program), (x, Y)).step) == 1


@pytest.mark.parametrize(
    ("model", "x", "words"),
    [
        (Both, X, r"is \(x, z, .*, and x is an array of shape \(16, 4\)\. Give"),
        (Both, (X,), r"x is a tuple of 1\. Give build objective="),
        (Both, {"x": X, "y": Z}, r"x is a dict of 2\. Give build objective="),
        (Keys, X, r"needs rngs; .* Keep the nnx\.Rngs in the model .* objective="),
    ],
)
def test_a_call_that_is_not_clear_names_objective(model, x, words):
    program = build(model(), SGD, SGD)
    state = start(program)
    for function in (program.step, program.evaluate):
        with pytest.raises(ValueError, match=words):
            function(state, (x, Y))
    assert int(state.step) == 0  # it was not donated


FREE = optax.contrib.schedule_free_sgd(0.1, b1=0.8)


def everything(params):
    return jax.tree.map(lambda _: "free", params)


def biases_apart(params):
    return {name: "plain" if "bias" in name else "free" for name in params}


def averages(state, params):
    """x of y = (1 - b1) z + b1 x, in NumPy."""
    z = state.z
    return {
        name: np.asarray(y)
        if isinstance(z[name], optax.MaskedNode)
        else (np.asarray(y) - 0.2 * np.asarray(z[name])) / 0.8
        for name, y in params.items()
    }


@pytest.mark.parametrize(
    ("optimizer", "inner"),
    [
        (FREE, lambda s: s),
        (
            optax.chain(
                optax.clip_by_global_norm(1.0),
                optax.multi_transform({"free": FREE, "plain": SGD}, biases_apart),
            ),
            lambda s: s[1].inner_states["free"].inner_state,
        ),
    ],
    ids=["alone", "inside of others, for some parameters"],
)
def test_schedule_free_is_evaluated_at_its_averages(optimizer, inner):
    program = build(Net(), optimizer, SGD)
    losses = []
    state = fit(
        program,
        start(program),
        (X, Y),
        (X, Y),
        ticks=2,
        batch_size=4,
        on_tick=lambda _, report: losses.append(float(report.loss)),
    )
    params = averages(inner(state.opt_state), state.params)
    hidden = np.maximum(X @ params["a/base/kernel"] + params["a/base/bias"], 0)
    logits = hidden @ params["b/kernel"] + params["b/bias"]
    truth = jnp.mean(classification(jnp.asarray(logits), Y)[0])
    np.testing.assert_allclose(losses[-1], truth, rtol=1e-5)
    np.testing.assert_allclose(program.evaluate(state, (X, Y))[0], truth, rtol=1e-5)
    model = harvest(program.model(state))
    np.testing.assert_allclose(model(X), logits, rtol=1e-4, atol=1e-6)
    # What trains are other weights.
    assert abs(np.asarray(state.params["b/kernel"]) - params["b/kernel"]).max() > 1e-3


def averaged_weights(decay):
    """An average of the weights beside an optimizer, as users write it."""

    def update(updates, state, params=None):
        new = optax.apply_updates(params, updates)
        mean = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state, new)
        return updates, mean

    return optax.GradientTransformation(lambda p: jax.tree.map(jnp.array, p), update)


def test_an_average_of_the_weights_is_evaluated_where_eval_params_says_so():
    optimizer = optax.chain(SGD, averaged_weights(0.9))
    program = build(Net(), optimizer, SGD, eval_params=lambda state, params: state[1])
    plain = build(Net(), optimizer, SGD)
    state = program.step(start(program), (X, Y))
    mean = dataclasses.replace(state, params=dict(state.opt_state[1]))
    shown, truth = program.evaluate(state, (X, Y))[0], plain.evaluate(mean, (X, Y))[0]
    assert shown == truth
    assert shown != plain.evaluate(state, (X, Y))[0]
    _, report = program.tick(state, (X, Y))
    assert report.loss == truth


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda s, p: {"b/bias": p["b/bias"]}, "a/base/bias' expected .*, got None"),
        (lambda s, p: {**p, "b/bias": p["b/kernel"]}, r"\[3\], got float32\[8, 3\]"),
        (lambda s, p: s, "got None"),
    ],
)
def test_eval_params_of_another_form_are_refused(function, words):
    with pytest.raises(ValueError, match="eval_params must return.*" + words):
        build(Net(), SGD, SGD, eval_params=function)


def objective(model, batch):
    loss, score = classification(model(batch["x"]), batch["y"])
    return loss, {
        "score": score,
        "rows": batch["x"][:, 0],
        "right": jnp.sum(score).astype(jnp.int32),
        "per class": jnp.mean(jax.nn.one_hot(batch["y"], 3), 0),
    }


def test_step_returns_loss_and_aux_and_changes_the_same():
    batch = {"x": X, "y": Y}
    program = build(Net(), SGD, SGD, objective=objective)
    before, _ = program.evaluate(start(program), batch)
    state, (loss, aux) = program.step_with_aux(start(program), batch)
    np.testing.assert_allclose(loss, before, rtol=1e-6)
    assert aux.keys() == {"score", "rows", "right", "per class"}
    np.testing.assert_array_equal(aux["rows"], X[:, 0])
    plain = program.step(start(program), batch)
    for name, value in plain.params.items():
        np.testing.assert_allclose(value, state.params[name], rtol=1e-6)
    program.step_with_aux(state, batch)
    assert program.recompiles() == 0

    # Along an axis, each device has its rows and all come to the whole batch's.
    mesh = jax.make_mesh((4,), ("d",), (AxisType.Auto,))
    divided = build(Net(), SGD, SGD, objective=objective, axis_name="d")
    divided = over_mesh(divided, mesh)
    state, (loss, whole) = divided.step_with_aux(start(divided), batch)
    np.testing.assert_allclose(loss, before, rtol=1e-6)
    for name in ("score", "rows", "per class"):
        np.testing.assert_allclose(whole[name], aux[name], rtol=1e-6)
    assert float(whole["right"]) == int(aux["right"]) / 4
    for name, value in plain.params.items():
        np.testing.assert_allclose(value, state.params[name], rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "aux"),
    [(classification, 16), (lambda o, y: jnp.mean((o[:, 0] - y) ** 2), None)],
)
def test_aux_of_a_loss_is_its_score(loss, aux):
    # polyak_sgd needs the loss as value
    program = build(Net(), optax.polyak_sgd(0.1), SGD, loss=loss)
    _, (value, score) = program.step_with_aux(start(program), (X, Y))
    assert value > 0
    assert score is None if aux is None else score.shape == (aux,)
