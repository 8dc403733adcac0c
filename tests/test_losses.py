"""What a loss may return: the true held-out loss comes out, or a refusal by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from esper_jax.layers import ChunkedLayer
from esper_jax.train import build, classification, fit, scan_fit


class Tokens(nnx.Module):
    """A number for each of T positions and C channels of (N, T, 4)."""

    def __init__(self, channels: int = 3) -> None:
        rngs = nnx.Rngs(0)
        self.a = ChunkedLayer(nnx.Linear(4, 8, rngs=rngs), num_seeds=2, rngs=rngs)
        self.b = nnx.Linear(8, channels, rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.relu(self.a(x)))


RNG = np.random.default_rng(0)
X = RNG.normal(size=(10, 5, 4)).astype(np.float32)
Y = RNG.integers(0, 3, size=(10, 5)).astype(np.int32)


def new(loss=classification, eval_batch=4):
    return build(
        Tokens(), optax.sgd(0.1), optax.sgd(0.1), loss=loss, eval_batch=eval_batch
    )


def truth(x, y):
    """Mean cross-entropy and accuracy over all tokens, in NumPy."""
    logits = np.asarray(Tokens()(x), np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    logp = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    right = np.take_along_axis(logp, y[..., None], -1)[..., 0]
    return -right.mean(), (logits.argmax(-1) == y).mean()


def per_row(logits, y):
    loss, score = classification(logits, y)
    return loss.mean(1), score.mean(1)


def trailing_one(logits, y):
    loss, score = per_row(logits, y)
    return loss[:, None], score[:, None]


def scalars(logits, y):
    return jax.tree.map(jnp.mean, classification(logits, y))


def mixed(logits, y):
    loss, score = per_row(logits, y)
    return loss, score.mean()


def alone(logits, y):
    return classification(logits, y)[0]


def scalar_alone(logits, y):
    return alone(logits, y).mean()


@pytest.mark.parametrize(
    "loss",
    [classification, per_row, trailing_one, scalars, mixed, alone, scalar_alone],
)
@pytest.mark.parametrize("rows", [10, 3])  # a ragged last batch; less than a batch
def test_the_true_held_out_loss_comes_out(loss, rows):
    program = new(loss)
    state = program.init(jax.random.key(0))
    got, score = program.evaluate(state, (X[:rows], Y[:rows]))
    want, accuracy = truth(X[:rows], Y[:rows])
    np.testing.assert_allclose(got, want, rtol=1e-6)
    if loss in (alone, scalar_alone):
        assert np.isnan(score)
    else:
        np.testing.assert_allclose(score, accuracy, rtol=1e-6)


def test_all_shapes_of_one_loss_train_the_same():
    want = None
    for loss in (classification, per_row, trailing_one, scalars, scalar_alone):
        program = new(loss)
        state = program.step(program.init(jax.random.key(0)), (X, Y))
        state, report = program.tick(state, (X, Y))
        np.testing.assert_allclose(report.train_loss, truth(X, Y)[0], rtol=1e-6)
        want = want or state.params
        for name, value in state.params.items():
            np.testing.assert_allclose(value, want[name], atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (
            lambda o, y: classification(o, y)[0].reshape(-1),
            r"loss with the \d+ rows.*got shape \((2|5)0,",
        ),
        (lambda o, y: (alone(o, y), jnp.ones(3)), r"a score with the \d+ rows"),
        (lambda o, y: (alone(o, y), 1.0, 2.0), r"the tuple \(loss, score\).*tuple of"),
        (lambda o, y: {"loss": alone(o, y)}, r"got a dict of 1"),
        (lambda o, y: jnp.argmax(o, -1), r"floating point; got int32"),
    ],
)
def test_any_other_loss_is_refused_in_step_and_evaluate(loss, words):
    program = new(loss)
    state = program.init(jax.random.key(0))
    for function in (program.evaluate, program.tick, program.step):
        with pytest.raises(ValueError, match=words):
            function(state, (X, Y))
    with pytest.raises(ValueError, match=words):
        fit(program, state, (X, Y), (X, Y), ticks=1, batch_size=10)


FLAT, CLASSES = X[:, 0], Y[:, 0]


def with_label(value):
    labels = CLASSES.copy()
    labels[7] = value
    return labels


BAD = {
    "minus one": (with_label(-1), r"from 0 to 2.*got 1 others.*-1 in row 7"),
    "out of range": (with_label(3), r"from 0 to 2.*got 1 others.*3 in row 7"),
    "float": (CLASSES.astype(np.float32), r"labels must be integers.*float32"),
    "one-hot": (np.eye(3, dtype=np.int32)[CLASSES], r"one-hot.*argmax"),
    "column": (CLASSES[:, None], r"got int32 of shape \(\d+, 1\)"),
    "too few": (CLASSES[:4], r"same number of rows"),
    "one": (CLASSES[:1], r"same number of rows"),
    "a number": (np.int32(1), r"rows|labels must be integers of shape"),
    "a list": (CLASSES.tolist(), r"10 Python numbers.*numpy.asarray"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_labels_are_refused_everywhere_before_anything_changes(kind, flat_program):
    labels, words = BAD[kind]
    program, good, bad = flat_program, (FLAT, CLASSES), (FLAT, labels)
    state, order = program.init(jax.random.key(0)), jnp.arange(10)
    calls = {
        "step": lambda: program.step(state, bad),
        "step_from": lambda: program.step_from(state, bad, order, 5),
        "tick": lambda: program.tick(state, bad),
        "evaluate": lambda: program.evaluate(state, bad),
        "fit": lambda: fit(program, state, bad, good, ticks=1, batch_size=5),
        "held out": lambda: fit(program, state, good, bad, ticks=1, batch_size=5),
        "scan_fit": lambda: scan_fit(program, state, bad, good, ticks=1, batch_size=5),
        "batches": lambda: fit(program, state, [bad], [good], ticks=1),
        "held-out batches": lambda: fit(program, state, [good], [bad], ticks=1),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=words) as raised:
            call()
        assert len(str(raised.value)) < 500, name
    program.step(state, good)  # and the state was not donated


@pytest.fixture(scope="module")
def flat_program():
    return build(Tokens(), optax.sgd(0.1), optax.sgd(0.1), eval_batch=4)


@pytest.mark.parametrize("label", [-1, 3, -(2**31)])
def test_a_traced_label_out_of_range_gives_nan(label):
    loss, score = jax.jit(classification)(jnp.ones((2, 3)), jnp.array([0, label]))
    np.testing.assert_allclose(loss[0], np.log(3), rtol=1e-6)
    assert np.isnan(loss[1])
    assert score.tolist() == [1, 0]


def test_labels_that_change_in_place_are_looked_at_again(flat_program):
    labels = CLASSES.copy()
    state = flat_program.init(jax.random.key(0))
    flat_program.evaluate(state, (FLAT, labels))
    labels[2] = 5
    with pytest.raises(ValueError, match="5 in row 2"):
        flat_program.evaluate(state, (FLAT, labels))
