"""Training a model that grows: the step, and the loop around step and tick.

`build` turns a Flax NNX model into a `Program`: a functional `TrainState` and jitted
functions of it, none of which recompiles while the model grows. `fit` runs them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from esper_jax import blueprints, controller
from esper_jax.blueprints import Bank
from esper_jax.chunks import ChunkLayout
from esper_jax.controller import ControllerConfig
from esper_jax.functional import (
    Arrays,
    GovernorMemory,
    ModelParts,
    Monitor,
    TrainState,
    grow_capacity,
    host_weights,
    is_key,
    split_model,
    values_of,
)
from esper_jax.governor import Governor
from esper_jax.lifecycle import LifecycleConfig
from esper_jax.optim import PerSlot, per_slot
from esper_jax.state import SeedState, saturating_add, slot_coefficients
from esper_jax.tick import Batch, Loss, TickReport, evaluate, tick

__all__ = ["Program", "build", "classification", "fit"]


class Program(NamedTuple):
    """A model as jitted functions. ``step``, ``step_from`` and ``tick`` donate the
    state that they are given.

    Attributes:
      init: ``init(rng) -> TrainState``, from the values the model had when built.
      step: ``step(state, batch) -> state``: one update from ``batch = (x, y)``.
      step_from: ``step_from(state, data, order, batch_size) -> state``: the same with
        the rows of ``data`` that ``order`` names at the state's position.
      tick: ``tick(state, held_out) -> state, TickReport``.
      evaluate: ``evaluate(state, data) -> loss, score``, means over the rows.
      model: ``model(state) -> nnx.Module`` with the state's values.
      grow_capacity: ``grow_capacity(state, capacity) -> state`` with another number of
        slots, in all layers or by name; see `functional.grow_capacity`. The only thing
        that makes ``step`` and ``tick`` compile again.
      layouts: `ChunkLayout` of each layer that can grow.
      kinds: the blueprints of each layer that can grow.
      gates: the lifecycle's numbers that it was built with.
      recompiles: how often ``step``, ``step_from`` and ``tick`` were compiled again
        after their first time.
    """

    init: Callable[[Any], TrainState]
    step: Callable[[TrainState, Batch], TrainState]
    step_from: Callable[[TrainState, Batch, Any, int], TrainState]
    tick: Callable[[TrainState, Batch], tuple[TrainState, TickReport]]
    evaluate: Callable[[TrainState, Batch], tuple[Array, Array]]
    model: Callable[[TrainState], nnx.Module]
    grow_capacity: Callable[[TrainState, int | Mapping[str, int]], TrainState]
    layouts: dict[str, ChunkLayout]
    kinds: dict[str, tuple[blueprints.Blueprint, ...]]
    gates: LifecycleConfig
    recompiles: Callable[[], int]


def classification(
    logits: Float[Array, "B N"], labels: Int[Array, " B"]
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Softmax cross-entropy in nats, and whether the largest logit is the label's."""
    loss = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), labels
    )
    return loss, (jnp.argmax(logits, -1) == labels).astype(jnp.float32)


