"""Pure JAX and Flax Linen: slots are given back, fossils folded into given weights."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import serialization
from test_folds import FOSSILS, LEARNING, biased, conv, filled, linear
from test_linen import HELD

from esper_jax import LifecycleConfig, Stage
from esper_jax.blueprints import affine, group, lora, low_rank, residual_mlp
from esper_jax.growth import growth_functions, linen_growth
from esper_jax.growth.folds import fold_fossils, folds_of
from esper_jax.growth.parts import split_model, values_of
from esper_jax.layers import linen
from esper_jax.lifecycle import commands_for
from esper_jax.monitor.words import folds
from esper_jax.policy import Reason, TrialConfig, trial, trial_lives

X = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
Y = np.sin(X @ np.random.default_rng(1).normal(size=(6, 6))).astype(np.float32)
same = functools.partial(jax.tree.map, np.testing.assert_array_equal)


def is_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    same(one, other)


# --- Fold


def twin(base: Any, kinds: Any) -> Any:
    """The layer of `filled` in pure JAX: functions, variables and weights."""
    model = filled(base, kinds)
    growth = growth_functions(
        {"hidden": {"features": 10, "num_seeds": 4, "blueprints": kinds, "inputs": 5}},
        optax.sgd(0.1),
    )
    variables = growth.init(jax.random.key(0))
    bed, layer = model[0].bed, model[0].base
    for name in ("bank", "seeds"):
        variables[name] = {"hidden": {name: getattr(bed, name).get_arrays()}}
    weights = {"kernel": layer.kernel[...]}
    if layer.bias is not None:
        weights["bias"] = layer.bias[...]
    return model, growth, variables, {"hidden": weights}


@pytest.mark.parametrize(
    ("base", "kinds", "shape"),
    [
        (linear, [lora(rank=2, scaling=2.0)], (7, 5)),
        (linear, [affine(), low_rank()], (7, 5)),
        (lambda: linear(jnp.bfloat16), [affine()], (7, 5)),
        (lambda: linear(use_bias=False), [low_rank()], (7, 5)),
        (lambda: conv(1), [lora(), biased], (2, 4, 4, 5)),
        (lambda: conv(3), [affine()], (2, 4, 4, 5)),
    ],
)
def test_fossils_become_part_of_given_weights_as_in_nnx(
    base: Any, kinds: Any, shape: tuple[int, ...]
) -> None:
    model, growth, variables, weights = twin(base, kinds)
    layer, before = model[0].base, jax.tree.map(np.asarray, (variables, weights))
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)

    def run(variables: Any, weights: Any) -> np.ndarray:
        for name, array in weights["hidden"].items():
            getattr(layer, name).set_value(array)
        out, _ = growth.apply(variables, "hidden", layer(x), False, x=x)
        return np.asarray(out, np.float32)

    out = run(variables, weights)
    with jax.debug_nans(True):
        new, folded, which = growth.fold(variables, weights)
    is_same(jax.tree.map(np.asarray, (variables, weights)), before)  # nothing in place
    assert np.flatnonzero(which["hidden"]).tolist() == list(FOSSILS)
    size = np.abs(out).max()
    rounding = 1e-2 if layer.kernel.dtype == jnp.bfloat16 else 2e-6
    assert np.abs(run(new, folded) - out).max() <= rounding * size
    assert np.abs(run(new, weights) - out).max() > 1e-2 * size  # it was not nothing
    # Bank, probe and what growth remembers stay; the slots of fossils are free.
    is_same(*({n: v[n] for n in ("bank", "probe", "growth")} for v in (variables, new)))
    state = linen.read_seeds(new["seeds"]["hidden"]["seeds"])
    assert state.stage.tolist() == [0, 0, 0, Stage.TRAINING]
    assert state.seed_of_slot.tolist() == [-1, -1, -1, LEARNING]
    # The numbers are those of the NNX path, to the bit.
    parts, values = split_model(model), values_of(model)
    found = folds_of(model, parts, LifecycleConfig(fold="trained"))
    for name, array in weights["hidden"].items():
        values[f"0/base/{name}"] = array
    want = jax.jit(lambda *a: fold_fossils(parts, found, *a))(
        *(parts.take(values, name) for name in ("seeds", "bank")), values
    )
    for name, array in folded["hidden"].items():
        np.testing.assert_array_equal(array, want.weights[f"0/base/{name}"])
    # Again, and there is nothing left: the very same arrays.
    again, kept, none = growth.fold(new, folded)
    assert again is new
    assert kept["hidden"]["kernel"] is folded["hidden"]["kernel"]
    assert not np.any(none["hidden"])


def test_what_is_not_finite_stays_a_fossil_and_other_entries_are_left() -> None:
    _, growth, variables, weights = twin(linear, [lora(rank=1)])
    bank = variables["bank"]["hidden"]["bank"]
    bank["custom_lora_w1"] = bank["custom_lora_w1"].at[0].set(jnp.nan)  # of seed 2
    given = {"hidden": {**weights["hidden"], "scale": "mine"}}
    _, folded, which = growth.fold(variables, given)
    assert np.flatnonzero(which["hidden"]).tolist() == [0]
    assert np.all(np.isfinite(folded["hidden"]["kernel"]))
    assert folded["hidden"]["scale"] == "mine"


def test_a_report_tells_of_what_was_folded() -> None:
    _, growth, variables, weights = twin(linear, [lora()])
    variables, report = growth.tick(variables, lambda v: 1.0)
    variables, _, which = growth.fold(variables, weights)
    told = report.with_folded(which).layers["hidden"]
    assert [event.seed for event in folds(told)] == list(FOSSILS)
    state = linen.read_seeds(variables["seeds"]["hidden"]["seeds"])
    np.testing.assert_array_equal(told.stage, state.stage)
    assert told.alpha.tolist() == [0, 0, 0, 0]
    assert report.layers["hidden"].alpha.tolist() == [1, 0, 1, 0]
    with pytest.raises(ValueError, match="folded: the report has no layer 'b'"):
        report.with_folded({"b": which["hidden"]})
    _, report = growth.tick(variables, lambda v: 1.0)  # goes on
    assert report.layers["hidden"].stage.tolist() == [0, 0, 0, Stage.TRAINING]


def test_weights_that_do_not_fit_are_refused() -> None:
    _, growth, variables, weights = twin(linear, [lora()])
    before = jax.tree.map(np.asarray, variables)
    kernel, bias = weights["hidden"]["kernel"], weights["hidden"]["bias"]
    for given, error, message in (
        (None, TypeError, "weights must hold .*'hidden': .* got NoneType"),
        ({}, TypeError, "weights must hold .* got dict without any"),
        ({"c": weights["hidden"]}, ValueError, "no layer 'c'; .*'hidden'"),
        ({"hidden": kernel}, TypeError, r"weights\['hidden'\] must be a dictionary"),
        ({"hidden": {"bias": bias}}, TypeError, "with 'kernel' and.*got 'bias'"),
        ({"hidden": {"kernel": [1.0]}}, TypeError, "floating point; got list"),
        (
            {"hidden": {"kernel": kernel.astype(jnp.int8)}},
            TypeError,
            r"\['kernel'\] must be an array of floating point; got int8",
        ),
        ({"hidden": {"kernel": kernel.T}}, ValueError, r"\(..., D, 10\).*\(10, 5\)"),
        ({"hidden": {"kernel": bias}}, ValueError, r"\(..., D, 10\).*got \(10,\)"),
        (
            {"hidden": {"kernel": kernel, "bias": bias[:9]}},
            ValueError,
            r"\['bias'\] must have shape \(10\).*got \(9,\)",
        ),
        # An adapter is as wide as the input, 5, of which a kernel of 2 x 5 reads two.
        ({"hidden": {"kernel": kernel[:3]}}, ValueError, "layer 'hidden': nothing"),
        ({"hidden": {"kernel": jnp.ones((2, 5, 10))}}, ValueError, "nothing that grow"),
    ):
        with pytest.raises(error, match=message):
            growth.fold(variables, given)
    with pytest.raises(ValueError, match="fold must be called between steps"):
        jax.jit(growth.fold)(variables, weights)
    is_same(jax.tree.map(np.asarray, variables), before)
    with pytest.raises(ValueError, match="hand them to the function fold"):
        growth_functions(
            {"a": {"features": 4, "num_seeds": 2}},
            optax.sgd(0.1),
            lifecycle_config=LifecycleConfig(fold="trained"),
        )


@pytest.mark.parametrize(
    ("kinds", "bias"),
    [
        ([residual_mlp()], True),
        ([affine(), group()], True),  # which reads what would change
        ([affine()], False),  # whose offset has no place
    ],
)
def test_what_can_never_be_folded_is_refused(kinds: Any, bias: bool) -> None:
    _, growth, variables, weights = twin(lambda: linear(use_bias=bias), kinds)
    with pytest.raises(ValueError, match=f"folded .*got {kinds[0].name!r}"):
        growth.fold(variables, weights)


def test_layers_of_one_array_are_refused() -> None:
    arguments = {"features": 4, "num_seeds": 2, "blueprints": [low_rank()]}
    growth = growth_functions({"a": arguments, "b": arguments}, optax.sgd(0.1))
    variables, tied = growth.init(jax.random.key(0)), {"kernel": jnp.ones((3, 4))}
    with pytest.raises(ValueError, match="'a' and 'b' must be arrays of their own"):
        growth.fold(variables, {"a": tied, "b": dict(tied)})
    kept, _, which = growth.fold(variables, {"b": tied})  # some of the layers
    assert list(which) == ["b"]
    assert kept is variables


# --- Linen


class Block(nn.Module):
    """A layer of a stack."""

    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        options = {"blueprints": (lora(rank=1), biased)}
        layer = linen.ChunkedLayer(nn.Dense(6, name="mlp"), 3, options, name="grown")
        return x + layer(x), None


class Stacked(nn.Module):
    """A scanned stack of two."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        axes = dict.fromkeys(HELD, 0)
        stack = nn.scan(Block, axes, split_rngs={"params": True}, length=2)
        return stack(name="blocks")(x, None)[0]


