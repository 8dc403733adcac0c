"""`build` turns a Flax NNX model into a `Program` that trains and grows it.

A program is a functional `TrainState` and jitted functions of it. None of them
recompiles while the model grows. `fit` runs them.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from esper_jax import blueprints
from esper_jax.chunks import ChunkLayout
from esper_jax.growth.capacity import give_back, grow_capacity
from esper_jax.growth.cautions import warn_of_statistics
from esper_jax.growth.folds import Fold, folds_of
from esper_jax.growth.outside import Outside
from esper_jax.growth.parts import ModelParts, split_model, values_of
from esper_jax.growth.recipe import check_trained, policy_for
from esper_jax.growth.reports import TickReport
from esper_jax.growth.state import Arrays, TrainState
from esper_jax.layers.bed import SeedBed
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.optim import PerSlot, per_slot
from esper_jax.parallel import collectives
from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.heuristic import Decide, policy_of
from esper_jax.policy.interface import Policy, PolicyFactory
from esper_jax.train.checks import Checks
from esper_jax.train.evaluation import evaluate
from esper_jax.train.losses import classification
from esper_jax.train.recipe import AT_ONCE, Batch, Loss, Objective, TrainRecipe
from esper_jax.train.shardings import shardings_of, spread
from esper_jax.train.shown import EvalParams, averaged_by, check_eval_params
from esper_jax.train.start import initial_state
from esper_jax.train.step import train_step
from esper_jax.train.tick import tick
from esper_jax.train.tracing import compiled, unmeasured_is_nan
from esper_jax.trees import is_key

__all__ = ["Program", "build", "classification"]


class Program(NamedTuple):
    """A model as jitted functions.

    ``step``, ``step_with_aux``, ``step_from`` and ``tick`` donate the state that they
    are given.

    Attributes:
      init: ``init(rng) -> TrainState`` starts from the values that the model had when
        it was built. ``init(rng, values)`` starts from others, as
        `growth.parts.values_of` returns them.
      step: ``step(state, batch) -> state``: one update from ``batch = (x, y)``, or from
        what the objective takes.
      step_with_aux: ``step_with_aux(state, batch) -> state, (loss, aux)``: the same
        update, with the mean loss of the batch before it and what the loss or the
        objective returned beside the loss (None if nothing). Along ``axis_name``,
        arrays of a number for each row are those of all devices, others their mean.
      step_from: ``step_from(state, data, order, batch_size) -> state``: one update
        from the rows of ``data`` that ``order`` names at the state's position.
      tick: ``tick(state, held_out) -> state, TickReport``. Held-out data are arrays, or
        an iterable of batches. A third argument, an `Outside` of all layers, is asked
        beside what the policy asks. Give it at every tick, or at none: the other way
        compiles once more.
      evaluate: ``evaluate(state, data) -> loss, score``, means over the rows of arrays
        or of an iterable of batches.
      model: ``model(state) -> nnx.Module`` with the state's values, those to evaluate
        where ``eval_params`` tells them from those that train.
      grow_capacity: ``grow_capacity(state, capacity) -> state`` with another number of
        slots, in all layers or by name; see `growth.capacity`. Nothing but this and
        ``shrink`` makes ``step`` and ``tick`` compile again.
      shrink: ``shrink(state) -> state, changed`` without the slots that nothing will be
        born in any more, and slots before and after by layer; changes nothing before
        the policy says so (`policy.Reason.SETTLED`). `fit` calls it after each tick.
      layouts: `ChunkLayout` of each layer that can grow.
      kinds: the blueprints of each layer that can grow.
      gates: the lifecycle's numbers that the program was built with.
      axis_name: the mapped axis under which ``step``, ``tick`` and ``evaluate`` must be
        called, if any.
      place: ``place(name, data, divided) -> data`` puts data on the devices as the
        functions want it: ``divided`` among them (a batch, held-out data) or whole
        (what ``step_from`` picks rows from). ``name`` is the argument's, for errors.
      check: ``check(name, data, whole)`` refuses what the program cannot use: a batch,
        or arrays to be cut into batches (``whole``). All functions above call it; see
        `Checks`.
      recompiles: how often ``step``, ``step_with_aux``, ``step_from`` and ``tick`` were
        compiled again after their first time.
    """

    init: Callable[..., TrainState]
    step: Callable[[TrainState, Batch], TrainState]
    step_with_aux: Callable[[TrainState, Batch], tuple[TrainState, tuple[Array, Any]]]
    step_from: Callable[[TrainState, Batch, Any, int], TrainState]
    tick: Callable[..., tuple[TrainState, TickReport]]
    evaluate: Callable[[TrainState, Any], tuple[Array, Array]]
    model: Callable[[TrainState], nnx.Module]
    grow_capacity: Callable[[TrainState, int | Mapping[str, int]], TrainState]
    shrink: Callable[[TrainState], tuple[TrainState, dict[str, tuple[int, int]]]]
    layouts: dict[str, ChunkLayout]
    kinds: dict[str, tuple[blueprints.Blueprint, ...]]
    gates: LifecycleConfig
    axis_name: str | None
    place: Callable[[str, Any, bool], Any]
    check: Callable[[str, Any, bool], None]
    recompiles: Callable[[], int]


def build(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    blueprint_optimizer: optax.GradientTransformation | PerSlot,
    *,
    loss: Loss = classification,
    objective: Objective | None = None,
    wrt: Any = nnx.Param,
    eval_params: EvalParams | None = None,
    lifecycle_config: LifecycleConfig | None = None,
    controller_config: ControllerConfig | None = None,
    decide: Decide | None = None,
    policy: Policy | PolicyFactory | None = None,
    eval_batch: int = 1024,
    axis_name: str | None = None,
    debug: bool = False,
) -> Program:
    """Makes the functions that train and grow ``model``.

    Args:
      model: a Flax NNX model that is called with the ``x`` of a batch ``(x, y)`` and
        holds `ChunkedLayer` or `SeedBed` modules. Where its signature takes several
        inputs, ``x`` is a tuple of them, or a dictionary by name. Its values are
        copied, not changed; `Program.model` gives it back trained. Modules in
        evaluation mode stay in it (``bn.eval()``, dropout with
        ``deterministic=True``), all others train; evaluation puts all in evaluation
        mode. Values sown as `nnx.Intermediate` are dropped. Variables that lie on a
        mesh (`nnx.with_partitioning`) lie so in the state, with their moments; the
        mesh's axes must be Auto.
      optimizer: for the host's parameters. It is given the loss as ``value``.
      blueprint_optimizer: for the banks; runs in each slot (`optim.per_slot`). A
        `PerSlot` is taken as it is.
      loss: ``loss(outputs, y)`` returns the loss, or ``(loss, score)``. Each is one
        number for every row, or several (pixels, tokens), whose mean is taken, or a
        single number: the mean over the batch. The score counts as accuracy. That the
        shape is one of these is checked; that a single number is a mean over the rows
        given, and not a sum or a mean over fewer of them, cannot be known.
      objective: ``objective(model, batch)``, in place of ``loss``, for batches of any
        pytree. It calls the model itself, with keys and masks as it likes, and returns
        the loss, shaped as for ``loss``, or ``(loss, aux)``. If ``aux`` is a dict, its
        ``"score"`` counts as accuracy, and its ``"weight"`` says how much the batch
        counts among held-out ones, by default the number of its rows. In evaluation
        the model is in evaluation mode.
      wrt: which of the host's variables ``optimizer`` trains, as for `nnx.Optimizer`:
        a type of variable, a function of path and variable, ... Bare arrays and
        variables of other types train only if it matches them. None is a frozen host,
        for which no gradients are computed.
      eval_params: ``eval_params(opt_state, params) -> params``: what to evaluate, and
        `Program.model` to return, in place of the parameters that train, such as an
        average that the optimizer's state holds. By default, if that state holds one
        of `optax.contrib.schedule_free`, its average; else those that train.
      lifecycle_config: minimum ages, gates and grafting.
      controller_config: numbers of the heuristic.
      decide: decides instead of the heuristic, with the signature of `policy.decide`.
      policy: a `Policy`, or what makes one, instead of the heuristic; see
        `policy.Policy`.
      eval_batch: rows that are evaluated at once.
      axis_name: for several devices, the mapped axis that the rows are divided along.
        Call ``step``, ``tick`` and ``evaluate`` inside `jax.pmap` or `jax.shard_map`
        over it, each device with the same state and an equal part of the rows; or use
        `over_mesh`. All devices come to the same state. Plain `jax.jit` on sharded
        arrays needs no axis.
      debug: each tick compares the states of all devices along ``axis_name`` bit for
        bit, and reports whether they agree. Needs ``axis_name``.

    Raises:
      TypeError: if the model or an optimizer is of another kind.
      ValueError: if the model holds nothing that can grow, the controller's blueprint
        is not one of every layer's, ``loss`` and ``objective`` are both given, ``wrt``
        matches nothing, ``eval_params`` returns other parameters, ``eval_batch`` is
        below 1, ``debug`` is given without ``axis_name``, or, with it, the model holds
        an untyped random key.
    """
    _check_kinds(model, optimizer, blueprint_optimizer)
    if objective is not None and loss is not classification:
        raise ValueError(
            "loss and objective must not both be given: objective(model, batch) "
            "returns the loss. Leave one out"
        )
    if eval_batch < 1:
        raise ValueError(f"eval_batch must be at least 1, got {eval_batch}")
    _check_debug(debug, axis_name)
    parts = split_model(model, axis_name, wrt)
    params = {name: values_of(model)[name] for name in parts.host_params()}
    if eval_params is None:
        eval_params = averaged_by(optimizer, params)
    else:
        check_eval_params(eval_params, optimizer, params)
    gates = lifecycle_config or LifecycleConfig()
    asked = policy_of(policy, controller_config, decide)
    _warn_if_frozen(model)
    if wrt is None:
        warn_of_statistics(model)
    strategies = parts.strategies(values_of(model))
    recipe = TrainRecipe(
        parts=parts,
        loss=loss,
        objective=objective,
        optimizer=optax.with_extra_args_support(optimizer),
        eval_params=eval_params,
        bank_optimizer=(
            blueprint_optimizer
            if isinstance(blueprint_optimizer, PerSlot)
            else per_slot(blueprint_optimizer)
        ),
        gates=gates,
        policy=check_trained(parts, policy_for(parts, gates, asked), strategies),
        maker=None if isinstance(asked, Policy) else asked,
        folds=_folds(model, parts, gates, eval_params),
        eval_batch=eval_batch,
        # JAX cannot vmap a branch whose operands vary along a mapped axis.
        at_once=AT_ONCE if axis_name is None else 1,
        axis_name=axis_name,
        debug=debug,
    )
    values = values_of(model)
    how = shardings_of(values)
    initial = jax.tree.map(lambda v: v if is_key(v) else np.asarray(v), values)
    program = _program(recipe, initial)
    return program._replace(init=lambda *given: spread(program.init(*given), how))


def _check_kinds(model: Any, optimizer: Any, blueprint_optimizer: Any) -> None:
    if not isinstance(model, nnx.Module):
        raise TypeError(
            "model must be a Flax NNX module that holds layers which can grow; got "
            f"{type(model).__name__}. For Linen use esper_jax.layers.linen in your own "
            "loop"
        )
    for name, given in (
        ("optimizer", optimizer),
        ("blueprint_optimizer", blueprint_optimizer),
    ):
        if not (hasattr(given, "init") and hasattr(given, "update")):
            raise TypeError(
                f"{name} must be an optax optimizer, such as optax.adam(1e-3); got "
                f"{given!r:.80}"
            )


def _check_debug(debug: bool, axis_name: str | None) -> None:
    if debug and axis_name is None:
        raise ValueError(
            "debug compares the devices along axis_name, so axis_name must be given "
            "with it; got None. With plain jit on sharded arrays, call "
            "parallel.check_replicas(state) between ticks instead"
        )


def _folds(
    model: nnx.Module,
    parts: ModelParts,
    gates: LifecycleConfig,
    eval_params: EvalParams | None,
) -> dict[str, Fold]:
    """Where fossils are folded, which must be weights that are evaluated, too."""
    folds = folds_of(model, parts, gates)
    if folds and eval_params is not None:
        raise ValueError(
            f"fold must be 'never' with weights to evaluate that are others than those "
            f"that train (eval_params, schedule_free); got {gates.fold!r}"
        )
    return folds


def _warn_if_frozen(model: nnx.Module) -> None:
    """Tells that nothing will grow in a model that was left in evaluation mode."""
    beds = [node for _, node in nnx.iter_graph(model) if isinstance(node, SeedBed)]
    if all(bed.deterministic for bed in beds):
        warnings.warn(
            "model is in evaluation mode, and build keeps it there: its seeds measure "
            "nothing, and BatchNorm and Dropout do not train. Call model.train() "
            "before build, if that is not meant",
            stacklevel=3,
        )


def _program(recipe: TrainRecipe, initial: Arrays) -> Program:
    """The jitted functions of a recipe, with the values that a run starts from."""
    parts = recipe.parts
    check = Checks(recipe, initial)

    def step(state: TrainState, batch: Batch) -> TrainState:
        return train_step(recipe, state, batch)[0]

    def step_with_aux(
        state: TrainState, batch: Batch
    ) -> tuple[TrainState, tuple[Array, Any]]:
        return train_step(recipe, state, batch)

    def step_from(
        state: TrainState, data: Batch, order: Array, batch_size: int
    ) -> TrainState:
        position = state.step % (order.shape[0] // batch_size) * batch_size
        if recipe.axis_name is not None:
            batch_size //= collectives.axis_size(recipe.axis_name)
            position += jax.lax.axis_index(recipe.axis_name) * batch_size
        rows = jax.lax.dynamic_slice_in_dim(order, position, batch_size)
        return step(state, jax.tree.map(lambda a: jnp.asarray(a)[rows], data))

    def one_tick(
        state: TrainState, held_out: Batch, outside: Outside | None = None
    ) -> tuple[TrainState, TickReport]:
        return tick(recipe, state, held_out, outside)

    def shown_evaluate(state: TrainState, data: Batch) -> tuple[Array, Array]:
        return evaluate(recipe, parts.values(recipe.shown(state)), data)

    @jax.debug_nans(False)
    def model(state: TrainState) -> nnx.Module:
        # Copies: the state's own arrays are gone once it is donated.
        values = jax.tree.map(jnp.copy, parts.values(recipe.shown(state)))
        return parts.merge(values, train=True, alone=True)

    # The values are an argument: as constants of the program they would cost seconds.
    @unmeasured_is_nan
    @jax.jit
    def init(values: Arrays, rng: Array) -> TrainState:
        return initial_state(recipe, values, rng)

    return Program(
        init=lambda rng, values=initial: init(values, rng),
        **compiled(
            check,
            step=step,
            step_with_aux=step_with_aux,
            step_from=step_from,
            tick=one_tick,
            evaluate=shown_evaluate,
        ),
        model=model,
        grow_capacity=functools.partial(grow_capacity, recipe),
        shrink=functools.partial(give_back, recipe),
        layouts=parts.layouts,
        kinds=parts.kinds,
        gates=recipe.gates,
        axis_name=recipe.axis_name,
        place=lambda name, data, divided: jax.tree.map(jnp.asarray, data),
        check=check,
    )
