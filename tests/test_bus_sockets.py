"""The socket in a run's folder: guests of all kinds, none of which hurts the run."""

import contextlib
import json
import pathlib
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from test_bus_command import ROOT, bus

from esper_jax.bus import Enable, encode, sockets
from esper_jax.bus.connect import client
from esper_jax.bus.envelope import MOST_BYTES
from esper_jax.bus.socket_client import SOCKET, ServedClient
from esper_jax.bus.sockets import Served
from esper_jax.bus.transport import Outgoing, TransportError
from esper_jax.run.config import ConfigError
from esper_jax.run.folder import RunError
from esper_jax.run.steering import Channels, check_channels


def wait(what: Callable[[], Any], seconds: float = 30) -> Any:
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until
        time.sleep(0.002)
    return found


def heard_by(reader: Any, count: int) -> list[bytes]:
    """The next messages that a program gets, which come in some pieces."""
    found: list[bytes] = []
    wait(lambda: found.extend(reader.receive(1)) or len(found) >= count)
    return found


class Heard:
    """A served folder whose commands are kept, and answered on demand."""

    def __init__(self, folder: pathlib.Path, **options: Any) -> None:
        self.came: list[Any] = []
        self.served = Served(folder, "abcdef", **options)
        self.served.listen(self.came.append)
        self.folder, self.number = folder, 0

    def say(self, *data: bytes, topic: Any = "events", settles: Any = ()) -> None:
        messages = []
        for one in data:
            self.number += 1
            messages.append(Outgoing("e", self.number, topic, one, tuple(settles)))
        self.served.publish(messages)

    def guest(self, hello: bytes = b'{"last": 0}\n') -> socket.socket:
        one = socket.socket(socket.AF_UNIX)
        one.connect(str(self.folder / SOCKET))
        one.settimeout(20)
        if hello:
            one.sendall(hello)
            assert json.loads(one.recv(100)) == {"run": "abcdef"}
        return one


@pytest.fixture
def heard(tmp_path: pathlib.Path) -> Iterator[Heard]:
    made = Heard(tmp_path)
    yield made
    made.served.close()


def test_several_programs_hear_all_and_ask(heard: Heard) -> None:
    path = heard.folder / SOCKET
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    heard.say(b"1", b"2", b"3")
    first = ServedClient(heard.folder, last=None)
    assert heard_by(first, 3) == [b"1", b"2", b"3"]
    second, third = ServedClient(heard.folder, last=2), ServedClient(heard.folder)
    assert heard_by(second, 2) == [b"2", b"3"]
    long = b"x" * (5 * MOST_BYTES)  # what a run says may be as long as it likes
    heard.say(b"4", long)
    for reader in (first, second, third):
        found: list[bytes] = []
        wait(
            lambda reader=reader, found=found: (
                found.extend(reader.receive(1)) or found[1:]
            )
        )
        assert found == [b"4", long]
    first.send(b"a")
    second.send(b"b")
    wait(lambda: len(heard.came) == 2)
    assert {d.data for d in heard.came} == {b"a", b"b"}
    assert first.receive(0) == []
    # Only who sent it is told what could not be read.
    token = next(d.token for d in heard.came if d.data == b"a")
    heard.say(b"cannot be read", topic="dead", settles=[token])
    assert first.receive(10) == [b"cannot be read"]
    assert second.receive(0.05) == []
    heard.served.close()
    with pytest.raises(TransportError, match="the run has ended the connection"):
        second.receive(10)
    with pytest.raises(TransportError, match=r"no run serves in .*Train with --serve"):
        second.receive(0)
    assert not path.exists()
    for one in (first, second, third):
        one.close()


def test_bad_guests_hurt_nobody(heard: Heard, monkeypatch: Any) -> None:
    monkeypatch.setattr(sockets, "_ROOM", 1 << 20)
    good = ServedClient(heard.folder)
    silent = heard.guest(hello=b"")  # says nothing at all
    lazy = heard.guest()  # never reads
    dying = heard.guest()
    dying.sendall(b'{"half a line')
    dying.close()
    loud = heard.guest(hello=b"")
    loud.sendall(b"\xff\x00[[[\n" * 10 + b"y" * (3 * MOST_BYTES) + b"\nafter\n")
    wait(lambda: heard.came and heard.came[-1].data == b"after")
    lengths = [len(d.data) for d in heard.came]
    assert lengths[:10] == [5] * 10
    assert [MOST_BYTES < n <= MOST_BYTES + (1 << 16) for n in lengths[10:]] == [
        True,
        False,
    ]
    began = time.monotonic()
    for n in range(20):
        heard.say(b"%02d" % n + b"z" * 300_000)
        assert good.receive(10)[0][:2] == b"%02d" % n
    assert time.monotonic() - began < 20
    with contextlib.suppress(ConnectionError):
        while lazy.recv(1 << 20):  # it was let go, after what had been sent
            pass
    assert len(heard.served._guests) == 2  # loud did not read, either
    crowd = [heard.guest(hello=b"") for _ in range(80)]
    wait(lambda: len(heard.served._guests) == 64)
    heard.say(b"still here")
    assert good.receive(10) == [b"still here"]
    for one in (*crowd, silent, lazy, loud, good):
        one.close()
    wait(lambda: not heard.served._guests)


