"""What a policy reads at a tick, as messages of a run to a remote policy."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jaxtyping import Int

from esper_jax import blueprints
from esper_jax.bus.envelope import MessageError
from esper_jax.bus.messages import Column, Layer, LayerSeen, Message, TickSeen
from esper_jax.growth.reports import TickReport
from esper_jax.lifecycle.rules import LifecycleConfig
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.state import SeedState, init_seeds
from esper_jax.policy.interface import SAMPLED, LayerShape

__all__ = ["Lent", "Sight", "gates_in", "layers_of", "lent", "seen_told", "sight_of"]


class Lent(NamedTuple):
    """What is fixed of a run that a remote policy may decide in."""

    ticks: int
    """For how many ticks a decision may silence the run's own policy."""
    layers: dict[str, Layer]
    costs: Mapping[str, Int[np.ndarray, "N S"]]
    """Parameters of each blueprint on each chunk, by layer."""
    aims: Mapping[str, list[bool]]
    """Which blueprints start in the gradient's direction, by layer."""
    gates: LifecycleConfig
    measured: frozenset[str]
    """Which of `policy.interface.SAMPLED` are measured."""


class Sight(NamedTuple):
    """What a policy reads of one layer."""

    shape: LayerShape
    seeds: SeedState
    signals: Signals


def layers_of(model: Any) -> dict[str, Layer]:
    """What a `Service` must know of the layers that can grow.

    Args:
      model: a `Growth`, or the `Program` of `build`.
    """
    parts = model if hasattr(model, "layouts") else model.recipe.parts
    return {
        name: Layer(layout.num_seeds, tuple(b.name for b in parts.kinds[name]))
        for name, layout in parts.layouts.items()
    }


def lent(model: Any, ticks: int) -> Lent:
    """What is fixed of a model that grows.

    Args:
      model: a `Growth`, or the `Program` of `build`.
      ticks: for how many ticks a decision may silence the run's own policy.

    Raises:
      ValueError: if they are fewer than one.
    """
    if ticks < 1:
        raise ValueError(
            f"ticks: expected at least 1, for which the run's own policy is silent "
            f"after a decision; got {ticks}"
        )
    recipe = getattr(model, "recipe", None)
    parts = model if recipe is None else recipe.parts
    costs = {
        name: blueprints.param_counts(parts.kinds[name], layout.sizes)
        for name, layout in parts.layouts.items()
    }
    aims = {n: [blueprints.aims([k]) for k in of] for n, of in parts.kinds.items()}
    gates = model.gates if recipe is None else recipe.gates
    # A program measures all of them.
    measured = SAMPLED if recipe is None else recipe.measured
    return Lent(ticks, layers_of(model), costs, aims, gates, measured)


def seen_told(
    of: Lent, report: TickReport, seeds: Mapping[str, SeedState], rollbacks: int
) -> Iterator[Message]:
    """One message for each layer, and one for the tick.

    Args:
      of: what is fixed.
      report: of the tick, with host values.
      seeds: after the tick, by layer, likewise.
      rollbacks: of the governor so far.
    """
    tick = int(report.tick)
    for name, state in seeds.items():
        yield LayerSeen(
            tick=tick,
            layer=name,
            blueprints=list(of.layers[name].blueprints),
            costs=_column(of.costs[name]),
            aims=of.aims[name],
            seeds=_columns(state),
            signals=_columns(report.layers[name].signals),
        )
    yield TickSeen(
        tick=tick,
        rollbacks=rollbacks,
        ticks=of.ticks,
        layers=len(seeds),
        measured=sorted(of.measured),
        gates=json.dumps(dataclasses.asdict(of.gates)),
    )


def gates_in(message: TickSeen) -> LifecycleConfig:
    """The gates that a run tells.

    Raises:
      MessageError: if they are none that this version knows.
    """
    try:
        return msgspec.convert(json.loads(message.gates), LifecycleConfig)
    except (ValueError, TypeError) as error:
        raise MessageError(f"TickSeen: gates: {error!s:.300}") from None


def sight_of(message: LayerSeen) -> Sight:
    """What a policy reads of a layer. Inverse of what `seen_told` does.

    ``mean_worth`` is NaN for seeds that moved at this very tick: what was measured
    belongs to the stage that they left.

    Raises:
      MessageError: naming the array that is missing, or not of the dtype and shape that
        it must have.
    """
    where = f"LayerSeen: {message.layer}"
    costs = _array(f"{where}: costs", message.costs)
    seeds, slots = (_size(where, message, n) for n in ("stage", "seed_of_slot"))
    rows = len(message.blueprints)
    if not rows or costs.shape != (rows, seeds) or not 1 <= slots <= seeds:
        raise MessageError(
            f"{where}: costs: expected one row for each of {rows} "
            f"blueprints, and one column for each of {seeds} seeds, which have 1 to "
            f"{seeds} slots; got shape {costs.shape} and {slots} slots"
        )
    state = _filled(f"{where}: seeds", init_seeds(seeds, slots), message.seeds)
    # Signals that all seeds share are numbers.
    given = {n: tuple(column.shape) for n, column in message.signals.items()}
    shapes = {
        field.name: (seeds,) if given.get(field.name) else ()
        for field in dataclasses.fields(Signals)
    }
    like = Signals(**{n: np.zeros(s, np.float32) for n, s in shapes.items()})  # type: ignore[arg-type]
    signals = _filled(f"{where}: signals", like, message.signals)
    moved = np.asarray(state.epochs_in_stage) == 0
    mean = jnp.where(moved, jnp.nan, signals.mean_worth)
    shape = LayerShape(
        num_seeds=seeds, capacity=slots, costs=costs, aims=tuple(message.aims)
    )
    return Sight(shape, state, dataclasses.replace(signals, mean_worth=mean))


def _column(value: Any) -> Column:
    array = np.asarray(value)
    return Column(
        dtype=array.dtype.str, shape=list(array.shape), data=array.tobytes("C")
    )


def _columns(tree: Any) -> dict[str, Column]:
    return {name: _column(leaf) for name, leaf in _named(tree)}


def _named(tree: Any) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in leaves
    ]


def _size(where: str, message: LayerSeen, name: str) -> int:
    column = message.seeds.get(name)
    if column is None or len(column.shape) != 1:
        raise MessageError(f"{where}: seeds: expected an array {name!r} of one axis")
    return column.shape[0]


def _array(where: str, column: Column) -> np.ndarray:
    try:
        return np.frombuffer(column.data, column.dtype).reshape(column.shape)
    except (ValueError, TypeError) as error:
        raise MessageError(f"{where}: not an array: {error!s:.200}") from None


def _filled(where: str, like: Any, columns: Mapping[str, Column]) -> Any:
    """The arrays of a message in the place of those of ``like``."""
    filled = []
    for name, leaf in _named(like):
        if name not in columns:
            raise MessageError(f"{where}: {name!r} is missing")
        array = _array(f"{where}: {name}", columns[name])
        if array.dtype != leaf.dtype or array.shape != leaf.shape:
            raise MessageError(
                f"{where}: {name}: expected {leaf.dtype} of shape {leaf.shape}, got "
                f"{array.dtype} of shape {array.shape}"
            )
        filled.append(jnp.asarray(array))
    return jax.tree.unflatten(jax.tree.structure(like), filled)
