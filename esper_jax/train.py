"""Training a model that grows: the step, and the loop around step and tick.

`build` turns a Flax NNX model into a `Program`: a functional `TrainState` and jitted
functions of it, none of which recompiles while the model grows. `fit` runs them.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from esper_jax import blueprints, collectives, controller, gradients
from esper_jax.blueprints import Bank
from esper_jax.chunks import ChunkLayout
from esper_jax.controller import ControllerConfig, Decide
from esper_jax.functional import (
    Arrays,
    GovernorMemory,
    ModelParts,
    Monitor,
    TrainState,
    count_recompiles,
    counted,
    grow_capacity,
    is_key,
    split_model,
    values_of,
)
from esper_jax.governor import Governor
from esper_jax.lifecycle import LifecycleConfig
from esper_jax.optim import PerSlot, per_slot
from esper_jax.parallel import check_replicas
from esper_jax.state import (
    SeedState,
    saturating_add,
    slot_coefficients,
    start_tick,
)
from esper_jax.tick import AT_ONCE, Batch, Loss, TickReport, evaluate, tick

__all__ = ["Program", "build", "classification", "epoch_order", "fit"]


class Program(NamedTuple):
    """A model as jitted functions. ``step``, ``step_from`` and ``tick`` donate the
    state that they are given.

    Attributes:
      init: ``init(rng) -> TrainState``, from the values the model had when built;
        ``init(rng, values)`` from others, as `functional.values_of` gives them.
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
      axis_name: the mapped axis that ``step``, ``tick`` and ``evaluate`` are to be
        called under, if any.
      place: ``place(name, data, divided) -> data`` on the devices as the functions want
        it: ``divided`` among them (a batch, held-out data) or whole (what ``step_from``
        picks rows of). ``name`` is the argument's, for errors.
      recompiles: how often ``step``, ``step_from`` and ``tick`` were compiled again
        after their first time.
    """

    init: Callable[..., TrainState]
    step: Callable[[TrainState, Batch], TrainState]
    step_from: Callable[[TrainState, Batch, Any, int], TrainState]
    tick: Callable[[TrainState, Batch], tuple[TrainState, TickReport]]
    evaluate: Callable[[TrainState, Batch], tuple[Array, Array]]
    model: Callable[[TrainState], nnx.Module]
    grow_capacity: Callable[[TrainState, int | Mapping[str, int]], TrainState]
    layouts: dict[str, ChunkLayout]
    kinds: dict[str, tuple[blueprints.Blueprint, ...]]
    gates: LifecycleConfig
    axis_name: str | None
    place: Callable[[str, Any, bool], Any]
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
    blueprint_optimizer: optax.GradientTransformation | PerSlot,
    *,
    loss: Loss = classification,
    lifecycle_config: LifecycleConfig | None = None,
    controller_config: ControllerConfig | None = None,
    decide: Decide = controller.decide,
    eval_batch: int = 1024,
    axis_name: str | None = None,
    debug: bool = False,
) -> Program:
    """Makes the functions that train and grow ``model``.

    Args:
      model: a Flax NNX model that is called with a batch ``x`` and holds `ChunkedLayer`
        or `SeedBed` modules. Its values are copied, not changed; `Program.model` gives
        it back trained.
      optimizer: for the host's parameters.
      blueprint_optimizer: for the banks; runs in each slot (`optim.per_slot`). A
        `PerSlot` is taken as it is.
      loss: ``loss(outputs, y) -> (loss, score)``, one float of each for every row; the
        score is what counts as accuracy.
      lifecycle_config: minima, gates and grafting.
      controller_config: the heuristic's numbers.
      decide: what asks for transitions, with the signature of `controller.decide`.
      eval_batch: rows that are evaluated at once.
      axis_name: for several devices, the name of the mapped axis that the rows are
        divided along. ``step``, ``tick`` and ``evaluate`` are then to be called inside
        `jax.pmap` or `jax.shard_map` over it, each device with the same state and an
        equal part of the rows, or through `parallel.over_mesh`. All devices come to the
        same state. Plain `jax.jit` on arrays that are sharded needs none.
      debug: each tick compares the states of all devices along ``axis_name``, which
        must be given, bit for bit, and says in its report whether they agree.

    Raises:
      ValueError: if the model holds nothing that can grow, the controller's blueprint
        is not one of every layer's, ``eval_batch`` is below 1, ``debug`` is given
        without ``axis_name``, or, with it, the model holds an untyped random key.
    """
    if eval_batch < 1:
        raise ValueError(f"eval_batch must be at least 1, got {eval_batch}")
    if debug and axis_name is None:
        raise ValueError(
            "debug compares the devices along axis_name, so axis_name must be given "
            "with it; got None. With plain jit on sharded arrays, call "
            "parallel.check_replicas(state) between ticks instead"
        )
    gates = lifecycle_config or LifecycleConfig()
    policy = controller_config or ControllerConfig()
    parts = split_model(model, axis_name)
    for name, kinds in parts.kinds.items():
        if policy.blueprint >= len(kinds):
            raise ValueError(
                f"controller blueprint must be an index into the {len(kinds)} "
                f"blueprints of layer {name!r}, got {policy.blueprint}"
            )
    bank_optimizer = (
        blueprint_optimizer
        if isinstance(blueprint_optimizer, PerSlot)
        else per_slot(blueprint_optimizer)
    )
    initial = jax.tree.map(
        lambda v: v if is_key(v) else np.asarray(v), values_of(model)
    )
    measure = functools.partial(evaluate, parts, loss, eval_batch, axis_name)

    def step(state: TrainState, batch: Batch) -> TrainState:
        return _step(parts, loss, optimizer, bank_optimizer, axis_name, state, batch)

    def step_from(
        state: TrainState, data: Batch, order: Array, batch_size: int
    ) -> TrainState:
        position = state.step % (order.shape[0] // batch_size) * batch_size
        if axis_name is not None:
            batch_size //= collectives.axis_size(axis_name)
            position += jax.lax.axis_index(axis_name) * batch_size
        rows = jax.lax.dynamic_slice_in_dim(order, position, batch_size)
        return step(state, jax.tree.map(lambda a: a[rows], data))

    def one_tick(state: TrainState, held_out: Batch) -> tuple[TrainState, TickReport]:
        return tick(
            parts,
            measure,
            bank_optimizer,
            gates,
            policy,
            state,
            held_out,
            decide,
            compare_along=axis_name if debug else None,
            # JAX cannot vmap a branch whose operands vary along a mapped axis.
            at_once=AT_ONCE if axis_name is None else 1,
        )

    # The values are an argument: as constants of the program they would cost seconds.
    @jax.jit
    def init(values: Arrays, rng: Array) -> TrainState:
        return _init(parts, optimizer, bank_optimizer, values, rng)

    traces: Counter[str] = Counter()
    return Program(
        init=lambda rng, values=initial: init(values, rng),
        step=jax.jit(counted(traces, step), donate_argnums=0),
        step_from=jax.jit(
            counted(traces, step_from), donate_argnums=0, static_argnums=3
        ),
        tick=jax.jit(counted(traces, one_tick), donate_argnums=0),
        evaluate=jax.jit(lambda state, data: measure(parts.values(state), data)),
        # Copies: the state's own arrays are gone once it is donated.
        model=lambda state: parts.merge(
            jax.tree.map(jnp.copy, parts.values(state)), train=True, alone=True
        ),
        grow_capacity=functools.partial(grow_capacity, parts, bank_optimizer),
        layouts=parts.layouts,
        kinds=parts.kinds,
        gates=gates,
        axis_name=axis_name,
        place=lambda name, data, divided: jax.tree.map(jnp.asarray, data),
        recompiles=functools.partial(count_recompiles, traces),
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
      ValueError: if the rows do not match or do not fill a batch, devices do not divide
        them, or (in debug mode) the devices have different states.
      TrainingStopped: by the governor.
    """
    data = _checked(program, "data", data, False)
    held_out = _checked(program, "held_out", held_out, True)
    rows = jax.tree.leaves(data)[0].shape[0]
    if not 1 <= batch_size <= rows:
        raise ValueError(
            f"batch_size must be from 1 to the {rows} rows of data, got {batch_size}"
        )
    per_epoch = rows // batch_size

    shuffle = jax.jit(
        lambda epoch, rollbacks: epoch_order(seed, epoch, rollbacks, rows)
    )
    if governor is not None:
        governor.start(state)
    while (epoch := int(state.ticks)) < ticks:
        order = shuffle(np.int32(epoch), np.int32(state.governor.rollbacks))
        order = program.place("order", order, False)
        for _ in range(per_epoch - int(state.step) % per_epoch):
            state = program.step_from(state, data, order, batch_size)
        state, report = program.tick(state, held_out)
        if not bool(report.replicas_agree):
            check_replicas(state)
            raise ValueError(
                "state must be the same on all devices, and was not before tick "
                f"{int(report.tick)}. Start all replicas from one state"
            )
        if governor is not None:
            state, rollback = governor.review(state, report, data, held_out)
            if rollback is not None:
                continue
        if on_tick is not None:
            on_tick(state, jax.device_get(report))
    return state


