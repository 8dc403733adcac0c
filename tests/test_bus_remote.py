"""A policy in another program decides, and the run's own while it is silent."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
import pytest
from flax import nnx

from esper_jax import (
    ControllerConfig,
    Growth,
    LifecycleConfig,
    Stage,
    build,
    make_growable,
)
from esper_jax.bus import (
    Acknowledged,
    Batch,
    Decided,
    Germinate,
    LayerSeen,
    Local,
    MessageError,
    Move,
    Record,
    RemotePolicy,
    Service,
    SetStrategy,
    TickSeen,
    TransportError,
    decode,
    encode,
    layers_of,
    read_record,
)
from esper_jax.bus.admission import Waiting
from esper_jax.bus.decisions import sifted, silenced
from esper_jax.bus.envelope import MOST_BYTES
from esper_jax.bus.remote import _first, requests_of
from esper_jax.bus.seen import gates_in, sight_of
from esper_jax.hosts import MLP
from esper_jax.lifecycle.commands import commands_for
from esper_jax.lifecycle.grafting import Strategy
from esper_jax.policy import Policy, heuristic
from esper_jax.train.faults import Fault
from esper_jax.train.retreat import Rollback

RULES = LifecycleConfig(
    min_epochs=tuple(5 if s is Stage.TRAINING else 0 for s in Stage),
    reconstruction_threshold=float("inf"),
)
X = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
DATA = X, (X[:, 0] > 0).astype(np.int32)
A, B = "layers/0", "layers/1"
N = 3


shapes: dict[str, Any] = {}
"""What the run's own policy was told of its layers."""


def noting(setting: Any) -> Policy:
    """The heuristic."""
    shapes.update(setting.layers)
    config = ControllerConfig(
        when="period", period=1, where="round_robin", max_training=8
    )
    return heuristic(config)(setting)


@pytest.fixture(scope="module")
def program() -> Any:
    """Two layers of four seeds; its own policy lets one germinate at each tick."""
    return build(
        MLP(4, (8, 8), 2, num_seeds=4, capacity=4, rngs=nnx.Rngs(0)),
        optax.sgd(1e-2),
        optax.adam(1e-2),
        lifecycle_config=RULES,
        policy=noting,
    )


class Client:
    """Another program's end of a bus within this process."""

    def __init__(self, bus: Local) -> None:
        self.bus, self.read = bus, 0

    def receive(self, patience: float) -> list[bytes]:
        said = [data for topic, data in self.bus._kept if topic != "dead"]
        new, self.read = said[self.read :], len(said)
        return new

    def send(self, data: bytes) -> None:
        self.bus.put(data)


class Run:
    """A program with a service, ticked by hand."""

    def __init__(self, program: Any, record: Record, lends: bool = True) -> None:
        self.program, self.bus = program, Local(room=50_000)
        self.service = Service(
            layers_of(program), self.bus, lifecycle_config=RULES, record=record
        )
        if lends:
            self.service.lend(program, ticks=N)
        self.state = program.init(jax.random.key(0))
        self.silent: list[bool] = []
        self.history: list[list[str]] = []

    def tick(self, rollbacks: int = 0) -> Any:
        outside = self.service.asked(int(self.state.ticks) + 1, rollbacks)
        self.state, report = self.program.tick(self.state, DATA, outside)
        self.report = jax.device_get(report)
        self.service.ticked(self.report, seeds=self.state.seeds)
        assert self.service.outbox.flush(10)
        self.silent.append(self.service.silent)
        self.history.append([*self.stages(A), *self.stages(B)])
        return [(n, np.flatnonzero(r.by)) for n, r in self.report.layers.items()]

    def answers(self) -> dict[str, Acknowledged]:
        said = self.bus.messages(Acknowledged)
        return {e.message.command: e.message for e in said}

    def stages(self, layer: str) -> list[str]:
        return [Stage(s).name for s in self.state.seeds[layer].stage]


