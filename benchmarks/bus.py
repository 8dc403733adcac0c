"""What the bus costs and how fast it is, beside a bare ping-pong of redis-py.

    PYTHONPATH=. python3 benchmarks/bus.py [--ticks 200] [--rounds 12]

It starts a redis-server of its own. *tick* is the time from `Service.ticked` to a
consumer in another process that has read the whole tick; *bare* the same for as many
bytes that are XADDed and XREAD with nothing else; within a process, to the moment at
which the messages are in `Local`. There is a tick every 0.1 s; *messages/s* is with
ticks as fast as they go. *command* is the time from a client that sends a
command to its answer, at a tick every 2 ms. *step* compares `fit` with and without a
bus, in turns on one program, as benchmarks/monitor.py does.
"""

import argparse
import json
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import redis
from bus_faults import table
from flax import nnx
from monitor import BATCH, CLASSES, FEATURES, rows, spread

from esper_jax import build, fit
from esper_jax.bus import Local, Service, layers_of
from esper_jax.bus.messages import Layer
from esper_jax.bus.redis_streams import RedisStreams
from esper_jax.growth.reports import LayerReport, TickReport
from esper_jax.hosts import MLP
from esper_jax.lifecycle.signals import Signals

SEEDS, PAUSE = 1000, 0.1

CONSUMER = """
import json, sys, time
from esper_jax.bus import LayerHealth, decode
from esper_jax.bus.redis_streams import RedisClient
url, ticks, layers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
reader = RedisClient(url, "bench", last=0)
print("ready", flush=True)
seen, found, start = 0, [], 0.0
while len(found) < ticks:
    for data in reader.receive(1):
        message = decode(data).message
        if isinstance(message, LayerHealth):
            seen += 1
            if seen % layers == 0:
                found.append(time.monotonic() - start)
        elif hasattr(message, "train_loss"):
            start = message.train_loss
print(json.dumps(found[:ticks]))
"""

BARE = """
import json, sys, time, redis
url, ticks = sys.argv[1], int(sys.argv[2])
reader, found = redis.Redis.from_url(url), []
last = ([id for id, _ in reader.xrevrange("bare", count=1)] or ["0"])[0]
print("ready", flush=True)
while len(found) < ticks:
    for _, entries in reader.xread({"bare": last}, block=1000) or []:
        for last, fields in entries:
            found.append(time.monotonic() - float(fields[b"t"]))
print(json.dumps(found[:ticks]))
"""

SENDER = """
import json, sys, time
from esper_jax.bus import Enable, encode
from esper_jax.bus.envelope import new_id
from esper_jax.bus.redis_streams import RedisClient
from esper_jax.bus.watch import answer_to
client, found = RedisClient(sys.argv[1], "bench"), []
for _ in range(int(sys.argv[2])):
    id, began = new_id(), time.monotonic()
    client.send(encode(Enable(on=True), "bench", id))
    assert answer_to(client, id, 60)
    found.append(time.monotonic() - began)
print(json.dumps(found))
"""


@contextmanager
def server() -> Iterator[str]:
    """The URL of a redis-server that keeps nothing on the disk."""
    with socket.socket() as one, tempfile.TemporaryDirectory() as folder:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
        one.close()
        words = ["--port", str(port), "--dir", folder, "--save", ""]
        with subprocess.Popen(["redis-server", *words], stdout=-3) as process:
            time.sleep(1)
            yield f"redis://127.0.0.1:{port}"
            process.terminate()


def report(layers: int) -> TickReport:
    """A tick of layers whose seeds have all been measured."""
    column = np.random.default_rng(0).random(SEEDS).astype(np.float32)
    nothing = np.full(SEEDS, -1, np.int8)
    layer = LayerReport(
        outcome=np.zeros(SEEDS, np.int8),
        source=np.zeros(SEEDS, np.int8),
        target=nothing,
        slot=nothing,
        epochs=np.zeros(SEEDS, np.uint16),
        errors=np.zeros(SEEDS, np.uint8),
        stage=np.zeros(SEEDS, np.int8),
        alpha=column,
        blueprint=nothing,
        signals=Signals.unmeasured(worth=column),
        health=column,
    )
    number: Any = np.int32(1)
    return TickReport(
        tick=number,
        step=number,
        train_loss=number,
        loss=number,
        accuracy=number,
        reason=number,
        replicas_agree=number,
        layers={f"layers/{n}": layer for n in range(layers)},
    )


