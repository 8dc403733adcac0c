"""The transport of ``esper-jax train --serve``: JSON lines over a socket in the run's
folder, ``bus.sock``: the run's end; that of other programs is `bus.socket_client`.

It is a Unix domain socket, which its owner alone can open; nothing of it is on a
network. A program that connects says how many of the newest messages it wants first,
``{"last": 64}``, and is answered ``{"run": ID}``. From then on each line is a message,
in either direction.
"""

import contextlib
import errno
import json
import os
import selectors
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

from esper_jax.bus.envelope import MOST_BYTES
from esper_jax.bus.lines import Splitter
from esper_jax.bus.socket_client import SOCKET, address_of
from esper_jax.bus.transport import Deliver, Delivery, Outgoing

__all__ = ["Served"]

_MOST_GUESTS = 64

_ROOM = 1 << 25
"""Bytes that may wait for a guest when more comes: who reads no faster is let go."""

_KEPT, _KEPT_BYTES = 1000, 1 << 24
"""The newest messages, for guests that come later: how many, and their bytes."""

_MOST_HELD, _MOST_HELD_BYTES = 10_000, 1 << 26
"""Commands without an answer, beyond which no more are read."""

_CHUNK = 1 << 16


def _listening(path: Path) -> socket.socket:
    """A socket at a path, in the place of one that a run which was killed has left.

    Raises:
      OSError: if there cannot be one, or something else is there.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    scratch = path.with_name(path.name + ".tmp")
    scratch.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with address_of(scratch) as address:
            listener.bind(address)
        scratch.chmod(0o600)
        listener.listen(_MOST_GUESTS)
        listener.setblocking(False)
        scratch.replace(path)  # whoever finds it can connect
    except OSError:
        listener.close()
        raise
    return listener


class _Guest:
    """A program that has connected."""

    def __init__(self, connection: socket.socket, number: int) -> None:
        connection.setblocking(False)
        self.connection, self.number = connection, number
        self.lines = Splitter(MOST_BYTES)
        self.told = False  # whether it has said what it wants
        self.size = 0
        self._waiting: deque[memoryview] = deque()

    def add(self, line: bytes) -> None:
        """Puts a line behind what waits to be sent."""
        self._waiting.append(memoryview(line))
        self.size += len(line)

    def write(self) -> None:
        """Sends as much as is taken now.

        Raises:
          OSError: if it is gone.
        """
        with contextlib.suppress(BlockingIOError):
            while self._waiting:
                sent = self.connection.send(self._waiting[0])
                self.size -= sent
                self._waiting[0] = self._waiting[0][sent:]
                if not self._waiting[0]:
                    self._waiting.popleft()


class Served:
    """A run's end of the socket. One thread serves all guests.

    A guest that does not read, sends what is no message, or dies is no other's
    business. All get all messages; of what could not be read, its sender is told.

    Args:
      folder: of the run, which nobody else trains into.
      run: its id.
      linger: seconds that `close` waits for guests to read.

    Raises:
      OSError: if there cannot be a socket.
    """

    def __init__(self, folder: Path, run: str, linger: float = 2.0) -> None:
        self._path = folder.absolute() / SOCKET
        self._hello = json.dumps({"run": run}).encode() + b"\n"
        self._linger = linger
        self._listener = _listening(self._path)
        self._mine = self._path.lstat().st_ino
        self._selector = selectors.DefaultSelector()
        self._bell, self._rings = socket.socketpair()
        for one in (self._bell, self._rings):
            one.setblocking(False)
        self._lock = threading.Lock()
        self._fresh: list[Outgoing] = []
        self._kept: deque[bytes] = deque()
        self._kept_bytes = self._count = 0
        self._guests: dict[int, _Guest] = {}
        self._held: dict[str, int] = {}  # bytes of each command without an answer
        self._held_bytes = 0
        self._deliver: Deliver | None = None
        self._thread: threading.Thread | None = None
        self._until: float | None = None  # when to end, once it is closed

    def listen(self, deliver: Deliver, answered: Iterable[str] = ()) -> None:
        """See `Transport`."""
        self._deliver = deliver
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._rings, selectors.EVENT_READ)
        self._thread = threading.Thread(
            target=self._run, name="esper-jax-serve", daemon=True
        )
        self._thread.start()

    def publish(self, messages: Sequence[Outgoing]) -> None:
        """See `Transport`. Waits for no guest."""
        with self._lock:
            self._fresh += messages
        self._ring()

    def close(self) -> None:
        """See `Transport`."""
        self._unlink()
        self._until = time.monotonic() + self._linger
        self._ring()
        if self._thread is not None:
            self._thread.join(2 * self._linger)
        for guest in [*self._guests.values()]:
            self._let_go(guest)
        for one in (self._listener, self._selector, self._bell, self._rings):
            one.close()

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # it has rung and was not heard yet
            self._bell.send(b"!")

    def _unlink(self) -> None:
        with contextlib.suppress(OSError):
            if self._path.lstat().st_ino == self._mine:
                self._path.unlink()

    def _run(self) -> None:
        while True:
            left = None if self._until is None else self._until - time.monotonic()
            for key, events in self._selector.select(left):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._rings:
                    with contextlib.suppress(BlockingIOError):
                        self._rings.recv(_CHUNK)
                elif events & selectors.EVENT_READ:
                    self._read(key.data)
            self._spread()
            for guest in [*self._guests.values()]:
                self._attend(guest)
            waiting = any(guest.size for guest in self._guests.values())
            until = self._until
            if until is not None and (not waiting or time.monotonic() >= until):
                return

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptors are left
            time.sleep(0.1)
            return
        if len(self._guests) >= _MOST_GUESTS:
            connection.close()
            return
        self._count += 1
        guest = self._guests[self._count] = _Guest(connection, self._count)
        self._selector.register(connection, selectors.EVENT_READ, guest)

    def _read(self, guest: _Guest) -> None:
        try:
            data = guest.connection.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._let_go(guest)
            return
        for line, end in guest.lines.feed(data):
            last = None if guest.told else _wanted(line)
            if not guest.told:
                guest.told = True
                self._welcome(guest, last or 0)
            if last is None:
                token = f"{guest.number}.{end}"
                self._held[token] = len(line)
                self._held_bytes += len(line)
                assert self._deliver is not None
                self._deliver(Delivery(line, token))

    def _welcome(self, guest: _Guest, last: int) -> None:
        guest.add(self._hello)
        for line in [*self._kept][len(self._kept) - min(last, len(self._kept)) :]:
            guest.add(line)

    def _spread(self) -> None:
        """Hands what is new to the guests, and lets those go that do not read."""
        with self._lock:
            fresh, self._fresh = self._fresh, []
        for guest in [*self._guests.values()] if fresh else []:
            if guest.size > _ROOM:
                self._let_go(guest)
        for message in fresh:
            line = message.data + b"\n"
            for token in message.settles:
                self._held_bytes -= self._held.pop(token, 0)
            if message.topic == "dead":
                senders = {int(t.partition(".")[0]) for t in message.settles}
                mine = [self._guests[n] for n in senders & self._guests.keys()]
            else:
                mine = [guest for guest in self._guests.values() if guest.told]
                self._keep(line)
            for guest in mine:
                guest.add(line)

    def _keep(self, line: bytes) -> None:
        self._kept.append(line)
        self._kept_bytes += len(line)
        while len(self._kept) > _KEPT or self._kept_bytes > _KEPT_BYTES:
            self._kept_bytes -= len(self._kept.popleft())

    def _attend(self, guest: _Guest) -> None:
        """Sends what waits, and sees to what is to be waited for next."""
        try:
            guest.write()
        except OSError:
            self._let_go(guest)
            return
        full = len(self._held) >= _MOST_HELD or self._held_bytes >= _MOST_HELD_BYTES
        events = 0 if full else selectors.EVENT_READ
        events |= selectors.EVENT_WRITE if guest.size else 0
        known = self._selector.get_map().get(guest.connection)
        if known is not None and known.events == events:
            return
        if known is not None:
            self._selector.unregister(guest.connection)
        if events:
            self._selector.register(guest.connection, events, guest)

    def _let_go(self, guest: _Guest) -> None:
        del self._guests[guest.number]
        with contextlib.suppress(KeyError):
            self._selector.unregister(guest.connection)
        guest.connection.close()


def _wanted(line: bytes) -> int | None:
    """How many of the newest messages a guest wants first; None if it says nothing."""
    try:
        last = json.loads(line)["last"]
        return max(0, int(_KEPT if last is None else last))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
