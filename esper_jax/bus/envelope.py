"""Messages as JSON, in an envelope of CloudEvents 1.0.

{"specversion": "1.0", "id": "...", "source": "...", "time": "...",
 "type": "esper_jax.Move.v1", "data": {"layer": "layers/0", "seed": 3, ...}}
"""

import datetime
import re
import uuid
from typing import Any, NamedTuple

import msgspec

from esper_jax.bus.messages import COMMANDS, MESSAGES, VERSION, Message

__all__ = [
    "MOST_BYTES",
    "MOST_CHARACTERS",
    "Envelope",
    "MessageError",
    "decode",
    "decode_command",
    "encode",
    "new_id",
    "type_of",
]

MOST_BYTES = 1 << 20
"""A longer command is refused unread."""

MOST_CHARACTERS = 200
"""Of a command's id."""

_HEAD, _ID = 4096, re.compile(rb'"id"\s*:\s*"([^"\\]{1,200})"')
"""Where the id of a message stands that is too long to be read."""

_TYPE = re.compile(r"esper_jax\.(\w+)\.v(\d+)")


class MessageError(ValueError):
    """A message that cannot be used; the text says why.

    Attributes:
      id: of the message, where it could be read.
    """

    def __init__(self, text: str, id: str | None = None) -> None:
        super().__init__(text)
        self.id = id


class Envelope(NamedTuple):
    """A message and who sent it when."""

    id: str
    source: str
    time: str
    message: Message


class _Wire(msgspec.Struct):
    """An envelope as it arrives: what a sender may leave out has a default."""

    id: msgspec.Raw = msgspec.Raw(b"null")
    type: msgspec.Raw = msgspec.Raw(b"null")
    specversion: msgspec.Raw = msgspec.Raw(b'"1.0"')
    source: msgspec.Raw = msgspec.Raw(b'""')
    time: msgspec.Raw = msgspec.Raw(b'""')
    data: msgspec.Raw = msgspec.Raw(b"{}")


_wire = msgspec.json.Decoder(_Wire)
_text = msgspec.json.Decoder(str)
_readers = {name: msgspec.json.Decoder(kind) for name, kind in MESSAGES.items()}
_encoder = msgspec.json.Encoder()


def new_id() -> str:
    """An id that no other message has."""
    return uuid.uuid4().hex


def type_of(message: Message) -> str:
    """The type of a message as it stands in its envelope."""
    return f"esper_jax.{type(message).__name__}.v{VERSION}"


def encode(message: Message, source: str, id: str | None = None) -> bytes:
    """A message in its envelope, as JSON in one line. NaN and infinity become null.

    Args:
      message: to send.
      source: who sends it.
      id: no other message of the source has it; by default a new one.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    envelope: dict[str, Any] = {
        "specversion": "1.0",
        "id": id or new_id(),
        "source": source,
        "time": now.replace("+00:00", "Z"),
        "type": type_of(message),
        "datacontenttype": "application/json",
    }
    layer = getattr(message, "layer", None)
    subject = {} if layer is None else {"subject": layer}
    return _encoder.encode({**envelope, **subject, "data": message})


def decode(data: bytes) -> Envelope:
    """Reads a message, however long. Fields that are not known are passed over.

    Raises:
      MessageError: if it is none, or of another version; with its id, if it has one.
    """
    id, what = None, "not a message"
    try:
        wire = _wire.decode(data)
        id = _field("id", wire.id)
        if not id:
            raise MessageError("id: expected 1 to 200 characters, got 0")
        version = _field("specversion", wire.specversion)
        source, time = _field("source", wire.source), _field("time", wire.time)
        if not version.startswith("1."):
            raise MessageError(
                f"specversion: expected 1.0 of CloudEvents, got {version!r:.80}"
            )
        name = what = _known(_field("type", wire.type))
        message = _readers[name].decode(wire.data)
    except MessageError as error:
        raise MessageError(str(error), id) from None
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        said = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise MessageError(f"{what}: {said:.300}", id) from None
    return Envelope(id, source, time, message)


def decode_command(data: bytes) -> Envelope:
    """The same for what must be a command, of at most `MOST_BYTES`.

    Raises:
      MessageError: if it is none.
    """
    if len(data) > MOST_BYTES:
        begins = _ID.search(data[:_HEAD])
        raise MessageError(
            f"a message of {len(data)} bytes: expected at most {MOST_BYTES}",
            None if begins is None else begins[1].decode(errors="replace"),
        )
    envelope = decode(data)
    if len(envelope.id) > MOST_CHARACTERS:
        raise MessageError(
            f"id: expected 1 to {MOST_CHARACTERS} characters, got {len(envelope.id)}",
            envelope.id,
        )
    if type(envelope.message).__name__ not in COMMANDS:
        raise MessageError(
            f"type: expected a command ({', '.join(COMMANDS)}), got "
            f"{type_of(envelope.message)}",
            envelope.id,
        )
    return envelope


def _field(name: str, raw: msgspec.Raw) -> str:
    try:
        return _text.decode(raw)
    except msgspec.MsgspecError:
        raise MessageError(
            f"{name}: expected a string, got {bytes(raw)[:80].decode(errors='replace')}"
        ) from None


def _known(type: str) -> str:
    """The name of a type of message that this version reads."""
    match = _TYPE.fullmatch(type)
    if match is None or match[1] not in MESSAGES:
        known = ", ".join(f"esper_jax.{name}.v{VERSION}" for name in MESSAGES)
        raise MessageError(f"type: expected one of {known}; got {type!r:.100}")
    if int(match[2][:9]) != VERSION:
        raise MessageError(
            f"type: expected version {VERSION} of {match[1]}, got {type!r:.100}: this "
            "program is older or newer than its sender"
        )
    return match[1]