def with_fossils(variables: Any) -> Any:
    """Seed 1 of every layer is a fossil in slot 2; parameters are not 0."""
    keys = iter(jax.random.split(jax.random.key(3), 99))
    bank = jax.tree.map(
        lambda x: 0.3 * jax.random.normal(next(keys), x.shape), variables["bank"]
    )

    def live(tree: Any) -> Any:
        if "steps" not in tree:
            return {key: live(of) for key, of in tree.items()}
        s = linen.read_seeds(jax.tree.map(jnp.asarray, tree))
        return linen.write_seeds(
            s.replace(
                stage=s.stage.at[..., 1].set(Stage.FOSSILIZED),
                blueprint=s.blueprint.at[..., 1].set(1),
                slot_of_seed=s.slot_of_seed.at[..., 1].set(2),
                seed_of_slot=s.seed_of_slot.at[..., 2].set(1),
            )
        )

    return {**variables, "bank": bank, "seeds": live(variables["seeds"])}


def test_a_linen_stack_is_folded_and_shrunk() -> None:
    model = Stacked()
    variables = with_fossils(model.init(jax.random.key(0), X))
    growth = linen_growth(lambda v: model.apply(v, X), variables, optax.adam(0.1))
    grown = growth.init(jax.random.key(1))
    params, out = variables["params"], model.apply(variables, X)
    weights = {"blocks/grown": params["blocks"]["mlp"]}
    new, folded, which = growth.fold(grown, weights)
    assert {n: w.tolist() for n, w in which.items()} == {
        f"blocks/grown[{i}]": [False, True, False] for i in range(2)
    }
    params = {"blocks": {"mlp": folded["blocks/grown"]}}
    size = np.abs(out).max()
    after = model.apply({**new, "params": params}, X)
    assert np.abs(after - out).max() <= 4e-6 * size  # of two layers, one on the other
    plain = X
    for i in range(2):
        mlp = jax.tree.map(lambda w, i=i: np.float64(w[i]), params["blocks"]["mlp"])
        plain = plain + plain @ mlp["kernel"] + mlp["bias"]
    assert np.abs(plain - out).max() <= 4e-6 * size
    # The module goes on with the slots that are left, and without a probe.
    small, changed = growth.shrink(new, {"blocks/grown[0]": 1, "blocks/grown[1]": 1})
    assert set(changed.values()) == {(3, 1)}
    assert small["probe"]["blocks"]["grown"]["bed"]["probe"].shape == (2, 1)
    without = {name: small[name] for name in ("bank", "seeds")}
    for given in (small, without):
        same(model.apply({**given, "params": params}, X), after)

    @jax.jit
    def learn(small: Any) -> Any:
        def loss(learned: Any) -> Any:
            given = {**small, **learned, "params": params}
            out, new = model.apply(given, X, mutable=["seeds"])
            return jnp.mean((out - Y) ** 2), new

        learned = {name: small[name] for name in ("bank", "probe")}
        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(learned)
        return growth.update({**small, **new}, grads, value)

    learned = learn(small)
    assert jax.tree.map(np.shape, learned) == jax.tree.map(np.shape, small)
    assert learned["seeds"]["blocks"]["grown"]["bed"]["seeds"]["steps"].tolist() == [
        1,
        1,
    ]
    # As in a process that made model and functions anew.
    again = linen_growth(lambda v: model.apply(v, X), variables, optax.adam(0.1))
    _, report = again.tick(small, lambda v: 1.0)
    assert report.layers["blocks/grown[0]"].stage.tolist() == [0, 0, 0]
    small = {**small, "params": params}
    of_small = linen_growth(lambda v: model.apply(v, X), small, optax.adam(0.1))
    start = of_small.init(jax.random.key(0))
    assert jax.tree.map(np.shape, {**small, **start}) == jax.tree.map(np.shape, small)
    with pytest.raises(ValueError, match="are of one stack"):
        growth.shrink(new, {"blocks/grown[0]": 1})


