"""What was made of a model before `make_growable` and is given to it goes on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from esper_jax import Growth, make_growable

WIDTH = 4


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.mlp = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(WIDTH))

    def __call__(self, x: Any) -> Any:
        return x + self.scale * self.mlp(x)


class Net(nnx.Module):
    def __init__(self, readout: int = 3) -> None:
        rngs = nnx.Rngs(0)
        self.stem = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.blocks[1].mlp = self.blocks[0].mlp  # in two places
        self.readout = nnx.Linear(WIDTH, readout, rngs=rngs)
        self.tied = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.tied.kernel = self.stem.kernel

    def __call__(self, x: Any) -> Any:
        x = self.blocks[1](self.blocks[0](self.stem(x)))
        return self.readout(self.tied(x))


LAYERS = ["stem", "blocks/0", "blocks/0/mlp", "tied"]
"""Among them one inside another, one in two places, and one with a shared kernel."""
X = np.random.default_rng(0).normal(size=(8, WIDTH)).astype(np.float32)


def loss_fn(model: Any) -> Any:
    return jnp.mean((model(X) - X[:, :3]) ** 2)


def grow(model: Any, where: Any = LAYERS, **options: Any) -> list[str]:
    features = WIDTH if "blocks/0" in where else None
    return make_growable(
        model, where, 2, features=features, rngs=nnx.Rngs(1), **options
    )


def values(model: Any) -> dict[str, np.ndarray]:
    """The host's parameters by their paths in the plain model."""
    return {
        "/".join(str(key) for key in path if key != "base"): np.asarray(leaf[...])
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def kernels(params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.ndim(x) > 1, params)


def labels(params: Any) -> Any:
    return jax.tree.map(lambda x: "a" if jnp.ndim(x) > 1 else "b", params)


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adam, clipped": lambda: optax.chain(optax.clip(0.1), optax.adam(1e-2)),
    "masked": lambda: optax.masked(optax.sgd(0.1, momentum=0.9), kernels),
    "multi_transform": lambda: optax.multi_transform(
        {"a": optax.adam(1e-2), "b": optax.sgd(1e-1, momentum=0.5)}, labels
    ),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "muon": lambda: optax.contrib.muon(1e-2),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), 2),
    "schedule_free": lambda: optax.contrib.schedule_free_sgd(1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_made_before_goes_on_as_if_nothing_had_been_wrapped(
    name: str,
) -> None:
    models = plain, grown = Net(), Net()
    tx = OPTIMIZERS[name]()
    optimizers = [nnx.Optimizer(model, tx, wrt=nnx.Param) for model in models]

    def train(model: Any, optimizer: Any) -> Any:
        grads = nnx.grad(loss_fn)(model)
        optimizer.update(model, grads)

    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer)
    grow(grown, optimizer=optimizers[1])
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer)
    assert int(optimizers[1].step[...]) == 4
    jax.tree.map(np.testing.assert_array_equal, values(grown), values(plain))
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.leaves(optimizers[1].opt_state),
        jax.tree.leaves(optimizers[0].opt_state),
    )


def test_model_and_optimizer_averages_and_plain_optax_move_together() -> None:
    model, like = Net(), Net()
    kept: list[Any] = []
    for each in (model, like):
        optimizer = nnx.ModelAndOptimizer(each, optax.adam(1e-2))
        ema = nnx.EMA(each, 0.5, only=nnx.Param)
        tx = optax.ema(0.9)
        kept.append([each, optimizer, ema, tx, tx.init(nnx.state(each, nnx.Param))])
    averages = nnx.clone(nnx.state(model, nnx.Param))
    grow(model, optimizer=(kept[0][1], kept[0][2], kept[0][4], averages))
    for each, optimizer, ema, tx, moments in kept:
        grads = nnx.grad(loss_fn)(each)
        optimizer.update(grads)
        ema.update(nnx.state(each, nnx.Param))
        grads = nnx.state(grads, nnx.Param)
        nnx.update(each, tx.update(grads, moments)[0])
    jax.tree.map(np.testing.assert_array_equal, values(model), values(like))
    averaged = [values(ema.apply_to(each)) for each, _, ema, _, _ in kept]
    jax.tree.map(np.testing.assert_array_equal, *averaged)
    assert list(nnx.traversals.flatten_mapping(averages)) == list(
        nnx.traversals.flatten_mapping(nnx.state(model, nnx.Param))
    )


