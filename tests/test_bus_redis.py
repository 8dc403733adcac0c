"""Redis Streams under faults, on a real server: all arrives once and in order."""

import dataclasses
import io
import itertools
import json
import logging
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import redis
from redis_server import Proxy, Server, needs_redis
from reports import report
from reports import seeds as a_layer
from rich.console import Console

from esper_jax import LifecycleConfig, Stage
from esper_jax.bus import (
    Acknowledged,
    Enable,
    LayerSeen,
    Record,
    RemotePolicy,
    RunEnded,
    Service,
    StopAndSave,
    decode,
    encode,
    read_record,
)
from esper_jax.bus import redis_streams as streams
from esper_jax.bus.connect import check_url, client, connect, shown
from esper_jax.bus.envelope import MOST_BYTES
from esper_jax.bus.messages import Layer
from esper_jax.bus.outbox import Letter, Outbox
from esper_jax.bus.redis_entries import entries_of
from esper_jax.bus.redis_streams import RedisClient, RedisStreams
from esper_jax.bus.seen import Lent, seen_told
from esper_jax.bus.transport import TransportError
from esper_jax.bus.watch import print_all
from esper_jax.lifecycle.commands import commands_for
from esper_jax.lifecycle.signals import Signals
from esper_jax.lifecycle.state import init_seeds
from esper_jax.policy import Policy

pytestmark = needs_redis

LAYERS = {"layers/0": Layer(4, ("residual_mlp",))}
RUNS = (f"run{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Any:
    """One server for all tests; each has a run of its own."""
    made = Server(tmp_path_factory.mktemp("redis")).start()
    yield made
    made.kill()


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: Any) -> None:
    """Seconds are tenths of a second here."""
    made = streams._redis

    def hurried(url: str) -> Any:
        one = made(url)
        one.connection_pool.connection_kwargs["socket_timeout"] = 0.8
        return one

    monkeypatch.setattr(streams, "_redis", hurried)


def wait(what: Callable[[], Any], seconds: float = 30) -> Any:
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until
        time.sleep(0.005)
    return found


def events(numbers: Any) -> list[Letter]:
    return [Letter("events", b'{"n": %d}' % number) for number in numbers]


def told(url: str, run: str) -> list[int]:
    """The numbers that are in the stream of events."""
    reader = RedisClient(url, run, last=None)
    found: list[bytes] = []
    while more := reader.receive(0.001):
        found += more
    reader.close()
    return [entry["n"] for data in found if "n" in (entry := json.loads(data))]


def test_a_server_that_comes_late_gets_all_of_it_once(
    tmp_path: pathlib.Path, caplog: Any
) -> None:
    late = Server(tmp_path)
    outbox = Outbox(RedisStreams(late.url, "late"), tmp_path / "spill", room=8)
    outbox.post(*events(range(100)))  # nobody waits for it
    for tick in range(20):
        outbox.tell(lambda tick=tick: [Letter("telemetry", b'{"t": %d}' % tick)])
    wait(lambda: outbox.error)
    assert outbox.waiting == 100
    assert outbox.dropped == 12  # telemetry alone, the oldest
    assert (tmp_path / "spill").stat().st_size > 0
    late.start()
    assert outbox.flush(30)
    assert told(late.url, "late") == [*range(100)]
    assert not (tmp_path / "spill").exists()
    telemetry = streams._redis(late.url).xrange("esper:{late}:telemetry")
    assert [json.loads(f[b"m"])["t"] for _, f in telemetry] == [*range(12, 20)]
    assert (outbox.close(1), outbox.outages) == (0, 1)
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert said[0].startswith("the bus cannot be reached (Error 111 ")
    assert said[1:] == ["the bus can be reached again"]
    late.kill()


def test_a_server_that_is_killed_again_and_again_loses_and_doubles_nothing(
    tmp_path: pathlib.Path,
) -> None:
    server = Server(tmp_path).start()
    outbox = Outbox(RedisStreams(server.url, "killed"), tmp_path / "spill", room=16)
    for part in range(4):
        outbox.post(*events(range(part * 500, part * 500 + 500)))
        server.kill()
        wait(lambda: outbox.error)
        server.start()
    assert outbox.flush(60)
    assert told(server.url, "killed") == [*range(2000)]
    assert outbox.close(1) == 0
    server.kill()