def last_first() -> Policy:
    """Lets the last dormant seed of layer B germinate, and asks nothing every third
    tick; remembers how many ticks it has seen."""

    def decide(seeds: Any, signals: Any, memory: Any) -> Any:
        nothing = {n: jnp.full(s.num_seeds, -1, jnp.int8) for n, s in seeds.items()}
        dormant = seeds[B].stage == Stage.DORMANT
        last = jnp.max(jnp.where(dormant, jnp.arange(4), -1))
        wants = (jnp.arange(4) == last) & (memory % 3 != 2)
        target = nothing | {B: jnp.where(wants, jnp.int8(Stage.GERMINATED), -1)}
        made = {
            n: dataclasses.replace(
                commands_for(4), target=target[n].astype(jnp.int8), blueprint=nothing[n]
            )
            for n in seeds
        }
        return made, memory + 1

    return Policy(lambda shapes, key: jnp.asarray(0), decide, reads=frozenset())


@pytest.fixture(scope="module")
def story(program: Any, tmp_path_factory: Any) -> Any:
    """Five ticks with a remote policy, then five without: the run and its record."""
    path = tmp_path_factory.mktemp("remote") / "commands.jsonl"
    steered = Run(program, Record(path))
    remote = RemotePolicy(last_first(), Client(steered.bus))
    by = [steered.tick()]
    for _ in range(4):
        assert remote.step(0) == int(steered.state.ticks)
        by.append(steered.tick())
    for _ in range(5):
        by.append(steered.tick())
    assert program.recompiles() == 0
    return steered, by, path


def test_the_remote_policy_decides_and_the_runs_own_while_it_is_silent(
    story: Any,
) -> None:
    steered, by, _ = story
    stages = steered.history
    # The first tick is the run's own; the last decision was by tick 4, and N is 3.
    assert steered.silent == [False] + 6 * [True] + 3 * [False]
    outside = [{name: list(seeds) for name, seeds in of} for of in by]
    assert outside[1:5] == [
        {A: [], B: [3]},
        {A: [], B: [2]},
        {A: [], B: []},
        {A: [], B: [1]},
    ]
    assert all(of == {A: [], B: []} for of in outside[5:])
    answers = [*steered.answers().values()]
    assert [a.outcome for a in answers] == 4 * ["OK"]
    assert answers[0].parts[0].reason.startswith("seed 3: DORMANT -> GERMINATED")
    assert answers[2].reason == "nothing was asked"
    # What it let germinate goes on only once it is heard again.
    assert {s for of in stages[:7] for s in of} == {"DORMANT", "GERMINATED"}
    assert "TRAINING" in stages[7]
    # Beside its first, the run's own policy had three ticks of its own.
    alive = sum(stage != "DORMANT" for n in (A, B) for stage in steered.stages(n))
    assert alive == 1 + 3 + 3


def test_the_same_decisions_at_the_same_ticks_give_the_same_state(
    program: Any, story: Any
) -> None:
    steered, _, path = story
    again = Run(program, Record(replayed=read_record(path)), lends=False)
    for _ in range(10):
        again.tick()
    assert again.silent == steered.silent
    same = jax.tree.map(
        lambda a, b: np.array_equal(a, b, equal_nan=True),
        again.state.seeds,
        steered.state.seeds,
    )
    assert all(jax.tree.leaves(same))
    # Nothing is told to a remote policy where none was asked for.
    assert not again.bus.messages(LayerSeen) + again.bus.messages(TickSeen)
    # A run that goes on within that silence is silent, too.
    past = read_record(path)
    assert Record(past=past, at=(0, 6)).silent_until == (0, 7)
    assert Record(past=past, at=(0, 1)).silent_until == (0, -1)


def test_a_policy_reads_elsewhere_what_it_would_read_here(story: Any) -> None:
    steered, _, _ = story
    told = {e.message.layer: e.message for e in steered.bus.messages(LayerSeen)}
    for name, state in steered.state.seeds.items():
        sight = sight_of(told[name])
        for a, b in zip(
            jax.tree.leaves(sight.seeds), jax.tree.leaves(state), strict=True
        ):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        measured = steered.report.layers[name].signals
        moved = np.asarray(state.epochs_in_stage) == 0
        for field in dataclasses.fields(measured):
            a, b = (getattr(s, field.name) for s in (sight.signals, measured))
            if field.name == "mean_worth":
                b = np.where(moved, np.nan, b)
            np.testing.assert_array_equal(a, b, err_msg=field.name)
        shape, made = sight.shape, shapes[name]
        assert (shape.num_seeds, shape.capacity, shape.aims) == (4, 4, made.aims)
        np.testing.assert_array_equal(shape.costs, made.costs)
    tick = steered.bus.messages(TickSeen)[-1].message
    assert gates_in(tick) == RULES
    assert (tick.tick, tick.ticks, tick.layers) == (10, N, 2)


