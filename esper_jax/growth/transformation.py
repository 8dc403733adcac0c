"""`Growth`: growth beside a training loop of one's own.

As an optimizer is, it is a transformation beside the model. The loop, the loss, the
batches, the host's optimizer and its random keys stay the user's.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key, UInt

from esper_jax.groups import flat_slots
from esper_jax.growth.births import births, born_in
from esper_jax.growth.measure import asked_for_worth
from esper_jax.growth.parts import split_model, values_of
from esper_jax.growth.recipe import Recipe, check_measured, policy_for, what_is_read
from esper_jax.growth.reports import TickReport
from esper_jax.growth.state import Arrays, GrowthState
from esper_jax.growth.tick import Seen, advance
from esper_jax.growth.update import BankGradients, Learned, update_banks
from esper_jax.growth.watch import StepGradients, start_monitor, watch
from esper_jax.layers.bed import SeedBed
from esper_jax.layers.variables import BlueprintParam, GraftProbe, VariableTree
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.state import SeedState, slot_coefficients
from esper_jax.optim import PerSlot, per_slot
from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.heuristic import policy_of
from esper_jax.policy.interface import Policy, PolicyFactory

__all__ = ["MEASURE_EVERY", "Growth", "GrowthVariable", "Remembered", "Sums"]

MEASURE_EVERY = 8
"""Default number of steps of which one measures the host's gradients."""


class GrowthVariable(nnx.Variable):
    """An array of what growth `Remembered`."""


class Sums(NamedTuple):
    """Sums over the steps since the last tick, by group.

    They are in few arrays here and not in the layers' seeds, which take them over at
    the next tick.
    """

    calls: dict[str, Int[Array, " L"]]
    """Calls of each layer that ``update`` knows of."""
    gains: dict[str, Float[Array, "L K"]]
    """See `SeedState.gain`."""
    errors: dict[str, UInt[Array, "L K"]]
    """See `SeedState.errors`."""


