"""The position of an iterator of batches, as a manifest holds it.

The protocol is grain's: ``get_state()`` returns bytes or what JSON can hold, and
``set_state(state)`` goes there.
"""

import base64
import json
from typing import Any

__all__ = ["PositionError", "go_to", "has_position", "position_of"]

_BYTES = "base64"
"""Key of the only entry of a dictionary that stands for bytes."""


class PositionError(ValueError):
    """A position that cannot be saved or gone to; the message says why."""


def has_position(data: Any) -> bool:
    """Whether an iterator can say where it is and go there."""
    return hasattr(data, "get_state") and hasattr(data, "set_state")


def position_of(data: Any) -> Any:
    """Where an iterator is, as JSON; None if it cannot say, or is None.

    Raises:
      PositionError: if JSON cannot hold the position.
    """
    if not has_position(data):
        return None
    state = data.get_state()
    try:
        position = json.loads(json.dumps(state, default=_encoded))
        same = _decoded(position) == state
    except (TypeError, ValueError):
        same = False
    if not same:
        raise PositionError(
            "data.get_state() must return bytes, numbers, texts, or dictionaries (of "
            f"texts) and lists of them; got {state!r:.200}"
        )
    return position


def go_to(data: Any, position: Any) -> bool:
    """Sends an iterator to a position.

    Returns:
      Whether it is there: False if there is no position, or it cannot be moved.

    Raises:
      PositionError: if it refuses the position.
    """
    if position is None or not has_position(data):
        return False
    try:
        data.set_state(_decoded(position))
    except Exception as error:
        raise PositionError(
            f"data cannot go to the position that was saved: {error!r:.300}"
        ) from error
    return True


def _encoded(value: Any) -> dict[str, str]:
    if not isinstance(value, bytes):
        raise TypeError
    return {_BYTES: base64.b64encode(value).decode()}


def _decoded(position: Any) -> Any:
    def entry(table: dict[str, Any]) -> Any:
        return base64.b64decode(table[_BYTES]) if table.keys() == {_BYTES} else table

    return json.loads(json.dumps(position), object_hook=entry)