def test_an_answer_that_does_not_come_back_is_not_sent_twice(server: Server) -> None:
    """What was sent has arrived, and nobody knows: the worst moment of a connection."""
    proxy, run = Proxy(server.port), next(RUNS)
    outbox = Outbox(RedisStreams(proxy.url, run))
    outbox.post(*events(range(10)))
    assert outbox.flush(10)
    for first in (10, 20):
        proxy.stalls.set()
        outbox.post(*events(range(first, first + 10)))
        # It has arrived while the outbox still waits for the answer.
        wait(lambda first=first: len(told(server.url, run)) == first + 10)
        assert outbox.waiting == 10
        wait(lambda: outbox.error)  # it gave up
        proxy.stalls.clear()
        proxy.cut()
        assert outbox.flush(30)
    assert told(server.url, run) == [*range(30)]
    assert outbox.close(1) == 0
    proxy.close()


def test_a_server_without_memory_gets_it_later(tmp_path: pathlib.Path) -> None:
    small = Server(tmp_path).start()
    admin = streams._redis(small.url)
    outbox = Outbox(RedisStreams(small.url, "full"), tmp_path / "spill", room=4)
    outbox.post(*events(range(5)))
    assert outbox.flush(10)
    admin.config_set("maxmemory", "1mb")  # it needs more for itself
    outbox.post(*events(range(5, 50)))
    assert "maxmemory" in wait(lambda: outbox.error)
    admin.config_set("maxmemory", 0)
    assert outbox.flush(30)
    assert told(small.url, "full") == [*range(50)]
    # All connections are cut: the next attempt makes a new one.
    admin.client_kill_filter(_type="normal", skipme=True)
    outbox.post(*events(range(50, 60)))
    assert outbox.flush(30)
    assert told(small.url, "full") == [*range(60)]
    assert outbox.close(1) == 0
    small.kill()


def test_what_is_left_at_the_end_is_sent_by_the_next_process(
    server: Server, tmp_path: pathlib.Path
) -> None:
    """Also if it was sent, but the answer did not come: it keeps its number."""
    proxy, run, spill = Proxy(server.port), next(RUNS), tmp_path / "spill"
    outbox = Outbox(RedisStreams(proxy.url, run), spill, room=4)
    outbox.post(*events([0]))
    assert outbox.flush(10)
    proxy.stalls.set()
    outbox.post(*events([1, 2]))
    wait(lambda: outbox.waiting == 2 and len(told(server.url, run)) == 3)
    outbox.post(*events(range(3, 12)))
    assert outbox.close(0) == 0
    kept = spill.read_bytes()
    assert len(kept.splitlines()) == 11
    spill.write_bytes(kept + b'{"epoch": "half a li')  # it was killed
    proxy.close()
    following = Outbox(RedisStreams(server.url, run), spill, room=4)
    following.post(*events(range(12, 15)))
    assert following.flush(10)
    assert told(server.url, run) == [*range(15)]
    assert following.close(1) == 0
    assert not spill.exists()


def test_a_disk_that_takes_nothing_loses_nothing_while_the_process_lives(
    server: Server, tmp_path: pathlib.Path
) -> None:
    proxy, run = Proxy(server.port), next(RUNS)
    proxy.stalls.set()
    gone = tmp_path / "gone" / "spill"
    outbox = Outbox(RedisStreams(proxy.url, run), gone, room=4)
    outbox.post(*events(range(50)))
    assert outbox.waiting == 50
    proxy.stalls.clear()
    proxy.cut()
    assert outbox.flush(30)
    assert told(server.url, run) == [*range(50)]
    proxy.stalls.set()
    outbox.post(*events(range(50, 60)))
    assert outbox.close(0) == 10  # and then they are counted
    proxy.close()


def service(transport: Any, record: pathlib.Path, at: int = 0) -> Service:
    kept = Record(record, read_record(record), at=(0, at))
    return Service(LAYERS, transport, record=kept, patience=0)


REPORT = report(1, {})


def answers(url: str, run: str) -> list[tuple[str, str]]:
    reader = RedisClient(url, run, last=None)
    found: list[bytes] = []
    while more := reader.receive(0.001):
        found += more
    reader.close()
    said = [decode(data).message for data in found]
    return [(a.command, a.outcome) for a in said if isinstance(a, Acknowledged)]


def joined(service: Service, count: int) -> None:
    """Asks until so many commands have joined the tick."""

    def asked() -> bool:
        service.asked(1)
        assert service._admitted is not None
        return len(service._admitted.now) == count

    wait(asked)


