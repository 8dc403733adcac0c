"""The transport of Redis Streams. Needs redis: ``pip install 'esper-jax[redis]'``.

    esper:{RUN}:telemetry, :events, :acks, :dead   what the run says
    esper:{RUN}:commands                           commands to it
    esper:runs                                     runs by the time they started last

Each entry has one field, ``m``. The run is the one consumer of the group ``run``: an
answer and the XACK of its command are one script, so a command that was not answered
comes again, and one that was does not. That script also counts what was sent, so that
nothing is sent twice where a connection breaks in between.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import unquote

from esper_jax.bus.envelope import MOST_BYTES, new_id
from esper_jax.bus.redis_entries import entries_of, in_order, streams_of
from esper_jax.bus.transport import (
    TOPICS,
    Deliver,
    Delivery,
    Outgoing,
    Topic,
    TransportError,
)
from esper_jax.monitor.writers import optional

__all__ = ["RedisClient", "RedisStreams", "check_options"]

_log = logging.getLogger(__name__)

_RUNS = "esper:runs"
_GROUP = _CONSUMER = "run"

_MOST: dict[Topic, int] = {
    "telemetry": 10_000,
    "events": 100_000,
    "acks": 100_000,
    "dead": 1_000,
}
"""Entries that a stream keeps, about."""

_MOST_BYTES = 1 << 28
"""Of telemetry that a stream keeps, about: fewer entries where they are long."""

_LIVES, _LIVES_TELEMETRY = 3600, 60
"""Seconds for which a message is kept that is too long for a stream."""

_MOST_COMMANDS = 100_000
"""That may wait. Those that are answered are taken out."""

_MOST_HELD, _MOST_HELD_BYTES = 10_000, 1 << 26
"""Commands without an answer, beyond which no more are read."""

_COUNT = 1000
"""Entries of each stream that a reader takes at once."""

_MOST_AT_ONCE = 1 << 26
"""Bytes beyond which a reader takes no more messages at once."""

_REGISTERED = 1.0
"""Seconds until a run tells the server again that it is there."""

_BLOCK = 500
"""Milliseconds of one wait for commands."""

_PUBLISH = """
local i = 2
for _ = 1, tonumber(ARGV[1]) do
  local epoch, number, settles = ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 7])
  if number > tonumber(redis.call('HGET', KEYS[1], epoch) or '0') then
    if ARGV[i + 5] ~= '' then
      redis.call('SET', ARGV[i + 5], ARGV[i + 8], 'EX', ARGV[i + 6])
    end
    local stream, most = KEYS[tonumber(ARGV[i + 2])], ARGV[i + 3]
    redis.call('XADD', stream, 'MAXLEN', '~', most, '*', 'm', ARGV[i + 4])
    redis.call('HSET', KEYS[1], epoch, number)
  end
  for s = 1, settles do
    redis.call('XACK', KEYS[2], 'run', ARGV[i + 8 + s])
    redis.call('XDEL', KEYS[2], ARGV[i + 8 + s])
  end
  i = i + 9 + settles
end
"""
"""Sends messages that were not sent before, and settles what they answer.

KEYS: the counts by epoch, the commands, and the streams. ARGV: how many messages; of
each its epoch, number, stream, the stream's length, entry, key and seconds of what is
too long for the stream, how many tokens, what that key holds, and the tokens.
"""


def check_options(url: str) -> None:
    """Refuses a URL that redis-py cannot use. Connects to nothing.

    Raises:
      ImportError: without redis-py.
      ValueError: saying what is wrong, without password.
    """
    errors = optional("redis.exceptions", "a bus at redis://", "esper-jax[redis]")
    try:
        pool = _redis(url).connection_pool
        pool.connection_class(**pool.connection_kwargs)  # refuses unknown options
    except (ValueError, TypeError, errors.RedisError) as error:
        said = str(error).partition("__init__() ")[2] or str(error)
        raise ValueError(_clean(url, said)) from None


def _redis(url: str) -> Any:
    redis = optional("redis", "a bus at redis://", "esper-jax[redis]")
    retry = optional("redis.retry", "a bus at redis://", "esper-jax[redis]")
    backoff = optional("redis.backoff", "a bus at redis://", "esper-jax[redis]")
    # Whoever calls tries again, and knows what may have arrived.
    made = redis.Redis.from_url(
        url,
        socket_timeout=5.0,
        socket_connect_timeout=2.0,
        retry=retry.Retry(backoff.NoBackoff(), 0),
    )
    made.connection_pool.connection_kwargs["decode_responses"] = False  # all is bytes
    return made


def _clean(url: str, text: str) -> str:
    """A text without the URL's password, also where that breaks the URL."""
    authority, _, _ = url.partition("://")[2].rpartition("@")
    secrets = authority.partition(":")[2]
    if authority and "Port" in text:
        return (
            "the port is no number; #, /, ? and @ in a password must be written as "
            "%23, %2F, %3F and %40"
        )
    for form in {secrets, unquote(secrets)} - {""}:
        text = text.replace(form, "***")
    return text


