"""The bus under faults, with a real redis-server: what is lost, doubled or misordered.

    PYTHONPATH=. python3 benchmarks/bus.py --faults

A run in a process of its own ticks every few milliseconds, with a record of commands
and a checkpoint a tick; nothing is trained. *messages* are events, commands and
answers. *lost*: an event that is not in the stream, or a command that was not carried
out or not answered. *doubled*: an event that is there twice, a command that was carried
out twice, more answers than the command was sent. *misordered*: events out of their
order, or commands of a layer that were carried out in another order than they came. The
server writes each command to the disk (``appendfsync always``).
"""

import collections
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import redis

from esper_jax.bus import (
    Acknowledged,
    Record,
    SeedMoved,
    Service,
    SetStrategy,
    StopAndSave,
    decode,
    encode,
    read_record,
)
from esper_jax.bus.messages import Layer
from esper_jax.bus.outbox import Letter, Outbox
from esper_jax.bus.redis_streams import RedisClient, RedisStreams
from esper_jax.bus.transport import TransportError
from esper_jax.growth.reports import LayerReport, TickReport
from esper_jax.lifecycle.signals import Signals

LAYERS, SEEDS, RUN = [f"layers/{n}" for n in range(4)], 500, "faults"
HERE = Path(__file__).parent


class Counts(NamedTuple):
    """What became of some messages."""

    messages: int
    lost: int
    doubled: int
    misordered: int