def test_a_consumer_that_dies_between_effect_and_answer_answers_later_once(
    server: Server, tmp_path: pathlib.Path
) -> None:
    run, record = next(RUNS), tmp_path / "commands.jsonl"
    proxy = Proxy(server.port)
    RedisStreams(server.url, run).publish([])  # the run is known
    sender = RedisClient(server.url, run)
    sender.send(encode(Enable(on=False), "test", "off"))
    first = service(RedisStreams(proxy.url, run), record)
    joined(first, 1)
    proxy.stalls.set()
    proxy.cut()
    done = first.ticked(REPORT, events=[])  # the effect; its answer gets nowhere
    assert [d.id for d in done] == ["off"]
    assert answers(server.url, run) == []
    first._transport.close()  # SIGKILL: nothing more is said
    second = service(RedisStreams(server.url, run), record, at=1)
    assert not second.asked(2).germination  # it holds
    # What the dead consumer held comes again, is known, and is answered.
    sender.send(encode(StopAndSave(), "test", "stop"))

    def answered() -> bool:
        second.asked(2)
        return answers(server.url, run) == [("off", "OK")]

    wait(answered)
    assert len(read_record(record)) == 1
    joined(second, 1)
    second.ticked(REPORT, events=[])
    second.stopped()
    assert second.outbox.flush(10)
    assert answers(server.url, run) == [("off", "OK"), ("stop", "OK")]
    pending = streams._redis(server.url).xpending(f"esper:{{{run}}}:commands", "run")
    assert pending["pending"] == 0
    second.close()
    proxy.close()
    # A third has nothing to do.
    third = service(RedisStreams(server.url, run), record, at=2)
    third.asked(3)
    third.close()
    assert len(answers(server.url, run)) == 2


class Held(RedisStreams):
    """Sends nothing until it may, and says how often what is pending was read again."""

    def __init__(self, url: str, run: str) -> None:
        super().__init__(url, run)
        self.may, self.again = True, 0

    def publish(self, messages: Any) -> None:
        if not self.may:
            raise TransportError("not now")
        super().publish(messages)

    def _read(self, start: str, deliver: Any) -> str:
        found = super()._read(start, deliver)
        self.again += start != ">"
        return found


def test_a_listener_that_connects_anew_doubles_no_answer(
    server: Server, tmp_path: pathlib.Path
) -> None:
    """The answers wait in the outbox; after a resume, in its file."""
    run, record = next(RUNS), tmp_path / "commands.jsonl"
    held, admin = Held(server.url, run), streams._redis(server.url)
    kept = Record(record, at=(0, 0))
    one = Service(LAYERS, held, record=kept, spill=tmp_path / "spill", patience=0)
    one.started(0, 0)
    assert one.outbox.flush(10)
    sender = RedisClient(server.url, run)
    names = [f"c{n}" for n in range(5)]
    sender.send(b"garbage")
    for name in names:
        sender.send(encode(Enable(on=False), "test", name))
    held.may = False
    joined(one, 5)
    one.ticked(REPORT, events=[])
    assert one.outbox.waiting == 6
    for tick in (2, 3):
        before = held.again
        admin.client_kill_filter(_type="normal", skipme=True)
        wait(lambda before=before: held.again > before)
        one.asked(tick)
        one.ticked(report(tick, {}), events=[])
    held.may = True
    assert one.outbox.flush(10)
    assert answers(server.url, run) == [(name, "OK") for name in names]
    assert admin.xlen(f"esper:{{{run}}}:dead") == 1
    # They wait for the next process.
    held.may = False
    sender.send(encode(Enable(on=True), "test", "last"))

    def last() -> bool:
        one.asked(4)
        return bool(one._admitted.now)

    wait(last)
    one.ticked(report(4, {}), events=[])
    one.close()
    assert (tmp_path / "spill").exists()
    again = Held(server.url, run)
    kept = Record(record, read_record(record), at=(0, 4))
    two = Service(LAYERS, again, record=kept, spill=tmp_path / "spill")
    wait(lambda: again.again)
    two.asked(5)
    two.ticked(report(5, {}), events=[])
    assert two.outbox.flush(10)
    assert answers(server.url, run) == [(n, "OK") for n in (*names, "last")]
    # Whoever sends it again is answered again.
    RedisClient(server.url, run).send(encode(Enable(on=True), "test", "last"))

    def twice() -> bool:
        two.asked(6)
        return len(answers(server.url, run)) == 7

    wait(twice)
    two.close()
    sender.close()