def test_arrays_that_do_not_fit_are_refused_by_name(story: Any) -> None:
    told = story[0].bus.messages(LayerSeen)[0].message

    def changed(field: str, name: str, **more: Any) -> LayerSeen:
        columns = dict(getattr(told, field))
        columns[name] = msgspec.structs.replace(columns[name], **more)
        return msgspec.structs.replace(told, **{field: columns})

    fewer = {n: c for n, c in told.seeds.items() if n != "graft.alpha"}
    for bad, said in [
        (
            msgspec.structs.replace(told, seeds=fewer),
            r"seeds: 'graft.alpha' is missing",
        ),
        (changed("seeds", "stage", shape=[2, 2]), "expected an array 'stage' of one"),
        (changed("seeds", "health", data=b"x"), r"seeds: health: not an array: "),
        (changed("signals", "worth", dtype="<i4"), r"worth: expected float32 of shape"),
        (changed("signals", "worth", dtype="|O8"), r"worth: not an array"),
        (msgspec.structs.replace(told, blueprints=[]), r"costs: expected one row"),
    ]:
        with pytest.raises(MessageError, match=said):
            sight_of(bad)


def decided(seen: int, ticks: int = N, rollbacks: int = 0, **more: Any) -> Decided:
    return Decided(seen=seen, ticks=ticks, rollbacks=rollbacks, **more)


def test_decisions_that_come_too_late_are_refused() -> None:
    def late(*commands: Any, due: bool = False, at: Any = (0, 6)) -> dict[str, str]:
        waiting = [Waiting(str(n), command) for n, command in enumerate(commands)]
        return sifted(waiting, due, at)

    germinate = Germinate(layer=A, seed=0)
    assert late(germinate, decided(5)) == late(decided(3)) == {}
    assert late(decided(4), decided(5), decided(4)) == {
        "0": "there is a later decision than this by tick 4",
        "2": "there is a later decision than this by tick 4",
    }
    assert late(decided(2)) == {
        "0": "it was decided by tick 2, more than 3 before tick 6"
    }
    undone = "tick 6, by which it was decided, was undone"
    assert late(decided(6)) == late(decided(6), at=(1, 9)) == {"0": undone}
    assert list(late(germinate, decided(5), due=True)) == ["1"]
    assert silenced((0, 9), [germinate, decided(7)], 0) == (0, 10)
    assert silenced((0, 9), [decided(2)], 0) == (0, 9)
    assert silenced((0, 9), [decided(2)], 1) == (1, 5)


def test_decisions_are_taken_only_where_they_are_wanted(program: Any) -> None:
    steered, plain = Run(program, Record()), Run(program, Record(), lends=False)
    some = [Germinate(layer=A, seed=9)]
    for command in (decided(0, 4), decided(0, commands=some)):
        steered.bus.send(command)
    plain.bus.send(decided(0))
    steered.service.asked(), plain.service.asked()
    for each in (steered, plain):
        assert each.service.outbox.flush(10)
        assert not each.service.silent
    reasons = [a.reason for a in (steered.answers() | plain.answers()).values()]
    assert reasons == [
        "ticks: expected at most 3, as the run tells in TickSeen, got 4",
        "commands[0]: seed: layers/0 has seeds 0 to 3, got 9",
        "this run takes no decisions of a remote policy; train with --remote",
    ]
    with pytest.raises(ValueError, match="seeds: expected those of each layer"):
        steered.service.ticked(None)
    with pytest.raises(ValueError, match="ticks: expected at least 1"):
        steered.service.lend(program, 0)


def test_a_rollback_ends_the_silence_and_the_policys_memory_goes_back(
    program: Any,
) -> None:
    steered = Run(program, Record())
    remote = RemotePolicy(noting, Client(steered.bus))
    assert remote.step(0) is None
    for _ in range(2):
        steered.tick()
    assert remote.step(0) == 2  # it sees both, and decides by the newer
    assert [t for t, _ in remote._memories] == [1, 2]
    start = jax.tree.map(lambda x: x.copy(), steered.state)  # ticks donate theirs
    steered.tick()
    assert steered.service.silent
    remote.step(0)
    assert [t for t, _ in remote._memories] == [1, 2, 3]
    steered.service.asked(4)
    undone = Rollback(1, 4, 2, Fault.JUMP, "the loss is nan", layers={})
    steered.service.undone(undone)
    steered.state = start
    steered.tick(rollbacks=1)
    assert not steered.service.silent
    assert [a.outcome for a in steered.answers().values()][-1] == "UNDONE"
    remote.step(0)
    assert [t for t, _ in remote._memories] == [1, 2, 3]
    steered.tick(rollbacks=1)
    assert steered.service.silent
    steered.service.ended(4, 0, "done")
    assert steered.service.outbox.flush(10)
    remote.run()
    assert remote.ended


