"""`Growth`: growth beside a training loop of one's own.

As an optimizer is, it is a transformation beside the model. The loop, the loss, the
batches, the host's optimizer and its random keys stay the user's.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from esper_jax.growth.beds import name_of
from esper_jax.growth.capacity import give_back, is_settled, switch_off, switch_on
from esper_jax.growth.cautions import warn_of_statistics_once, warn_of_switched_off
from esper_jax.growth.folds import folds_of
from esper_jax.growth.functions import (
    MEASURE_EVERY,
    check_loss,
    check_untraced,
    recipe_for,
    start,
    tick,
    update,
)
from esper_jax.growth.held import GrowthVariable, HeldTree
from esper_jax.growth.outside import Outside
from esper_jax.growth.parts import put_values, split_model, values_of
from esper_jax.growth.recipe import check_known, check_trained
from esper_jax.growth.reports import TickReport
from esper_jax.growth.saving import (
    check_alike,
    others_of,
    put_others,
    remembered_of,
    run_state,
    values_in,
)
from esper_jax.growth.showing import display
from esper_jax.growth.state import Arrays, TrainState
from esper_jax.layers.bed import SeedBed
from esper_jax.layers.keys import key_of
from esper_jax.layers.variables import BlueprintParam, GraftProbe, SeedVariable
from esper_jax.lifecycle.commands import Commands
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.optim import PerSlot
from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.heuristic import policy_of
from esper_jax.policy.interface import Policy, PolicyFactory

__all__ = ["Growth", "GrowthVariable"]


Evaluate = Callable[[Any], Any]
"""``evaluate(model)``: the held-out loss, or ``(loss, score)``."""


class Growth(nnx.Module):
    """Grows a model beside a training loop of one's own.

        growth = Growth(model, optax.adam(3e-4))
        optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)

        @nnx.jit
        def train_step(model, optimizer, growth, batch):
            loss, grads = nnx.value_and_grad(loss_fn, argnums=growth.argnums)(
                model, batch
            )
            optimizer.update(model, grads)
            growth.update(model, grads, loss=loss)
            return loss

        report = growth.tick(model, evaluate)

    `update` is to be called in every step, jitted or not. `tick` runs on the host,
    between steps; it calls the user's ``evaluate`` once for the loss and once more for
    each seed on probation.

    Args:
      model: holds `ChunkedLayer` or `SeedBed` modules; see `make_growable`. Not changed
        here.
      optimizer: for the blueprints; runs in each slot (`optim.per_slot`). A `PerSlot`
        is taken as it is.
      wrt: which of the host's variables are trained, as for `nnx.Optimizer`; None for a
        frozen host, for which no gradients are computed then. The first `update`
        warns of layers whose averages change all the same (`nnx.BatchNorm` in training
        mode).
      lifecycle_config: minimum ages, gates and grafting.
      controller_config: numbers of the heuristic.
      policy: a `Policy`, or what makes one, instead of the heuristic.
      measure: which of the signals that cost a pass over the host's gradients or
        weights are measured: ``"chunk_gradient"``, ``"gradient_ratio"``,
        ``"grad_norm"``, ``"drift"``. The others are NaN in reports. By default those
        that the policy and the seeds' grafting strategies read. Of a frozen host the
        last two are 0, and the first two are refused.
      measure_every: gradients are measured at every so many steps, beginning with the
        first after a tick. Other steps do not read the host's gradients.
      rngs: key ``params`` draws the blueprints and the policy's choices.

    Raises:
      TypeError: if ``optimizer`` or ``policy`` is none.
      ValueError: if the model holds nothing that can grow, the policy does not suit
        it, or reads what ``measure`` leaves out or a frozen host does not have, or
        ``measure`` holds what the host, as far as it trains, does not have.
    """

    def __init__(
        self,
        model: nnx.Module,
        optimizer: optax.GradientTransformation | PerSlot,
        *,
        wrt: Any = nnx.Param,
        lifecycle_config: LifecycleConfig | None = None,
        controller_config: ControllerConfig | None = None,
        policy: Policy | PolicyFactory | None = None,
        measure: Collection[str] | None = None,
        measure_every: int = MEASURE_EVERY,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        values, parts = values_of(model), split_model(model, wrt=wrt)
        recipe = recipe_for(
            parts,
            values,
            optimizer,
            lifecycle_config,
            policy_of(policy, controller_config, None),
            (measure, measure_every),
        )
        folds = folds_of(model, parts, recipe.gates)
        self.recipe = dataclasses.replace(recipe, folds=folds)
        check_trained(parts, self.recipe.policy, parts.strategies(values))
        check_known(parts, measure)
        self.wrt = wrt
        self._off: tuple[str, ...] = ()  # paths of the beds that shrink switched off
        key = key_of(nnx.Rngs(0) if rngs is None else rngs)
        self.state = HeldTree(start(self.recipe, values, key))
        self._shapes = self._shapes_of(values)

    @property
    def argnums(self) -> nnx.DiffState:
        """What to differentiate: the host's variables and those of growth.

        For ``nnx.grad`` and ``nnx.value_and_grad`` of a function whose first argument
        is the model.
        """
        own = nnx.Any(BlueprintParam, GraftProbe)
        if self.wrt is None:
            return nnx.DiffState(0, own)
        # A filter by path finds the seeds, too, which have no gradient.
        host = nnx.All(self.wrt, nnx.Not(SeedVariable))
        return nnx.DiffState(0, nnx.Any(host, own))

    def update(
        self, model: nnx.Module, grads: Any, *, loss: Float[Array, ""] | None = None
    ) -> None:
        """Lets the blueprints learn from one step's gradients.

        Changes nothing of the host.

        Args:
          model: after the forward pass that the gradients are of.
          grads: as ``nnx.value_and_grad(..., argnums=growth.argnums)`` returns them.
          loss: of the step, a single number: for the report of the next tick, and for
            optimizers that read it as ``value``.

        Raises:
          ValueError: if the gradients of the blueprints are missing, the loss is no
            single number, or the model is another than growth was made for.
        """
        check_loss(loss)
        values, given = self._values(model), self._gradients(grads)
        warn_of_statistics_once(self.recipe, model)
        old = self.state.get_value()
        remembered, banks = update(self.recipe, old, values, given, loss)
        self.state.set_value(remembered, old)
        put_values(model, banks)

    def tick(
        self,
        model: nnx.Module,
        evaluate: Evaluate,
        commands: Outside | Mapping[str, Commands] | None = None,
    ) -> TickReport:
        """Measures, decides and carries out what was decided, for all layers.

        Runs on the host. The model that ``evaluate`` gets is a view of ``model`` in the
        same mode, whose seeds record nothing: it may be switched to evaluation mode,
        and what it changes of its variables is lost.

        Args:
          model: the model; its seeds and banks are changed.
          evaluate: ``evaluate(model) -> loss`` or ``-> (loss, score)`` on held-out
            data, each a single number. A loss that is not finite counts as not
            measured.
          commands: what you ask beside the policy, by the same gates: by layer, as
            ``{"layers/0": commands_for(4, {2: Stage.CULLED})}``. Where both ask for the
            same seed, the policy is not heard, and ``by`` of the report says so. The
            first tick with commands compiles once more.

        Returns:
          The report, as host arrays.

        Raises:
          TypeError, ValueError: if ``evaluate`` does not return one or two single
            numbers, the commands do not fit the layers, the model is another than
            growth was made for, or this is being traced.
        """
        if not callable(evaluate):
            raise TypeError(
                "evaluate must be a function of the model that returns the held-out "
                f"loss; got {evaluate!r:.60}"
            )
        values = self._values(model)
        check_untraced("tick", "a model that is", values)
        remembered, new, report = tick(
            self.recipe,
            self.state.get_value(),
            values,
            functools.partial(_measured, evaluate, model),
            commands,
        )
        warn_of_switched_off(self.recipe, model, report, self._off)
        self.state.set_value(remembered)
        put_values(model, new)
        switch_on(model, self._off)
        return report

    @property
    def settled(self) -> bool:
        """Whether the policy lets nothing be born any more, so that `shrink` may act.

        It is the reason `policy.Reason.SETTLED` of reports, as after a trial. Not to be
        read while it is being traced.
        """
        return is_settled(self.state.get_value().growth.memory)

    def shrink(self, model: nnx.Module) -> dict[str, tuple[int, int]]:
        """Gives back the slots that nothing will be born in any more.

            report = growth.tick(model, evaluate)
            growth.shrink(model)  # does nothing until the policy is settled

        Shapes change, which no step can do by itself: call it between steps. What is
        jitted compiles once more, and states that were split before have to be split
        again. No value changes; outputs of adapters may round differently, as fewer
        hidden units are summed. A `ChunkedLayer` in which nothing lives runs its base
        alone from then on (``enabled`` is False), unless a command or `go_on` brings
        something to life in it.

        Args:
          model: the model; its banks, seeds and probes are changed.

        Returns:
          Slots before and after of each layer that has fewer, 0 where the base runs
          alone; empty if there are none, or nothing is `settled`.

        Raises:
          ValueError: if the model is another than growth was made for, or this is being
            traced.
        """
        values = self._values(model)
        check_untraced("shrink", "a model that is", values)
        if not self.settled:
            return {}
        now = self.state.get_value()
        state = run_state(self.recipe, now, values, ())
        before = {name: seeds.capacity for name, seeds in state.seeds.items()}
        state, changed = give_back(self.recipe, state)
        if changed:
            self.recipe = self.recipe.for_slots(state.seeds)
            measured = now.growth.monitor.gradients
            self.state = HeldTree(remembered_of(self.recipe, state, measured))
            new, own = values_in(self.recipe, state), self.recipe.parts.of_beds(changed)
            put_values(model, {name: new[name] for name in own})
            self._shapes = self._shapes_of(values_of(model))
        off = switch_off(model, self.recipe.parts, state.seeds)
        paths = {self.recipe.parts.beds[name].path for name in off}
        self._off = tuple(sorted({*self._off, *paths}))
        return changed | {name: (before[name], 0) for name in off}

    def display(self, model: nnx.Module) -> None:
        """Shows the model's layers with their seeds by stage, alpha and worth.

        In a notebook as HTML, elsewhere as lines; see `esper_jax.growth.display`.

        Args:
          model: the model that grows.

        Raises:
          ValueError: if the model is another than growth was made for.
        """
        self._values(model)
        display(model)

    def run_state(self, model: nnx.Module, *others: Any) -> TrainState:
        """All that this loop is, as one tree of arrays for a `Checkpointer`.

            state = growth.run_state(model, optimizer)
            checkpoints.save(int(state.step), state, data=batches)

        Its layout is that of `build`, which is frozen: later versions read it.

        Args:
          model: the model.
          *others: NNX objects beside it: the host's optimizer, an `nnx.EMA`, the
            random streams.

        Returns:
          The state; its ``opt_state`` holds the arrays of ``others``.

        Raises:
          ValueError: if the model is another than growth was made for.
        """
        self._values(model)
        kept: Any = nnx.state(model, nnx.Not(nnx.Intermediate))
        values = values_of(kept)
        remembered = self.state.get_value()
        return run_state(self.recipe, remembered, values, others_of(others, model))

    def go_on(self, state: TrainState, model: nnx.Module, *others: Any) -> None:
        """Goes on from where `run_state` was called.

            state = growth.run_state(model, optimizer)
            state = checkpoints.restore(state, data=batches).state
            growth.go_on(state, model, optimizer)

        Args:
          state: of the same loop.
          model: made as it was then; its variables are set.
          *others: as they were given to `run_state`; their variables are set.

        Raises:
          ValueError: if the model is another than growth was made for, or the state is
            of other layers or of another number of ``others``.
        """
        check_alike(self.recipe, state, self.run_state(model, *others))
        self.recipe = self.recipe.for_slots(state.seeds)
        measured = self.state.get_value().growth.monitor.gradients
        self.state = HeldTree(remembered_of(self.recipe, state, measured))
        put_values(model, values_in(self.recipe, state))
        self._shapes = self._shapes_of(values_of(model))
        put_others(others, state)
        switch_on(model, self._off)

    def _values(self, model: nnx.Module) -> Arrays:
        """The values of the model's variables, which are those that are known."""
        values = values_of(model)
        parts = self.recipe.parts
        own = [v for bed in parts.beds.values() for v in bed.variables("seeds")]
        missing = [name for name in (*own, *parts.variables) if name not in values]
        if missing:
            raise ValueError(
                "model must be the one that Growth was made for, or one of the same "
                f"structure; got one without {missing[0]!r}"
            )
        for name, shape in self._shapes:
            if np.shape(values[name]) != shape:
                raise ValueError(
                    "model must be the one that Growth was made for, or one of the "
                    f"same structure; got one whose {name!r} has shape "
                    f"{np.shape(values[name])}, and not {shape}. After grow_capacity, "
                    "make Growth anew"
                )
        return values

    def _shapes_of(self, values: Arrays) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Names and shapes of the variables that growth computes with."""
        parts = self.recipe.parts
        names = (*parts.host_params(), *parts.of_beds(parts.beds))
        return tuple((name, np.shape(values[name])) for name in names)

    def _gradients(self, grads: Any) -> Arrays:
        """The gradients by variable."""
        given = {} if grads is None else values_of(grads)
        for bed in self.recipe.parts.beds.values():
            for name in (*bed.variables("bank"), *bed.variables("probe")):
                if name not in given:
                    got = "None" if grads is None else "none"
                    raise ValueError(
                        "grads must hold the gradients of the blueprints, of "
                        f"{name!r} for one; got {got}. Differentiate with "
                        "nnx.value_and_grad(loss_fn, argnums=growth.argnums)"
                    )
        return given


def _measured(evaluate: Evaluate, model: nnx.Module, probes: Mapping[str, Any]) -> Any:
    """What ``evaluate`` returns.

    Args:
      evaluate: the user's.
      model: seen by it in the same mode, recording nothing.
      probes: added to the alphas of beds, by path.
    """
    view = nnx.merge(*nnx.split(model), copy=True)
    for path, node in nnx.iter_graph(view):
        if isinstance(node, SeedBed):
            node.deterministic = True
            if (probe := probes.get(name_of(path))) is not None:
                node.probe.set_value(probe)
    return evaluate(view)
