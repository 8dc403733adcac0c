"""The events of a run as messages of the bus."""

from collections.abc import Iterator
from pathlib import Path

from esper_jax.bus.envelope import encode
from esper_jax.bus.messages import Message
from esper_jax.bus.record import RecordError, read_record
from esper_jax.bus.telling import events_told, rollback_told
from esper_jax.run.folder import RunError, RunFolder, read_config
from esper_jax.run.logs import read_logs
from esper_jax.run.record import read_record as read_run

__all__ = ["messages_of"]


def messages_of(path: Path) -> Iterator[bytes]:
    """The messages that tell of a run's events, oldest first. Changes nothing.

    Args:
      path: folder of the run.

    Raises:
      RunError: if it holds no run, or a record of it is damaged.
    """
    folder = RunFolder(path)
    read_config(folder)  # says where there is no run
    run, logs = read_run(folder), read_logs(folder)
    try:
        done = read_record(folder.commands)
    except RecordError as error:
        raise RunError(str(error)) from None
    told: list[tuple[int, Message]] = [
        *((m.tick, m) for m in events_told(logs["events"])),
        *((r["tick"], rollback_told(r)) for r in logs["rollbacks"]),
        *((d.tick, d.answer) for d in done),
    ]
    source = "esper_jax" if run is None else f"esper_jax/{run.id}"
    for number, (_, message) in enumerate(sorted(told, key=lambda pair: pair[0])):
        yield encode(message, source, f"replay-{number}")