def test_a_decision_that_cannot_be_sent_is_sent_later(story: Any) -> None:
    bus, told = Local(), story[0].bus
    bus._kept.extend(told._kept)
    client = Client(bus)
    sent, fails = [], [True, True]

    def send(data: bytes) -> None:
        if fails and fails.pop():
            raise TransportError("it is away")
        sent.append(decode(data).message.seen)

    client.send = send  # type: ignore[method-assign]
    remote = RemotePolicy(last_first(), client)
    for _ in range(2):
        with pytest.raises(TransportError):
            remote.step(0)
    assert remote.step(0) == 10
    assert remote.step(0) is None
    assert sent == [10]


def test_requests_are_no_more_than_a_run_reads() -> None:
    asked = [
        Germinate(layer="l" * 300, seed=n, blueprint="b" * 50) for n in range(5000)
    ]
    some = _first(asked)
    data = encode(decided(1, commands=some), "esper_jax/remote")
    assert 0.99 * MOST_BYTES < len(data) <= MOST_BYTES
    assert some == asked[: len(some)]
    assert _first(asked[:3]) == asked[:3]


def test_requests_of_a_policy_as_commands() -> None:
    asked = commands_for(
        5,
        {0: Stage.GERMINATED, 1: Stage.CULLED, 3: Stage.GERMINATED},
        blueprints={0: 1},
        strategies={0: 1, 1: 2, 2: 0},
    )
    found = requests_of("x", jax.device_get(asked), ["p", "q"])
    names = [s.name.lower() for s in Strategy]
    assert found == [
        Germinate(layer="x", seed=0, blueprint="q", strategy=names[1]),
        Move(layer="x", seed=1, stage="CULLED"),
        SetStrategy(layer="x", seed=1, strategy=names[2]),
        SetStrategy(layer="x", seed=2, strategy=names[0]),
        Germinate(layer="x", seed=3),
    ]
    Batch(commands=found)


def test_a_policy_that_reads_more_than_is_measured_is_refused(story: Any) -> None:
    greedy = last_first()._replace(reads=frozenset({"drift"}))
    told = Local()
    less = [
        msgspec.structs.replace(e.message, measured=["grad_norm"])
        if isinstance(e.message, TickSeen)
        else e.message
        for e in story[0].bus.messages()
    ]
    told._kept.extend(("telemetry", encode(message, "test")) for message in less)
    remote = RemotePolicy(greedy, Client(told))
    with pytest.raises(ValueError, match="policy reads drift, which the run does not"):
        remote.step(0)


def test_a_loop_of_ones_own_takes_decisions_too() -> None:
    model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
    make_growable(model, "layers/0", num_seeds=4, rngs=nnx.Rngs(1))
    quiet = ControllerConfig(enabled=False)
    growth = Growth(model, optax.sgd(1e-2), policy=heuristic(quiet))

    def ask_the_last() -> Policy:
        def decide(seeds: Any, signals: Any, memory: Any) -> Any:
            return {n: commands_for(4, {3: Stage.GERMINATED}) for n in seeds}, memory

        return Policy(lambda shapes, key: jnp.asarray(0), decide, reads=frozenset())

    bus = Local()
    with Service(layers_of(growth), bus) as service:
        service.lend(growth, ticks=N)
        remote = RemotePolicy(ask_the_last(), Client(bus))
        for tick in (1, 2):
            report = growth.tick(
                model, lambda m: jnp.mean(m(X) ** 2), commands=service.asked()
            )
            service.ticked(report, seeds=growth.run_state(model).seeds)
            assert service.outbox.flush(10)
            assert service.silent == (tick == 2)
            assert remote.step(0) == tick
    assert report.layers["layers/0"].stage.tolist() == [0, 0, 0, Stage.GERMINATED]
