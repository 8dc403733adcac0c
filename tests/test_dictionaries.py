"""Growth on dictionaries of arrays: pure JAX and Flax Linen beside the NNX loop."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx, serialization
from flax.traverse_util import flatten_dict, unflatten_dict
from test_own_loops import POLICY, QUICK, cross_entropy, products, rows

from esper_jax import ControllerConfig, Growth, SeedBed, Stage, Strategy
from esper_jax.growth import growth_functions, linen_growth
from esper_jax.growth.functions import start
from esper_jax.growth.parts import values_of
from esper_jax.layers.linen import ChunkedLayer, read_seeds
from esper_jax.policy.interface import SAMPLED

X = rows(16, 4)
Y = products(X)
LAYERS = {
    "a": {"features": 8, "num_seeds": 2},
    "deep/b": {"features": 6, "num_seeds": 3, "capacity": 2},
}
OPTIONS = {"lifecycle_config": QUICK, "controller_config": POLICY}
STEPS, HALF, TICKS = 3, 7, 18
KEYS = jax.random.split(jax.random.key(0), 3)
PARAMS = {
    name: jax.random.normal(key, shape) / 2
    for name, key, shape in zip("123", KEYS, ((4, 8), (8, 6), (6, 3)), strict=True)
}


def outputs(params: Any, first: Any, second: Any, x: Any) -> Any:
    h = first(x @ params["1"])
    return second(jnp.tanh(h) @ params["2"]) @ params["3"]


def sgd(params: Any, grads: Any) -> Any:
    return jax.tree.map(lambda p, g: p - 5e-2 * g, params, grads)


# --- Pure JAX


@functools.cache
def pure() -> Any:
    return growth_functions(LAYERS, optax.adam(2e-2), **OPTIONS)


def pure_outputs(params: Any, variables: Any, x: Any, train: bool = True) -> Any:
    growth, seen = pure(), []

    def grow(layer: str) -> Callable[[Any], Any]:
        def call(y: Any) -> Any:
            given = {**variables, "seeds": seen[-1]} if seen else variables
            y, seeds = growth.apply(given, layer, y, train)
            seen.append(seeds)
            return y

        return call

    return outputs(params, grow("a"), grow("deep/b"), x), seen[-1]


@jax.jit
def pure_step(params: Any, variables: Any) -> Any:
    def loss_fn(params: Any, learned: Any) -> Any:
        out, seeds = pure_outputs(params, {**variables, **learned}, X)
        return cross_entropy(out, Y).mean(), seeds

    learned = {name: variables[name] for name in ("bank", "probe")}
    grad_fn = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
    (loss, seeds), (grads, more) = grad_fn(params, learned)
    variables = pure().update({**variables, "seeds": seeds}, more, loss)
    return sgd(params, grads), variables


@jax.jit
def pure_evaluate(params: Any, variables: Any) -> Any:
    out, _ = pure_outputs(params, variables, X, train=False)
    return cross_entropy(out, Y).mean()


class Run(NamedTuple):
    reports: list[Any]
    params: Any
    values: dict[str, Any]
    """Of banks and seeds, by name."""
    variables: Any


def flat(variables: Any, *names: str) -> dict[str, Any]:
    return {
        path: array
        for name in names
        for path, array in flatten_dict(variables[name], sep="/").items()
    }


def pure_ticks(params: Any, variables: Any, ticks: int) -> Run:
    reports = []
    for _ in range(ticks):
        for _ in range(STEPS):
            params, variables = pure_step(params, variables)
        evaluate = functools.partial(pure_evaluate, params)
        variables, report = pure().tick(variables, evaluate)
        reports.append(report)
    return Run(reports, params, flat(variables, "bank", "seeds"), variables)


@functools.cache
def pure_run() -> Run:
    return pure_ticks(PARAMS, pure().init(jax.random.key(7)), TICKS)


# --- The same in NNX


class Beds(nnx.Module):
    """The layers of `LAYERS` between the same weights."""

    def __init__(self) -> None:
        self.a = SeedBed(**LAYERS["a"], rngs=nnx.Rngs(0))
        self.deep = nnx.Module()
        self.deep.b = SeedBed(**LAYERS["deep/b"], rngs=nnx.Rngs(0))
        self.weights = nnx.Dict({n: nnx.Param(p) for n, p in PARAMS.items()})

    def __call__(self, x: Any) -> Any:
        weights = {n: p.get_value() for n, p in self.weights.items()}
        return outputs(weights, self.a, self.deep.b, x)


@functools.cache
def nnx_run() -> Run:
    model = Beds()
    values = flat(pure().init(jax.random.key(7)), "bank", "seeds", "probe")
    nnx.update(model, _state(model, values))
    growth = Growth(model, optax.adam(2e-2), **OPTIONS)
    _, policy = jax.random.split(jax.random.key(7))  # as init does
    growth.state.set_value(start(growth.recipe, values_of(model), policy))
    optimizer, reports = nnx.Optimizer(model, optax.sgd(5e-2), wrt=nnx.Param), []

    def loss_fn(model: Any) -> Any:
        return cross_entropy(model(X), Y).mean()

    @nnx.jit
    def train_step(model: Any, optimizer: Any, growth: Growth) -> None:
        loss, grads = nnx.value_and_grad(loss_fn, argnums=growth.argnums)(model)
        optimizer.update(model, grads)
        growth.update(model, grads, loss=loss)

    for _ in range(TICKS):
        for _ in range(STEPS):
            train_step(model, optimizer, growth)
        reports.append(growth.tick(model, nnx.jit(loss_fn)))
    params = {n: p.get_value() for n, p in model.weights.items()}
    named = {n: v for n, v in values_of(model).items() if "/probe" not in n}
    named = {n: v for n, v in named.items() if not n.startswith("weights/")}
    return Run(reports, params, named, None)


def _state(model: Any, values: dict[str, Any]) -> Any:
    return nnx.from_flat_state(
        [
            (path, leaf.replace(values["/".join(map(str, path))]))
            for path, leaf in nnx.to_flat_state(nnx.state(model))
            if "/".join(map(str, path)) in values
        ]
    )


def test_the_loop_in_pure_jax_is_the_loop_in_nnx() -> None:
    """The same stages at every tick, and the same numbers to rounding."""
    pure, other = pure_run(), nnx_run()
    for mine, theirs in zip(pure.reports, other.reports, strict=True):
        assert list(mine.layers) == list(theirs.layers) == ["a", "deep/b"]
        for name, layer in mine.layers.items():
            np.testing.assert_array_equal(layer.stage, theirs.layers[name].stage)
            np.testing.assert_array_equal(layer.outcome, theirs.layers[name].outcome)
        close(mine, theirs)
    last = [layer.stage for layer in pure.reports[-1].layers.values()]
    assert all(Stage.FOSSILIZED in stage for stage in last), last
    close(pure.params, other.params)
    assert pure.values.keys() == other.values.keys()
    close(pure.values, {name: other.values[name] for name in pure.values})


def close(one: Any, other: Any) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), one, other
    )


def test_a_whole_life_compiles_once() -> None:
    pure_run()
    assert (pure_step._cache_size(), pure_evaluate._cache_size()) == (1, 1)


def test_evaluation_counts_nothing_and_training_counts_each_layer() -> None:
    variables = pure_run().variables
    _, seeds = pure_outputs(PARAMS, variables, X, train=False)
    jax.tree.map(np.testing.assert_array_equal, seeds, variables["seeds"])
    before = jax.tree.map(np.asarray, variables)
    _, seeds = pure_outputs(PARAMS, variables, X)
    states = [read_seeds(bed["seeds"]) for bed in (seeds["a"], seeds["deep"]["b"])]
    assert [int(state.steps) for state in states] == [1, 1]
    assert all(np.all(state.statistics.count > 0) for state in states)
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_harvest_gives_the_same_outputs() -> None:
    counts = []
    for run, parts in (
        (pure_run_half(), "fossils"),
        (pure_run_half(), "counting"),
        (pure_run(), "fossils"),
    ):
        want, _ = pure_outputs(run.params, run.variables, X, train=False)
        layers = pure().harvest(run.variables, parts=parts)
        assert sorted(layers) == ["a", "deep/b"]
        out = outputs(run.params, layers["a"], layers["deep/b"], X)
        apart = np.max(np.abs(out - want))
        counts.append((count(layers), apart < 1e-5))
    plain = outputs(run.params, lambda y: y, lambda y: y, X)
    assert np.max(np.abs(plain - want)) > 1e-2
    (few, wrong), (more, right), (most, same) = counts
    assert (wrong, right, same) == (False, True, True)
    assert few < more < most


def count(layers: Any) -> int:
    leaves = jax.tree.leaves(nnx.state(nnx.Dict(layers), nnx.Param))
    return sum(leaf.size for leaf in leaves)


def through_msgpack(variables: Any, path: Any) -> Any:
    data = serialization.to_bytes(variables)
    return serialization.from_bytes(pure().init(jax.random.key(0)), data)


def through_flat_numpy(variables: Any, path: Any) -> Any:
    file = path / "variables.npz"
    np.savez(file, **flatten_dict(variables, sep="."))
    with np.load(file) as found:
        return unflatten_dict(dict(found), sep=".")


def through_orbax(variables: Any, path: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "variables", variables)
        checkpointer.wait_until_finished()
        like = jax.eval_shape(lambda: variables)
        return checkpointer.restore(path / "variables", like)


@pytest.mark.parametrize(
    "through", [through_msgpack, through_flat_numpy, through_orbax]
)
def test_variables_survive_storage(through: Any, tmp_path: Any) -> None:
    """In the middle of lives, and go on as if nothing had been."""
    start = pure_run_half()
    found = through(start.variables, tmp_path)
    assert jax.tree.structure(found) == jax.tree.structure(start.variables)
    again = pure_ticks(start.params, found, TICKS - HALF)
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    same(again.values, pure_run().values)
    same(again.reports, pure_run().reports[HALF:])


@functools.cache
def pure_run_half() -> Run:
    return pure_ticks(PARAMS, pure().init(jax.random.key(7)), HALF)


# --- What is refused


def test_layers_that_do_not_fit_are_refused_by_name() -> None:
    good = {"features": 8, "num_seeds": 2}
    for layers, error, message in (
        ({}, ValueError, "layers must name at least one layer .* got {}"),
        ([good], ValueError, "layers must name at least one layer"),
        ({"a": good, "b": {"features": 8}}, TypeError, "layer 'b': .*num_seeds"),
        ({"a": {**good, "num_seeds": 9}}, ValueError, "layer 'a': num_seeds must be"),
        ({"a": {**good, "size": 9}}, TypeError, "layer 'a': .*size"),
        ({"a": None}, TypeError, "layer 'a': .*mapping"),
        ({"a": {**good, "blueprints": ("x",)}}, ValueError, "layer 'a': .*'x'"),
        ({0: good}, TypeError, "layer 0: .* name"),
        ({"": good}, ValueError, "layer '': .* name"),
        ({"a//b": good}, ValueError, "layer 'a//b': .* name"),
        ({"bed": good}, ValueError, "layer 'bed': .* name"),
        ({"train": good}, ValueError, "layer 'train': .* name"),
        ({"eval/a": good}, ValueError, "layer 'eval/a': .* name"),
        ({"a": good, "a/b": good}, ValueError, "layer 'a/b': .*'a'"),
        ({"a/b": good, "a": good}, ValueError, "layer 'a/b': .*'a'"),
    ):
        with pytest.raises(error, match=message):
            growth_functions(layers, optax.sgd(0.1))
    with pytest.raises(TypeError, match="optimizer must be an optax optimizer"):
        growth_functions(LAYERS, "adam")


def test_what_reads_the_host_is_refused_and_its_signals_are_nan() -> None:
    from_drift = {"a": {**LAYERS["a"], "strategy": Strategy.DRIFT_CONTROLLED}}
    for layers, options, read in (
        (LAYERS, {"controller_config": ControllerConfig(where="gradient")}, "chunk"),
        (LAYERS, {"controller_config": ControllerConfig(how="conditions")}, "drift, g"),
        (from_drift, {}, "drift: the host's gradients"),
    ):
        with pytest.raises(ValueError, match=f"must not read {read}"):
            growth_functions(layers, optax.sgd(0.1), **options)
    signals = pure_run().reports[-1].layers["a"].signals
    for name in sorted(SAMPLED):
        assert np.all(np.isnan(getattr(signals, name)))


@pytest.fixture(scope="module")
def given() -> Any:
    variables = pure().init(jax.random.key(1))
    grads = {name: variables[name] for name in ("bank", "probe")}
    return variables, grads


def test_an_unknown_layer_is_refused(given: Any) -> None:
    for layer in ("c", "b", None):
        with pytest.raises(ValueError, match=rf"layer must be one of 'a', .*{layer!r}"):
            pure().apply(given[0], layer, jnp.ones((2, 8)))


def test_an_activation_of_another_width_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"layer 'a': .*8"):
        pure().apply(given[0], "a", jnp.ones((2, 6)))


@pytest.mark.parametrize("missing", ["bank", "seeds", "probe", "growth"])
def test_a_missing_collection_is_refused(given: Any, missing: str) -> None:
    variables, grads = given
    less = {name: of for name, of in variables.items() if name != missing}
    message = f"variables must hold the collection {missing}"
    called: list[Any] = []
    for broken in (less, less | {missing: {}}, less | {missing: None}):
        with pytest.raises(ValueError, match=message):
            pure().update(broken, grads)
        with pytest.raises(ValueError, match=message):
            pure().tick(broken, lambda v: called.append(v) or 1.0)
        if missing != "growth":
            with pytest.raises(ValueError, match=message):
                pure().apply(broken, "a", jnp.ones((2, 8)))
            with pytest.raises(ValueError, match=message):
                pure().harvest(broken)
    assert not called


def test_missing_gradients_are_refused(given: Any) -> None:
    variables, grads = given
    for missing in ("bank", "probe"):
        less = {name: of for name, of in grads.items() if name != missing}
        for broken in (less, less | {missing: {"a": grads[missing]["a"]}}):
            with pytest.raises(ValueError, match=f"grads must hold .* {missing}"):
                pure().update(variables, broken)
    with pytest.raises(TypeError, match=r"grads must be a dictionary .* got NoneType"):
        pure().update(variables, None)
    with pytest.raises(TypeError, match=r"grads\['bank'\] must be a dictionary"):
        pure().update(variables, {**grads, "bank": [1]})
    with pytest.raises(TypeError, match="variables must be a dictionary"):
        pure().tick(None, lambda v: 1.0)


def test_a_loss_of_another_shape_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"loss must be a single number.*\(3,\)"):
        pure().update(*given, jnp.ones(3))


@pytest.mark.parametrize("result", [None, jnp.ones(3), (1.0, 2.0, 3.0), "low"])
def test_what_evaluate_returns_is_checked(given: Any, result: Any) -> None:
    variables, before = given[0], jax.tree.map(np.asarray, given[0])
    with pytest.raises(ValueError, match="evaluate must return the held-out loss"):
        pure().tick(variables, lambda v: result)
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_a_traced_tick_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="tick must be called between steps"):
        jax.jit(lambda v: pure().tick(v, lambda _: 1.0)[0])(given[0])


# --- Linen


class Block(nn.Module):
    """A layer of a stack."""

    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        return x + ChunkedLayer(nn.Dense(8, name="mlp"), 2, name="grown")(x), None


class Net(nn.Module):
    """A layer that can grow, and a scanned stack of two."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        axes = dict.fromkeys(("params", "bank", "seeds", "probe"), 0)
        stack = nn.scan(Block, axes, split_rngs={"params": True}, length=2)
        x = nn.tanh(ChunkedLayer(nn.Dense(8, name="dense"), 2, name="first")(x))
        x, _ = stack(name="blocks")(x, None)
        return nn.Dense(3, name="head")(x)


