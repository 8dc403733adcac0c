"""Blueprints by name."""

from collections.abc import Callable, Sequence

from esper_jax.blueprints.kinds import Adapter, Blueprint, Custom, Dense
from esper_jax.lifecycle.state import MAX_BLUEPRINTS

__all__ = ["bound", "register", "registered", "resolve"]

_REGISTRY: dict[str, Callable[[], Blueprint]] = {}


def register(name: str, make: Callable[[], Blueprint]) -> None:
    """Makes ``make()`` available under ``name``.

    Raises:
      ValueError: if the name is taken.
    """
    if name in _REGISTRY:
        raise ValueError(f"there is already a blueprint named {name!r}; choose another")
    _REGISTRY[name] = make


def registered() -> dict[str, Blueprint]:
    """Every registered blueprint by its name, in the order of registration."""
    return {name: make() for name, make in _REGISTRY.items()}


def resolve(blueprints: Sequence[str | Blueprint]) -> tuple[Blueprint, ...]:
    """Blueprints from names and blueprints; a seed's id is the index into them.

    Raises:
      ValueError: if there are none or more than 127, a name is unknown, or two that
        are not `Dense` share a name.
      TypeError: if an entry is neither.
    """
    if isinstance(blueprints, str | Dense | Custom | Adapter):
        raise TypeError(
            f"blueprints must be a sequence of names or blueprints, "
            f"got {blueprints!r}; write [{blueprints!r}]"
        )
    resolved: list[Blueprint] = []
    for entry in blueprints:
        if isinstance(entry, str):
            if entry not in _REGISTRY:
                raise ValueError(
                    f"blueprints: unknown blueprint {entry!r}; expected one of "
                    f"{sorted(_REGISTRY)}"
                )
            resolved.append(_REGISTRY[entry]())
        elif isinstance(entry, Dense | Custom | Adapter):
            resolved.append(entry)
        else:
            called = "; call it, as in [lora()]" if callable(entry) else ""
            raise TypeError(
                "blueprints must hold names, Dense, Custom or Adapter, got "
                f"{entry!r}{called}"
            )
    if not 1 <= len(resolved) <= MAX_BLUEPRINTS:
        raise ValueError(
            f"blueprints must number 1 to {MAX_BLUEPRINTS}, got {len(resolved)}"
        )
    names = [b.name for b in resolved if not isinstance(b, Dense)]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(
            f"blueprints: two blueprints are named {twice[0]!r}; give one another name"
        )
    return tuple(resolved)


def bound(blueprints: Sequence[Blueprint], inputs: int | None) -> tuple[Blueprint, ...]:
    """The blueprints for a layer whose input is ``inputs`` wide."""
    return tuple(b.bound(inputs) if isinstance(b, Adapter) else b for b in blueprints)