def build(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    blueprint_optimizer: optax.GradientTransformation,
    *,
    loss: Loss = classification,
    lifecycle_config: LifecycleConfig | None = None,
    controller_config: ControllerConfig | None = None,
    eval_batch: int = 1024,
) -> Program:
    """Makes the functions that train and grow ``model``.

    Args:
      model: a Flax NNX model that is called with a batch ``x`` and holds `ChunkedLayer`
        or `SeedBed` modules. Its values are copied, not changed; `Program.model` gives
        it back trained.
      optimizer: for the host's parameters.
      blueprint_optimizer: for the banks; runs in each slot (`optim.per_slot`).
      loss: ``loss(outputs, y) -> (loss, score)``, one float of each for every row; the
        score is what counts as accuracy.
      lifecycle_config: minima, gates and grafting.
      controller_config: the heuristic's numbers.
      eval_batch: rows that are evaluated at once.

    Raises:
      ValueError: if the model holds nothing that can grow, the controller's blueprint
        is not one of every layer's, or ``eval_batch`` is below 1.
    """
    if eval_batch < 1:
        raise ValueError(f"eval_batch must be at least 1, got {eval_batch}")
    gates = lifecycle_config or LifecycleConfig()
    policy = controller_config or ControllerConfig()
    parts = split_model(model)
    for name, kinds in parts.kinds.items():
        if policy.blueprint >= len(kinds):
            raise ValueError(
                f"controller blueprint must be an index into the {len(kinds)} "
                f"blueprints of layer {name!r}, got {policy.blueprint}"
            )
    bank_optimizer = per_slot(blueprint_optimizer)
    initial = jax.tree.map(
        lambda v: v if is_key(v) else np.asarray(v), values_of(model)
    )
    measure = functools.partial(evaluate, parts, loss, eval_batch)

    def step(state: TrainState, batch: Batch) -> TrainState:
        return _step(parts, loss, optimizer, bank_optimizer, state, batch)

    def step_from(
        state: TrainState, data: Batch, order: Array, batch_size: int
    ) -> TrainState:
        position = state.step % (order.shape[0] // batch_size)
        rows = jax.lax.dynamic_slice_in_dim(order, position * batch_size, batch_size)
        return step(state, jax.tree.map(lambda a: a[rows], data))

    def one_tick(state: TrainState, held_out: Batch) -> tuple[TrainState, TickReport]:
        return tick(parts, measure, bank_optimizer, gates, policy, state, held_out)

    jitted: list[Any] = [
        jax.jit(step, donate_argnums=0),
        jax.jit(step_from, donate_argnums=0, static_argnums=3),
        jax.jit(one_tick, donate_argnums=0),
    ]
    return Program(
        init=jax.jit(lambda rng: _init(parts, optimizer, bank_optimizer, initial, rng)),
        step=jitted[0],
        step_from=jitted[1],
        tick=jitted[2],
        evaluate=jax.jit(lambda state, data: measure(parts.values(state), data)),
        # Copies: the state's own arrays are gone once it is donated.
        model=lambda state: parts.merge(
            jax.tree.map(jnp.copy, parts.values(state)), train=True
        ),
        grow_capacity=functools.partial(grow_capacity, parts, bank_optimizer),
        layouts=parts.layouts,
        kinds=parts.kinds,
        gates=gates,
        recompiles=lambda: sum(max(0, f._cache_size() - 1) for f in jitted),
    )


def fit(
    program: Program,
    state: TrainState,
    data: Batch,
    held_out: Batch,
    *,
    ticks: int,
    batch_size: int,
    seed: int = 0,
    on_tick: Callable[[TrainState, TickReport], None] | None = None,
    governor: Governor | None = None,
) -> TrainState:
    """Trains until the state has seen ``ticks`` ticks, one after each epoch.

    The order of the rows in epoch ``e`` depends on ``seed``, ``e`` and the number of
    rollbacks alone, so a restored state goes on where it stopped. What does not fill a
    batch at the end of an epoch is left out.

    Args:
      program: as `build` makes it.
      state: where to start; donated.
      data: ``(x, y)`` to train on, rows first.
      held_out: ``(x, y)`` that the gates and the controller read.
      ticks: where to stop, counted from the beginning of the run.
      batch_size: rows a step. A restored state must go on with the one that it was
        trained with: its position in the data is counted in steps.
      seed: of the order of the rows.
      on_tick: called after each tick with the state (to read, not to keep: it will be
        donated) and the report on the host. Not called for a tick that was undone.
      governor: checks each tick and undoes those that failed.

    Returns:
      The state after the last tick.

    Raises:
      ValueError: if the rows do not match or do not fill a batch.
      TrainingStopped: by the governor.
    """
    data, held_out = _checked("data", data), _checked("held_out", held_out)
    rows = jax.tree.leaves(data)[0].shape[0]
    if not 1 <= batch_size <= rows:
        raise ValueError(
            f"batch_size must be from 1 to the {rows} rows of data, got {batch_size}"
        )
    per_epoch = rows // batch_size

    @jax.jit
    def shuffle(stream: Array) -> Array:
        return jax.random.permutation(
            jax.random.fold_in(jax.random.key(seed), stream), rows
        )

    if governor is not None:
        governor.start(state)
    while (epoch := int(state.ticks)) < ticks:
        # Another order after a rollback, or the same step would fail again.
        rollbacks = int(state.governor.rollbacks)
        order = shuffle(np.uint32((epoch + (rollbacks << 24)) % 2**32))
        for _ in range(per_epoch - int(state.step) % per_epoch):
            state = program.step_from(state, data, order, batch_size)
        state, report = program.tick(state, held_out)
        if governor is not None:
            state, rollback = governor.review(state, report, data, held_out)
            if rollback is not None:
                continue
        if on_tick is not None:
            on_tick(state, jax.device_get(report))
    return state


def _checked(name: str, data: Batch) -> Batch:
    arrays = jax.tree.map(jnp.asarray, data)
    counts = {leaf.shape[:1] for leaf in jax.tree.leaves(arrays)}
    if len(counts) != 1 or counts & {(), (0,)}:
        raise ValueError(
            f"{name} must be (x, y) with the same number of rows, at least one, on the "
            f"first axis; got {[leaf.shape for leaf in jax.tree.leaves(arrays)]}"
        )
    return arrays


def _init(
    parts: ModelParts,
    optimizer: optax.GradientTransformation,
    bank_optimizer: PerSlot,
    initial: Arrays,
    rng: Key[Array, ""],
) -> TrainState:
    """The state before the first step."""
    values = jax.tree.map(jnp.array, initial)
    layers = parts.beds
    banks = {layer: values.pop(f"{bed}/bank") for layer, bed in layers.items()}
    seeds = {layer: values.pop(f"{bed}/seeds") for layer, bed in layers.items()}
    params = {name: values.pop(name) for name in parts.host_params()}
    host_mean = {layer: host_weights(params, layer) for layer in layers}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        ticks=jnp.zeros((), jnp.int32),
        rng=jnp.array(rng),
        params=params,
        opt_state=optimizer.init(params),
        banks=banks,
        bank_opt={layer: bank_optimizer.init(bank) for layer, bank in banks.items()},
        seeds=seeds,
        rest=values,
        memory=controller.init_memory(),
        monitor=Monitor.start(jax.tree.map(jnp.array, host_mean)),
        governor=GovernorMemory.start(),
    )