def linen_run(model: Any, ticks: int) -> Any:
    variables = model.init(jax.random.key(0), X)
    params = variables["params"]
    growth = linen_growth(
        lambda v: model.apply(v, X), variables, optax.adam(2e-2), **OPTIONS
    )
    grown, reports = growth.init(jax.random.key(1)), []
    for name in ("bank", "seeds", "probe"):
        jax.tree.map(np.testing.assert_array_equal, grown[name], variables[name])

    def loss_fn(params: Any, parts: Any, grown: Any, mutable: Any = ("seeds",)) -> Any:
        given = {**grown, **parts, "params": params}
        out, new = model.apply(given, X, mutable=mutable)
        return cross_entropy(out, Y).mean(), new

    @jax.jit
    def step(params: Any, grown: Any) -> Any:
        parts = {name: grown[name] for name in ("bank", "probe")}
        grad_fn = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
        (loss, new), (grads, more) = grad_fn(params, parts, grown)
        return sgd(params, grads), growth.update({**grown, **new}, more, loss)

    @jax.jit
    def evaluate(grown: Any) -> Any:
        return loss_fn(params, {}, grown, [])[0]

    for _ in range(ticks):
        for _ in range(STEPS):
            params, grown = step(params, grown)
        grown, report = growth.tick(grown, evaluate)
        reports.append(report)
    assert step._cache_size() == evaluate._cache_size() == 1
    return params, growth, grown, reports