def test_moved_arrays_are_the_same_arrays_with_their_shardings() -> None:
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    model = Net()
    split = NamedSharding(mesh, PartitionSpec("x"))
    model.stem.kernel.set_value(jax.device_put(model.stem.kernel[...], split))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    before = optimizer.opt_state[0].mu["stem"]["kernel"]
    assert before[...].sharding == split
    grow(model, optimizer=optimizer)
    after = optimizer.opt_state[0].mu["stem"]["base"]["kernel"]
    assert after is before


def test_growth_beside_an_optimizer_made_before() -> None:
    model = Net()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    grow(model, "stem", optimizer=optimizer)
    growth = Growth(model, optax.adam(1e-2))

    @nnx.jit
    def train_step(model: Any, optimizer: Any, growth: Any) -> Any:
        loss, grads = nnx.value_and_grad(loss_fn, argnums=growth.argnums)(model)
        optimizer.update(model, grads)
        growth.update(model, grads, loss=loss)
        return loss

    losses = [float(train_step(model, optimizer, growth)) for _ in range(3)]
    assert losses[2] < losses[0]
    grow(model, "blocks/0/mlp", optimizer=optimizer)  # and once more, later
    growth = Growth(model, optax.adam(1e-2))
    assert float(train_step(model, optimizer, growth)) < losses[2]


def by_path(path: Any, variable: Any) -> bool:
    return path == ("stem", "kernel")


def another_model(model: Any) -> Any:
    return nnx.Optimizer(Net(readout=2), optax.adam(1e-2), wrt=nnx.Param)


def another_layer(model: Any) -> Any:
    return nnx.Optimizer(model.stem, optax.adam(1e-2), wrt=nnx.Param)


def chosen_by_path(model: Any) -> Any:
    return nnx.Optimizer(model, optax.adam(1e-2), wrt=by_path)


def masked_by_a_tree(model: Any) -> Any:
    tx = optax.masked(optax.adam(1e-2), kernels(nnx.state(model, nnx.Param)))
    return nnx.Optimizer(model, tx, wrt=nnx.Param)


REFUSED = {
    another_model: r"of this model.*\(2,\) at .*'readout'.* instead of \(3,\)",
    another_layer: r"of this model.*\(4,\) at .*'bias'.* instead of nothing",
    chosen_by_path: "Optimizer would hold another tree.*chooses by path",
    masked_by_a_tree: "Optimizer would hold another tree.*chooses by path",
    lambda model: nnx.EMA(model, 0.9): "EMA would hold another tree.*takes in",
    lambda model: {"loss": jnp.zeros(())}: "dict holds nothing by the model's paths",
    lambda model: [{"stem": {"bias": 0}, "w": 0}]: "dict holds 'w', and the model has",
    lambda model: optax.adam: "optimizer must be an nnx.Optimizer.*got function",
}


@pytest.mark.parametrize("make", REFUSED)
def test_what_cannot_be_moved_is_refused_and_nothing_changes(make: Any) -> None:
    model = Net()
    good = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    bad = make(model)
    trees = [jax.tree.structure(x) for x in (model, good.opt_state)]
    held = bad.opt_state if isinstance(bad, nnx.Optimizer) else bad
    held_tree = jax.tree.structure(held)
    with pytest.raises((TypeError, ValueError), match=REFUSED[make]):
        grow(model, optimizer=[good, *(bad if isinstance(bad, list) else [bad])])
    assert trees == [jax.tree.structure(x) for x in (model, good.opt_state)]
    assert jax.tree.structure(held) == held_tree


def test_the_error_of_an_optimizer_that_was_not_given_is_the_documented_one() -> None:
    model = Net()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    grow(model)
    assert "different numbers\n    of pytree children" in str(make_growable.__doc__)
    with pytest.raises(ValueError, match="different numbers of pytree children") as e:
        optimizer.update(model, nnx.grad(loss_fn)(model))
    assert "base" in str(e.value)


def test_one_that_is_given_twice_is_moved_once() -> None:
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    make_growable(model, "layers/0", 2, rngs=rngs, optimizer=[optimizer, optimizer])
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 3)))))(model)
    optimizer.update(model, grads)
    assert int(optimizer.step[...]) == 1
