"""Models and loops as people write them, grown by `Growth` until a seed is kept.

The model, the loss, the batches and the optimizer are the user's; the loop has the
lines that the docstring of `Growth` adds and no others.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from esper_jax import (
    ChunkedLayer,
    ControllerConfig,
    GraftConfig,
    Growth,
    LifecycleConfig,
    SeedBed,
    Stage,
    make_growable,
)
from esper_jax.blueprints import Custom
from esper_jax.monitor.words import why
from esper_jax.policy.interface import SAMPLED
from esper_jax.policy.memory import Reason

QUICK = LifecycleConfig(
    min_epochs=(0, 0, 1, 1, 1, 1, 1, 0, 1, 0, 1),
    reconstruction_threshold=1e9,
    min_stability=-1e9,
    min_improvement=-1e9,
    min_final_stability=-1e9,
    cull_delta=-1e9,
    grafting=GraftConfig(ramp_duration=1),
)
POLICY = ControllerConfig(
    when="period", period=1, births=1, max_training=1, keep_tolerance=1e6
)
ROWS, WIDTH, CLASSES = 16, 4, 3
HIDDEN, SEEDS = 8, 2
STEPS, TICKS = 5, 10
"""Steps a tick, and the ticks after which a seed must have been kept."""
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class Kind(NamedTuple):
    """A model with what its user brings."""

    model: Any
    layer: str
    loss: Callable[[Any, Any], Any]
    """``loss(model, batch)``, or with ``aux`` ``(loss, aux)``."""
    batch: Any
    held_out: Callable[[Any], Any] | None = None
    """Held-out loss of a model; by default ``loss`` on the batch."""
    wrt: Any = nnx.Param
    optimizer: optax.GradientTransformation = optax.sgd(1e-2)
    aux: bool = False
    options: Mapping[str, Any] = MappingProxyType({})
    """Of `make_growable`."""
    policy: ControllerConfig = POLICY
    gates: LifecycleConfig = QUICK


def rows(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def products(x: np.ndarray) -> np.ndarray:
    """Labels that no linear map of ``x`` gives: a layer gains by growing."""
    return np.argmax(x[..., :CLASSES] * x[..., 1 : CLASSES + 1], -1).astype(np.int32)


X = rows(ROWS, WIDTH)
Y = products(X)
PAIR = (X, Y)


class Layers(nnx.Module):
    """Layers ``a`` and ``b`` with nothing between them that a seed could not be."""

    def __init__(self, a: Any = None, b: Any = None) -> None:
        self.a = a or nnx.Linear(WIDTH, HIDDEN, rngs=nnx.Rngs(0))
        self.b = b or nnx.Linear(HIDDEN, CLASSES, rngs=nnx.Rngs(1))

    def __call__(self, x: Any) -> Any:
        return self.b(self.a(x))


def pair_loss(model: Any, batch: Any) -> Any:
    x, y = batch
    return cross_entropy(model(x), y).mean()


def tuple_output() -> Kind:
    class Attention(nnx.Module):
        def __init__(self) -> None:
            self.projection = nnx.Linear(WIDTH, HIDDEN, rngs=nnx.Rngs(0))

        def __call__(self, x: Any, cache: Any = None) -> tuple[Any, Any]:
            return self.projection(x), cache

    class Net(Layers):
        def __call__(self, x: Any) -> Any:
            h, _ = self.a(x)
            return self.b(h)

    return Kind(Net(Attention()), "a", pair_loss, PAIR, options={"features": HIDDEN})


def dictionary_output() -> Kind:
    class Encoder(nnx.Module):
        def __init__(self) -> None:
            self.projection = nnx.Linear(WIDTH, HIDDEN, rngs=nnx.Rngs(0))

        def __call__(self, x: Any) -> dict[str, Any]:
            return {"norm": jnp.sum(x**2), "hidden": self.projection(x)}

    class Net(Layers):
        def __call__(self, x: Any) -> Any:
            return self.b(self.a(x)["hidden"])

    options = {"features": HIDDEN, "output": lambda out: out["hidden"]}
    return Kind(Net(Encoder()), "a", pair_loss, PAIR, options=options)


def dictionary_batch() -> Kind:
    def loss(model: Any, batch: Any) -> Any:
        return cross_entropy(model(batch["image"]), batch["label"]).mean()

    return Kind(Layers(), "a", loss, {"image": X, "label": Y})


def masked_tokens() -> Kind:
    def loss(model: Any, batch: Any) -> Any:
        x, y, mask = batch
        return jnp.sum(cross_entropy(model(x), y) * mask) / jnp.sum(mask)

    x = rows(4, 6, WIDTH)
    mask = np.arange(6) < np.array([[6], [2], [4], [5]])
    return Kind(Layers(), "a", loss, (x, products(x), mask))


def raw_scan_over_time() -> Kind:
    class Recurrent(nnx.Module):
        def __init__(self) -> None:
            self.cell = nnx.Linear(WIDTH + HIDDEN, HIDDEN, rngs=nnx.Rngs(0))
            self.readout = nnx.Linear(HIDDEN, CLASSES, rngs=nnx.Rngs(1))

        def __call__(self, x: Any) -> Any:
            def step(carry: Any, now: Any) -> Any:
                carry = jnp.tanh(self.cell(jnp.concatenate([now, carry], -1)))
                return carry, carry

            start = jnp.zeros((x.shape[0], HIDDEN))
            _, out = jax.lax.scan(step, start, jnp.swapaxes(x, 0, 1))
            return self.readout(jnp.swapaxes(out, 0, 1))

    x = rows(4, 6, WIDTH)
    kind = Kind(Recurrent(), "cell", pair_loss, (x, products(x)))
    # What cannot be measured in a raw scan must not be asked for.
    return kind._replace(
        policy=dataclasses.replace(POLICY, where="round_robin"),
        gates=dataclasses.replace(QUICK, reconstruction_threshold=math.inf),
    )


def batch_norm_and_dropout() -> Kind:
    class Net(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0, dropout=1)
            self.a = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
            self.norm = nnx.BatchNorm(HIDDEN, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)
            self.b = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.b(self.dropout(self.norm(self.a(x))))

    def held_out(model: Any) -> Any:
        view = nnx.view(model, deterministic=True, use_running_average=True)
        return pair_loss(view, PAIR)

    return Kind(Net(), "a", pair_loss, PAIR, held_out)


def tied_embeddings() -> Kind:
    class Net(nnx.Module):
        def __init__(self) -> None:
            self.embed = nnx.Embed(10, HIDDEN, rngs=nnx.Rngs(0))
            self.mlp = nnx.Linear(HIDDEN, HIDDEN, rngs=nnx.Rngs(1))

        def __call__(self, tokens: Any) -> Any:
            return self.embed.attend(self.mlp(self.embed(tokens)))

    tokens = np.random.default_rng(0).integers(10, size=(4, 6))
    return Kind(Net(), "embed", pair_loss, (tokens, (tokens * 7 + 3) % 10))


def vae_with_noise() -> Kind:
    class VAE(nnx.Module):
        def __init__(self) -> None:
            self.encoder = nnx.Linear(WIDTH, HIDDEN, rngs=nnx.Rngs(0))
            self.decoder = nnx.Linear(HIDDEN // 2, WIDTH, rngs=nnx.Rngs(1))

        def __call__(self, x: Any, key: Any) -> Any:
            mean, logvar = jnp.split(self.encoder(x), 2, -1)
            noise = jax.random.normal(key, mean.shape)
            return self.decoder(mean + jnp.exp(logvar / 2) * noise), mean, logvar

    def loss(model: Any, batch: Any) -> Any:
        x, key = batch
        out, mean, logvar = model(x, key)
        kl = -0.5 * jnp.sum(1 + logvar - mean**2 - jnp.exp(logvar), -1)
        return jnp.mean(jnp.sum((out - x) ** 2, -1) + 1e-2 * kl)

    return Kind(VAE(), "encoder", loss, (X, jax.random.key(3)))


def graph() -> Kind:
    class Convolution(nnx.Module):
        def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs) -> None:
            self.linear = nnx.Linear(inputs, outputs, rngs=rngs)

        def __call__(self, x: Any, edges: Any) -> Any:
            sources, targets = edges
            messages = self.linear(x)[sources]
            return jax.ops.segment_sum(messages, targets, x.shape[0])

    class Net(nnx.Module):
        def __init__(self) -> None:
            self.a = Convolution(WIDTH, HIDDEN, nnx.Rngs(0))
            self.b = Convolution(HIDDEN, CLASSES, nnx.Rngs(1))

        def __call__(self, x: Any, edges: Any) -> Any:
            return self.b(self.a(x, edges), edges)

    def loss(model: Any, batch: Any) -> Any:
        logits = model(batch["nodes"], batch["edges"])
        return jnp.mean(cross_entropy(logits, batch["labels"]) * batch["seen"])

    ring = np.stack([np.arange(ROWS), (np.arange(ROWS) + 1) % ROWS])
    edges = np.concatenate([ring, ring[:, :5] * 0 + np.arange(5)], 1)
    batch = {"nodes": X, "edges": edges, "labels": Y, "seen": np.arange(ROWS) < 12}
    return Kind(Net(), "a", loss, batch, options={"features": HIDDEN})


def scanned_stack() -> Kind:
    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.mlp = nnx.Linear(HIDDEN, HIDDEN, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return x + self.mlp(x)

    class Net(nnx.Module):
        def __init__(self) -> None:
            @nnx.split_rngs(splits=2)
            @nnx.vmap
            def make(rngs: nnx.Rngs) -> Block:
                return Block(rngs)

            self.embed = nnx.Linear(WIDTH, HIDDEN, rngs=nnx.Rngs(0))
            self.blocks = make(nnx.Rngs(1))
            self.readout = nnx.Linear(HIDDEN, CLASSES, rngs=nnx.Rngs(2))

        def __call__(self, x: Any) -> Any:
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            def run(block: Any, x: Any) -> Any:
                return block(x)

            return self.readout(run(self.blocks, self.embed(x)))

    return Kind(Net(), "blocks/mlp", pair_loss, PAIR, options={"stack": 2})


class Weight(nnx.Variable):
    """A variable type of the user's own."""