def test_a_linen_stack_grows_beside_a_layer() -> None:
    model = Net()
    params, growth, grown, reports = linen_run(model, 18)
    names = ["blocks/grown[0]", "blocks/grown[1]", "first"]
    assert list(reports[0].layers) == names
    stages = [layer.stage for layer in reports[-1].layers.values()]
    assert sum(Stage.FOSSILIZED in stage for stage in stages) >= 2, stages
    want = model.apply({**grown, "params": params}, X)
    parts = growth.harvest(grown, parts="counting")
    assert sorted(parts) == names

    def dense(layer: Any, x: Any) -> Any:
        return x @ layer["kernel"] + layer["bias"]

    # Each layer of the stack is a module of its own.
    x = jnp.tanh(parts["first"](dense(params["dense"], X)))
    for i in range(2):
        base = jax.tree.map(lambda p, i=i: p[i], params["blocks"]["mlp"])
        x = x + parts[f"blocks/grown[{i}]"](dense(base, x))
    out = dense(params["head"], x)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


def test_a_linen_layer_alone_grows() -> None:
    """Its bed has no layer around it, whose name it could have."""
    _, growth, grown, reports = linen_run(ChunkedLayer(nn.Dense(3), 3), 4)
    ((name, layer),) = reports[-1].layers.items()
    assert np.any(layer.stage)
    assert list(growth.harvest(grown)) == [name]


def test_linen_models_that_cannot_grow_are_refused() -> None:
    def growth(model: Any, variables: Any) -> Any:
        return linen_growth(lambda v: model.apply(v, X), variables, optax.sgd(0.1))

    dense = nn.Dense(3)
    variables = dense.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"call must run a model .* met none"):
        growth(dense, variables)
    model = ChunkedLayer(dense, 3)
    params = {"params": model.init(jax.random.key(0), X)["params"]}
    with pytest.raises(ValueError, match="bank and seeds must be given to apply"):
        growth(model, params)
