"""A loop that was not changed trains as before, though its model can now grow.

Without jit, every operation of the host is the same, and so is every bit. Under jit XLA
may fuse the host's part in another way, which rounds otherwise by some units in the
last place.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from esper_jax import make_growable


class CNN(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.hidden = nnx.Linear(8, 8, rngs=rngs)
        self.readout = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        return self.readout(nnx.relu(self.hidden(x)))


RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 6, 6, 1)).astype(np.float32)
Y = RNG.integers(3, size=12)


def loss_fn(model: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(model(X), Y).mean()


def train_step(model: Any, optimizer: nnx.Optimizer) -> Any:
    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def trained(
    tx: optax.GradientTransformation,
    steps: int,
    *,
    growable: bool,
    optimizer_first: bool = False,
    step: Callable[[Any, nnx.Optimizer], Any] = train_step,
) -> tuple[dict[str, np.ndarray], list[float]]:
    """The host's variables by their paths in the plain model, and the losses."""
    model = CNN()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param) if optimizer_first else None
    if growable:
        layers = ["conv", "hidden"]
        make_growable(model, layers, 4, optimizer=optimizer, rngs=nnx.Rngs(1))
    optimizer = optimizer or nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses = [float(step(model, optimizer)) for _ in range(steps)]
    host = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    return {
        "/".join(str(key) for key in path if key != "base"): np.asarray(
            leaf.get_value()
        )
        for path, leaf in nnx.to_flat_state(host)
    }, losses


@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(optax.sgd(0.1), id="sgd"),
        pytest.param(optax.sgd(0.1, momentum=0.9), id="sgd with momentum"),
        pytest.param(optax.adam(1e-2), id="adam"),
    ],
)
@pytest.mark.parametrize("optimizer_first", [False, True])
def test_without_jit_every_bit_is_the_same(tx: Any, optimizer_first: bool) -> None:
    plain, losses = trained(tx, 3, growable=False)
    host, grown_losses = trained(tx, 3, growable=True, optimizer_first=optimizer_first)
    assert losses == grown_losses
    assert losses[-1] < losses[0]
    assert plain.keys() == host.keys()
    jax.tree.map(np.testing.assert_array_equal, host, plain)


def apart(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(np.max(np.abs(a[name] - b[name]))) for name in a}


UNSEEN = ("conv/bias", "norm/mean")
"""A bias in front of BatchNorm, which subtracts it again, and the mean that follows."""


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        pytest.param(optax.sgd(1e-2), (1e-6, 1e-6), id="sgd"),
        pytest.param(optax.adam(1e-2), (1e-5, None), id="adam"),
        pytest.param(optax.adam(1e-2, eps=1e-3), (1e-5, 1e-5), id="adam, large eps"),
    ],
)
def test_under_jit_adam_takes_full_steps_along_gradients_that_are_noise(
    tx: Any, expected: tuple[float, float | None]
) -> None:
    """The gradient of a bias in front of BatchNorm is 0 but for rounding.

    Adam divides a gradient by its own size. So rounding noise, which depends on how
    XLA fuses, becomes steps of the whole learning rate, in the plain model too.
    """
    others, unseen = expected
    step = nnx.jit(train_step)
    plain, losses = trained(tx, 20, growable=False, step=step)
    grown, grown_losses = trained(tx, 20, growable=True, step=step)
    distance = {
        name: float(np.max(np.abs(grown[name] - plain[name]))) for name in plain
    }
    for name in plain:
        if name not in UNSEEN:
            assert distance[name] < others, distance
    if unseen is None:
        start = np.asarray(CNN().conv.bias[...])
        # 20 noisy steps of up to 1e-2 each, in the plain model as in the other.
        assert np.max(np.abs(plain["conv/bias"] - start)) > 1e-3
        assert distance["conv/bias"] > 100 * others
    else:
        assert max(distance[name] for name in UNSEEN) < unseen, distance
    # What the model computes does not depend on that bias.
    np.testing.assert_allclose(grown_losses, losses, rtol=1e-5)


def test_the_gradient_of_a_bias_before_batch_norm_is_rounding() -> None:
    grads = nnx.grad(loss_fn)(CNN())
    largest = float(jnp.max(jnp.abs(grads["conv"]["kernel"][...])))
    assert 0 < float(jnp.max(jnp.abs(grads["conv"]["bias"][...]))) < 1e-5 * largest