def own_variables() -> Kind:
    class Dense(nnx.Module):
        def __init__(self, key: Any, inputs: int, outputs: int) -> None:
            self.w = Weight(jax.random.normal(key, (inputs, outputs)) / 2)

        def __call__(self, x: Any) -> Any:
            return x @ self.w[...]

    keys = jax.random.split(jax.random.key(0))
    model = Layers(Dense(keys[0], WIDTH, HIDDEN), Dense(keys[1], HIDDEN, CLASSES))
    options = {"features": HIDDEN}
    return Kind(model, "a", pair_loss, PAIR, wrt=Weight, options=options)


def is_bare_array(path: Any, leaf: Any) -> bool:
    return not isinstance(leaf, nnx.Variable)


def bare_arrays() -> Kind:
    class Dense(nnx.Module):
        def __init__(self, key: Any, inputs: int, outputs: int) -> None:
            self.w = jax.random.normal(key, (inputs, outputs)) / 2

        def __call__(self, x: Any) -> Any:
            return x @ self.w

    keys = jax.random.split(jax.random.key(0))
    model = Layers(Dense(keys[0], WIDTH, HIDDEN), Dense(keys[1], HIDDEN, CLASSES))
    options = {"features": HIDDEN}
    return Kind(model, "a", pair_loss, PAIR, wrt=is_bare_array, options=options)


