"""`Growth`: growth beside a training loop of one's own.

As an optimizer is, it is a transformation beside the model. The loop, the loss, the
batches, the host's optimizer and its random keys stay the user's.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct
from jaxtyping import Array, Float, Int, Key

from esper_jax.blueprints import Bank
from esper_jax.growth.measure import asked_for_worth
from esper_jax.growth.parts import ModelParts, split_model, values_of
from esper_jax.growth.recipe import Recipe, policy_for
from esper_jax.growth.reports import TickReport
from esper_jax.growth.state import Arrays, GovernorMemory, Monitor, TrainState
from esper_jax.growth.tick import Seen, advance
from esper_jax.growth.update import (
    Layer,
    LayerGradients,
    add_gradients,
    update_layer,
)
from esper_jax.layers.bed import SeedBed
from esper_jax.layers.variables import BlueprintParam, GraftProbe, VariableTree
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.state import SeedState, slot_coefficients
from esper_jax.optim import PerSlot, per_slot
from esper_jax.policy.config import ControllerConfig
from esper_jax.policy.heuristic import policy_of
from esper_jax.policy.interface import Policy, PolicyFactory

__all__ = ["Growth", "GrowthState", "GrowthVariable"]


class GrowthVariable(nnx.Variable):
    """An array of the `GrowthState`."""


@struct.dataclass
class GrowthState:
    """What growth remembers beside the model.

    Seeds, banks and probes are in the model itself.
    """

    step: Int[Array, ""]
    """Calls of ``update`` so far."""
    ticks: Int[Array, ""]
    rng: Key[Array, ""]
    """Draws newborn blueprints."""
    moments: dict[str, Any]
    """State of each bank's optimizer, by layer."""
    memory: Any
    """What the policy remembers."""
    monitor: Monitor
    calls: dict[str, Int[Array, ""]]
    """Calls of each layer since the last tick that ``update`` knows of."""


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
      rngs: key ``params`` draws the blueprints and the policy's choices.

    Raises:
      TypeError: if ``optimizer`` or ``policy`` is none.
      ValueError: if the model holds nothing that can grow, or the policy does not suit
        it.
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
        rngs: nnx.Rngs | None = None,
    ) -> None:
        if not isinstance(optimizer, PerSlot | optax.GradientTransformation):
            raise TypeError(
                "optimizer must be an optax optimizer for the blueprints, or a PerSlot;"
                f" got {optimizer!r}"
            )
        parts = split_model(model, wrt=wrt)
        gates = lifecycle_config or LifecycleConfig()
        self.recipe = Recipe(
            parts=parts,
            bank_optimizer=(
                optimizer if isinstance(optimizer, PerSlot) else per_slot(optimizer)
            ),
            gates=gates,
            policy=policy_for(parts, gates, policy_of(policy, controller_config, None)),
        )
        self.wrt = wrt
        key = (rngs or nnx.Rngs(0)).params()
        self.state = VariableTree(GrowthVariable, self._start(values_of(model), key))

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
        parts, state = self.recipe.parts, self.state.get_value()
        values = self._values(model)
        given = self._gradients(grads)
        seeds, banks = parts.take(values, "seeds"), parts.take(values, "bank")
        bank_grads, gains = parts.take(given, "bank"), parts.take(given, "probe")
        layers = {
            name: update_layer(
                self.recipe.bank_optimizer,
                Layer(seeds[name], banks[name], state.moments[name]),
                LayerGradients(
                    bank_grads[name],
                    gains[name],
                    seeds[name].steps - state.calls[name],
                ),
                step=state.step,
                value=jnp.float32(jnp.nan) if loss is None else loss,
            )
            for name in parts.beds
        }
        host = {name: given[name] for name in parts.host_params() if name in given}
        monitor = state.monitor
        self.state.set_value(
            dataclasses.replace(
                state,
                step=state.step + 1,
                moments={name: layer.moments for name, layer in layers.items()},
                calls={name: layer.seeds.steps for name, layer in layers.items()},
                monitor=dataclasses.replace(
                    monitor,
                    gradients=add_gradients(
                        parts, monitor.gradients, seeds, host, bank_grads
                    ),
                    train_loss=monitor.train_loss
                    + (jnp.nan if loss is None else jnp.asarray(loss, jnp.float32)),
                    grad_norm=monitor.grad_norm + optax.tree.norm(host)
                    if host
                    else monitor.grad_norm + jnp.nan,
                    steps=monitor.steps + 1,
                ),
            )
        )
        self._put(
            model,
            {name: layer.seeds for name, layer in layers.items()},
            {name: layer.bank for name, layer in layers.items()},
        )

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
        parts, state = self.recipe.parts, self.state.get_value()
        values = self._values(model)
        if any(isinstance(value, jax.core.Tracer) for value in values.values()):
            raise ValueError(
                "tick must be called between steps, outside of jax.jit and nnx.jit, "
                "since evaluate may be any function; got a model that is being traced"
            )
        seeds = parts.take(values, "seeds")
        loss, score = _measured(evaluate, model)
        worth = {
            name: self._worth(model, evaluate, name, layer, loss)
            for name, layer in seeds.items()
        }
        whole = TrainState(
            step=state.step,
            ticks=state.ticks,
            rng=state.rng,
            params={name: values[name] for name in parts.host_params()},
            opt_state=(),
            banks=parts.take(values, "bank"),
            bank_opt=state.moments,
            seeds=seeds,
            rest={},
            memory=state.memory,
            monitor=state.monitor,
            governor=GovernorMemory.start(),
        )
        seen = Seen(
            jnp.float32(loss),
            jnp.float32(score),
            jax.tree.map(jnp.asarray, worth),
            jnp.ones((), bool),
        )
        whole, report = _advance(self.recipe, whole, seen)
        self.state.set_value(
            dataclasses.replace(
                state,
                ticks=whole.ticks,
                rng=whole.rng,
                moments=whole.bank_opt,
                memory=whole.memory,
                monitor=whole.monitor,
                calls=jax.tree.map(jnp.zeros_like, state.calls),
            )
        )
        self._put(model, whole.seeds, whole.banks)
        return jax.device_get(report)

    def _start(self, values: Arrays, key: Key[Array, ""]) -> GrowthState:
        parts = self.recipe.parts
        params = {name: values[name] for name in parts.host_params()}
        host_mean = {name: parts.host_weights(params, name) for name in parts.beds}
        num_seeds = {name: layout.num_seeds for name, layout in parts.layouts.items()}
        policy, births = jax.random.split(key)
        return GrowthState(
            step=jnp.zeros((), jnp.int32),
            ticks=jnp.zeros((), jnp.int32),
            rng=births,
            moments={
                name: self.recipe.bank_optimizer.init(bank)
                for name, bank in parts.take(values, "bank").items()
            },
            memory=self.recipe.policy.init(parts.shapes(), policy),
            monitor=Monitor.start(jax.tree.map(jnp.array, host_mean), num_seeds),
            calls={name: jnp.zeros((), jnp.int32) for name in parts.beds},
        )

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

    def _put(
        self, model: nnx.Module, seeds: dict[str, SeedState], banks: dict[str, Bank]
    ) -> None:
        """Writes seeds and banks into the model's variables."""
        parts = self.recipe.parts
        new = parts.joined("seeds", seeds) | parts.joined("bank", banks)
        flat = [
            (path, variable.replace(new[name]))
            for name, (path, variable) in parts.variables.items()
            if name in new
        ]
        nnx.update(model, nnx.from_flat_state(flat))

    def _worth(
        self,
        model: nnx.Module,
        evaluate: Evaluate,
        name: str,
        layer: SeedState,
        loss: float,
    ) -> Float[np.ndarray, " K"]:
        """Worth of the seed in each slot of a layer; NaN where none is asked for."""
        parts = self.recipe.parts
        alpha = np.asarray(slot_coefficients(layer)[0])
        asked = np.asarray(asked_for_worth(layer, self.recipe.gates))
        worth = np.full(alpha.shape, np.nan, np.float32)
        for slot in np.flatnonzero(asked):
            probe = np.zeros_like(alpha)
            probe[slot] = -alpha[slot]
            others = {n: jnp.zeros(b, jnp.float32) for n, b in _probes(parts, model)}
            probes = parts.joined("probe", others | {name: jnp.asarray(probe)})
            worth[slot] = _measured(evaluate, model, probes)[0] - loss
        return worth


_advance = jax.jit(advance, static_argnums=0)


def _probes(parts: ModelParts, model: nnx.Module) -> list[tuple[str, tuple[int, ...]]]:
    probes = parts.take(values_of(model), "probe")
    return [(name, probe.shape) for name, probe in probes.items()]


def _measured(
    evaluate: Evaluate, model: nnx.Module, probes: Arrays | None = None
) -> tuple[float, float]:
    """Held-out loss and score, NaN for none, of the model with these probes."""
    view = nnx.merge(*nnx.split(model), copy=True)
    for path, node in nnx.iter_graph(view):
        if isinstance(node, SeedBed):
            node.deterministic = True
            where = "/".join(map(str, (*path, "probe")))
            if probes is not None:
                node.probe.set_value(probes[where])
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