def epoch_order(
    seed: int | Int[Array, ""],
    epoch: Int[Array, ""],
    rollbacks: Int[Array, ""],
    rows: int,
) -> Int[Array, " rows"]:
    """The order of the rows in an epoch.

    Another one after a rollback, or the same step would fail again.
    """
    stream = epoch.astype(jnp.uint32) + (rollbacks.astype(jnp.uint32) << 24)
    return jax.random.permutation(
        jax.random.fold_in(jax.random.key(seed), stream), rows
    )


def _checked(program: Program, name: str, data: Batch, divided: bool) -> Batch:
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(data)]
    counts = {shape[:1] for shape in shapes}
    if len(counts) != 1 or counts & {(), (0,)}:
        raise ValueError(
            f"{name} must be (x, y) with the same number of rows, at least one, on the "
            f"first axis; got {shapes}"
        )
    return program.place(name, data, divided)


_CONTROLLER = 0x5EED
"""Folded into the run's key for the controller's; not 0 or 1, which fold as splitting
does."""


def _init(
    parts: ModelParts,
    optimizer: optax.GradientTransformation,
    bank_optimizer: PerSlot,
    initial: Arrays,
    rng: Key[Array, ""],
) -> TrainState:
    """The state before the first step."""
    values = jax.tree.map(jnp.array, initial)
    banks, seeds = parts.take(values, "bank"), parts.take(values, "seeds")
    for bed in parts.beds.values():
        values.pop(f"{bed.path}/bank", None)
        values.pop(f"{bed.path}/seeds", None)
    params = {name: values.pop(name) for name in parts.host_params()}
    host_mean = {layer: parts.host_weights(params, layer) for layer in parts.beds}
    num_seeds = {layer: layout.num_seeds for layer, layout in parts.layouts.items()}
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
        memory=controller.init_memory(
            num_seeds,
            key=jax.random.fold_in(rng, _CONTROLLER),
            blueprints=min(len(kinds) for kinds in parts.kinds.values()),
        ),
        monitor=Monitor.start(jax.tree.map(jnp.array, host_mean), num_seeds),
        governor=GovernorMemory.start(),
    )


