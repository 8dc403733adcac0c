"""`HybridLayer`: plain and chunked behind one call, switched both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from openfeature import api
from test_harvest import X, fossils, grow, same_bits

from esper_jax import Growth, harvest
from esper_jax.checkpoint import Checkpointer
from esper_jax.layers.chunked import ChunkedLayer
from esper_jax.layers.corrections import CorrectedLayer
from esper_jax.rollout import FlagFile, HybridLayer
from esper_jax.rollout.provider import DOMAIN, FlagFileProvider


@pytest.fixture
def file(tmp_path):
    """A flag at 50 percent. By SHA-256, ``m66`` is number 21 and ``m91`` number 79."""
    path = tmp_path / "features.toml"
    path.write_text("[chunked_layers]\nrollout_percentage = 50\n")
    api.set_provider_and_wait(FlagFileProvider(path), DOMAIN)
    yield FlagFile(path)
    api.clear_providers()


class Net(nnx.Module):
    def __init__(self, model_id="m66"):
        rngs = nnx.Rngs(0)
        self.layer = HybridLayer(
            nnx.Linear(6, 11, rngs=rngs), 4, model_id=model_id, rngs=rngs
        )
        self.head = nnx.Linear(11, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.layer(x)))


def test_a_flag_chooses_by_model_and_can_be_asked_again(file):
    assert Net("m66").layer.enabled
    layer = Net("m91").layer
    assert not layer.enabled
    file.roll_out("chunked_layers", 80)
    assert layer.choose("m91") is layer.enabled is True
    file.roll_out("chunked_layers", 0)
    assert layer.choose("m91") is layer.enabled is False


def test_a_plain_call_is_the_base_to_the_bit_and_compare_measures_both(file):
    layer = Net().layer
    grow(layer.bed, fossils("residual_mlp", "residual_mlp"))
    base = nnx.jit(layer.base)(X)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer)))
    apart = np.abs(np.float64(nnx.jit(layer)(X)) - np.float64(base)).max()
    assert apart > 0.01
    for enabled in (True, False):
        layer.enabled = enabled
        found = layer.compare(X, repeats=3)
        assert found.difference == pytest.approx(apart, rel=1e-6)
        assert found.plain_seconds > 0
        assert found.chunked_seconds > 0
        assert "largest difference" in str(found)
        assert layer.enabled is enabled
    same_bits(nnx.jit(layer)(X), base)
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer)))
    jax.tree.map(np.testing.assert_array_equal, after, before)  # nothing is recorded


def test_outputs_that_are_not_finite_are_compared_as_they_are(file):
    layer = Net().layer
    assert (
        layer.compare(X.at[0].set(jnp.nan) if hasattr(X, "at") else X).difference == 0
    )
    broken = np.array(X)
    broken[0, 0], broken[1, 0] = np.nan, np.inf
    assert layer.compare(broken, repeats=1).difference == 0
    grow(layer.bed, fossils("residual_mlp"))
    # The row of the infinity gets a NaN from the fossil alone.
    assert np.isnan(layer.compare(broken, repeats=1).difference)


def test_compare_refuses_what_it_cannot_measure(file):
    layer = Net().layer
    for repeats in (0, True, 2.5):
        with pytest.raises(ValueError, match="repeats must be an int of at least 1"):
            layer.compare(X, repeats=repeats)
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lambda x: layer.compare(x).difference)(X)


@pytest.fixture
def loop(file):
    """A model that trains beside growth, its step, and how often that was traced."""
    model = Net()
    grow(model.layer.bed, fossils("residual_mlp"))
    growth = Growth(model, optax.adam(1e-3))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    traced = []

    @nnx.jit
    def step(model, optimizer, growth, x):
        traced.append(model.layer.enabled)
        loss, grads = nnx.value_and_grad(
            lambda model, x: jnp.mean(model(x) ** 2), argnums=growth.argnums
        )(model, x)
        optimizer.update(model, grads)
        growth.update(model, grads, loss=loss)
        return loss

    return model, optimizer, growth, step, traced


def test_a_live_model_is_switched_both_ways_while_it_trains(loop):
    model, optimizer, growth, step, traced = loop
    bank = jax.tree.map(np.asarray, model.layer.bed.bank.get_value())
    losses = []
    for enabled in (True, False, True, False):
        model.set_attributes(HybridLayer, enabled=enabled)
        expected = jnp.mean(nnx.jit(model)(X) ** 2)
        losses.append(step(model, optimizer, growth, X))
        np.testing.assert_allclose(losses[-1], expected, rtol=1e-6)
    assert traced == [True, False]  # one program each, whatever the order
    # The host has learned both ways; the fossil is frozen and as it was.
    same = jax.tree.map(np.array_equal, bank, model.layer.bed.bank.get_value())
    assert all(jax.tree.leaves(same))
    assert type(harvest(model).layer) is nnx.Linear
    model.layer.enabled = True
    assert type(harvest(model).layer) is CorrectedLayer


def test_a_checkpoint_of_one_is_restored_by_the_other(loop, tmp_path):
    model, optimizer, growth, step, _ = loop
    step(model, optimizer, growth, X)
    chunked = nnx.jit(model)(X)
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, growth.run_state(model, optimizer))
        fresh = Net("m91")
        assert not fresh.layer.enabled
        other = Growth(fresh, optax.adam(1e-3))
        its = nnx.Optimizer(fresh, optax.adam(1e-2), wrt=nnx.Param)
        state = checkpoints.restore(other.run_state(fresh, its)).state
        other.go_on(state, fresh, its)
    model.layer.enabled = False
    same_bits(nnx.jit(fresh)(X), nnx.jit(model)(X))
    fresh.layer.enabled = True
    same_bits(nnx.jit(fresh)(X), chunked)


def test_it_is_a_chunked_layer_in_all_else(file):
    model = Net()
    assert isinstance(model.layer, ChunkedLayer)
    assert model.layer.kernel.shape == (6, 11)
    with pytest.raises(TypeError, match="features must be given"):
        HybridLayer(lambda x: x, 4, model_id=None, rngs=nnx.Rngs(0))
