"""What is told once, since it would else go wrong without a word."""

import warnings
import weakref
from collections.abc import Collection, Sequence

import numpy as np
from flax import nnx

from esper_jax.growth.beds import name_of
from esper_jax.growth.recipe import Recipe
from esper_jax.growth.reports import LayerReport, TickReport
from esper_jax.layers.chunked import ChunkedLayer
from esper_jax.lifecycle.stages import Stage

__all__ = ["warn_of_statistics", "warn_of_statistics_once", "warn_of_switched_off"]

_MOST = 4
"""How many layers a warning names."""

_LOOKED_AT: weakref.WeakSet[Recipe] = weakref.WeakSet()
"""Recipes whose models were looked at. No attribute of `Growth`: to set one while a
step is traced would change what the step was compiled for."""


_SWITCHED_OFF: weakref.WeakSet[Recipe] = weakref.WeakSet()
"""Recipes of which it was told that something grows where it does not count."""


def warn_of_switched_off(
    recipe: Recipe, model: nnx.Module, report: TickReport, off: Collection[str]
) -> None:
    """Warns, once, of a tick that decides about seeds in layers that are switched off.

    They count for nothing there, and are judged by that.

    Args:
      recipe: what the model is grown by.
      model: before the tick's changes.
      report: of the tick.
      off: paths of the beds of layers that `switch_off` switched off, which are
        switched on again as soon as something lives in them.
    """
    beds = {n: b.path for n, b in recipe.parts.beds.items() if b.path not in off}
    moved = [name for name in beds if _moved(report.layers[name])]
    if recipe in _SWITCHED_OFF or not moved:
        return
    plain = {
        name_of((*path, "bed"))
        for path, node in nnx.iter_graph(model)
        if isinstance(node, ChunkedLayer) and not node.enabled
    }
    wrong = [name for name in moved if beds[name] in plain]
    if not wrong:
        return
    _SWITCHED_OFF.add(recipe)
    warnings.warn(
        f"{_listed(wrong)} switched off (enabled=False): what grows there does not "
        "count, and is judged as worth nothing. Call tick where it counts: switch the "
        "layers on, as model.set_attributes(ChunkedLayer, enabled=True) does",
        stacklevel=3,
    )


def _moved(layer: LayerReport) -> bool:
    """Whether a seed of a layer was born, went on or was removed."""
    lives = [
        (stage >= Stage.GERMINATED) & (stage <= Stage.FOSSILIZED)
        for stage in map(np.asarray, (layer.source, layer.stage))
    ]
    return bool(np.any((layer.source != layer.stage) & (lives[0] | lives[1])))


def warn_of_statistics_once(recipe: Recipe, model: nnx.Module) -> None:
    """`warn_of_statistics` of a frozen host, at the first step of it alone.

    Args:
      recipe: what the model is grown by.
      model: as it is in a step.
    """
    if not recipe.parts.trained and recipe not in _LOOKED_AT:
        _LOOKED_AT.add(recipe)
        warn_of_statistics(model, stacklevel=4)


def warn_of_statistics(model: nnx.Module, stacklevel: int = 3) -> None:
    """Warns of layers of a frozen host whose averages each forward pass changes.

    Args:
      model: its layers are looked at, `nnx.BatchNorm` and others with its attribute
        ``use_running_average``.
      stacklevel: of the warning.
    """
    moving = [
        name_of(path) or type(node).__name__
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Module)
        and getattr(node, "use_running_average", None) is False
        and any(isinstance(value, nnx.BatchStat) for value in vars(node).values())
    ]
    if moving:
        warnings.warn(
            f"the host is frozen (wrt=None), but {_listed(moving)} in training mode: "
            "each forward pass changes the averages there, so with enabled=False the "
            "model will not be the one from before. Set use_running_average=True, as "
            "model.set_attributes(nnx.BatchNorm, use_running_average=True) does, or "
            "call model.eval(), with which layers that can grow measure nothing",
            stacklevel=stacklevel,
        )


def _listed(layers: Sequence[str]) -> str:
    """The first of the layers by name, with the verb."""
    named = ", ".join(map(repr, layers[:_MOST]))
    if len(layers) == 1:
        return f"layer {named} is"
    more = f" and {len(layers) - _MOST} more" if len(layers) > _MOST else ""
    return f"layers {named}{more} are"
