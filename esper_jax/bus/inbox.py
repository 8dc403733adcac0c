"""`Inbox`: commands as they come in, and the same ones in each of several processes."""

import json
import queue
from typing import NamedTuple

import jax

from esper_jax.bus.admission import parts_of
from esper_jax.bus.envelope import Envelope, MessageError, decode_command
from esper_jax.bus.transport import Delivery
from esper_jax.parallel.processes import exchange

__all__ = ["Arrived", "Inbox"]


class Arrived(NamedTuple):
    """What has come since the last time."""

    commands: list[tuple[Delivery, Envelope]]
    unreadable: list[tuple[Delivery, MessageError]]


class Inbox:
    """What transports deliver, in any thread, until it is taken between two ticks.

    Attributes:
      shared: whether several processes take the commands that came to process 0. All of
        them must call `take` then, as often.
    """

    def __init__(self) -> None:
        self.shared = False
        self._queue: queue.SimpleQueue[Delivery] = queue.SimpleQueue()

    def put(self, delivery: Delivery) -> None:
        """Takes a delivery in."""
        self._queue.put(delivery)

    def take(self, most: int) -> Arrived:
        """What has come; what cannot be read concerns the process that got it alone.

        Args:
          most: requests, about; the rest waits for the next time.
        """
        came = Arrived([], [])
        while most > 0 and not self._queue.empty():
            delivery = self._queue.get()
            most -= 1
            try:
                envelope = decode_command(delivery.data)
            except MessageError as error:
                came.unreadable.append((delivery, error))
            else:
                came.commands.append((delivery, envelope))
                most -= len(parts_of(envelope.message))
        if not self.shared:
            return came
        # Bytes that are no UTF-8 may stand in fields that nobody reads.
        mine = [d.data.decode(errors="surrogateescape") for d, _ in came.commands]
        first = exchange(json.dumps(mine))[0]
        if not jax.process_index():
            return came
        heard = [
            Delivery(text.encode(errors="surrogateescape"))
            for text in json.loads(first)
        ]
        return Arrived([(d, decode_command(d.data)) for d in heard], came.unreadable)