def lora_beside_a_frozen_host() -> Kind:
    lora = nnx.LoRALinear(WIDTH, HIDDEN, lora_rank=2, rngs=nnx.Rngs(0))
    return Kind(Layers(lora), "a", pair_loss, PAIR, wrt=nnx.LoRAParam)


def frozen_host() -> Kind:
    return Kind(Layers(), "a", pair_loss, PAIR, wrt=None)


def residual_convolutions() -> Kind:
    class Net(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.stem = nnx.Conv(1, HIDDEN, (3, 3), rngs=rngs)
            self.conv = nnx.Conv(HIDDEN, HIDDEN, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(HIDDEN, rngs=rngs)
            self.readout = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = self.stem(x)
            x = x + self.conv(nnx.relu(self.norm(x)))
            return self.readout(x.mean((1, 2)))

    images = rows(ROWS, 4, 4, 1)
    labels = np.argmax(images[:, 0, :3, 0] * images[:, 1, 1:, 0], -1)
    return Kind(Net(), "conv", pair_loss, (images, labels))


def several_inputs() -> Kind:
    class Net(Layers):
        def __call__(self, x: Any, *, bias: Any) -> Any:
            return self.b(self.a(x)) + bias

    def loss(model: Any, batch: Any) -> Any:
        inputs, y = batch
        return cross_entropy(model(inputs["x"], bias=inputs["bias"]), y).mean()

    inputs = {"x": X, "bias": rows(ROWS, CLASSES, seed=1) / 10}
    return Kind(Net(), "a", loss, (inputs, Y))


def loss_with_aux() -> Kind:
    def loss(model: Any, batch: Any) -> Any:
        x, y = batch
        logits = model(x)
        return cross_entropy(logits, y).mean(), {"logits": logits}

    def held_out(model: Any) -> Any:
        value, aux = loss(model, PAIR)
        return value, jnp.mean(aux["logits"].argmax(-1) == Y)

    return Kind(Layers(), "a", loss, PAIR, held_out, aux=True)


def rngs_of_the_call() -> Kind:
    class Net(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nnx.Dropout(0.1)

        def __call__(self, x: Any, *, rngs: nnx.Rngs) -> Any:
            return self.b(self.dropout(self.a(x), rngs=rngs))

    def loss(model: Any, batch: Any) -> Any:
        x, y, key = batch
        return cross_entropy(model(x, rngs=nnx.Rngs(dropout=key)), y).mean()

    def held_out(model: Any) -> Any:
        model.eval()
        return loss(model, (X, Y, jax.random.key(0)))

    return Kind(Net(), "a", loss, (X, Y, jax.random.key(1)), held_out)


def optimizer_of_many_parts() -> Kind:
    steps = optax.MultiSteps(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2), optax.ema(0.9)),
        every_k_schedule=2,
    )
    return Kind(
        Layers(), "a", pair_loss, PAIR, optimizer=steps.gradient_transformation()
    )


def nnx_loop(kind: Kind, model: Any, growth: Growth, losses: list[float]) -> Any:
    """The loop of the docstring: `nnx.jit` and `nnx.Optimizer`."""
    optimizer = nnx.Optimizer(
        model, kind.optimizer, wrt=nnx.Nothing() if kind.wrt is None else kind.wrt
    )
    traces = []

    @nnx.jit
    def train_step(model: Any, optimizer: Any, growth: Growth, batch: Any) -> Any:
        traces.append(1)
        value, grads = nnx.value_and_grad(
            kind.loss, argnums=growth.argnums, has_aux=kind.aux
        )(model, batch)
        loss = value[0] if kind.aux else value
        optimizer.update(model, grads)
        growth.update(model, grads, loss=loss)
        return loss

    def run() -> None:
        for _ in range(STEPS):
            losses.append(train_step(model, optimizer, growth, kind.batch))

    return run, traces


def jax_loop(kind: Kind, model: Any, growth: Growth, losses: list[float]) -> Any:
    """`jax.jit` on split states, with plain optax."""
    wrt = nnx.Nothing() if kind.wrt is None else kind.wrt
    moments = kind.optimizer.init(nnx.state(model, wrt))
    traces = []
    graph = nnx.graphdef((model, growth))

    @jax.jit
    def train_step(state: Any, moments: Any, batch: Any) -> Any:
        traces.append(1)
        model, growth = nnx.merge(graph, state)
        value, grads = nnx.value_and_grad(
            kind.loss, argnums=growth.argnums, has_aux=kind.aux
        )(model, batch)
        loss = value[0] if kind.aux else value
        host = nnx.filter_state(grads, wrt)
        updates, moments = kind.optimizer.update(host, moments, nnx.state(model, wrt))
        nnx.update(model, optax.apply_updates(nnx.state(model, wrt), updates))
        growth.update(model, grads, loss=loss)
        return nnx.state((model, growth)), moments, loss

    def run() -> None:
        nonlocal moments
        state = nnx.state((model, growth))
        for _ in range(STEPS):
            state, moments, loss = train_step(state, moments, kind.batch)
            losses.append(loss)
        nnx.update((model, growth), state)

    return run, traces


NNX = [
    tuple_output,
    dictionary_output,
    dictionary_batch,
    masked_tokens,
    raw_scan_over_time,
    batch_norm_and_dropout,
    vae_with_noise,
    scanned_stack,
    own_variables,
    lora_beside_a_frozen_host,
    frozen_host,
    residual_convolutions,
    loss_with_aux,
    rngs_of_the_call,
    optimizer_of_many_parts,
]
JAX = [tied_embeddings, graph, bare_arrays, several_inputs]


@pytest.mark.filterwarnings("ignore:Embed.attend is a method:UserWarning")
@pytest.mark.parametrize(
    ("kind", "loop"),
    [
        *(pytest.param(kind, nnx_loop, id=kind.__name__) for kind in NNX),
        *(pytest.param(kind, jax_loop, id=kind.__name__) for kind in JAX),
    ],
)
def test_grows_in_a_loop_of_ones_own(kind: Any, loop: Any) -> None:
    kind = kind()
    model, layer = kind.model, kind.layer
    before = kind.loss(nnx.clone(model), kind.batch)
    assert make_growable(model, layer, SEEDS, rngs=nnx.Rngs(5), **kind.options)
    after = kind.loss(nnx.clone(model), kind.batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), after, before
    )
    growth = Growth(
        model,
        optax.adam(2e-2),
        wrt=kind.wrt,
        lifecycle_config=kind.gates,
        controller_config=kind.policy,
    )
    losses: list[Any] = []
    run, traces = loop(kind, model, growth, losses)
    held_out = kind.held_out or (lambda model: kind.loss(model, kind.batch))
    evaluate = nnx.jit(held_out)
    start = nnx.to_pure_dict(nnx.state(model))
    for tick in range(TICKS):
        run()
        report = growth.tick(model, evaluate)
        np.testing.assert_allclose(
            report.train_loss, np.mean(losses[-STEPS:]), rtol=1e-5
        )
        assert int(report.tick) == tick + 1
        stages = np.concatenate([x.stage for x in report.layers.values()])
        if Stage.FOSSILIZED in stages:
            break
    assert Stage.FOSSILIZED in stages, [Stage(s).name for s in stages]
    assert len(traces) == 1, "growth made the step compile again"
    grown = without_growth_loss(model, held_out)
    full = np.ravel(jax.tree.leaves(evaluate(model)))[0]
    assert full != grown, "the fossil must count in the output"
    trained_as_asked(model, start, kind.wrt)


