"""Times a jitted train step of an MLP with seeds, over the same MLP without.

    python benchmarks/step.py [--quick] [--rounds N]

A step is forward, backward, Adam for the host and `per_slot` Adam for the bank, in
float32 on split states. Every hidden layer has 64 seeds. All variants of a size run in
one process: each round times every variant once, in random order. A cell is the
variant's median time over the plain model's. "plain again" times the plain model twice:
its distance from 1 shows how much of the other cells is noise.
"""

import argparse
import dataclasses
import platform
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from esper_jax import (
    BlueprintParam,
    ChunkedLayer,
    GraftProbe,
    SeedState,
    SeedVariable,
    Stage,
    per_slot,
)
from esper_jax.lifecycle.state import slot_coefficients

SEEDS = 64
LIVING = (1, 4, 16, 64)
SIZES = [(128, 256), (512, 256), (128, 512), (512, 512), (128, 1024), (512, 1024)]
INPUTS, CLASSES = 64, 10


class MLP(nnx.Module):
    """Two hidden layers, without seeds if ``capacity`` is 0."""

    def __init__(self, width: int, capacity: int, rngs: nnx.Rngs) -> None:
        def layer(inputs: int) -> Any:
            base = nnx.Linear(inputs, width, rngs=rngs)
            if not capacity:
                return base
            return ChunkedLayer(base, SEEDS, capacity=capacity, rngs=rngs)

        self.hidden = nnx.List([layer(INPUTS), layer(width)])
        self.last = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        return self.last(x)


def alive(seeds: SeedState, living: int) -> SeedState:
    """``seeds`` with the first ``living`` in FINE_TUNING: they count, and learn."""
    index = jnp.arange(living)
    return dataclasses.replace(
        seeds,
        stage=seeds.stage.at[:living].set(Stage.FINE_TUNING),
        slot_of_seed=seeds.slot_of_seed.at[:living].set(index),
        seed_of_slot=seeds.seed_of_slot.at[:living].set(index),
    )


def train_step(width: int, capacity: int, living: int) -> tuple[Callable, Any]:
    """A jitted ``step(carry, x, labels) -> carry, loss``, and its first carry.

    Args:
      width: of the hidden layers.
      capacity: slots of each; 0 for the plain model.
      living: seeds of each that live.
    """
    model = MLP(width, capacity, nnx.Rngs(0))
    for layer in model.hidden if capacity else ():
        layer.bed.seeds.set_value(alive(layer.bed.seeds.get_value(), living))
    graph, host, bank, probe, seeds = nnx.split(
        model, nnx.Param, BlueprintParam, GraftProbe, SeedVariable
    )
    host_optimizer, bank_optimizer = optax.adam(1e-3), per_slot(optax.adam(1e-3))

    def loss_fn(learned: Any, probe: Any, seeds: Any, x: Any, labels: Any) -> Any:
        m = nnx.merge(graph, *learned, probe, seeds, copy=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(m(x), labels)
        return jnp.mean(losses), nnx.state(m, SeedVariable)

    def step(carry: Any, x: Any, labels: Any) -> Any:
        host, host_state, bank, bank_state, probe, seeds = carry
        hidden = nnx.merge(graph, host, bank, probe, seeds, copy=True).hidden
        flags = [
            slot_coefficients(layer.bed.seeds.get_value())[1] > 0
            for layer in (hidden if capacity else ())
        ]
        (loss, seeds), (host_grads, bank_grads) = jax.value_and_grad(
            loss_fn, has_aux=True
        )((host, bank), probe, seeds, x, labels)
        updates, host_state = host_optimizer.update(host_grads, host_state, host)
        host = optax.apply_updates(host, updates)
        params, grads = (nnx.to_pure_dict(t) for t in (bank, bank_grads))
        new_params, new_states = {}, {}
        for i in params.get("hidden", {}):
            updates, new_states[i] = bank_optimizer.update(
                grads["hidden"][i], bank_state[i], params["hidden"][i], active=flags[i]
            )
            new_params[i] = optax.apply_updates(params["hidden"][i], updates)
        if new_params:
            bank = nnx.clone(bank)
            nnx.replace_by_pure_dict(bank, {"hidden": new_params})
        return (host, host_state, bank, new_states, probe, seeds), loss

    pure = nnx.to_pure_dict(bank)
    bank_state = {i: bank_optimizer.init(p) for i, p in pure.get("hidden", {}).items()}
    host_state = host_optimizer.init(host)
    carry = (host, host_state, bank, bank_state, probe, seeds)
    return jax.jit(step, donate_argnums=0), carry


def ratios(
    variants: dict[str, tuple[int, int]], batch: int, width: int, rounds: int
) -> tuple[float, dict[str, float]]:
    """Median time of the plain step in ms, and each variant's ratio to it.

    Args:
      variants: ``(capacity, living)`` of each, ``"plain"`` among them.
      batch: rows a step.
      width: of the hidden layers.
      rounds: timed steps of each variant.
    """
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, INPUTS)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, CLASSES, batch))
    steps = {name: train_step(width, *v) for name, v in variants.items()}
    carries = {name: carry for name, (_, carry) in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for i in range(rounds + 3):
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            carries[name], loss = steps[name][0](carries[name], x, labels)
            jax.block_until_ready((carries[name], loss))
            if i >= 3:  # the first three warm up
                times[name].append(time.perf_counter() - start)
    plain = times["plain"]
    ratio = {
        name: statistics.median(t) / statistics.median(plain)
        for name, t in times.items()
    }
    return 1e3 * statistics.median(plain), ratio


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one size, few rounds")
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    sizes, rounds = (SIZES[:1], 10) if options.quick else (SIZES, options.rounds)
    variants = {
        "plain": (0, 0),
        "plain again": (0, 0),
        "dormant K=8": (8, 0),
        f"dormant K={SEEDS}": (SEEDS, 0),
        **{f"{n} living": (SEEDS, n) for n in LIVING},
    }
    device = jax.devices()[0]
    print(
        f"device {device.device_kind} ({platform.processor() or platform.machine()}), "
        f"jax {jax.__version__}, flax {flax.__version__}, optax {optax.__version__}, "
        f"float32, {SEEDS} seeds a layer, 2 hidden layers, {rounds} rounds"
    )
    names = list(variants)[1:]
    print(f"living: capacity {SEEDS}, in FINE_TUNING; blueprint residual_mlp")
    print(" | ".join(["batch", "width", "plain ms", *names]))
    for batch, width in sizes:
        plain, ratio = ratios(variants, batch, width, rounds)
        cells = [f"{batch:5}", f"{width:5}", f"{plain:8.2f}"]
        cells += [f"{ratio[name]:{len(name)}.3f}" for name in names]
        print(" | ".join(cells), flush=True)


if __name__ == "__main__":
    main()
