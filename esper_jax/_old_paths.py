"""Import paths of version 0.1, which keep working.

Version 0.1 had one flat folder of modules. A name that stood in ``esper_jax.OLD`` is
now found in the modules listed here. Nothing in esper_jax imports through this.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

__all__ = ["install"]

_MOVED = {
    "collectives": ("parallel.collectives",),
    "compare": ("run.compare",),
    "config": ("run.config",),
    "controller": ("policy.heuristic", "policy.config", "policy.memory"),
    "events": ("monitor.words", "monitor.views"),
    "functional": (
        "growth.state",
        "growth.parts",
        "growth.capacity",
        "train.tracing",
        "trees",
    ),
    "governor": ("train.governor", "train.faults", "train.retreat", "growth.reports"),
    "gradients": ("growth.gradients",),
    "grafting": ("lifecycle.grafting",),
    "growable": ("layers.growable",),
    "host_leaves": ("checkpoint.host_leaves",),
    "linen": ("layers.linen",),
    "placement": ("policy.places", "policy.config"),
    "processes": ("parallel.processes",),
    "resizing": ("checkpoint.resizing",),
    "retention": ("checkpoint.retention",),
    "scan": ("train.scan",),
    "signals": ("lifecycle.signals",),
    "stages": ("lifecycle.stages",),
    "state": ("lifecycle.state", "lifecycle.slots", "lifecycle.history"),
    "step_directory": ("checkpoint.step_directory",),
    "step_folder": ("checkpoint.step_folder",),
    "tick": (
        "train.tick",
        "train.evaluation",
        "growth.reports",
        "train.recipe",
    ),
}
"""Modules that are gone, and where their names are."""

_RENAMED = {"LayerRetreat": "SeedMoves"}
"""Names that are others now."""

_ROOMS = {"parallel": {"over_mesh": "train.mesh"}}
"""Modules that are rooms now, and names that have moved out of them."""


class _OldModule(ModuleType):
    """Looks its names up in the modules that took them over."""

    def __getattr__(self, name: str) -> Any:
        old = self.__name__.removeprefix("esper_jax.")
        if not name.startswith("__"):
            for heir in _MOVED[old]:
                module = importlib.import_module(f"esper_jax.{heir}")
                for known in (name, _RENAMED.get(name, name)):
                    if hasattr(module, known):
                        return getattr(module, known)
        homes = ", ".join(f"esper_jax.{heir}" for heir in _MOVED[old])
        raise AttributeError(
            f"{self.__name__} was split up, and none of {homes} has {name!r}"
        )


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules that are gone; a module that only moved is itself."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.removeprefix("esper_jax.") not in _MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _OldModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        heirs = _MOVED[module.__name__.removeprefix("esper_jax.")]
        if len(heirs) == 1:
            heir = importlib.import_module(f"esper_jax.{heirs[0]}")
            sys.modules[module.__name__] = heir


def install() -> None:
    """Makes the old paths importable."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.append(_Finder())
    for room, names in _ROOMS.items():
        for name, home in names.items():
            value = getattr(importlib.import_module(f"esper_jax.{home}"), name)
            setattr(importlib.import_module(f"esper_jax.{room}"), name, value)
