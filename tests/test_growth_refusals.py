"""What `Growth` says to a bad argument, before anything has changed."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_own_loops import POLICY, QUICK, Layers, X, Y, pair_loss

from esper_jax import Growth, build, make_growable
from esper_jax.policy.heuristic import heuristic
from esper_jax.policy.interface import LayerShape, Setting

BATCH = (X, Y)


def made(layer: str = "a") -> tuple[Any, Growth]:
    model = Layers()
    make_growable(model, layer, 2, features=None, rngs=nnx.Rngs(5))
    growth = Growth(
        model, optax.adam(1e-2), lifecycle_config=QUICK, controller_config=POLICY
    )
    return model, growth


def gradients(model: Any, growth: Growth) -> Any:
    return nnx.grad(pair_loss, argnums=growth.argnums)(model, BATCH)


def numbers(*nodes: Any) -> list[np.ndarray]:
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(nodes)))
    return [
        np.asarray(
            jax.random.key_data(leaf)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else leaf
        )
        for leaf in leaves
    ]


class Unchanged:
    """Checks that a refusal names what it must and changes no bit."""

    def __init__(self, *nodes: Any, words: list[str], kind: Any = ValueError) -> None:
        self.nodes, self.words = nodes, words
        self.raises = pytest.raises(kind)

    def __enter__(self) -> None:
        self.before = numbers(*self.nodes)
        self.info = self.raises.__enter__()

    def __exit__(self, *error: Any) -> bool:
        swallowed = bool(self.raises.__exit__(*error))
        if swallowed:
            message = str(self.info.value)
            for word in self.words:
                assert re.search(word, message), message
            for a, b in zip(self.before, numbers(*self.nodes), strict=True):
                np.testing.assert_array_equal(a, b)
        return swallowed


def test_gradients_without_the_banks() -> None:
    model, growth = made()
    grads = nnx.grad(pair_loss)(model, BATCH)
    words = ["^grads", "a/bed/bank", "none", r"argnums=growth\.argnums"]
    with Unchanged(model, growth, words=words):
        growth.update(model, grads)


def test_no_gradients() -> None:
    model, growth = made()
    kinds = (TypeError, ValueError)
    with Unchanged(model, growth, words=["^grads", "None"], kind=kinds):
        growth.update(model, None)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        pytest.param(jnp.zeros(5), [r"\(5,\)", "mean"], id="array"),
        pytest.param((1.0, jnp.zeros(5)), [r"\(5,\)"], id="score of each row"),
        pytest.param((1.0, 2.0, 3.0), ["3|three"], id="three"),
        pytest.param({"loss": 1.0}, ["dict"], id="dictionary"),
        pytest.param("1.0", ["str"], id="string"),
        pytest.param(None, ["None"], id="nothing"),
    ],
)
def test_results_of_evaluate(result: Any, words: list[str]) -> None:
    model, growth = made()
    expected = ["^evaluate must return", "loss", *words]
    kinds = (TypeError, ValueError)
    with Unchanged(model, growth, words=expected, kind=kinds):
        growth.tick(model, lambda model: result)


def test_an_error_of_evaluate_is_the_users_and_changes_nothing() -> None:
    model, growth = made()

    def evaluate(model: Any) -> Any:
        raise KeyError("of the user")

    with Unchanged(model, growth, words=["of the user"], kind=KeyError):
        growth.tick(model, evaluate)


def test_nothing_that_grows() -> None:
    model = Layers()
    words = ["^model must hold at least one ChunkedLayer or SeedBed"]
    with Unchanged(model, words=words):
        Growth(model, optax.adam(1e-2))


def test_an_optimizer_that_is_none() -> None:
    model, _ = made()
    kinds = (TypeError, ValueError)
    with Unchanged(model, words=["^optimizer", "0.1"], kind=kinds):
        Growth(model, 0.1)


@pytest.mark.parametrize("method", ["update", "tick"])
def test_another_model(method: str) -> None:
    _, growth = made("a")
    other, own = made("b")
    words = ["^model", "a/bed", "made for"]
    grads = gradients(other, own)
    with Unchanged(other, growth, words=words):
        if method == "update":
            growth.update(other, grads)
        else:
            growth.tick(other, lambda model: pair_loss(model, BATCH))


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "abstract"])
def test_tick_inside_jit(jit: bool) -> None:
    model, growth = made()

    def run(model: Any, growth: Growth) -> None:
        growth.tick(model, lambda model: pair_loss(model, BATCH))

    transform: Any = nnx.jit if jit else nnx.eval_shape
    words = ["tick", "jit", "between steps|outside"]
    kinds = (TypeError, ValueError, RuntimeError)
    with Unchanged(model, growth, words=words, kind=kinds):
        transform(run)(model, growth) if jit else transform(run, model, growth)


def test_a_loss_of_each_row() -> None:
    model, growth = made()
    grads = gradients(model, growth)
    with Unchanged(model, growth, words=["^loss", r"\(16,\)", "mean"]):
        growth.update(model, grads, loss=jnp.zeros(16))


def test_gradients_that_are_not_finite_teach_nothing() -> None:
    model, growth = made()
    for _ in range(2):  # a seed is in TRAINING after two ticks
        growth.update(model, gradients(model, growth))
        growth.tick(model, lambda model: pair_loss(model, BATCH))
    bed = model.a.bed
    owner = int(np.flatnonzero(bed.seeds.get_value().stage == 2)[0])
    slot = int(bed.seeds.get_value().slot_of_seed[owner])
    grads = gradients(model, growth)
    bad = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), grads)
    before = numbers(bed.bank), growth.state.get_value().moments
    growth.update(model, bad, loss=jnp.float32(jnp.nan))
    for a, b in zip(before[0], numbers(bed.bank), strict=True):
        np.testing.assert_array_equal(a, b)
    jax.tree.map(
        np.testing.assert_array_equal, growth.state.get_value().moments, before[1]
    )
    errors = growth.state.get_value().sums.errors
    assert int(errors["a"][0, slot]) == 1
    growth.update(model, gradients(model, growth))
    assert any(
        np.any(a[slot] != b[slot])
        for a, b in zip(before[0], numbers(bed.bank), strict=True)
    )
    report = growth.tick(model, lambda model: pair_loss(model, BATCH))
    assert float(report.layers["a"].signals.error_rate[owner]) == 0.5
    assert int(bed.seeds.get_value().error_count[owner]) == 1


def reads_gradients() -> dict[str, Any]:
    return {"controller_config": dataclasses.replace(POLICY, where="gradient")}


@pytest.mark.parametrize(
    "wrt", [None, nnx.PathContains("b")], ids=["frozen", "only another layer trains"]
)
def test_gradients_that_no_growable_layer_has_are_not_waited_for(wrt: Any) -> None:
    model, _ = made()
    words = ["the policy reads chunk_gradient", "wrt trains none", "where='health'"]
    with Unchanged(model, words=words):
        Growth(model, optax.adam(1e-2), wrt=wrt, **reads_gradients())
    with Unchanged(model, words=words):
        build(model, optax.sgd(0.1), optax.sgd(0.1), wrt=wrt, **reads_gradients())
    # Where the layer itself trains, alone or not, they are known.
    for trained in (nnx.PathContains("a"), nnx.Param):
        Growth(model, optax.adam(1e-2), wrt=trained, **reads_gradients())
    # And a policy that does not say what it reads is trusted.
    own = heuristic(POLICY)(Setting(layers=LAYER, gates=QUICK))._replace(reads=None)
    Growth(model, optax.adam(1e-2), wrt=wrt, policy=own._replace(stacked=False))


LAYER = {
    "a": LayerShape(num_seeds=2, capacity=2, costs=np.ones((1, 2), np.int32)),
}
