"""The hosts beside the MLP: what they compute, and that they learn and grow."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from esper_jax.hosts import CharMLP, ConvNet
from esper_jax.layers.bed import BlueprintParam
from esper_jax.layers.chunked import ChunkedLayer
from esper_jax.lifecycle.stages import Stage
from esper_jax.policy.config import ControllerConfig
from esper_jax.train.loop import fit
from esper_jax.train.program import build

CHANNELS, STRIDES, SAMPLES = (4, 6), (1, 2), 11


def convnet(channels=CHANNELS, strides=STRIDES, kernel=5):
    return ConvNet(
        channels,
        3,
        strides=strides,
        kernel=kernel,
        num_seeds=2,
        activation="tanh",
        rngs=nnx.Rngs(0),
    )


@nnx.jit
def charmlp():
    return CharMLP(7, 3, 2, (5,), num_seeds=2, activation="tanh", rngs=nnx.Rngs(0))


# Under jit what a model is made of compiles as one program.
jitted_convnet = nnx.jit(convnet, static_argnums=(0, 1, 2))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def flax_convnet(model, x, kernel):
    """The same network out of `nnx.Conv` with the same weights."""
    y = x[..., None]
    for layer, stride in zip(model.layers, STRIDES, strict=True):
        weights = layer.base.linear.linear
        outputs = weights.bias.shape[0]
        inputs = weights.kernel.shape[0] // kernel
        before = (kernel - 1) // 2
        conv = nnx.Conv(
            inputs,
            outputs,
            (kernel,),
            strides=stride,
            padding=[(before, kernel - 1 - before)],
            rngs=nnx.Rngs(1),
        )
        conv.kernel.set_value(weights.kernel.reshape(kernel, inputs, outputs))
        conv.bias.set_value(weights.bias.get_value())
        y = jnp.tanh(conv(y))
    return model.readout(y.mean(axis=1))


@pytest.mark.parametrize("kernel", [5, 4])
def test_a_convnet_computes_what_flax_convolutions_do(kernel):
    model = jitted_convnet(CHANNELS, STRIDES, kernel)
    for layer in model.layers:
        bias = layer.base.linear.linear.bias
        bias.set_value(jnp.asarray(draw(*bias.shape, seed=2)))

    @nnx.jit
    def both(model, x):
        return model(x), flax_convnet(model, x, kernel)

    logits, expected = both(model, draw(8, SAMPLES))
    assert logits.shape == (8, 3)
    np.testing.assert_allclose(logits, expected, atol=1e-6)


def test_a_charmlp_computes_what_numpy_does():
    model = charmlp()
    x = np.random.default_rng(0).integers(0, 7, (8, 3)).astype(np.int32)
    hidden, readout = model.mlp.layers[0].base.linear, model.mlp.readout
    embedded = np.asarray(model.embed.embedding)[x].reshape(8, 6)
    y = np.tanh(embedded @ np.asarray(hidden.kernel) + np.asarray(hidden.bias))
    logits = model(x)
    assert logits.shape == (8, 7)
    expected = y @ np.asarray(readout.kernel) + np.asarray(readout.bias)
    np.testing.assert_allclose(logits, expected, atol=1e-6)


def host_gradients(model, x, y):
    """By path, of a cross-entropy, without the banks."""
    graph, host, rest = nnx.split(
        model, nnx.All(nnx.Param, nnx.Not(BlueprintParam)), ...
    )

    @jax.jit
    @jax.grad
    def gradients(host):
        logits = nnx.merge(graph, host, rest, copy=True)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return dict(nnx.to_flat_state(gradients(host)))


def test_gradients_reach_every_weight_of_a_convnet():
    x, y = draw(8, SAMPLES), np.arange(8) % 3
    found = host_gradients(jitted_convnet(CHANNELS, STRIDES, 5), x, y)
    assert len(found) == 2 * 3  # two layers and the readout, a kernel and a bias each
    for path, gradient in found.items():
        assert np.all(gradient.get_value() != 0), path


def test_gradients_reach_the_characters_that_were_read():
    x = np.array([[0, 1, 2], [2, 5, 0]], np.int32)
    found = host_gradients(charmlp(), x, np.array([1, 3]))
    assert len(found) == 1 + 2 * 2
    embedding = found.pop(("embed", "embedding")).get_value()
    read = np.isin(np.arange(7), x)
    np.testing.assert_array_equal(np.any(embedding != 0, axis=1), read)
    for path, gradient in found.items():
        assert np.all(gradient.get_value() != 0), path


@pytest.mark.parametrize(
    ("model", "widths"),
    [
        (lambda: jitted_convnet(CHANNELS, STRIDES, 5), CHANNELS),
        (lambda: charmlp().mlp, (5,)),
    ],
    ids=["convnet", "charmlp"],
)
def test_every_hidden_layer_can_grow(model, widths):
    layers = model().layers
    assert all(isinstance(layer, ChunkedLayer) for layer in layers)
    assert tuple(layer.bed.layout.features for layer in layers) == widths


def test_strides_must_match_the_layers():
    with pytest.raises(ValueError, match=r"strides .*2 layers, got \(1,\)"):
        ConvNet((4, 6), 3, strides=(1,), num_seeds=2, rngs=nnx.Rngs(0))


def test_a_seed_does_the_same_at_every_position():
    """A blueprint that counts adds to each position what it makes of it alone."""
    model = jitted_convnet(CHANNELS, STRIDES, 5)
    bed = model.layers[0].bed
    living = bed.seeds.get_value()
    living = living.replace(
        stage=living.stage.at[1].set(int(Stage.FOSSILIZED)),
        slot_of_seed=living.slot_of_seed.at[1].set(0),
        seed_of_slot=living.seed_of_slot.at[0].set(1),
        blueprint=living.blueprint.at[1].set(0),
    )
    bed.seeds.set_value(living)
    bank = bed.bank.get_value()
    bank = bank.replace(w2=jnp.asarray(draw(*bank.w2.shape)))
    bed.bank.set_value(bank)
    y = draw(2, SAMPLES, 4)
    grow = nnx.jit(lambda bed, y: bed(y))
    out = np.asarray(grow(bed, y))
    alone = np.asarray(grow(bed, y.reshape(-1, 4))).reshape(y.shape)
    np.testing.assert_array_equal(out[..., :2], y[..., :2])
    assert np.all(out[..., 2:] != y[..., 2:])
    np.testing.assert_allclose(out, alone, atol=1e-6)


def test_a_convnet_learns_and_grows():
    x = draw(64, SAMPLES)
    data = x, (x[:, 3] > 0).astype(np.int32)
    program = build(
        jitted_convnet((4,), (2,), 5),
        optax.adam(3e-2),
        optax.adam(1e-3),
        controller_config=ControllerConfig(when="period", period=1),
    )
    reports = []
    fit(
        program,
        program.init(jax.random.key(0)),
        data,
        data,
        ticks=3,
        batch_size=16,
        on_tick=lambda state, report: reports.append(report),
    )
    first, _, last = reports
    assert last.loss < first.loss
    stages = last.layers["layers/0"].stage
    assert sorted(stages) == [Stage.DORMANT, Stage.TRAINING]