def _step(
    parts: ModelParts,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    bank_optimizer: PerSlot,
    state: TrainState,
    batch: Batch,
) -> TrainState:
    """One update of host and blueprints."""
    x, y = batch
    probes = {layer: state.rest[parts.probe(layer)] for layer in parts.beds}

    def objective(params: Arrays, banks: Arrays, probes: Arrays) -> tuple[Array, Any]:
        trained = dataclasses.replace(state, params=params, banks=banks)
        model = parts.merge(parts.values(trained, probes), train=True)
        losses, _ = loss(model(x), y)
        return jnp.mean(losses), values_of(model)

    (value, after), (grads, bank_grads, gains) = jax.value_and_grad(
        objective, argnums=(0, 1, 2), has_aux=True
    )(state.params, state.banks, probes)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    seeds, banks, bank_opt = {}, {}, {}
    for name, bed in parts.beds.items():
        seeds[name], banks[name], bank_opt[name] = _update_bank(
            bank_optimizer,
            after[f"{bed}/seeds"],
            state.banks[name],
            state.bank_opt[name],
            bank_grads[name],
            gains[name],
        )
    monitor = dataclasses.replace(
        state.monitor,
        train_loss=state.monitor.train_loss + value,
        grad_norm=state.monitor.grad_norm + optax.tree.norm(grads),
        steps=state.monitor.steps + 1,
    )
    rest = {name: after[name] for name in state.rest}
    return dataclasses.replace(
        state,
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        seeds=seeds,
        banks=banks,
        bank_opt=bank_opt,
        rest=rest,
        monitor=monitor,
    )


def _update_bank(
    optimizer: PerSlot,
    seeds: SeedState,
    bank: Bank,
    opt_state: Any,
    grads: Bank,
    gain: Float[Array, " K"],
) -> tuple[SeedState, Bank, Any]:
    """Updates the slots that learn; one whose gradient is not finite waits a step.

    That, and a correction that is not finite in a slot that only counts, is an error.
    """
    alpha, beta, _ = slot_coefficients(seeds)
    finite = _finite_slots(grads) & jnp.isfinite(gain)
    learning = beta != 0
    living = learning | (alpha != 0)

    def update() -> tuple[Bank, Any]:
        updates, new = optimizer.update(
            grads, opt_state, bank, active=learning & finite
        )
        return optax.apply_updates(bank, updates), new

    bank, opt_state = jax.lax.cond(jnp.any(learning), update, lambda: (bank, opt_state))
    seeds = dataclasses.replace(
        seeds,
        gain=seeds.gain + gain,
        errors=saturating_add(seeds.errors, living & ~finite),
    )
    return seeds, bank, opt_state


def _finite_slots(grads: Bank) -> Bool[Array, " K"]:
    leaves = [
        jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))
        for leaf in jax.tree.leaves(grads)
    ]
    return functools.reduce(jnp.logical_and, leaves)
