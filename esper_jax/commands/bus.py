"""``esper-jax bus``: watch a run and steer it, from another program."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro

from esper_jax.commands.base import Errand
from esper_jax.commands.orders import Order

__all__ = ["Bus", "Replay", "Send", "Watch"]

_Url = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")]
_Run = Annotated[str | None, tyro.conf.arg(name="run", metavar="ID")]


@dataclasses.dataclass(frozen=True)
class Watch:
    """Show what a run tells, as it comes, until it ends.

    A table on a terminal, lines elsewhere.
    """

    url: _Url
    """What the run was given as --bus; or its folder, if it trains with --serve."""
    of: _Run = None
    """How the id of the run begins. Default: the run that started last."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print each message as it came, one a line."""

    def act(self) -> int:
        """Shows it; returns the exit status."""
        from esper_jax.bus.connect import client
        from esper_jax.bus.watch import LAST, print_all, watch

        reader = client(self.url, self.of, None if self.json else LAST)
        try:
            return print_all(reader) if self.json else watch(reader)
        finally:
            reader.close()


@dataclasses.dataclass(frozen=True)
class Send:
    """Send a command to a run, and wait for what becomes of it.

    Exits with status 1 if it is refused.
    """

    url: _Url
    """What the run was given as --bus; or its folder, if it trains with --serve."""
    order: Annotated[Order, tyro.conf.arg(name="")]
    of: _Run = None
    """How the id of the run begins. Default: the run that started last."""
    wait: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 60.0
    """How long to wait for the answer, which comes after the next tick."""
    id: Annotated[str | None, tyro.conf.arg(metavar="ID")] = None
    """Of the command, which is carried out once for each id. Default: a new one."""

    def act(self) -> int:
        """Sends it; returns the exit status."""
        from esper_jax.bus.connect import client
        from esper_jax.bus.envelope import encode, new_id
        from esper_jax.bus.transport import TransportError
        from esper_jax.bus.watch import answer_to
        from esper_jax.run.folder import RunError

        id = new_id() if self.id is None else self.id
        data = encode(_checked(self.order.command()), "esper-jax bus send", id)
        _check_sizes(id, data)
        sender = client(self.url, self.of)
        try:
            sender.send(data)
            if self.wait <= 0:
                print(f"sent: {id}")
                return 0
            answer = answer_to(sender, id, self.wait)
        except TransportError as error:
            raise RunError(
                f"the bus: {error}. The command may have arrived: send it again with "
                f"--id {id} before its name, and it is carried out once"
            ) from None
        finally:
            sender.close()
        if answer is None:
            raise RunError(
                f"no answer within {self.wait:g} seconds: the run may be in a long "
                "tick, or not be there. The command waits for it; send it again with "
                f"--id {id} before its name to wait on"
            )
        tick = "" if answer.tick is None else f" (tick {answer.tick})"
        done = answer.outcome == "OK"
        said = f"{answer.outcome}: {answer.reason}{tick}"
        print(said, file=sys.stdout if done else sys.stderr)
        return 0 if done else 1


def _check_sizes(id: str, data: bytes) -> None:
    """Refuses what a run would not read.

    Raises:
      ConfigError: saying what is too long.
    """
    from esper_jax.bus.envelope import MOST_BYTES, MOST_CHARACTERS
    from esper_jax.run.config import ConfigError

    if not 1 <= len(id) <= MOST_CHARACTERS:
        raise ConfigError(
            f"--id: expected 1 to {MOST_CHARACTERS} characters, got {len(id)}"
        )
    if len(data) > MOST_BYTES:
        raise ConfigError(
            f"the command has {len(data)} bytes: expected at most {MOST_BYTES}; send "
            "it in parts"
        )


def _checked(command: Any) -> Any:
    """A command that a run can read.

    Raises:
      ConfigError: naming the option.
    """
    import msgspec

    from esper_jax.run.config import ConfigError

    try:
        return msgspec.convert(msgspec.to_builtins(command), type(command))
    except msgspec.ValidationError as error:
        field = str(error).rpartition("`$.")[2].rstrip("`")
        raise ConfigError(f"--{field}: {str(error).partition(' - at ')[0]}") from None


@dataclasses.dataclass(frozen=True)
class Replay:
    """Print the events of a run as messages, one a line, oldest first.

    Those are SeedMoved, RolledBack and Acknowledged.
    """

    dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of the run."""

    def act(self) -> int:
        """Prints them; returns the exit status."""
        from esper_jax.run.retelling import messages_of

        for data in messages_of(self.dir.expanduser()):
            print(data.decode())
        return 0


@dataclasses.dataclass(frozen=True)
class Bus(Errand):
    """Watch a run that trains with --bus or --serve, and steer it."""

    do: Annotated[
        Annotated[Watch, tyro.conf.subcommand("watch", prefix_name=False)]
        | Annotated[Send, tyro.conf.subcommand("send", prefix_name=False)]
        | Annotated[Replay, tyro.conf.subcommand("replay", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]

    def only_reads(self) -> bool:
        return True

    def act(self) -> int:
        with _in_words():
            return self.do.act()


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    """Errors of the bus as those that the command line tells in one line."""
    from esper_jax.run.config import ConfigError
    from esper_jax.run.folder import RunError

    known: tuple[Any, ...] = ()
    try:
        from esper_jax.bus import MessageError, RecordError, TransportError

        known = (MessageError, RecordError, TransportError)
        yield
    except ImportError as error:
        raise ConfigError(str(error)) from None
    except (RunError, ConfigError):
        raise
    except known as error:
        raise RunError(f"the bus: {error}") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
