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

from esper_jax import Growth, Strategy, build, grow_capacity, make_growable
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
        pytest.param(None, ["None", r"got \w+\."], id="nothing"),
        pytest.param([1.0, 2.0], ["got list"], id="list"),
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


def test_a_frozen_host_has_no_norm_of_gradients_to_wait_for() -> None:
    """It would read as 0, at which `GRAD_NORM_GATED` never lets anything count."""
    model, _ = made()
    reads = {"controller_config": dataclasses.replace(POLICY, how="conditions")}
    with Unchanged(model, words=["policy reads grad_norm", "frozen", "how='fixed'"]):
        Growth(model, optax.adam(1e-2), wrt=None, **reads)
    Growth(model, optax.adam(1e-2), **reads)
    gated = Layers()
    strategy = Strategy.GRAD_NORM_GATED
    make_growable(gated, "a", 2, strategy=strategy, rngs=nnx.Rngs(5))
    for make in (
        lambda: Growth(gated, optax.adam(1e-2), wrt=None),
        lambda: build(gated, optax.sgd(0.1), optax.sgd(0.1), wrt=None),
    ):
        with Unchanged(gated, words=["GRAD_NORM_GATED", "frozen", "another strategy"]):
            make()
    Growth(gated, optax.adam(1e-2))


def test_a_host_that_trains_by_path_has_gradients() -> None:
    """The filter finds the layer's seeds, too, which are integers."""
    model, _ = made()
    growth = Growth(model, optax.adam(1e-2), wrt=nnx.PathContains("a"))
    found = {path for path, _ in nnx.to_flat_state(gradients(model, growth))}
    assert ("a", "base", "kernel") in found
    assert not any("seeds" in path for path in found)
    growth.update(model, gradients(model, growth))


def test_the_same_layers_of_other_shapes() -> None:
    model, growth = made()
    other = Layers()
    make_growable(other, "a", 3, rngs=nnx.Rngs(5))
    own = Growth(other, optax.adam(1e-2))
    grads = gradients(other, own)
    words = ["^model", "a/bed/", "shape", "made for"]
    with Unchanged(other, growth, words=words):
        growth.update(other, grads)
    with Unchanged(other, growth, words=words):
        growth.tick(other, lambda model: pair_loss(model, BATCH))
    grow_capacity(model, 1, rngs=nnx.Rngs(0))
    with Unchanged(model, growth, words=[*words, "grow_capacity"]):
        growth.tick(model, lambda model: pair_loss(model, BATCH))


def test_an_evaluate_that_is_no_function_or_is_traced() -> None:
    model, growth = made()
    words = ["^evaluate must be a function", "0.5"]
    with Unchanged(model, growth, words=words, kind=TypeError):
        growth.tick(model, 0.5)  # type: ignore[arg-type]

    @jax.jit
    def run(x: Any) -> None:  # the model is closed over: what it computes is traced
        growth.tick(model, lambda model: pair_loss(model, (x, Y)))

    with Unchanged(model, growth, words=["^tick", "between steps", "jit"]):
        run(X)


def test_gradients_are_accumulated_by_optax_multi_steps() -> None:
    """Four steps of a quarter of the rows are one of all of them."""
    ends = []
    for parts in (1, 4):
        model, _ = made()
        optimizer: Any = optax.sgd(0.1)
        if parts > 1:
            optimizer = optax.MultiSteps(optimizer, parts)
        growth = Growth(
            model, optimizer, lifecycle_config=QUICK, controller_config=POLICY
        )
        for _ in range(2):  # a seed is in TRAINING after two ticks
            growth.update(model, gradients(model, growth))
            growth.tick(model, lambda model: pair_loss(model, BATCH))
        size = len(X) // parts
        for i in range(parts):
            rows = X[i * size : (i + 1) * size], Y[i * size : (i + 1) * size]
            growth.update(
                model, nnx.grad(pair_loss, argnums=growth.argnums)(model, rows)
            )
        ends.append(numbers(model.a.bed.bank))
    fresh = numbers(made()[0].a.bed.bank)
    assert any(np.any(a != b) for a, b in zip(fresh, ends[0], strict=True))
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
