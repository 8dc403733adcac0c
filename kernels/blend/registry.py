"""Finds the backends, and chooses one.

Every sub-package of `esper_jax.kernels.blend` is a backend: it has the name that
``implementation=`` takes, and exports a `Backend` called ``BACKEND``. A further backend
is one more folder. Plain JAX, ``"xla"``, is always there.
"""

import functools
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any

import jax

from esper_jax.kernels.blend import reference
from esper_jax.kernels.blend.backend import Backend
from esper_jax.kernels.blend.static import Static

__all__ = ["backends", "check_implementation", "choose", "missing"]


def _path() -> list[str]:
    """Folders that hold the backends."""
    return list(sys.modules[__package__].__path__)


@functools.cache
def _names() -> tuple[str, ...]:
    """Every name that ``implementation=`` takes, whether or not it can be imported."""
    folders = [m.name for m in pkgutil.iter_modules(_path()) if m.ispkg]
    return (*folders, reference.BACKEND.name)


@functools.cache
def _found() -> tuple[dict[str, Backend], dict[str, str]]:
    """The backends by name, most preferred first; and why others are missing.

    Imported at the first call of blend, not with the package: a backend may need what
    this version of JAX does not have.
    """
    found, missing = [reference.BACKEND], {}
    for name in _names():
        if name == reference.BACKEND.name:
            continue
        try:
            # The first call may be traced, but what a module holds must not be.
            with jax.ensure_compile_time_eval():
                module = importlib.import_module(f"{__package__}.{name}")
            found.append(module.BACKEND)
        # A name that JAX has removed is the one or the other.
        except (ImportError, AttributeError) as error:
            missing[name] = (
                f"it cannot be imported with jax {jax.__version__} "
                f"({type(error).__name__}: {error})"
            )
    found.sort(key=lambda backend: -backend.preference)
    return {backend.name: backend for backend in found}, missing


def backends() -> dict[str, Backend]:
    """The backends that can be imported, by name, most preferred first."""
    return dict(_found()[0])


def missing() -> dict[str, str]:
    """Why each of the other backends cannot be imported, by name."""
    return dict(_found()[1])


def check_implementation(implementation: Any) -> None:
    """Refuses what is no name of a backend, no sequence of names, and not None.

    Raises:
      ValueError: if ``implementation`` is none of these. A backend that exists but does
        not support a call, or cannot be imported, is refused by `blend`.
    """
    named = [implementation] if isinstance(implementation, str) else implementation
    if named is None:
        return
    known = sorted(_names())
    if (
        not isinstance(named, Sequence)
        or not named
        or any(n not in known for n in named)
    ):
        raise ValueError(
            f"implementation must be one of {known}, a sequence of "
            f"them or None; got {implementation!r}"
        )


def choose(
    implementation: str | Sequence[str] | None, s: Static, rows: int, slots: int
) -> Backend:
    """The first of the backends asked for that takes a call.

    Args:
      implementation: as for `blend`.
      s: what is fixed while tracing.
      rows: rows of the flattened batch.
      slots: ``K``.

    Raises:
      ValueError: if a name is unknown, or none of the backends named takes the call.
    """
    check_implementation(implementation)
    found, missing = _found()
    if implementation is None:
        platform = _platform()
        names: Sequence[str] = [
            name
            for name, backend in found.items()
            if backend.platforms is None or platform in backend.platforms
            if not backend.slow(s, rows, slots)
        ]
    else:
        names = [implementation] if isinstance(implementation, str) else implementation
    refusals = []
    for name in names:
        why = missing.get(name) or found[name].refusal(s, rows, slots)
        if why is None:
            return found[name]
        refusals.append(f"{name!r}: {why}")
    raise ValueError(
        f"implementation={implementation!r} does not support these arguments "
        f"({'; '.join(refusals)}); pass None to let blend choose"
    )


def _platform() -> str:
    """Platform that a function traced now is compiled for by default."""
    device = getattr(jax.config, "jax_default_device", None)
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform
