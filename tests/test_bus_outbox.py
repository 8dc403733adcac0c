"""What waits to be sent, and the transport of files and pipes."""

import json
import os
import pathlib
import resource
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from esper_jax.bus import Enable, Local, Move, Record, Service, encode, read_record
from esper_jax.bus.envelope import MOST_BYTES
from esper_jax.bus.lines import Lines, LinesClient, Tail
from esper_jax.bus.messages import Acknowledged, Layer
from esper_jax.bus.outbox import Letter, Outbox
from esper_jax.bus.record import Done
from esper_jax.bus.transport import Outgoing, TransportError


class Gate(Local):
    """A transport that waits while it is shut, and fails while it is broken."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.broken = threading.Event(), False
        self.tried = threading.Event()

    def publish(self, messages: Sequence[Outgoing]) -> None:
        self.tried.set()
        assert self.open.wait(30)
        if self.broken:
            raise TransportError("it is broken")
        super().publish(messages)

    def numbers(self) -> list[int]:
        with self._lock:
            return [json.loads(data) for _, data in self._kept]


def events(numbers: Any) -> list[Letter]:
    return [Letter("events", f"{number}".encode()) for number in numbers]


def wait(what: Callable[[], Any]) -> None:
    until = time.monotonic() + 20
    while not what():
        assert time.monotonic() < until
        time.sleep(0.002)


def test_nobody_waits_for_a_transport_that_hangs(tmp_path: pathlib.Path) -> None:
    gate = Gate()
    outbox = Outbox(gate, tmp_path / "spill", room=4)
    outbox.post(*events([0]))
    assert gate.tried.wait(20)  # it hangs from here on
    outbox.post(*events(range(1, 40)))
    for n in range(100, 110):
        outbox.tell(lambda n=n: events([n]))
    assert (outbox.waiting, outbox.dropped) == (40, 6)
    assert len((tmp_path / "spill").read_bytes().splitlines()) == 36
    gate.open.set()
    assert outbox.flush(20)
    assert gate.numbers() == [*range(40), *range(106, 110)]
    assert not (tmp_path / "spill").exists()
    assert outbox.account == {"records": 6, "given": 50, "error": None}
    assert outbox.close(1) == 0


def test_what_was_told_first_goes_first() -> None:
    """So the end of a run comes behind what its last tick measured."""
    gate = Gate()
    outbox = Outbox(gate)
    outbox.post(*events([0]))
    assert gate.tried.wait(20)
    for number in range(1, 9):
        if number % 3:
            outbox.post(*events([number]))
        else:
            outbox.tell(lambda n=number: events([n]))
    gate.open.set()
    assert outbox.flush(20)
    assert gate.numbers() == [*range(9)]
    outbox.close(1)


def test_what_fails_is_tried_again_and_what_cannot_be_made_stops_nothing(
    caplog: Any,
) -> None:
    gate = Gate()
    gate.broken = True
    gate.open.set()
    outbox = Outbox(gate)
    outbox.tell(lambda: events(1 // 0 for _ in "x"))
    outbox.post(*events(range(5)))
    wait(lambda: outbox.error)
    gate.broken = False
    outbox.tell(lambda: events([5]))
    assert outbox.flush(20)
    assert gate.numbers() == [*range(6)]
    outbox.close(1)
    said = [record.getMessage() for record in caplog.records]
    assert "the bus cannot be reached (it is broken); the run goes on" in said
    assert "the bus can be reached again" in said


def test_the_end_waits_no_longer_than_its_patience(tmp_path: pathlib.Path) -> None:
    gate, spill = Gate(), tmp_path / "spill"
    outbox = Outbox(gate, spill, room=4)
    outbox.post(*events(range(10)))
    assert gate.tried.wait(20)
    assert outbox.close(0) == 0
    numbers = [json.loads(line)["number"] for line in spill.read_bytes().splitlines()]
    assert numbers == [*range(1, 11)]
    gate.open.set()  # too late: it is not for this process to send any more
    following = Gate()
    following.open.set()
    again = Outbox(following, spill, room=4)
    again.post(*events([10]))
    assert again.flush(20)
    assert following.numbers() == [*range(11)]
    again.close(1)
    nowhere = Outbox(Gate())
    nowhere.post(*events(range(3)))
    assert nowhere.close(0) == 3


def test_a_record_knows_what_is_due_and_what_holds(tmp_path: pathlib.Path) -> None:
    def done(id: str, command: Any, rollbacks: int, tick: int, outcome: str) -> Done:
        answer = Acknowledged(command=id, outcome=outcome, reason="", tick=tick)
        return Done(command, tick, rollbacks, answer)

    move = Move(layer="a", seed=0, stage="CULLED")
    past = [
        done("off", Enable(on=False), 0, 3, "OK"),
        done("gone", move, 0, 5, "UNDONE"),  # the governor went back to tick 4
        done("on", Enable(on=True), 1, 5, "OK"),
        done("late", move, 1, 6, "OK"),
    ]
    path = tmp_path / "commands.jsonl"
    Record(path).add(past)
    assert read_record(path) == past
    whole = Record(path, past)
    assert [*whole.due] == [(0, 3), (0, 5), (1, 5), (1, 6)]
    assert whole.germination
    middle = Record(path, past, at=(1, 4))
    assert [*middle.due] == [(1, 5), (1, 6)]
    assert not middle.germination
    end = Record(path, past, at=(1, 6), replayed=[past[3], done("x", move, 1, 7, "")])
    assert [d.id for of in end.due.values() for d in of] == ["x"]
    assert end.germination
    assert end.answers.keys() == {"off", "gone", "on", "late"}
    # Where a command is due, it joins with what else has come.
    bus = Local()
    layers = {"a": Layer(2, ("b",))}
    with Service(layers, bus, record=Record(None, past, at=(1, 5))) as service:
        bus.send(Move(layer="a", seed=1, stage="TRAINING"))
        asked = service.asked(6, 1).commands["a"].target
        assert [int(t) for t in asked] == [8, 2]


def test_the_lines_of_a_file_come_as_they_are_written(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "in.jsonl"
    tail = Tail(path)
    assert [*tail.read()] == []
    with path.open("ab", buffering=0) as file:
        file.write(b"one\ntw")
        assert [*tail.read()] == [(b"one", 4)]
        file.write(b"o\n\n  \nthree\n")
        assert [*tail.read()] == [(b"two", 8), (b"three", 18)]
        file.write(b"x" * (3 * MOST_BYTES))
        [(cut, _)] = tail.read()
        assert len(cut) > MOST_BYTES
        file.write(b"x\nfour\n")
        assert [line for line, _ in tail.read()] == [b"four"]
    path.write_bytes(b"anew\n")  # a shorter file is another
    assert [*tail.read()] == [(b"anew", 5)]
    assert [*Tail(path, 5).read()] == []


def test_named_pipes_carry_commands_and_reports(tmp_path: pathlib.Path) -> None:
    for name in ("in.jsonl", "out.jsonl"):
        os.mkfifo(tmp_path / name)
    lines = Lines(tmp_path)
    with pytest.raises(TransportError, match=r"out.jsonl cannot be written: No such"):
        lines.publish([Outgoing("e", 1, "events", b"nobody reads")])
    with pytest.raises(TransportError, match=r"in.jsonl cannot be written: No such"):
        LinesClient(tmp_path).send(b"nobody listens")
    came: list[bytes] = []
    lines.listen(lambda delivery: came.append(delivery.data))
    reader = LinesClient(tmp_path)
    assert reader.receive(0) == []
    lines.publish(
        [Outgoing("e", 1, "events", b"hello"), Outgoing("e", 2, "acks", b"x")]
    )
    assert reader.receive(10) == [b"hello", b"x"]
    data = encode(Enable(on=True), "test")
    reader.send(data)
    wait(lambda: came == [data])
    reader.close()
    lines.close()


def test_answered_lines_are_settled_in_their_order(tmp_path: pathlib.Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"a\nb\nc\n")
    lines, came = Lines(tmp_path), []
    lines.listen(came.append)
    assert [d.token for d in came] == ["2", "4", "6"]

    def answer(token: str) -> None:
        lines.publish([Outgoing("e", 1, "acks", b"{}", (token,))])

    answer("4")
    assert not (tmp_path / "in.settled").exists()  # the first is not answered
    answer("2")
    assert (tmp_path / "in.settled").read_text() == "4\n"
    lines.close()
    again: list[Any] = []
    following = Lines(tmp_path)
    following.listen(again.append)
    assert [d.data for d in again] == [b"c"]
    following.close()


class Narrow(Gate):
    """A transport that takes little at once."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.sizes = most, []
        self.open.set()

    def publish(self, messages: Sequence[Outgoing]) -> None:
        self.sizes.append(sum(len(m.data) for m in messages))
        if self.sizes[-1] > self.most:
            raise TransportError("it takes too long")
        super().publish(messages)


def numbered(topic: Any, number: int, size: int) -> Letter:
    return Letter(topic, b" " * size + b"%d" % number)


def test_much_is_sent_in_portions() -> None:
    narrow = Narrow(300_000)
    outbox = Outbox(narrow)
    outbox.tell(lambda: [numbered("telemetry", n, 60_000) for n in range(20)])
    outbox.post(*(numbered("events", 100 + n, 60_000) for n in range(20)))
    assert outbox.flush(20)
    assert narrow.numbers() == [*range(20), *range(100, 120)]
    assert outbox.outages == 0
    outbox.close(1)


def test_telemetry_that_cannot_be_sent_holds_up_no_answer() -> None:
    narrow = Narrow(300_000)
    outbox = Outbox(narrow)
    outbox.tell(lambda: [numbered("telemetry", 1, 400_000)])
    wait(lambda: outbox.error)
    outbox.post(*events([2, 3]))
    outbox.tell(lambda: events([4]))
    assert outbox.flush(20)
    assert narrow.numbers() == [2, 3, 4]
    assert (outbox.dropped, outbox.close(1)) == (1, 0)


def test_a_file_that_cannot_be_read_for_a_while_stops_nothing(
    tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
    gate, spill = Gate(), tmp_path / "spill"
    outbox = Outbox(gate, spill, room=4)
    outbox.post(*events(range(12)))
    assert gate.tried.wait(20)
    opened, fails = pathlib.Path.open, threading.Event()
    fails.set()

    def fail(path: pathlib.Path, mode: str = "r", *words: Any, **more: Any) -> Any:
        if path == spill and mode == "rb" and fails.is_set():
            raise OSError(24, "Too many open files")
        return opened(path, mode, *words, **more)

    monkeypatch.setattr(pathlib.Path, "open", fail)
    gate.open.set()
    wait(lambda: "Too many open files" in outbox.error)
    outbox.post(*events([12]))
    fails.clear()
    assert outbox.flush(20)
    assert gate.numbers() == [*range(13)]
    gate.open.clear()
    outbox.post(*events(range(20, 32)))
    fails.set()
    assert outbox.close(0) == 4  # what the file holds is there for the next process
    fails.clear()
    left = [json.loads(x)["data"] for x in spill.read_bytes().splitlines()]
    assert left == [f"{n}" for n in range(24, 32)]
    gate.open.set()


def test_what_others_take_out_of_the_file_is_counted(tmp_path: pathlib.Path) -> None:
    gate, spill = Gate(), tmp_path / "spill"
    outbox = Outbox(gate, spill, room=4)
    outbox.post(*events(range(20)))
    assert gate.tried.wait(20)
    spill.unlink()
    gate.open.set()
    assert outbox.flush(20)  # it waits for nothing that is gone
    outbox.post(*events(range(20, 23)))
    assert outbox.flush(20)
    assert gate.numbers() == [*range(4), *range(20, 23)]
    assert outbox.close(1) == 16


def test_a_full_disk_loses_nothing_while_the_process_lives_and_counts_then(
    tmp_path: pathlib.Path,
) -> None:
    """A limit on the size of files ends a write in its midst, as a full disk does."""
    gate, spill = Gate(), tmp_path / "spill"
    outbox = Outbox(gate, spill, room=4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        outbox.post(*(numbered("events", n, 9000) for n in range(40)))
        assert outbox.waiting == 40
        assert 80_000 < spill.stat().st_size <= 100_000
        assert spill.read_bytes().endswith(b"\n")  # no half message
        gate.open.set()
        assert outbox.flush(20)
        assert gate.numbers() == [*range(40)]
        gate.open.clear()
        gate.tried.clear()
        outbox.post(*(numbered("events", n, 9000) for n in range(40, 80)))
        assert gate.tried.wait(20)
        lost = outbox.close(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    kept = [json.loads(x)["data"].strip() for x in spill.read_bytes().splitlines()]
    assert [int(n) for n in kept] == [*range(44, 44 + len(kept))]
    assert lost == 40 - len(kept)
    assert 0 < len(kept) < 36
    gate.open.set()
    again = Gate()
    again.open.set()
    following = Outbox(again, spill)
    assert following.flush(20)
    assert again.numbers() == [*range(44, 44 + len(kept))]
    following.close(1)


def test_what_cannot_be_read_holds_up_no_answer(
    tmp_path: pathlib.Path, caplog: Any
) -> None:
    (tmp_path / "dead.jsonl").mkdir()
    lines = Lines(tmp_path)
    for number in range(3):
        letters = [("dead", b"bad"), ("acks", b"%d" % number)]
        lines.publish([Outgoing("e", number, t, d) for t, d in letters])
    assert (tmp_path / "out.jsonl").read_bytes() == b"0\n1\n2\n"
    [said] = [r.getMessage() for r in caplog.records]
    assert "what cannot be read is not kept there" in said
    # Tokens that a server gave, of what a run before could not send, settle nothing.
    lines.publish([Outgoing("e", 9, "acks", b"{}", ("1690000000000-0",))])
    lines.close()


def test_answers_that_wait_in_the_file_are_not_given_again(
    tmp_path: pathlib.Path,
) -> None:
    spill = tmp_path / "spill"
    (tmp_path / "in.jsonl").write_bytes(b"a\nb\n")
    gate = Gate()
    before = Outbox(gate, spill)
    before.post(Letter("acks", b"1", ("2",)))
    before.close(0)
    lines, came = Lines(tmp_path), []
    outbox = Outbox(lines, spill)
    assert outbox.answered == {"2"}
    lines.listen(came.append, outbox.answered)
    assert [d.data for d in came] == [b"b"]
    assert outbox.flush(10)
    assert (tmp_path / "in.settled").read_text() == "2\n"
    outbox.close(1)
    lines.close()
    gate.open.set()


def test_what_is_sent_between_two_services_waits_for_the_second() -> None:
    bus, layers = Local(), {"a": Layer(2, ("b",))}
    Service(layers, bus).close()
    bus.send(Move(layer="a", seed=1, stage="TRAINING"))
    with Service(layers, bus) as service:
        assert [int(t) for t in service.asked(1).commands["a"].target] == [-1, 2]