class Bases(nn.Module):
    """Layers whose weights cannot be changed, each for its own reason."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        twice = nn.Dense(6, name="twice")
        x = nn.tanh(twice(x)) + linen.ChunkedLayer(twice, 2, LINEAR, name="of")(x)
        both = nn.Dense(6, name="both")
        for name in ("one", "two"):
            x = linen.ChunkedLayer(both, 2, LINEAR, name=name)(x)
        x = nn.DenseGeneral((1, 6), name="general")(x).reshape(x.shape)
        x = nn.DenseGeneral((2, 3), name="heads")(x).reshape(x.shape)
        x = nn.Dense(6, name="own", dot_general=_dot)(x)
        x = nn.Conv(6, (1,), feature_group_count=2, name="groups")(x[None])[0]
        return nn.Dense(6, name="good")(x)


LINEAR = {"blueprints": (low_rank(),)}


def _dot(*args: Any, **kwargs: Any) -> Any:
    return jax.lax.dot_general(*args, **kwargs)


def test_layers_of_linen_that_take_no_corrections_are_refused() -> None:
    names = ("general", "heads", "own", "groups", "good")
    model = linen.Growable(Bases(), names, 2, LINEAR)
    variables = model.init(jax.random.key(0), X)
    growth = linen_growth(lambda v: model.apply(v, X), variables, optax.sgd(0.1))
    grown, params = growth.init(jax.random.key(1)), variables["params"]
    for layer, weights, message in (
        ("of", params["twice"], "layer 'of': the Dense is also called where nothing"),
        ("two", params["both"], "or grows in two places"),
        ("heads", params["heads"], "grows over all its features; got DenseGeneral"),
        ("own", params["own"], "got Dense, or one with a product of its own"),
        ("groups", params["groups"], "layer 'groups': nothing that grows there"),
    ):
        with pytest.raises(ValueError, match=message):
            growth.fold(grown, {layer: weights})
    for layer in ("good", "general"):
        assert list(growth.fold(grown, {layer: params[layer]})[2]) == [layer]
    with pytest.raises(ValueError, match=r"\['bias'\] must have shape \(1, 6\), as"):
        growth.fold(grown, {"general": {**params["general"], "bias": jnp.ones(6)}})


# --- Shrink: a trial over a frozen host in pure JAX


KERNELS = {
    name: jax.random.normal(jax.random.key(i), (6, 6)) / 2
    for i, name in enumerate(("a", "b"))
}


@functools.cache
def tried() -> Any:
    layer = {"features": 6, "num_seeds": 3, "inputs": 6, "blueprints": [lora(rank=1)]}
    return growth_functions(
        {"a": layer, "b": layer},
        optax.adam(1e-2),
        policy=trial(TrialConfig(ticks=1, budget=12)),
        lifecycle_config=trial_lives(tuning=4),
    )


def outputs(kernels: Any, variables: Any, train: bool = False) -> Any:
    h, seeds = tried().apply(variables, "a", X @ kernels["a"], train, x=X)
    h, given = jnp.tanh(h), {**variables, "seeds": seeds}
    return tried().apply(given, "b", h @ kernels["b"], train, x=h)


def evaluated(variables: Any) -> Any:
    return jnp.mean((outputs(KERNELS, variables)[0] - Y) ** 2)


def stepped(variables: Any) -> Any:
    def loss_fn(learned: Any) -> Any:
        out, seeds = outputs(KERNELS, {**variables, **learned}, True)
        return jnp.mean((out - Y) ** 2), seeds

    learned = {name: variables[name] for name in ("bank", "probe")}
    (loss, seeds), grads = jax.value_and_grad(loss_fn, has_aux=True)(learned)
    return tried().update({**variables, "seeds": seeds}, grads, loss)


step, evaluate = jax.jit(stepped), jax.jit(evaluated)


def ticks(variables: Any, count: int) -> Any:
    for _ in range(count):
        for _ in range(4):
            variables = step(variables)
        variables, report = tried().tick(variables, evaluate)
    return variables, report


@functools.cache
def settled() -> Any:
    variables = tried().init(jax.random.key(0))
    assert tried().shrink(variables) == (variables, {})  # not before the policy says so
    variables, report = ticks(variables, 7)
    assert int(report.reason) == Reason.SETTLED
    return variables


def living(variables: Any, layer: str) -> dict[int, Any]:
    """Bank and moments of what lives, by seed."""
    owner = linen.read_seeds(variables["seeds"][layer]["seeds"]).seed_of_slot
    return {
        int(seed): jax.tree.map(lambda x, k=k: x[k], variables["bank"][layer]["bank"])
        for k, seed in enumerate(owner)
        if seed >= 0
    }


def test_slots_are_given_back_and_the_loop_goes_on() -> None:
    variables = settled()
    steps = step._cache_size()
    out = outputs(KERNELS, variables)[0]
    alive = {name: living(variables, name) for name in KERNELS}
    assert sum(map(len, alive.values())) == 1
    with jax.debug_nans(True):  # NaN is what was not measured
        small, changed = tried().shrink(variables)
    assert changed == {"a": (3, 1), "b": (3, 1)}  # at least one slot stays
    np.testing.assert_allclose(outputs(KERNELS, small)[0], out, rtol=1e-6, atol=1e-6)
    is_same({name: living(small, name) for name in KERNELS}, alive)
    parts = tried().harvest(small, parts="counting")
    h = jnp.tanh(parts["a"](X @ KERNELS["a"], x=X))
    plain = parts["b"](h @ KERNELS["b"], x=h)
    np.testing.assert_allclose(plain, out, rtol=1e-5, atol=1e-6)
    again, none = tried().shrink(small)
    assert again is small
    assert none == {}
    # The very numbers of the loop that kept its slots: adapters are one product over
    # their hidden units, so to rounding.
    gone, told = ticks(small, 3)
    kept, want = ticks(variables, 3)
    for name, layer in told.layers.items():
        np.testing.assert_array_equal(layer.stage, want.layers[name].stage)
        np.testing.assert_allclose(layer.alpha, want.layers[name].alpha)
    np.testing.assert_allclose(float(told.loss), float(want.loss), rtol=1e-5)
    for name in KERNELS:
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
            living(gone, name),
            living(kept, name),
        )
    assert step._cache_size() == steps + 1  # compiled once more
    # Saved, and restored by functions that were made anew, it goes on bit for bit.
    data = serialization.to_bytes(small)
    tried.cache_clear()
    tried()
    step.clear_cache()
    restored = serialization.msgpack_restore(data)
    restored = jax.tree.map(jnp.asarray, restored)
    # The first call for these slots is in a trace.
    with jax.checking_leaks(), jax.debug_nans(True):
        step(restored)
    is_same(ticks(restored, 3)[0], gone)
    assert tried().init(jax.random.key(0))["probe"]["a"]["probe"].shape == (3,)


def test_what_is_left_is_folded_into_the_plain_model() -> None:
    variables = settled()
    ask = {n: commands_for(3, {s: Stage.FOSSILIZED}) for n, s in first_of(variables)}
    for _ in range(9):
        variables, report = tried().tick(variables, evaluate, ask)
        if any(Stage.FOSSILIZED in x.stage for x in report.layers.values()):
            break
    out = np.asarray(outputs(KERNELS, variables)[0])
    new, weights, which = tried().fold(
        variables, {n: {"kernel": kernel} for n, kernel in KERNELS.items()}
    )
    assert sum(map(np.sum, which.values())) == 1
    kernels = {name: of["kernel"] for name, of in weights.items()}
    untouched = next(name for name, of in which.items() if not np.any(of))
    np.testing.assert_array_equal(kernels[untouched], KERNELS[untouched])
    plain = np.tanh(X @ np.float64(kernels["a"])) @ np.float64(kernels["b"])
    assert np.abs(plain - out).max() <= 4e-6 * np.abs(out).max()
    small, changed = tried().shrink(new)
    assert changed == {"a": (3, 1), "b": (3, 1)}
    np.testing.assert_array_equal(
        outputs(kernels, small)[0], outputs(kernels, new)[0]
    )  # nothing lives: the same products


def first_of(variables: Any) -> list[tuple[str, int]]:
    return [(name, seed) for name in KERNELS for seed in living(variables, name)]


def test_capacities_that_do_not_fit_are_refused() -> None:
    variables = settled()
    before = jax.tree.map(np.asarray, variables)
    (name, _), *_ = first_of(variables)
    for capacity, message in (
        (4, "capacity must be .*3"),
        (0, "capacity must be"),
        ({"c": 1}, "capacity: there is no layer 'c'; .*'a', 'b'"),
        ({name: True}, "capacity must be"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            tried().shrink(variables, capacity)
    with pytest.raises(ValueError, match="shrink must be called between steps"):
        jax.jit(lambda v: tried().shrink(v))(variables)
    small, changed = tried().shrink(variables, {name: 2})
    assert changed == {name: (3, 2)}
    with pytest.raises(ValueError, match=r"at most 2, the slots that it has.*got 3"):
        tried().shrink(small, {name: 3})
    is_same(jax.tree.map(np.asarray, variables), before)
    start, _ = tried().tick(tried().init(jax.random.key(1)), evaluate)
    with pytest.raises(ValueError, match="lose a living seed"):
        tried().shrink(start, 1)


def test_collections_that_do_not_belong_together_are_refused() -> None:
    variables = settled()
    small, _ = tried().shrink(variables)
    for name in ("bank", "seeds", "probe"):
        mixed = {**small, name: variables[name]}
        for call in (
            lambda v: tried().apply(v, "a", X, x=X),
            lambda v: tried().tick(v, evaluate),
            tried().shrink,
            tried().harvest,
        ):
            with pytest.raises(ValueError, match=rf"layer 'a' .*one number.*{name} 3"):
                call(mixed)
    with pytest.raises(ValueError, match="of the collection growth must have shape"):
        tried().tick({**small, "growth": variables["growth"]}, evaluate)
    with pytest.raises(ValueError, match="grads must be of as many slots"):
        tried().update(small, variables)


def test_layers_of_one_shape_may_part_and_meet_again() -> None:
    """What is remembered is kept by groups of layers, of which there are more then."""
    variables = settled()
    (name, _), *_ = first_of(variables)
    apart, _ = tried().shrink(variables, {name: 2})
    apart, _ = ticks(apart, 1)
    whole, _ = ticks(variables, 1)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(near, living(apart, name), living(whole, name))
    (both, _), (at_once, _) = (tried().shrink(v, 1) for v in (apart, whole))
    assert jax.tree.structure(both) == jax.tree.structure(at_once)
    assert jax.tree.map(np.shape, both) == jax.tree.map(np.shape, at_once)
    jax.tree.map(near, living(both, name), living(at_once, name))
