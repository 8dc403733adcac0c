"""A real redis-server on a free port, and a proxy before it that fails on demand."""

import atexit
import contextlib
import pathlib
import shutil
import signal
import socket
import subprocess
import threading
import time
from typing import Any

import pytest

BINARY = shutil.which("redis-server")

needs_redis = pytest.mark.skipif(
    BINARY is None,
    reason="there is no redis-server: apt-get install redis-server",
)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Server:
    """Writes each command to the disk before it answers, as a careful operator has it.

    Args:
      folder: of its data, which outlives `kill`.
      options: further words of its command line.
    """

    def __init__(self, folder: pathlib.Path, *options: str) -> None:
        self.port, self._folder, self._options = free_port(), folder, options
        self.url = f"redis://127.0.0.1:{self.port}"
        self._process: Any = None
        atexit.register(self.kill)  # also where a test fails

    def start(self) -> "Server":
        assert BINARY is not None
        words = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        words += ["--dir", str(self._folder), "--appendonly", "yes"]
        words += ["--appendfsync", "always", *self._options]
        self._process = subprocess.Popen(
            [BINARY, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError):
                one = socket.create_connection(("127.0.0.1", self.port), 1)
                one.sendall(b"PING\r\n")
                answer = one.recv(100)
                one.close()
                if answer.startswith((b"+PONG", b"-NOAUTH")):
                    return self
            assert time.monotonic() < until, "redis-server does not answer"
            assert self._process.poll() is None, "redis-server ended"
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL, if it runs."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


class Proxy:
    """Passes bytes to a server and back.

    Attributes:
      stalls: nothing comes back while it is set; what was sent arrives all the same.
    """

    def __init__(self, port: int) -> None:
        self.stalls = threading.Event()
        self._port, self._open = port, True
        self._pairs: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Ends all connections."""
        for one in self._pairs:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._pairs.clear()

    def close(self) -> None:
        self._open = False
        self.stalls.clear()
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while self._open:
            with contextlib.suppress(OSError):
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                self._pairs += [near, far]
                for pair in ((near, far, False), (far, near, True)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, back: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                while back and self.stalls.is_set():
                    time.sleep(0.005)
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.close()
