"""Transports by their URL."""

from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from esper_jax.bus.lines import Lines, LinesClient
from esper_jax.bus.transport import Transport

__all__ = ["Client", "check_url", "client", "connect", "shown"]

_KNOWN = "file:FOLDER"


class Client(Protocol):
    """Another program's end of a bus."""

    def send(self, data: bytes) -> None:
        """Sends a command.

        Raises:
          TransportError: if it cannot.
        """

    def receive(self, patience: float) -> list[bytes]:
        """What the run has said since the last time; waits for it some seconds.

        Raises:
          TransportError: if it cannot.
        """

    def close(self) -> None:
        """Lets go of the connection."""


def check_url(url: str) -> None:
    """Refuses what is no URL of a bus. Connects to nothing.

    Raises:
      ValueError: saying what is expected. It quotes no password.
    """
    scheme, _, rest = url.partition(":")
    if scheme == "file" and rest.strip("/"):
        return
    raise ValueError(f"expected {_KNOWN}, got {shown(url)!r}")


def connect(url: str, run: str) -> Transport:
    """A run's end of the bus.

    Args:
      url: of the bus.
      run: id of the run.

    Raises:
      ValueError: if it is no URL of a bus.
      OSError: if the folder cannot be made.
    """
    check_url(url)
    return Lines(_folder(url))


def client(url: str, run: str | None = None, from_start: bool = False) -> Client:
    """Another program's end of the bus.

    Args:
      url: of the bus.
      run: how the id of the run begins; by default the one that started last.
      from_start: whether to be told what was said before.

    Raises:
      ValueError: if it is no URL of a bus.
      TransportError: if there is no such bus or run.
    """
    check_url(url)
    return LinesClient(_folder(url), from_start)


def shown(url: str) -> str:
    """A URL without user, password and options."""
    try:
        parts: Any = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return url.partition(":")[0]
    if not parts.netloc:
        return url.partition("?")[0]
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}"


def _folder(url: str) -> Path:
    rest = url.partition(":")[2]
    if rest.startswith("//"):
        rest = unquote(rest[2:])
    return Path(rest).expanduser()
