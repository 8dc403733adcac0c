"""Seeds, and what growth remembers, as the few arrays that a step passes through."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from esper_jax import Growth, make_growable
from esper_jax.bits import from_words, to_words, words_of
from esper_jax.growth.held import HeldTree
from esper_jax.lifecycle.packing import NAMES, pack, unpack
from esper_jax.lifecycle.state import init_seeds
from esper_jax.trees import state_hash

DTYPES = ("int8", "float32", "uint16", "uint8", "int32", "int8", "uint8", "int16")


def noise(shape, dtype, seed):
    """Any bits: NaN, infinities and negative zeros among the floats."""
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    array = rng.integers(0, 256, count, np.uint8).view(dtype).reshape(shape)
    if dtype == "float32" and array.size:
        array.flat[0] = -0.0
        array.flat[-1] = np.nan
    return array


def noisy_seeds(stack, seeds=5, slots=3):
    leaves, tree = jax.tree.flatten(init_seeds(seeds, slots))
    return jax.tree.unflatten(
        tree,
        [
            noise((*stack, *leaf.shape), leaf.dtype.name, number)
            for number, leaf in enumerate(leaves)
        ],
    )


def bits(tree):
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("on", ["host", "device", "traced"])
def test_words_hold_every_bit_and_fields_share_them(on):
    fields = [noise((4,), dtype, n) for n, dtype in enumerate(DTYPES)]
    make = to_words if on == "host" else jax.jit(to_words) if on == "traced" else None
    if on == "device":
        with jax.debug_nans(False):
            fields = [jnp.asarray(field) for field in fields]
        make = to_words
    words = make(fields)
    assert [word.dtype for word in words] == [np.uint32] * len(words)
    # Two of four bytes, two of two in one word, four of one in another.
    assert len(words) == words_of([f.dtype for f in fields]) == 4
    assert bits(from_words(words, [f.dtype for f in fields])) == bits(fields)


def test_words_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"1, 2 or 4 bytes; got .*float64"):
        to_words([np.zeros(3, np.float64)])


@pytest.mark.parametrize("stack", [(), (2,), (2, 3)])
def test_seeds_are_four_arrays_bit_for_bit(stack):
    seeds = noisy_seeds(stack)
    packed = pack(seeds)
    assert tuple(packed) == NAMES
    assert len(NAMES) == 4
    assert all(isinstance(array, np.ndarray) for array in packed.values())
    assert bits(unpack(packed)) == bits(seeds)
    # Not more memory than the fields: 16-bit and 8-bit ones share words.
    size = sum(array.nbytes for array in packed.values())
    fields = sum(leaf.nbytes for leaf in jax.tree.leaves(seeds))
    assert size <= fields + 8 * int(np.prod(stack)) * (5 + 3)
    traced = jax.jit(pack)(seeds)
    assert bits(traced) == bits(packed)
    assert bits(jax.jit(unpack)(traced)) == bits(seeds)
    assert bits(unpack(traced)) == bits(seeds)
    shapes = unpack(jax.eval_shape(pack, seeds))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), seeds
    )


def test_what_a_call_of_the_layer_leaves_alone_is_left_out():
    seeds = noisy_seeds(())
    more = dataclasses.replace(seeds, reconstruction=seeds.reconstruction + 1)
    assert list(pack(more, seeds)) == ["sums"]
    assert list(pack(dataclasses.replace(seeds, gain=seeds.gain + 0), seeds)) == [
        "slots"
    ]


def grown():
    model = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
    host = nnx.Dict(layer=model)
    make_growable(host, "layer", 2, rngs=nnx.Rngs(1))
    return host, Growth(host, optax.adam(1e-3))


def test_what_growth_remembers_comes_back_bit_for_bit():
    _, growth = grown()
    remembered = growth.state.get_value()
    before = state_hash(remembered)
    names = growth.state.names
    assert "words" in names
    # Neither the policy's memory nor the running means are variables of their own.
    assert not [name for name in names if "memory" in name or "_mean" in name]
    tree = HeldTree(remembered)
    assert state_hash(tree.get_value()) == before
    new = remembered._replace(
        growth=remembered.growth.replace(
            ticks=remembered.growth.ticks + 3, rng=jax.random.key(7)
        )
    )
    tree.set_value(new, remembered)
    assert state_hash(tree.get_value()) == state_hash(new) != before


def test_a_step_passes_few_arrays_and_leaves_most_as_they_are():
    model, growth = grown()

    def loss_of(model, x):
        return jnp.mean(model["layer"](x) ** 2)

    graph, state = nnx.split((model, growth))
    leaves, tree = jax.tree.flatten(state)

    def step(leaves, x):
        model, growth = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
        loss, grads = nnx.value_and_grad(loss_of, argnums=growth.argnums)(model, x)
        growth.update(model, grads, loss=loss)
        return jax.tree.leaves(nnx.state((model, growth)))

    jaxpr = jax.make_jaxpr(step)(leaves, jnp.ones((3, 4))).jaxpr
    same = sum(
        new is old for new, old in zip(jaxpr.outvars, jaxpr.invars, strict=False)
    )
    of_growth = len(jax.tree.leaves(nnx.state(growth)))
    moments = len(jax.tree.leaves(growth.state.get_value().moments))
    # Words, three sums, the steps of two counters, the loss and the gradient's norm.
    assert of_growth == moments + 8
    # Kernel and bias; words and slots; the probe; growth's words and its norm.
    assert same >= 7