def _step(
    parts: ModelParts,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    bank_optimizer: PerSlot,
    axis_name: str | None,
    state: TrainState,
    batch: Batch,
) -> TrainState:
    """One update of host and blueprints."""
    x, y = batch
    trained = (state.params, state.banks, parts.take(state.rest, "probe"))
    rest = state.rest
    if axis_name is not None:
        trained, rest = collectives.varying(trained, axis_name), _own(rest, axis_name)
    # Each step measures from 0, so that what was measured before is not summed twice.
    unmeasured = {name: start_tick(seeds) for name, seeds in state.seeds.items()}

    def objective(params: Arrays, banks: Arrays, probes: Arrays) -> tuple[Array, Any]:
        current = dataclasses.replace(
            state, params=params, banks=banks, rest=rest, seeds=unmeasured
        )
        model = parts.merge(parts.values(current, probes), train=True)
        losses, _ = loss(model(x), y)
        return jnp.mean(losses), values_of(model)

    (value, after), grads = jax.value_and_grad(
        objective, argnums=(0, 1, 2), has_aux=True
    )(*trained)
    value, (grads, bank_grads, gains) = collectives.mean((value, grads), axis_name)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    seeds, banks, bank_opt = {}, {}, {}
    for name, measured in parts.take(after, "seeds").items():
        seeds[name], banks[name], bank_opt[name] = _update_bank(
            bank_optimizer,
            state.seeds[name],
            measured,
            state.banks[name],
            state.bank_opt[name],
            bank_grads[name],
            gains[name],
            state.step,
        )
    sums = {
        name: gradients.add(
            state.monitor.gradients[name],
            parts.host_weights(grads, name),
            bank_grads[name],
            state.seeds[name],
            parts.layouts[name],
            owns=parts.has_base(name),
        )
        for name in parts.beds
    }
    monitor = dataclasses.replace(
        state.monitor,
        gradients=sums,
        train_loss=state.monitor.train_loss + value,
        grad_norm=state.monitor.grad_norm + optax.tree.norm(grads),
        steps=state.monitor.steps + 1,
    )
    return dataclasses.replace(
        state,
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        seeds=seeds,
        banks=banks,
        bank_opt=bank_opt,
        rest=_shared(state.rest, after, axis_name),
        monitor=monitor,
    )