class _Connection:
    """Calls of redis-py whose failures are `TransportError`, without passwords."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.redis = _redis(url)
        self._errors = optional("redis.exceptions", "redis", "esper-jax[redis]")

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        try:
            yield
        # ValueError: another thread has closed the connection.
        except (self._errors.RedisError, OSError, ValueError) as error:
            said = _clean(self._url, (str(error).splitlines() or [""])[0][:200])
            raise TransportError(said or type(error).__name__) from None

    def call(self, *words: Any) -> Any:
        with self.failing():
            return self.redis.execute_command(*words)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.redis.close()


def _key(run: str, name: str) -> str:
    return f"esper:{{{run}}}:{name}"


class RedisStreams:
    """A run's end of the streams. Connects when there is something to send.

    Args:
      url: ``redis://[[USER]:PASSWORD@]HOST[:PORT][/DB]``, ``rediss://`` with TLS, or
        ``unix://``.
      run: id of the run; stands in all keys but ``esper:runs``.

    Raises:
      ImportError: without redis-py.
      ValueError: if redis-py cannot use the URL.
    """

    def __init__(self, url: str, run: str) -> None:
        check_options(url)
        self._run = run
        self._out, self._in = _Connection(url), _Connection(url)
        self._publish = self._out.redis.register_script(_PUBLISH)
        self._commands = _key(run, "commands")
        streams = [_key(run, topic) for topic in TOPICS]
        self._keys = [_key(run, "sent"), self._commands, *streams]
        self._open = True
        self._registers = 0.0
        self._began = time.time()
        # Tokens of what was handed on, and those of them whose answer was sent: a read
        # that began before may still find them.
        self._given: dict[str, int] = {}  # with their bytes
        self._answered: set[str] = set()
        self._lock = threading.Lock()
        self._listener: threading.Thread | None = None

    def publish(self, messages: Sequence[Outgoing]) -> None:
        """See `Transport`."""
        # Again and again: the server may be another by now, which knows nothing.
        next_time, self._registers = self._registers, 0.0
        if time.monotonic() >= next_time:
            self._out.call("ZADD", _RUNS, self._began, self._run)
            next_time = time.monotonic() + _REGISTERED
        words: list[Any] = [len(messages)]
        for message in messages:
            entry, key, content = self._entry(message.data)
            stream = 3 + TOPICS.index(message.topic)
            most, lives = _MOST[message.topic], _LIVES
            if message.topic == "telemetry":
                most = max(100, min(most, _MOST_BYTES // len(entry)))
                lives = _LIVES_TELEMETRY
            words += [message.epoch, message.number, stream, most, entry, key, lives]
            words += [len(message.settles), content, *message.settles]
        with self._out.failing():
            self._publish(keys=self._keys, args=words)
        self._registers = next_time
        with self._lock:
            self._answered.update(*(m.settles for m in messages))

    def listen(self, deliver: Deliver, answered: Iterable[str] = ()) -> None:
        """See `Transport`."""
        self._given.update(dict.fromkeys(answered, 0))
        self._listener = threading.Thread(
            target=self._listen, args=(deliver,), name="esper-jax-commands", daemon=True
        )
        self._listener.start()

    def close(self) -> None:
        """See `Transport`."""
        self._open = False  # the thread that listens closes its own connection
        self._out.close()
        if self._listener is not None:  # what it reads now, nobody else would get
            self._listener.join(2 * _BLOCK / 1000)

    def _entry(self, data: bytes) -> tuple[bytes, str, bytes]:
        """What stands in the stream; and key and content of what is too long for it."""
        if len(data) <= MOST_BYTES:
            return data, "", b""
        key = _key(self._run, f"large:{new_id()}")
        envelope = json.loads(data)
        del envelope["data"]
        return json.dumps(envelope | {"dataref": key}).encode(), key, data

    def _listen(self, deliver: Deliver) -> None:
        start, pause = "", 0.05
        while self._open:
            try:
                if not start:
                    self._make_group()
                    start = "0"  # what was read before, and has no answer yet
                start = self._read(start, deliver)
                pause = 0.05
            except Exception as error:
                # Also where the group is gone, as after a restart without a file.
                if not isinstance(error, TransportError):
                    _log.warning("the bus: commands cannot be read now (%r)", error)
                start = ""
                time.sleep(pause)
                pause = min(2 * pause, 5.0)
        self._in.close()

    def _make_group(self) -> None:
        create = ("XGROUP", "CREATE", self._commands, _GROUP, "0", "MKSTREAM")
        try:
            self._in.call(*create)
        except TransportError as error:
            if "BUSYGROUP" not in str(error) and "already exists" not in str(error):
                raise

    def _read(self, start: str, deliver: Deliver) -> str:
        """Hands on some commands; returns where to go on."""
        with self._lock:
            for token in self._answered:
                self._given.pop(token, None)
            self._answered = set()
            held = self._given.values()
            full = len(held) >= _MOST_HELD or sum(held) >= _MOST_HELD_BYTES
        if full and start == ">":
            time.sleep(_BLOCK / 1000)
            return start
        with self._in.failing():
            found = self._in.redis.xreadgroup(
                _GROUP,
                _CONSUMER,
                {self._commands: start},
                count=16,
                block=_BLOCK if start == ">" else None,
            )
        entries = entries_of(found)
        for id, fields in entries:
            if not fields:  # somebody has taken it out
                self._in.call("XACK", self._commands, _GROUP, id)
                continue
            whole = fields.get(b"m", b"")
            # What is too long is refused by its length; nobody reads the rest.
            token, data = id.decode(), whole[: MOST_BYTES + 1]
            with self._lock:
                known = token in self._given
                self._given[token] = len(data)
            if not known:  # else its answer is on the way
                deliver(Delivery(data, token, len(whole)))
        if start == ">" or not entries:
            return ">"
        return entries[-1][0].decode()


class RedisClient:
    """Another program's end of the streams: sends commands and reads what is said.

    Args:
      url: as for `RedisStreams`.
      run: how the run's id begins; by default the run that started last.
      last: how many entries of each stream to begin with, the newest; None for all.

    Raises:
      ImportError, ValueError: as `RedisStreams`.
      TransportError: if there is no such run, or no server.
    """

    def __init__(self, url: str, run: str | None = None, last: int | None = 0) -> None:
        check_options(url)
        self._connection = _Connection(url)
        self.run = self._found(run)
        self._after = {}
        for topic in ("telemetry", "events", "acks"):
            key = _key(self.run, topic)
            newest = self._connection.call("XREVRANGE", key, "+", "-", "COUNT", 1)
            self._after[key] = newest[0][0] if newest and last is not None else b"0-0"
            if last and newest:
                some = self._connection.call(
                    "XREVRANGE", key, "+", "-", "COUNT", last + 1
                )
                self._after[key] = some[-1][0] if len(some) > last else b"0-0"

    def send(self, data: bytes) -> None:
        """Sends a command.

        Raises:
          TransportError: if it cannot be sent, or too many wait for the run.
        """
        stream = _key(self.run, "commands")
        if self._connection.call("XLEN", stream) >= _MOST_COMMANDS:
            raise TransportError(f"{_MOST_COMMANDS} commands wait for the run already")
        self._connection.call("XADD", stream, "*", "m", data)

    def receive(self, patience: float) -> list[bytes]:
        """What the run has said since the last time; waits for it some seconds.

        Raises:
          TransportError: if it cannot be read.
        """
        wait = max(1, int(1000 * min(patience, 2.0)))
        with self._connection.failing():
            found = self._connection.redis.xread(self._after, count=_COUNT, block=wait)
        said: list[bytes] = []
        size = 0
        for key, id, fields in in_order(streams_of(found), _COUNT):
            if size > _MOST_AT_ONCE:  # the rest comes the next time
                break
            whole = self._whole(fields.get(b"m", b""))
            self._after[key] = id
            said += [] if whole is None else [whole]
            size += len(whole or b"")
        return said

    def close(self) -> None:
        """Lets go of the connection."""
        self._connection.close()

    def _found(self, run: str | None) -> str:
        known = self._connection.call("ZREVRANGE", _RUNS, 0, -1)
        runs = [name.decode(errors="replace") for name in known]
        mine = [name for name in runs if name.startswith(run or "")]
        if len(mine) == 1 or (mine and run is None):
            return mine[0]
        if not runs:
            raise TransportError("no run has told anything here yet")
        some = ", ".join(name[:12] for name in (mine or runs)[:10])
        raise TransportError(
            f"expected one run whose id begins with {run!r}; there are {some}"
        )

    def _whole(self, data: bytes) -> bytes | None:
        """A message, also one that is too long for the stream; None if it is gone."""
        if b'"dataref"' not in data:
            return data
        with contextlib.suppress(ValueError, TypeError, KeyError):
            key = json.loads(data)["dataref"]
            if key.startswith(_key(self.run, "large:")):
                return self._connection.call("GET", key)
        return data