class Server:
    """A redis-server that writes each command to the disk, on a port that stays."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        self.url, self.folder = f"redis://127.0.0.1:{self.port}", folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Server":
        words = f"--port {self.port} --save  --appendonly yes --appendfsync always"
        command = ["redis-server", *words.split(" "), "--dir", str(self.folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        with redis.Redis(port=self.port) as probe:
            while True:
                with contextlib.suppress(redis.RedisError):
                    probe.ping()
                    return self
                time.sleep(0.01)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def a_report(tick: int) -> TickReport:
    """A tick at which no seed moved."""
    nothing = np.full(SEEDS, -1, np.int8)
    zeros = np.zeros(SEEDS, np.int8)
    layer = LayerReport(
        outcome=zeros,
        source=zeros,
        target=nothing,
        slot=nothing,
        epochs=np.zeros(SEEDS, np.uint16),
        errors=np.zeros(SEEDS, np.uint8),
        stage=zeros,
        alpha=np.zeros(SEEDS, np.float32),
        blueprint=nothing,
        signals=Signals.unmeasured(),
    )
    number: Any = np.int32(tick)
    return TickReport(
        tick=number,
        step=number,
        train_loss=number,
        loss=number,
        accuracy=number,
        reason=np.int32(0),
        replicas_agree=np.True_,
        layers=dict.fromkeys(LAYERS, layer),
    )


def an_event(tick: int) -> dict[str, Any]:
    moved = {"tick": tick, "layer": LAYERS[0], "seed": 0, "outcome": "OK", "text": ""}
    return {**moved, "from": "DORMANT", "to": "GERMINATED"}


def work(url: str, folder: Path, dies: float) -> None:
    """A run until a command stops it; SIGKILLs itself between effect and answer.

    Args:
      url: of the server.
      folder: of its records.
      dies: how likely, at a tick that commands have joined.
    """
    saved = folder / "tick"
    tick = int(saved.read_text()) if saved.exists() else 0
    path = folder / "commands.jsonl"
    record = Record(path, read_record(path), at=(0, tick))
    add = record.add

    def add_and_die(done: Sequence[Any]) -> None:
        add(done)
        if done and random.random() < dies:
            os.kill(os.getpid(), signal.SIGKILL)

    record.add = add_and_die  # type: ignore[method-assign]
    layers = {name: Layer(SEEDS, ("residual_mlp",)) for name in LAYERS}
    with Service(
        layers,
        RedisStreams(url, RUN),
        record=record,
        spill=folder / "spill",
        patience=30,
    ) as service:
        service.started(tick, tick)
        while not service.stop_asked:
            tick += 1
            service.asked(tick)
            service.ticked(a_report(tick), events=[an_event(tick)])
            saved.with_name("tick.tmp").write_text(f"{tick}")
            saved.with_name("tick.tmp").replace(saved)
            time.sleep(0.005)
        service.stopped()


class Trial:
    """A server, a run that is started again whenever it dies, and a sender."""

    def __init__(self, folder: Path, dies: float = 0.0) -> None:
        self.server = Server(folder).start()
        self.folder, self.dies, self.deaths = folder, dies, 0
        self.sent: collections.Counter[str] = collections.Counter()
        self.layer_of: dict[str, str] = {}
        self.process = self._started()
        while True:
            with contextlib.suppress(TransportError):
                self.sender = RedisClient(self.server.url, RUN)
                break
            time.sleep(0.02)

    def _started(self) -> subprocess.Popen[bytes]:
        words = [self.server.url, str(self.folder), str(self.dies)]
        command = [sys.executable, __file__, *words]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)

    def look(self) -> None:
        """Starts the run again if it died."""
        if self.process.poll() not in (None, 0):
            self.deaths += 1
            self.process = self._started()

    def command(self, number: int) -> bytes:
        layer = self.layer_of[f"c{number}"] = LAYERS[number % len(LAYERS)]
        seed = number // len(LAYERS) % SEEDS
        command = SetStrategy(layer=layer, seed=seed, strategy="momentum")
        return encode(command, "faults", f"c{number}")

    def send(self, number: int) -> None:
        """Sends a command until it has certainly arrived, which may be twice."""
        while True:
            self.sent[f"c{number}"] += 1
            with contextlib.suppress(TransportError):
                self.sender.send(self.command(number))
                return
            time.sleep(0.02)

    def flood(self, numbers: Sequence[int]) -> None:
        """Sends commands as fast as the server takes them."""
        with redis.Redis(port=self.server.port) as server:
            pipe = server.pipeline(transaction=False)
            for number in numbers:
                self.sent[f"c{number}"] += 1
                pipe.xadd(f"esper:{{{RUN}}}:commands", {"m": self.command(number)})
            pipe.execute()

    def said(self, topic: str) -> list[Any]:
        with redis.Redis(port=self.server.port) as server:
            entries: Any = server.xrange(f"esper:{{{RUN}}}:{topic}")
        return [fields[b"m"] for _, fields in entries]

    def end(self) -> None:
        """Stops the run when it has answered all."""
        while True:
            self.look()
            acks = [decode(data).message for data in self.said("acks")]
            answered = {a.command for a in acks if isinstance(a, Acknowledged)}
            if answered >= set(self.sent):
                break
            time.sleep(0.5)
        self.sender.send(encode(StopAndSave(), "faults", "stop"))
        while self.process.poll() != 0:
            self.look()
            time.sleep(0.02)

    def close(self) -> None:
        self.sender.close()
        self.server.kill()

    def commands(self, order: Sequence[str]) -> Counts:
        """What became of the commands, whose first arrivals came in this order."""
        done = [d.id for d in read_record(self.folder / "commands.jsonl")]
        carried = collections.Counter(id for id in done if id != "stop")
        acks = [decode(data).message for data in self.said("acks")]
        told = collections.Counter(
            a.command
            for a in acks
            if isinstance(a, Acknowledged) and a.command != "stop"
        )
        places = {id: place for place, id in enumerate(order)}
        wrong = 0
        for layer in LAYERS:
            mine = [places[i] for i in done if self.layer_of.get(i) == layer]
            wrong += sum(b < a for a, b in itertools.pairwise(mine))
        return Counts(
            2 * len(self.sent),
            len(self.sent.keys() - carried) + len(self.sent.keys() - told),
            sum(n - 1 for n in carried.values())
            + sum(max(0, n - self.sent[id]) for id, n in told.items()),
            wrong,
        )

    def events(self) -> Counts:
        """What became of the events, one a tick."""
        told = [decode(data).message for data in self.said("events")]
        ticks = [m.tick for m in told if isinstance(m, SeedMoved)]
        last = int((self.folder / "tick").read_text())
        return Counts(
            last,
            last - len(set(ticks)),
            len(ticks) - len(set(ticks)),
            sum(b < a for a, b in itertools.pairwise(ticks)),
        )


def plus(*counts: Counts) -> Counts:
    return Counts(*map(sum, zip(*counts, strict=True)))


def killed_server(folder: Path) -> tuple[Counts, str]:
    """SIGKILL of redis in the midst of everything, again and again."""
    trial, order = Trial(folder), [f"c{n}" for n in range(1000)]
    for number in range(len(order)):
        if number % 50 == 25:
            trial.server.kill()
            time.sleep(random.random() / 2)
            trial.server.start()
        trial.send(number)
    trial.end()
    resent = sum(trial.sent.values()) - len(order)
    found = plus(trial.commands(order), trial.events())
    trial.close()
    return found, f"20 kills; {resent} commands sent again"


def killed_consumer(folder: Path) -> tuple[Counts, str]:
    """SIGKILL of the run between effect and answer."""
    trial, order = Trial(folder, dies=0.3), [f"c{n}" for n in range(300)]
    for number in range(len(order)):
        trial.send(number)
        trial.look()
        time.sleep(0.02)
    trial.end()
    found = trial.commands(order)
    trial.close()
    return found, f"{trial.deaths} deaths"


def many_commands(folder: Path) -> tuple[Counts, str]:
    """10,000 commands, each sent once to three times, in a random order."""
    trial = Trial(folder)
    copies = [n for n in range(10_000) for _ in range(random.randint(1, 3))]
    random.shuffle(copies)
    for first in range(0, len(copies), 500):
        trial.flood(copies[first : first + 500])
    trial.end()
    order = list(dict.fromkeys(f"c{number}" for number in copies))
    found = plus(trial.commands(order), trial.events())
    trial.close()
    return found, f"{len(copies):,} sent"


def garbage(folder: Path) -> tuple[Counts, str]:
    """Random bytes between commands, and one message of 100 MB."""
    count = 900  # of the dead letters, a stream keeps 1,000
    trial, order = Trial(folder), [f"c{n}" for n in range(count)]
    for number in range(count):
        if number == 500:
            trial.sender.send(b"x" * 100_000_000)
        trial.sender.send(random.randbytes(random.randint(0, 2000)))
        trial.send(number)
    trial.end()
    dead = [json.loads(data)["bytes"] for data in trial.said("dead")]
    more = len(dead) - (count + 1)
    lost = Counts(count + 1, max(0, -more), max(0, more), 0)
    found = plus(trial.commands(order), trial.events(), lost)
    trial.close()
    return found, f"{len(dead):,} dead letters, the longest of {max(dead):,} bytes"


def full_disk(folder: Path) -> tuple[Counts, str]:
    """No server, and a disk of 1 MB for 4 MB of events, in a namespace of its own."""
    code = f"""