def _own(rest: Arrays, axis_name: str) -> Arrays:
    """The other variables as one device uses them: random streams of its own."""

    def own(x: Array) -> Array:
        if is_key(x):
            return _fold(x, jax.lax.axis_index(axis_name))
        inexact = jnp.issubdtype(x.dtype, jnp.inexact)
        return collectives.varying(x, axis_name) if inexact else x

    return jax.tree.map(own, rest)


def _fold(keys: Key[Array, "*N"], data: Array) -> Key[Array, "*N"]:
    fold = functools.partial(jax.random.fold_in, data=data)
    for _ in range(keys.ndim):
        fold = jax.vmap(fold)
    return fold(keys)


def _shared(before: Arrays, after: Arrays, axis_name: str | None) -> Arrays:
    """The other variables after a step: their mean over the devices (as of batch
    statistics). The random streams stay those that all devices share."""

    if axis_name is None:
        return {name: after[name] for name in before}

    def share(name: str, old: Array, new: Array) -> Array:
        if is_key(old):
            return old
        if jnp.issubdtype(old.dtype, jnp.inexact):
            return collectives.mean(new, axis_name)
        if collectives.differs(new, axis_name):
            raise ValueError(
                f"variable {name!r} ({old.dtype}) must be the same on all devices, but "
                "the model computes it from the rows that each device has. Reduce it "
                f"over {axis_name!r} in the model, or make it floating point"
            )
        return new

    return {
        name: jax.tree.map(functools.partial(share, name), old, after[name])
        for name, old in before.items()
    }


def _update_bank(
    optimizer: PerSlot,
    seeds: SeedState,
    measured: SeedState,
    bank: Bank,
    opt_state: Any,
    grads: Bank,
    gain: Float[Array, " K"],
    step: Int[Array, ""],
) -> tuple[SeedState, Bank, Any]:
    """Updates the slots that learn; one whose gradient is not finite waits a step.

    That, and a correction that is not finite in a slot that only counts, is an error.
    ``measured`` holds what this step alone measured.
    """
    alpha, beta, _ = slot_coefficients(seeds)
    finite = _finite_slots(grads) & jnp.isfinite(gain)
    learning = beta != 0
    living = learning | (alpha != 0)

    def update() -> tuple[Bank, Any]:
        updates, new = optimizer.update(
            grads, opt_state, bank, active=learning & finite, step=step
        )
        return optax.apply_updates(bank, updates), new

    bank, opt_state = jax.lax.cond(jnp.any(learning), update, lambda: (bank, opt_state))
    # A layer that is called several times in a step has as many errors.
    wrong = jnp.where(living & ~finite, measured.steps, 0)
    seeds = dataclasses.replace(
        seeds,
        statistics=jax.tree.map(jnp.add, seeds.statistics, measured.statistics),
        reconstruction=seeds.reconstruction + measured.reconstruction,
        steps=seeds.steps + measured.steps,
        gain=seeds.gain + gain,
        errors=saturating_add(seeds.errors, wrong),
    )
    return seeds, bank, opt_state


def _finite_slots(grads: Bank) -> Bool[Array, " K"]:
    leaves = [
        jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))
        for leaf in jax.tree.leaves(grads)
    ]
    return functools.reduce(jnp.logical_and, leaves)
