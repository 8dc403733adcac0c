"""Another program's end of the socket in a run's folder; the run's is `bus.sockets`."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from esper_jax.bus.lines import Splitter
from esper_jax.bus.transport import TransportError

__all__ = ["SOCKET", "ServedClient", "address_of"]

SOCKET = "bus.sock"
"""Name of the socket in the folder of a run."""

_LONGEST = 100
"""Bytes of a path that every system takes as an address."""

_CHUNK = 1 << 20
_PATIENCE = 10.0
"""Seconds for a run to take a guest in, or a command."""


@contextlib.contextmanager
def address_of(path: Path) -> Iterator[str]:
    """A path as an address of a socket, which must be short: by its folder if not."""
    folders = Path("/proc/self/fd")
    if len(os.fsencode(path)) <= _LONGEST or not folders.exists():
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        yield str(folders / str(folder) / path.name)
    finally:
        os.close(folder)


class ServedClient:
    """Another program's end of the socket: sends commands and reads what is said.

    Args:
      folder: of a run that trains with ``--serve``.
      last: how many messages to begin with, the newest; None for all that it keeps.

    Raises:
      TransportError: if no run serves there.
    """

    def __init__(self, folder: Path, last: int | None = 0) -> None:
        self._path = folder.absolute() / SOCKET
        self._last = last
        self._found: list[bytes] = []
        self._connection: socket.socket | None = None
        self._connect()

    def send(self, data: bytes) -> None:
        """Sends a command.

        Raises:
          TransportError: if it cannot be sent.
        """
        with self._losing() as connection:
            connection.settimeout(_PATIENCE)
            connection.sendall(data + b"\n")

    def receive(self, patience: float) -> list[bytes]:
        """What the run has said since the last time; waits for it some seconds.

        Connects anew if the connection was lost.

        Raises:
          TransportError: if it cannot be read.
        """
        if not self._found:
            with self._losing() as connection:
                self._read(connection, max(patience, 0.001))
        found, self._found = self._found, []
        return found

    def close(self) -> None:
        """Lets go of the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextlib.contextmanager
    def _losing(self) -> Iterator[socket.socket]:
        """The connection, made anew if there is none; lost where something fails."""
        if self._connection is None:
            self._connect()
        assert self._connection is not None
        try:
            yield self._connection
        except OSError as error:
            self.close()
            said = error.strerror or str(error)
            raise TransportError(f"{self._path}: {said}") from None

    def _connect(self) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with address_of(self._path) as address:
                connection.settimeout(_PATIENCE)
                connection.connect(address)
        except OSError as error:
            connection.close()
            raise TransportError(_nobody(self._path, error)) from None
        self._connection, self._lines = connection, Splitter(None)
        self.send(json.dumps({"last": self._last}).encode())
        before, self._found = self._found, []
        with self._losing() as connection:
            self._read(connection, _PATIENCE)
            if not self._found:
                raise TimeoutError("its run does not answer")
        self._found = before + self._found[1:]  # without the run's id

    def _read(self, connection: socket.socket, patience: float) -> None:
        """Reads what is there; waits for a whole line if there is none.

        Raises:
          OSError: if the connection is lost.
        """
        until = time.monotonic() + patience
        connection.settimeout(patience)
        with contextlib.suppress(TimeoutError, BlockingIOError):
            while data := connection.recv(_CHUNK):
                self._found += [line for line, _ in self._lines.feed(data)]
                left = 0 if self._found else max(0, until - time.monotonic())
                connection.settimeout(left)
            if not self._found:
                raise ConnectionResetError("the run has ended the connection")
            self.close()  # what was read comes first; the next call connects anew


def _nobody(path: Path, error: OSError) -> str:
    """Why nobody can be connected to."""
    if isinstance(error, FileNotFoundError):
        said = f"no run serves in {path.parent}: there is no {path.name}. Train with "
        return said + "--serve, or give the URL of its --bus"
    if isinstance(error, ConnectionRefusedError):
        return f"nobody listens at {path}: the run was killed; --resume it with --serve"
    return f"{path}: {error.strerror or error}"
