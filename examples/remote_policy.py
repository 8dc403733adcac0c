"""A run whose decisions come from another process, and which goes on without it."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import optax
from flax import nnx
from quick_lives import options

import esper_jax as ej
from esper_jax.bus import RemotePolicy, Service, layers_of
from esper_jax.bus.connect import client, connect
from esper_jax.bus.watch import LAST
from esper_jax.data import digits
from esper_jax.hosts import MLP
from esper_jax.policy import heuristic

GONE = 12
"""The tick after which the other process is ended."""


def decide(url):
    """The other process: it has neither model nor data."""
    policy = heuristic(options["controller_config"])
    RemotePolicy(policy, client(url, last=LAST)).run()


def train(folder):
    url = f"file:{folder}"
    rngs, data = nnx.Rngs(0), digits()
    host = MLP(64, (16,), 10, num_seeds=8, capacity=6, rngs=rngs)
    program = ej.build(host, optax.adam(3e-3), optax.adam(1e-2), **options)
    rules = options["lifecycle_config"]
    bus = connect(url, "example")
    with Service(layers_of(program), bus, lifecycle_config=rules) as service:
        service.lend(program, ticks=3)
        other = subprocess.Popen([sys.executable, __file__, url])
        births = {"the remote policy": 0, "its own policy": 0}
        decided = []

        def on_tick(state, report):
            tick = int(report.tick)
            who = "the remote policy" if service.silent else "its own policy"
            if decided[-1:] != [who]:
                print(f"tick {tick}: {who} decides", flush=True)
                decided.append(who)
            for layer in report.layers.values():
                born = layer.target == ej.Stage.GERMINATED
                births[who] += int((born & (layer.outcome == ej.Outcome.OK)).sum())
            service.ticked(report, seeds=state.seeds)
            until = time.monotonic() + 60
            while tick == 1 and time.monotonic() < until:  # only so that it is shown
                if (Path(folder) / "in.jsonl").exists():
                    break
                time.sleep(0.05)
            time.sleep(0.3 if tick < GONE else 0)
            if tick == GONE:
                other.kill()
                other.wait()
                print(f"tick {tick}: the other process is killed", flush=True)

        try:
            state = ej.fit(
                program,
                program.init(jax.random.key(0)),
                data.train,
                data.held_out,
                ticks=24,
                batch_size=64,
                on_tick=on_tick,
                commands=lambda state: service.asked(int(state.ticks) + 1),
            )
        finally:
            other.kill()
            other.wait()
    print("germinations:", births)
    print(f"held-out accuracy: {float(program.evaluate(state, data.held_out)[1]):.3f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        decide(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            train(folder)