def without_growth_loss(model: Any, held_out: Any) -> float:
    copy = nnx.clone(model)
    copy.set_attributes(ChunkedLayer, enabled=False)
    copy.set_attributes(SeedBed, deterministic=True)
    return float(np.ravel(jax.tree.leaves(held_out(copy)))[0])


def trained_as_asked(model: Any, start: Any, wrt: Any) -> None:
    """What ``wrt`` names has changed; every other parameter of the host has not."""
    trained = nnx.filterlib.to_predicate(nnx.Nothing() if wrt is None else wrt)
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    first = {
        path: value
        for path, value in nnx.traversals.flatten_mapping(start).items()
        if path in flat
    }
    seen = 0
    for path, leaf in flat.items():
        value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        if trained(path, leaf):
            seen += 1
            assert np.any(np.asarray(value) != np.asarray(first[path])), path
        elif isinstance(leaf, nnx.Param | Weight):
            np.testing.assert_array_equal(value, first[path])
    assert seen or wrt is None


def test_a_raw_scan_measures_nothing_and_the_report_says_so() -> None:
    kind = raw_scan_over_time()
    make_growable(kind.model, kind.layer, SEEDS, rngs=nnx.Rngs(5))
    growth = Growth(
        kind.model,
        optax.adam(2e-2),
        lifecycle_config=kind.gates,
        controller_config=dataclasses.replace(POLICY, where="health"),
    )
    nnx_loop(kind, kind.model, growth, [])[0]()
    report = growth.tick(kind.model, lambda model: kind.loss(model, kind.batch))
    layer = report.layers[kind.layer]
    assert report.reason == Reason.UNMEASURED
    assert np.all(layer.stage == Stage.DORMANT)
    assert np.isnan(kind.model.cell.bed.seeds.get_value().health).all()
    assert "'round_robin'" in why(report.reason)