def test_a_listener_outlives_what_nobody_foresaw(
    server: Server, tmp_path: pathlib.Path, monkeypatch: Any, caplog: Any
) -> None:
    run, failed = next(RUNS), []

    def broken(found: Any) -> Any:
        if len(failed) < 2:
            failed.append(found)
            raise AttributeError("decode")
        return entries_of(found)

    monkeypatch.setattr(streams, "entries_of", broken)
    url = f"{server.url}?decode_responses=true"
    one = service(RedisStreams(url, run), tmp_path / "commands.jsonl")
    one.started(0, 0)
    assert one.outbox.flush(10)
    RedisClient(url, run).send(encode(Enable(on=False), "test", "off"))
    joined(one, 1)
    one.close()
    assert "commands cannot be read now (AttributeError" in caplog.text


def test_commands_that_are_answered_go_and_others_are_not_trimmed(
    server: Server, tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(streams, "_MOST_COMMANDS", 3)
    run, admin = next(RUNS), streams._redis(server.url)
    one = service(RedisStreams(server.url, run), tmp_path / "commands.jsonl")
    one.started(0, 0)
    assert one.outbox.flush(10)
    sender = RedisClient(server.url, run)
    joined(one, 0)
    one._transport._open = False
    for number in range(3):
        sender.send(encode(Enable(on=False), "test", f"c{number}"))
    with pytest.raises(TransportError, match="3 commands wait for the run already"):
        sender.send(encode(Enable(on=False), "test", "more"))
    one.close()
    two = service(RedisStreams(server.url, run), tmp_path / "commands.jsonl")
    joined(two, 3)
    two.ticked(REPORT, events=[])
    assert two.outbox.flush(10)
    assert admin.xlen(f"esper:{{{run}}}:commands") == 0
    sender.send(encode(Enable(on=True), "test", "more"))
    joined(two, 1)
    two.close()


def test_a_run_that_went_on_is_not_the_one_that_started_last(
    server: Server, monkeypatch: Any
) -> None:
    monkeypatch.setattr(streams, "_REGISTERED", 0)
    names = sorted(next(RUNS) for _ in range(2))
    first, last = (RedisStreams(server.url, name) for name in names)
    for one in (last, first, first):
        one._began += one is last
        one.publish([])
    assert RedisClient(server.url).run == names[1]
    streams._redis(server.url).delete("esper:runs")  # as a server that keeps nothing
    for one in (last, first):
        one.publish([])
    assert RedisClient(server.url).run == names[1]
    for one in (last, first):
        one.close()


def test_telemetry_is_bounded_by_its_bytes(server: Server, monkeypatch: Any) -> None:
    monkeypatch.setattr(streams, "_MOST_BYTES", 100_000)
    run = next(RUNS)
    outbox = Outbox(RedisStreams(server.url, run), room=10_000)
    for topic in ("telemetry", "events"):
        outbox.post(*(Letter(topic, b"x" * 1000) for _ in range(1000)))
    assert outbox.flush(10)
    admin = streams._redis(server.url)
    assert 100 <= admin.xlen(f"esper:{{{run}}}:telemetry") <= 300
    assert admin.xlen(f"esper:{{{run}}}:events") == 1000
    large = json.dumps({"id": "a", "data": "x" * MOST_BYTES}).encode()
    outbox.post(Letter("telemetry", large))
    assert outbox.flush(10)
    [key] = admin.keys(f"esper:{{{run}}}:large:*")
    assert 50 < admin.ttl(key) <= 60
    outbox.close(1)


def test_all_that_a_run_said_is_printed_in_its_order(
    server: Server, monkeypatch: Any, caplog: Any
) -> None:
    """However many entries of each stream come at once, and where a read fails."""
    monkeypatch.setattr(streams, "_COUNT", 7)
    run = next(RUNS)
    outbox = Outbox(RedisStreams(server.url, run))
    for n in range(60):
        topic = "events" if n % 20 == 3 else "telemetry"
        outbox.post(Letter(topic, b'{"n": %d}' % n))
        assert outbox.flush(10)
        time.sleep(0.002)  # within a millisecond, nobody knows
    end = RunEnded(tick=1, step=1, reason="done")
    outbox.post(Letter("events", encode(end, "test")))
    outbox.post(Letter("telemetry", b'{"n": 60}'))
    assert outbox.flush(10)
    reader, reads = RedisClient(server.url, run, last=None), itertools.count()
    receive = reader.receive

    def failing(patience: float) -> list[bytes]:
        if next(reads) == 1:
            raise TransportError("it is away")
        return receive(patience)

    monkeypatch.setattr(reader, "receive", failing)
    printed = io.StringIO()
    assert print_all(reader, Console(file=printed)) == 0
    numbers = [json.loads(line).get("n") for line in printed.getvalue().splitlines()]
    assert [n for n in numbers if n is not None] == [*range(61)]
    assert "the connection is lost (it is away); trying again" in caplog.text
    outbox.close(1)


def test_garbage_and_what_is_too_long_stop_nothing(
    server: Server, tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
    monkeypatch.undo()  # the server needs a while for 100 MB
    run, record = next(RUNS), tmp_path / "commands.jsonl"
    one = service(RedisStreams(server.url, run), record)
    one.started(0, 0)
    assert one.outbox.flush(10)
    sender = RedisClient(server.url, run)
    sender.send(b"\x00\xff")
    patient = redis.Redis(port=server.port)
    patient.xadd(f"esper:{{{run}}}:commands", {"m": b"x" * 100_000_000})
    patient.xadd(f"esper:{{{run}}}:commands", {"other": "field"})
    patient.close()
    sender.send(encode(Enable(on=False), "test", "off"))
    joined(one, 1)
    one.ticked(REPORT, events=[])
    assert one.outbox.flush(10)
    assert answers(server.url, run) == [("off", "OK")]
    dead = streams._redis(server.url).xrange(f"esper:{{{run}}}:dead")
    told = [json.loads(fields[b"m"]) for _, fields in dead]
    assert [entry["bytes"] for entry in told] == [2, 100_000_000, 0]
    pending = streams._redis(server.url).xpending(f"esper:{{{run}}}:commands", "run")
    assert pending["pending"] == 0
    one.close()


def test_a_server_that_forgot_everything_is_gone_on_with(
    tmp_path: pathlib.Path,
) -> None:
    """It was restarted without its data: streams and group are made anew."""
    server = Server(tmp_path).start()
    one = service(RedisStreams(server.url, "forgot"), tmp_path / "commands.jsonl")
    one.started(0, 0)
    assert one.outbox.flush(10)
    server.kill()
    for kept in tmp_path.rglob("*.aof"):
        kept.write_bytes(b"")
    one.started(0, 0)
    wait(lambda: one.outbox.error)
    server.start()
    assert one.outbox.flush(10)
    RedisClient(server.url, "forgot").send(encode(Enable(on=False), "test", "off"))
    joined(one, 1)
    one.close()
    server.kill()


def test_a_report_that_is_too_long_is_kept_beside_the_stream(server: Server) -> None:
    run = next(RUNS)
    outbox = Outbox(RedisStreams(server.url, run))
    envelope = {"id": "a", "type": "t", "data": ["x" * 1000] * 2000}
    outbox.post(Letter("events", json.dumps(envelope).encode()))
    assert outbox.flush(10)
    admin = streams._redis(server.url)
    [(_, fields)] = admin.xrange(f"esper:{{{run}}}:events")
    stub = json.loads(fields[b"m"])
    assert len(fields[b"m"]) < 200
    assert 3500 < admin.ttl(stub["dataref"]) <= 3600
    [found] = RedisClient(server.url, run, last=None).receive(1)
    assert json.loads(found) == envelope
    outbox.close(1)


def looking() -> Policy:
    """Asks for the seed whose number is the tick's, by its worth."""

    def decide(seeds: Any, signals: Any, memory: Any) -> Any:
        wants = signals["big"].worth == 7
        target = jnp.where(wants, jnp.int8(Stage.GERMINATED), jnp.int8(-1))
        asked = commands_for(len(target), {0: Stage.GERMINATED})
        return {"big": dataclasses.replace(asked, target=target)}, memory

    return Policy(lambda shapes, key: 0, decide, reads=frozenset())


def test_a_remote_policy_reads_layers_that_are_too_long_for_the_stream(
    server: Server, caplog: Any
) -> None:
    """Where the server has forgotten one, that tick is passed over."""
    seeds, run = 12_000, next(RUNS)
    of = Lent(
        3,
        {"big": Layer(seeds, ("residual_mlp",))},
        {"big": np.ones((1, seeds), np.int32)},
        {"big": [False]},
        LifecycleConfig(),
        frozenset(),
    )
    outbox = Outbox(RedisStreams(server.url, run))
    outbox.post(*events([0]))
    assert outbox.flush(10)
    reader = RedisClient(server.url, run)
    remote = RemotePolicy(looking(), reader)
    admin = streams._redis(server.url)

    def large() -> list[bytes]:
        return admin.keys(f"esper:{{{run}}}:large:*")

    for tick, forgotten in ((1, False), (2, True), (3, False)):
        worth = np.zeros(seeds, np.float32)
        worth[seeds - tick] = 7
        layer = a_layer([0] * seeds, signals=Signals.unmeasured(worth=worth))
        told = seen_told(
            of, report(tick, {"big": layer}), {"big": init_seeds(seeds, 16)}, 0
        )
        for n, message in enumerate(told):
            data = encode(message, "test", f"{tick}-{n}")
            assert (len(data) > MOST_BYTES) == isinstance(message, LayerSeen)
            outbox.post(Letter("telemetry", data))
        assert outbox.flush(10)
        if forgotten:
            assert admin.delete(*large()) == 2
        assert remote.step(1) == (None if forgotten else tick)
    sent = admin.xrange(f"esper:{{{run}}}:commands")
    asked = [decode(fields[b"m"]).message for _, fields in sent]
    assert [(d.seen, [c.seed for c in d.commands]) for d in asked] == [
        (1, [seeds - 1]),
        (3, [seeds - 3]),
    ]
    assert not [r for r in caplog.records if r.name.startswith("esper_jax")]
    outbox.close(1)
    reader.close()


def test_a_reader_that_is_far_behind_takes_some_at_once(
    server: Server, monkeypatch: Any
) -> None:
    monkeypatch.setattr(streams, "_MOST_AT_ONCE", 10_000)
    run = next(RUNS)
    outbox = Outbox(RedisStreams(server.url, run))
    outbox.post(*(Letter("events", b"%04d" % n + b"x" * 3000) for n in range(20)))
    assert outbox.flush(10)
    reader = RedisClient(server.url, run, last=None)
    found = [reader.receive(1) for _ in range(5)]
    assert [len(part) for part in found] == [4] * 5
    assert [int(x[:4]) for part in found for x in part] == [*range(20)]
    outbox.close(1)


def test_streams_are_bounded(server: Server, monkeypatch: Any) -> None:
    monkeypatch.setitem(streams._MOST, "events", 100)
    run = next(RUNS)
    outbox = Outbox(RedisStreams(server.url, run), room=10_000)
    outbox.post(*events(range(1000)))
    assert outbox.flush(10)
    assert told(server.url, run)[-1] == 999
    assert len(told(server.url, run)) <= 300  # "about"
    outbox.close(1)


def test_a_client_names_the_runs_and_what_is_wrong(server: Server) -> None:
    for name in ("abc1", "abd2"):
        RedisStreams(server.url, name).publish([])
    assert RedisClient(server.url).run == "abd2"
    assert RedisClient(server.url, "abc").run == "abc1"
    with pytest.raises(TransportError, match="id begins with 'ab'; there are abd2, ab"):
        RedisClient(server.url, "ab")
    with pytest.raises(TransportError, match="id begins with 'x'; there are abd2, ab"):
        RedisClient(server.url, "x")


def test_a_password_is_asked_for_and_never_said(tmp_path: pathlib.Path) -> None:
    secret = "hunter2%20"
    server = Server(tmp_path, "--requirepass", "hunter2 ").start()
    address = f"127.0.0.1:{server.port}"
    url = f"redis://:{secret}@{address}/0"
    transport = connect(url, "secret")
    transport.publish([])
    assert client(url).run == "secret"
    assert shown(url) == f"redis://{address}/0"
    for wrong in (f"redis://:{secret}x@{address}", f"redis://{address}"):
        with pytest.raises(TransportError) as caught:
            client(wrong)
        assert "hunter2" not in str(caught.value)
    unquoted = [f"redis://:hunter2{c}x@{address}" for c in "#/?"]
    for wrong in (url + "?timeout=3", url.replace(":", ":x", 2), *unquoted):
        with pytest.raises(ValueError, match="expected redis://") as bad:
            check_url(wrong)
        assert "hunter2" not in str(bad.value)
    transport.close()
    server.kill()
