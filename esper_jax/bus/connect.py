"""Transports by their URL."""

from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from esper_jax.bus.lines import Lines, LinesClient
from esper_jax.bus.redis_streams import RedisClient, RedisStreams, check_options
from esper_jax.bus.socket_client import ServedClient
from esper_jax.bus.transport import Transport

__all__ = ["Client", "check_url", "client", "connect", "shown"]

_KNOWN = "redis://HOST[:PORT][/DB], rediss://..., unix://PATH or file:FOLDER"

_REDIS = ("redis", "rediss", "unix")


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


def check_url(url: str, known: str = _KNOWN) -> None:
    """Refuses what is no URL of a bus. Connects to nothing.

    Args:
      url: of the bus.
      known: what is expected, in words.

    Raises:
      ValueError: saying what is expected. It quotes no password.
      ImportError: if it needs a package that is not installed.
    """
    scheme, _, rest = url.partition(":")
    if scheme in _REDIS and rest.startswith("//"):
        try:
            check_options(url)
        except ValueError as error:
            raise ValueError(f"{shown(url)}: {error}; expected {known}") from None
    elif scheme != "file" or not rest.strip("/"):
        raise ValueError(f"expected {known}, got {shown(url)!r}")


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
    if url.startswith("file:"):
        return Lines(_folder(url))
    return RedisStreams(url, run)


def client(url: str, run: str | None = None, last: int | None = 0) -> Client:
    """Another program's end of the bus.

    Args:
      url: of the bus; or the folder of a run that trains with ``--serve``.
      run: how the id of the run begins; by default the one that started last. A folder
        is of one run.
      last: how much to be told of what was said before, about; None for all.

    Raises:
      ValueError: if it is no URL of a bus.
      TransportError: if there is no such bus or run.
    """
    if url.startswith("file:"):
        check_url(url)
        return LinesClient(_folder(url), last)
    folder = Path(url).expanduser()
    if folder.is_dir():
        return ServedClient(folder, last)
    check_url(url, f"DIR of a run that trains with --serve, {_KNOWN}")
    return RedisClient(url, run, last)


def shown(url: str) -> str:
    """A URL without user, password and options."""
    # A password that was not quoted may hold a question mark.
    before, at, address = url.rpartition("@")
    address = address.partition("?")[0]
    return f"{before.partition(':')[0]}://{address}" if at else address


def _folder(url: str) -> Path:
    rest = url.partition(":")[2]
    if rest.startswith("//"):
        rest = unquote(rest[2:])
    return Path(rest).expanduser()