def test_own_variables_are_measured_as_parameters_are() -> None:
    kind = own_variables()
    model = kind.model
    make_growable(model, "a", SEEDS, rngs=nnx.Rngs(5), **kind.options)
    growth = Growth(model, optax.adam(2e-2), wrt=Weight, measure=SAMPLED)
    for _ in range(2):
        grads = nnx.grad(kind.loss, argnums=growth.argnums)(model, kind.batch)
        growth.update(model, grads)
    report = growth.tick(model, lambda model: kind.loss(model, kind.batch))
    signals = report.layers["a"].signals
    host = [grads[name]["w"] for name in ("b",)] + [grads["a"]["base"]["w"]]
    np.testing.assert_allclose(
        signals.grad_norm, optax.tree.norm([g[...] for g in host]), rtol=1e-5
    )
    assert np.isfinite(signals.drift).all()
    assert np.isfinite(signals.chunk_gradient).all()


def test_parameters_of_a_blueprint_keep_their_values_whatever_their_names() -> None:
    def init(key: Any, width: int) -> Any:
        return {"a_b": jnp.zeros(width), "a": {"b": jnp.ones(width)}}

    def apply(p: Any, y: Any) -> Any:
        return p["a_b"] * p["a"]["b"] * y

    model: Any = Layers()
    gate = Custom(name="gate", init=init, apply=apply)
    make_growable(model, "a", SEEDS, blueprints=[gate], rngs=nnx.Rngs(5))
    names = model.a.bed.bank.names
    assert len(set(names)) == len(names)
    bank = model.a.bed.bank.get_value()
    assert any(x.size and np.all(x == 1) for x in jax.tree.leaves(bank))