def test_no_more_is_read_than_is_answered(heard: Heard, monkeypatch: Any) -> None:
    monkeypatch.setattr(sockets, "_MOST_HELD", 10)
    monkeypatch.setattr(sockets, "_CHUNK", 64)
    eager = heard.guest()
    eager.sendall(b"".join(b"%06d\n" % n for n in range(100)))
    wait(lambda: len(heard.came) >= 10)
    time.sleep(0.05)
    assert len(heard.came) < 25
    while len(heard.came) < 100:
        before = len(heard.came)
        heard.say(b"done", topic="acks", settles=[d.token for d in heard.came])
        wait(lambda before=before: len(heard.came) > before)
    assert [int(d.data) for d in heard.came] == [*range(100)]
    assert len({d.token for d in heard.came}) == 100
    eager.close()


def test_the_newest_messages_alone_are_kept(heard: Heard, monkeypatch: Any) -> None:
    monkeypatch.setattr(sockets, "_KEPT_BYTES", 4500)
    heard.say(*(b"%03d" % n + b"x" * 996 for n in range(200)))
    late = ServedClient(heard.folder, last=None)
    assert [int(m[:3]) for m in heard_by(late, 4)] == [196, 197, 198, 199]
    late.close()


def test_paths_that_are_too_long_or_taken(tmp_path: pathlib.Path) -> None:
    deep = tmp_path.joinpath(*["d" * 60] * 4)
    deep.mkdir(parents=True)
    made = Heard(deep)
    reader = client(str(deep), last=None)
    made.say(b"hello")
    assert reader.receive(10) == [b"hello"]
    reader.close()
    made.served.close()
    assert not [*deep.iterdir()]
    (deep / SOCKET).write_text("a file of the user's")
    with pytest.raises(OSError, match="in use"):
        Served(deep, "abcdef")
    assert (deep / SOCKET).read_text() == "a file of the user's"
    with pytest.raises(ConfigError, match="--serve: expected without --bus"):
        check_channels(Channels(serve=True, bus="file:x"))
    with pytest.raises(ConfigError, match="--remote: expected --bus URL or --serve"):
        check_channels(Channels(remote=3))


def test_who_does_not_read_holds_up_no_end(tmp_path: pathlib.Path) -> None:
    heard = Heard(tmp_path, linger=0.1)
    lazy, good = heard.guest(), ServedClient(tmp_path)
    heard.say(b"x" * (1 << 22), b"the end")
    found: list[bytes] = []
    wait(lambda: found.extend(good.receive(1)) or found[1:])
    began = time.monotonic()
    heard.served.close()
    assert time.monotonic() - began < 10
    assert found[-1] == b"the end"
    lazy.close()
    good.close()


def test_the_command_line_names_what_it_expected(
    tmp_path: pathlib.Path, capsys: Any
) -> None:
    with pytest.raises(RunError, match=r"no run serves in .*bus.sock. Train with"):
        bus("watch", str(tmp_path))
    with pytest.raises(ConfigError, match="expected DIR of a run that trains with --s"):
        bus("watch", str(tmp_path / "nowhere"))
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / SOCKET))
    left.close()  # as a run that was killed leaves it
    with pytest.raises(RunError, match=r"nobody listens at .*the run was killed"):
        bus("send", str(tmp_path), "stop")
    heard = Heard(tmp_path)  # takes its place
    assert bus("send", str(tmp_path), "--wait", "0", "--id", "a", "disable") == 0
    assert capsys.readouterr().out == "sent: a\n"
    [sent] = wait(lambda: heard.came)
    assert b'"on":false' in sent.data
    heard.served.close()


@pytest.mark.slow
def test_a_run_serves_until_it_ends_however_it_ends(tmp_path: pathlib.Path) -> None:
    """SIGKILL leaves the socket, which the next run replaces; SIGTERM leaves none."""
    out = tmp_path / "run"
    words = ["train", str(ROOT / "configs" / "smoke.toml"), "--out", str(out)]
    words += ["--resume", "--serve", "--set", "train.ticks=5000"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": "/root"}
    for number in (signal.SIGKILL, signal.SIGTERM):
        run = subprocess.Popen(
            [sys.executable, "-m", "esper_jax", *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert run.stdout is not None
        told = run.stdout.readline()
        assert told == f"watch it: esper-jax bus watch {out}\n"

        def served() -> bool:
            try:
                client(str(out)).close()
            except (TransportError, ValueError):  # ValueError: there is no folder yet
                return False
            return True

        wait(served, 120)
        reader = client(str(out), last=None)
        reader.send(encode(Enable(on=False), "test", f"{number}"))
        assert bus("send", str(out), "enable") == 0
        run.send_signal(number)
        run.wait(60)
        run.stdout.close()
        said: list[bytes] = []
        with contextlib.suppress(TransportError):
            while True:
                said += reader.receive(5)
        assert b"RunStarted" in said[0]
        assert any(b'"ack-%d"' % number in line for line in said)
        assert (b"RunEnded" in said[-1]) == (number == signal.SIGTERM)
        reader.close()
        assert (out / SOCKET).exists() == (number == signal.SIGKILL)
