"""A message bus: a run tells what it does, and takes commands from outside.

Needs msgspec: ``pip install 'esper-jax[bus]'``. The training program knows nothing of
it: commands come to a tick as arrays (`growth.outside`).
"""

from esper_jax.monitor.writers import optional

optional("msgspec", "esper_jax.bus", "esper-jax[bus]")

from esper_jax.bus.envelope import Envelope, MessageError, decode, encode  # noqa: E402
from esper_jax.bus.messages import (  # noqa: E402
    Acknowledged,
    Batch,
    CapacityChanged,
    Decided,
    Enable,
    Germinate,
    LayerHealth,
    LayerSeen,
    Message,
    Move,
    RolledBack,
    RunEnded,
    RunStarted,
    SeedMoved,
    SetStrategy,
    StopAndSave,
    TickReported,
    TickSeen,
)
from esper_jax.bus.record import Record, RecordError, read_record  # noqa: E402
from esper_jax.bus.remote import RemotePolicy  # noqa: E402
from esper_jax.bus.service import Service, layers_of  # noqa: E402
from esper_jax.bus.transport import Local, Transport, TransportError  # noqa: E402

__all__ = [
    "Acknowledged",
    "Batch",
    "CapacityChanged",
    "Decided",
    "Enable",
    "Envelope",
    "Germinate",
    "LayerHealth",
    "LayerSeen",
    "Local",
    "Message",
    "MessageError",
    "Move",
    "Record",
    "RecordError",
    "RemotePolicy",
    "RolledBack",
    "RunEnded",
    "RunStarted",
    "SeedMoved",
    "Service",
    "SetStrategy",
    "StopAndSave",
    "TickReported",
    "TickSeen",
    "Transport",
    "TransportError",
    "decode",
    "encode",
    "layers_of",
    "read_record",
]