class Remembered(NamedTuple):
    """What growth remembers beside the model, which holds seeds, banks and probes."""

    growth: GrowthState
    moments: dict[str, Any]
    """State of the bank's optimizer, by group: of its ``L * K`` slots."""
    sums: Sums


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
        frozen host, for which no gradients are computed then.
      lifecycle_config: minimum ages, gates and grafting.
      controller_config: numbers of the heuristic.
      policy: a `Policy`, or what makes one, instead of the heuristic.
      measure: which of the signals that cost a pass over the host's gradients or
        weights are measured: ``"chunk_gradient"``, ``"gradient_ratio"``,
        ``"grad_norm"``, ``"drift"``. The others are NaN in reports. By default those
        that the policy and the seeds' grafting strategies read.
      measure_every: gradients are measured at every so many steps, beginning with the
        first after a tick. Other steps do not read the host's gradients.
      rngs: key ``params`` draws the blueprints and the policy's choices.

    Raises:
      TypeError: if ``optimizer`` or ``policy`` is none.
      ValueError: if the model holds nothing that can grow, the policy does not suit
        it, or reads what ``measure`` leaves out.
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
        if not isinstance(optimizer, PerSlot | optax.GradientTransformation):
            raise TypeError(
                "optimizer must be an optax optimizer for the blueprints, or a PerSlot;"
                f" got {optimizer!r}"
            )
        parts = split_model(model, wrt=wrt)
        gates = lifecycle_config or LifecycleConfig()
        values = values_of(model)
        chosen = policy_for(parts, gates, policy_of(policy, controller_config, None))
        read = what_is_read(chosen, parts.strategies(values))
        self.recipe = Recipe(
            parts=parts,
            bank_optimizer=(
                optimizer if isinstance(optimizer, PerSlot) else per_slot(optimizer)
            ),
            gates=gates,
            policy=chosen,
            measured=check_measured(measure, measure_every, read),
            measure_every=measure_every,
        )
        self.wrt = wrt
        key = (rngs or nnx.Rngs(0)).params()
        self.state = VariableTree(GrowthVariable, self._start(values, key))

    @property
    def argnums(self) -> nnx.DiffState:
        """What to differentiate: the host's variables and those of growth.

        For ``nnx.grad`` and ``nnx.value_and_grad`` of a function whose first argument
        is the model.
        """
        host = () if self.wrt is None else (self.wrt,)
        return nnx.DiffState(0, nnx.Any(*host, BlueprintParam, GraftProbe))

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
        if loss is not None and jnp.shape(loss) != ():
            raise ValueError(
                f"loss must be a single number, got shape {jnp.shape(loss)}; take the "
                "mean over the rows"
            )
        recipe, (state, moments, sums) = self.recipe, self.state.get_value()
        parts = recipe.parts
        values, given = self._values(model), self._gradients(grads)
        seeds = parts.take_beds(values, "seeds")
        banks = parts.take_beds(values, "bank")
        bank_grads = parts.take_beds(given, "bank")
        calls = parts.groups.join({path: s.steps for path, s in seeds.items()})
        new_calls = {key: calls[key] - before for key, before in sums.calls.items()}
        learned = update_banks(
            recipe,
            seeds,
            Learned(banks, sums.gains, sums.errors, moments),
            BankGradients(bank_grads, parts.take_beds(given, "probe"), new_calls),
            step=state.step,
            value=jnp.float32(jnp.nan) if loss is None else loss,
        )
        host = {name: given[name] for name in parts.host_params() if name in given}
        of_step = StepGradients(host, bank_grads, seeds)
        monitor = watch(recipe, state.monitor, of_step, loss)
        state = dataclasses.replace(state, step=state.step + 1, monitor=monitor)
        sums = Sums(calls, learned.gains, learned.errors)
        self.state.set_value(Remembered(state, learned.moments, sums))
        self._put(model, parts.put_beds("bank", learned.banks))

    def tick(self, model: nnx.Module, evaluate: Evaluate) -> TickReport:
        """Measures, decides and carries out what was decided, for all layers.

        Runs on the host. The model that ``evaluate`` gets is a view of ``model`` in the
        same mode, whose seeds record nothing: it may be switched to evaluation mode,
        and what it changes of its variables is lost.

        Args:
          model: the model; its seeds and banks are changed.
          evaluate: ``evaluate(model) -> loss`` or ``-> (loss, score)`` on held-out
            data, each a single number. A loss that is not finite counts as not
            measured.

        Returns:
          The report, as host arrays.

        Raises:
          ValueError: if ``evaluate`` does not return one or two single numbers, the
            model is another than growth was made for, or this is being traced.
        """
        values = self._values(model)
        if any(isinstance(value, jax.core.Tracer) for value in values.values()):
            raise ValueError(
                "tick must be called between steps, outside of jax.jit and nnx.jit, "
                "since evaluate may be any function; got a model that is being traced"
            )
        seeds = self.recipe.parts.take_beds(values, "seeds")
        loss, score = _measured(evaluate, model)
        worth = {
            path: self._worth(model, evaluate, path, layers, loss)
            for path, layers in seeds.items()
        }
        seen = Seen(
            jnp.float32(loss),
            jnp.float32(score),
            self.recipe.parts.groups.join(worth),
            jnp.ones((), bool),
        )
        new, report = self._advance(values, seen)
        self._put(model, _placed(new, values))
        return report

    def _advance(self, values: Arrays, seen: Seen) -> tuple[Arrays, TickReport]:
        """Decides and carries out what was decided; the model's new values.

        Groups are put together and taken apart on the host: on a device, that would
        compile for each layer.
        """
        recipe, (state, moments, sums) = self.recipe, self.state.get_value()
        parts, groups = recipe.parts, recipe.parts.groups
        seeds, sums = jax.device_get((parts.take_beds(values, "seeds"), sums))
        before = {
            key: dataclasses.replace(s, gain=sums.gains[key], errors=sums.errors[key])
            for key, s in groups.join(seeds).items()
        }
        drifts = parts.host_params() if recipe.wants("drift") else ()
        host = {name: values[name] for name in drifts}
        state, after, birth, report = _advance(recipe, state, before, host, seen)
        after, report = jax.device_get((after, report))
        new = parts.put_beds("seeds", groups.part(after))
        if any(np.any(born_in(before[key], after[key])) for key in before):
            banks = groups.join(jax.device_get(parts.take_beds(values, "bank")))
            banks, moments = _births(recipe, (before, after), banks, moments, birth)
            new |= parts.put_beds("bank", groups.part(jax.device_get(banks)))
        zeros = jax.tree.map(jnp.zeros_like, sums)
        self.state.set_value(Remembered(state, moments, zeros))
        return new, report.replace(layers=groups.split(report.layers))

    def _start(self, values: Arrays, key: Key[Array, ""]) -> Remembered:
        recipe, parts = self.recipe, self.recipe.parts
        params = {name: values[name] for name in parts.host_params()}
        policy, births = jax.random.split(key)
        banks = parts.groups.join(parts.take_beds(values, "bank"))
        state = GrowthState(
            step=jnp.zeros((), jnp.int32),
            ticks=jnp.zeros((), jnp.int32),
            rng=births,
            memory=recipe.policy.init(parts.shapes(), policy),
            monitor=start_monitor(recipe, params),
        )
        moments = {
            name: recipe.bank_optimizer.init(flat_slots(bank))
            for name, bank in banks.items()
        }
        seeds = parts.groups.join(parts.take_beds(values, "seeds"))
        sums = Sums(
            calls={key: jnp.zeros_like(s.steps) for key, s in seeds.items()},
            gains={key: jnp.zeros_like(s.gain) for key, s in seeds.items()},
            errors={key: jnp.zeros_like(s.errors) for key, s in seeds.items()},
        )
        return Remembered(state, moments, sums)

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
        return values

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

    def _put(self, model: nnx.Module, values: Arrays) -> None:
        """Writes values, by name, into the model's variables."""
        flat = [
            (path, variable.replace(values[name]))
            for name, (path, variable) in self.recipe.parts.variables.items()
            if name in values
        ]
        nnx.update(model, nnx.from_flat_state(flat))

    def _worth(
        self,
        model: nnx.Module,
        evaluate: Evaluate,
        path: str,
        seeds: SeedState,
        loss: float,
    ) -> Float[np.ndarray, "*stack K"]:
        """Worth of the seed in each slot of a bed; NaN where none is asked for."""
        asked = functools.partial(asked_for_worth, gates=self.recipe.gates)
        coefficients = slot_coefficients
        for _ in range(seeds.seed_of_slot.ndim - 1):
            asked, coefficients = jax.vmap(asked), jax.vmap(coefficients)
        alpha = np.asarray(coefficients(seeds)[0])
        worth = np.full(alpha.shape, np.nan, np.float32)
        for slot in zip(*np.nonzero(np.asarray(asked(seeds))), strict=True):
            probe = np.zeros_like(alpha)
            probe[slot] = -alpha[slot]
            worth[slot] = _measured(evaluate, model, path, probe)[0] - loss
        return worth