import sys; sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]
from pathlib import Path
import bus_faults
bus_faults.fill(Path({str(folder)!r}))
"""
    mount = (
        f"mount -t tmpfs -o size=1m x {folder}/disk && exec {sys.executable} -c '$0'"
    )
    (folder / "disk").mkdir()
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    said = subprocess.run([*command, mount, code], capture_output=True, text=True)
    if said.returncode:
        return Counts(0, 0, 0, 0), "not permitted to mount"
    counts, note = json.loads(said.stdout.splitlines()[-1])
    return Counts(*counts), note


def fill(folder: Path) -> None:
    """See `full_disk`; prints what became of the events as JSON."""
    server, count = Server(folder), 4000
    spill = folder / "disk" / "spill"
    outbox = Outbox(RedisStreams(server.url, RUN), spill)
    outbox.post(*(_numbered(n) for n in range(count)))
    on_disk = spill.stat().st_size
    server.start()
    outbox.flush(60)
    server.kill()
    outbox.post(*(_numbered(n) for n in range(count, 2 * count)))
    lost = outbox.close(0)
    kept = len(spill.read_bytes().splitlines()) if spill.exists() else 0
    server.start()
    again = Outbox(RedisStreams(server.url, RUN), spill)
    again.flush(60)
    again.close(5)
    with redis.Redis(port=server.port) as one:
        entries: Any = one.xrange(f"esper:{{{RUN}}}:events")
    found = [json.loads(fields[b"m"])["n"] for _, fields in entries]
    server.kill()
    unsaid = 2 * count - len(set(found)) - lost
    wrong = sum(b < a for a, b in itertools.pairwise(found))
    note = (
        f"{on_disk:,} bytes fit; none of {count} lost while the process lives; of as "
        f"many at its end {kept} kept, {lost} counted as lost"
    )
    twice = len(found) - len(set(found))
    print(json.dumps([Counts(2 * count, unsaid, twice, wrong), note]))


def _numbered(number: int) -> Letter:
    return Letter("events", json.dumps({"n": number, "x": "x" * 1000}).encode())


TRIALS: dict[str, Callable[[Path], tuple[Counts, str]]] = {
    "redis is SIGKILLed and restarted": killed_server,
    "the run is SIGKILLed between effect and answer": killed_consumer,
    "10,000 commands with duplicates, reordered": many_commands,
    "garbage, and 100 MB": garbage,
    "full disk for the spill file": full_disk,
}


def table() -> None:
    """Prints a row for each fault."""
    random.seed(0)
    print("| fault | messages | lost | doubled | misordered | |")
    print("|---|---|---|---|---|---|")
    for name, trial in TRIALS.items():
        folder = Path(tempfile.mkdtemp(prefix="esper-jax-bus-"))
        began = time.monotonic()
        counts, note = trial(folder)
        took = time.monotonic() - began
        cells = " | ".join(f"{n:,}" for n in counts)
        print(f"| {name} | {cells} | {note}; {took:.0f} s |", flush=True)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