def started(code: str, *words: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finished(processes: Sequence[subprocess.Popen[str]]) -> list[float]:
    """What the processes measured, in seconds."""
    return [x for p in processes for x in json.loads(p.communicate()[0])]


def told(service: Service, shown: TickReport, ticks: int) -> float:
    """Tells of so many ticks, each with its time; then ticks a second at full speed."""
    for _ in range(ticks):
        now: Any = np.float64(time.monotonic())
        service.ticked(shown.replace(train_loss=now), events=[])  # type: ignore[attr-defined]
        time.sleep(PAUSE)
    assert service.outbox is not None
    service.outbox.flush(60)
    began, most = time.perf_counter(), 100
    for _ in range(most):
        service.ticked(shown, events=[])
    service.outbox.flush(60)
    return most / (time.perf_counter() - began)


class Timed(Local):
    """`Local`, and when each tick was in it."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers, self.seen, self.began = layers, 0, 0.0
        self.found: list[float] = []

    def publish(self, messages: Any) -> None:
        super().publish(messages)
        for message in messages:
            if b"TickReported" in message.data[:300]:
                self.began = json.loads(message.data)["data"]["train_loss"]
                self.seen = 0
            elif b"LayerHealth" in message.data[:300]:
                self.seen += 1
                if self.seen == self.layers:
                    self.found.append(time.monotonic() - self.began)


def latencies(url: str, layers: int, consumers: int, ticks: int) -> None:
    """Prints the rows of one size."""
    shown, names = (
        report(layers),
        {f"layers/{n}": Layer(SEEDS, ()) for n in range(layers)},
    )
    local = Timed(layers)
    with Service(names, local) as service:
        rate = told(service, shown, ticks)
    size = sum(len(data) for _, data in list(local._kept)[: layers + 1])
    row("in-process", layers, 0, local.found[:ticks], rate * (layers + 1), None)
    bare = [started(BARE, url, ticks) for _ in range(consumers)]
    for process in bare:
        assert process.stdout is not None
        process.stdout.readline()
    sender = redis.Redis.from_url(url)
    for _ in range(ticks):
        fields: Any = {"t": time.monotonic(), "m": b"x" * size}
        sender.xadd("bare", fields, maxlen=1000)
        time.sleep(PAUSE)
    base = finished(bare)
    row("bare", layers, consumers, base, None, base)
    with Service(names, RedisStreams(url, "bench")) as service:
        service.started(0, 0)
        assert service.outbox is not None
        service.outbox.flush(10)
        readers = [started(CONSUMER, url, ticks, layers) for _ in range(consumers)]
        for process in readers:
            assert process.stdout is not None
            process.stdout.readline()
        rate = told(service, shown, ticks)
        row("Redis", layers, consumers, finished(readers), rate * (layers + 1), base)


def row(
    name: str,
    layers: int,
    consumers: int,
    found: list[float],
    rate: float | None,
    base: list[float] | None,
) -> None:
    percents = [1e3 * float(x) for x in np.percentile(found, [50, 95, 99])]
    ratio = "" if base is None else f"{np.median(found) / np.median(base):.1f}"
    speed = "" if rate is None else f"{rate:.0f}"
    times = " | ".join(f"{x:.2f}" for x in percents)
    print(
        f"| {name} | {layers} | {consumers or ''} | {speed} | {times} | {ratio} |",
        flush=True,
    )


def commands(url: str, count: int) -> None:
    """Prints how long a command takes to its answer."""
    shown = report(1)
    with Service({"layers/0": Layer(SEEDS, ())}, RedisStreams(url, "bench")) as service:
        sender = started(SENDER, url, count)
        while sender.poll() is None:
            service.asked()
            service.ticked(shown, events=[])
            time.sleep(0.002)
        found = finished([sender])
    percents = [1e3 * float(x) for x in np.percentile(found, [50, 95, 99])]
    print("\nA command to its answer, ms: " + ", ".join(f"{x:.1f}" for x in percents))


def steps(url: str, rounds: int) -> None:
    """Prints the ratio of the times of a step with the bus and without."""
    hidden = (320, 320)
    model = MLP(FEATURES, hidden, CLASSES, num_seeds=4, capacity=2, rngs=nnx.Rngs(0))
    program = build(model, optax.adam(1e-3), optax.adam(1e-3))
    data, held_out = rows(BATCH * 50, 0), rows(BATCH, 1)

    def run(service: Service | None) -> tuple[float, float]:
        state = program.init(jax.random.key(0))
        jax.block_until_ready(state.params)
        began, main = time.perf_counter(), time.thread_time()
        options: dict[str, Any] = {"on_tick": lambda state, report: None}
        if service is not None:
            options["commands"] = lambda state: service.asked(int(state.ticks) + 1)
            options["on_tick"] = lambda state, report: service.ticked(report)
        fit(program, state, data, held_out, ticks=8, batch_size=BATCH, **options)
        return time.perf_counter() - began, time.thread_time() - main

    pairs = []
    with Service(layers_of(program), RedisStreams(url, "bench")) as service:
        for number in range(rounds + 1):
            arms: list[Service | None] = [None, service]
            order = arms if number % 2 else arms[::-1]
            times = {arm is not None: run(arm) for arm in order}
            pairs.append((times[True], times[False]))
    pairs = pairs[1:]  # the first compiles
    typical = statistics.median(off[0] for _, off in pairs)
    wall = [on[0] / off[0] for on, off in pairs]
    main = [1 + (on[1] - off[1]) / typical for on, off in pairs]
    print(
        f"A step of {1e3 * typical / 400:.2f} ms, 50 a tick, bus on over off: wall "
        f"{spread(wall)}, main thread {spread(main)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ticks", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps-only", action="store_true")
    parser.add_argument("--faults", action="store_true", help="see bus_faults.py")
    args = parser.parse_args()
    print(
        f"{platform.machine()}, Python {platform.python_version()}, jax "
        f"{jax.__version__}, redis-py {redis.__version__}; {args.ticks} ticks\n"
    )
    if args.faults:
        table()
        return
    if args.steps_only:
        with server() as url:
            steps(url, args.rounds)
        return
    head = "| | layers | consumers | messages/s | 50%, ms | 95% | 99% | 50% over bare |"
    print(head + "\n|---|---|---|---|---|---|---|---|")
    with server() as url:
        for layers in (1, 32):
            for consumers in (1, 4):
                latencies(url, layers, consumers, args.ticks)
        commands(url, args.ticks)
        steps(url, args.rounds)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