_advance = jax.jit(advance, static_argnums=0)
_births = jax.jit(births, static_argnums=0)


def _placed(new: Arrays, old: Arrays) -> Arrays:
    """Arrays of the host on the devices of those that they replace."""
    names = list(new)
    shardings = [
        old[n].sharding if getattr(old[n], "committed", False) else None for n in names
    ]
    placed = [
        jnp.asarray(new[n]) if where is None else jax.device_put(new[n], where)
        for n, where in zip(names, shardings, strict=True)
    ]
    return dict(zip(names, placed, strict=True))


def _measured(
    evaluate: Evaluate, model: nnx.Module, bed: str = "", probe: Any = None
) -> tuple[float, float]:
    """Held-out loss and score, NaN for none.

    Args:
      evaluate: the user's.
      model: seen by it in the same mode, recording nothing.
      bed: path of a `SeedBed`.
      probe: added to the alphas of that bed.
    """
    view = nnx.merge(*nnx.split(model), copy=True)
    for path, node in nnx.iter_graph(view):
        if isinstance(node, SeedBed):
            node.deterministic = True
            if probe is not None and "/".join(map(str, path)) == bed:
                node.probe.set_value(jnp.asarray(probe))
    result = evaluate(view)
    pair = result if isinstance(result, tuple) else (result, np.nan)
    if len(pair) != 2 or not all(map(_is_number, pair)):
        count = f"{len(pair)} values: " if isinstance(result, tuple) else ""
        raise ValueError(
            "evaluate must return the held-out loss, or (loss, score), each a single "
            f"number; got {count}{', '.join(map(_kind, pair))}. Take means over the "
            "rows, and leave anything else out"
        )
    return float(pair[0]), float(pair[1])


def _is_number(x: Any) -> bool:
    return (
        not isinstance(x, str | bytes)
        and np.ndim(x) == 0
        and np.issubdtype(np.asarray(x).dtype, np.number)
    )


def _kind(x: Any) -> str:
    shape = getattr(x, "shape", None)
    return type(x).__name__ if shape is None else f"an array of shape {shape}"
