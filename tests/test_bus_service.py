"""Commands of the bus join ticks, are answered once, and are told of."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from reports import report as a_report
from reports import seeds as a_layer

from esper_jax import ControllerConfig, LifecycleConfig, Outcome, Stage, build
from esper_jax.bus import (
    Acknowledged,
    Batch,
    CapacityChanged,
    Enable,
    Germinate,
    LayerHealth,
    Local,
    Move,
    Record,
    RolledBack,
    RunStarted,
    SeedMoved,
    Service,
    SetStrategy,
    StopAndSave,
    TickReported,
    layers_of,
    read_record,
)
from esper_jax.bus.envelope import encode
from esper_jax.bus.messages import Layer
from esper_jax.bus.record import Done
from esper_jax.hosts import MLP
from esper_jax.train.faults import Fault
from esper_jax.train.retreat import Rollback

RULES = LifecycleConfig(
    min_epochs=tuple(5 if s is Stage.TRAINING else 0 for s in Stage),
    reconstruction_threshold=1e9,
)
X = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
DATA = X, (X[:, 0] > 0).astype(np.int32)
A, B = "layers/0", "layers/1"


@pytest.fixture(scope="module")
def program() -> Any:
    """Two layers of four seeds and two slots; the policy lets things germinate."""
    return build(
        MLP(4, (8, 8), 2, num_seeds=4, capacity=2, rngs=nnx.Rngs(0)),
        optax.sgd(1e-2),
        optax.adam(1e-2),
        lifecycle_config=RULES,
        controller_config=ControllerConfig(
            when="period", period=1, where="round_robin", max_training=1
        ),
    )


class Run:
    """A program with a service, ticked by hand."""

    def __init__(self, program: Any, record: pathlib.Path | None = None) -> None:
        self.program, self.bus = program, Local(room=50_000)
        past = [] if record is None else read_record(record)
        self.service = Service(
            layers_of(program),
            self.bus,
            lifecycle_config=RULES,
            record=Record(record, past),
        )
        self.state = program.init(jax.random.key(0))

    def tick(self, times: int = 1) -> Any:
        for _ in range(times):
            outside = self.service.asked(int(self.state.ticks) + 1)
            self.state, report = self.program.tick(self.state, DATA, outside)
            self.done = self.service.ticked(jax.device_get(report))
        assert self.service.outbox.flush(10)
        return report

    def send(self, *commands: Any) -> list[str]:
        return [self.bus.send(command) for command in commands]

    def asked(self) -> Any:
        return self.service.asked().commands.values()

    def answer(self, id: str) -> tuple[str, str]:
        [found] = [
            e.message
            for e in self.bus.messages(Acknowledged)
            if e.message.command == id
        ]
        return found.outcome, found.reason

    def stages(self, layer: str) -> list[str]:
        return [Stage(int(s)).name for s in self.state.seeds[layer].stage]


@pytest.fixture
def run(program: Any) -> Any:
    made = Run(program)
    made.send(Enable(on=False))
    yield made
    made.service.close()


D, G, T = "DORMANT", "GERMINATED", "TRAINING"


def test_a_command_joins_the_next_tick_and_its_answer_is_the_lifecycle_s(
    run: Run,
) -> None:
    born, early, illegal, full = run.send(
        Germinate(layer=A, seed=2),
        Germinate(layer=B, seed=0, strategy="momentum"),
        Move(layer=A, seed=0, stage="FOSSILIZED"),
        Germinate(layer=A, seed=3, blueprint="residual_mlp"),
    )
    run.tick()
    assert run.stages(A) == [D, D, G, G]
    assert run.answer(born) == ("OK", "seed 2: DORMANT -> GERMINATED")
    assert run.answer(early) == ("OK", "seed 0: DORMANT -> GERMINATED")
    assert run.answer(full)[0] == "OK"
    assert run.answer(illegal) == (
        "ILLEGAL",
        "seed 0 stays in DORMANT: FOSSILIZED cannot follow DORMANT, only GERMINATED "
        "can",
    )
    later, early, style = run.send(
        Germinate(layer=A, seed=0),
        Move(layer=A, seed=2, stage="CULLED"),
        SetStrategy(layer=B, seed=3, strategy="drift_controlled"),
    )
    run.tick(2)
    assert run.answer(later) == (
        "NO_CAPACITY",
        "seed 0 stays in DORMANT: no slot is free",
    )
    assert run.answer(early)[0] == "ILLEGAL"  # GERMINATED cannot be culled
    assert run.answer(style) == ("OK", "seed 3: its strategy is DRIFT_CONTROLLED now")
    told = [e.message for e in run.bus.messages(SeedMoved)]
    asked = [
        (m.tick, m.layer, m.seed, m.outcome, m.by) for m in told if m.by != "POLICY"
    ]
    assert asked[:3] == [
        (1, A, 0, "ILLEGAL", "OUTSIDE"),
        (1, A, 2, "OK", "OUTSIDE"),
        (1, A, 3, "OK", "OUTSIDE"),
    ]
    assert run.program.recompiles() == 0


def test_what_a_tick_measured_is_told(run: Run) -> None:
    run.service.started(0, 0)
    report = run.tick()
    [tick] = [e.message for e in run.bus.messages(TickReported)]
    assert (tick.tick, tick.step, tick.train_loss) == (1, 0, None)
    assert tick.loss == pytest.approx(float(report.loss))
    assert tick.seeds["DORMANT"] == 8
    assert sum(tick.seeds.values()) == 8
    assert (
        tick.reason == "nothing germinates: the controller is not enabled, or not heard"
    )
    health = {e.message.layer: e.message for e in run.bus.messages(LayerHealth)}
    assert list(health) == [A, B]
    assert health[A].stage == health[B].stage == [0] * 4
    assert health[A].worth == [None] * 4
    assert health[A].alpha == [0.0] * 4
    [start] = [e.message for e in run.bus.messages(RunStarted)]
    assert start.layers[B] == Layer(4, ("residual_mlp",))
    ids = [e.id for e in run.bus.messages()]
    assert len(set(ids)) == len(ids)


def test_an_atomic_batch_is_one_answer_with_its_parts(run: Run) -> None:
    parts = [Germinate(layer=A, seed=1), Move(layer=B, seed=0, stage="TRAINING")]
    style = SetStrategy(layer=A, seed=0, strategy="momentum")
    whole, loose = run.send(
        Batch(commands=[*parts, style]), Batch(commands=parts, atomic=False)
    )
    run.tick()
    assert run.answer(whole) == (
        "ILLEGAL",
        "seed 0 stays in DORMANT: TRAINING cannot follow DORMANT, only GERMINATED can; "
        "so all of the batch is refused",
    )
    assert run.stages(A) == [D] * 4
    [told] = [
        e.message for e in run.bus.messages(Acknowledged) if e.message.command == whole
    ]
    assert [p.outcome for p in told.parts] == ["BATCH", "ILLEGAL", "BATCH"]
    assert int(run.state.seeds[A].strategy[0]) == 0
    # The same seeds: it waited for the next tick.
    run.tick()
    assert run.stages(A) == [D, G, D, D]
    assert run.answer(loose)[0] == "ILLEGAL"


def test_the_policy_is_heard_unless_it_is_told_otherwise(program: Any) -> None:
    run = Run(program)
    run.tick()
    assert run.stages(A) == [G, D, D, D]
    run.send(Enable(on=False), Move(layer=A, seed=0, stage="CANCELLED"))
    run.tick()
    assert run.bus.messages(SeedMoved)[-1].message.by == "OVERRULING"
    run.tick(2)
    assert run.stages(A) == [D] * 4
    run.send(Enable(on=True))
    run.tick()
    assert (run.stages(A) + run.stages(B)).count(G) == 1
    run.service.close()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            Move(layer="layer/0", seed=0, stage="CULLED"),
            "layer: there is no layer 'layer/0'; expected one of layers/0, layers/1",
        ),
        (
            Move(layer=A, seed=4, stage="CULLED"),
            "seed: layers/0 has seeds 0 to 3, got 4",
        ),
        (Move(layer=A, seed=0, stage="culled"), "stage: there is no stage 'culled'"),
        (
            Germinate(layer=A, seed=0, blueprint="lora"),
            "blueprint: there is no blueprint in layers/0 'lora'; expected one of "
            "residual_mlp",
        ),
        (
            SetStrategy(layer=A, seed=0, strategy="cubic"),
            "strategy: there is no grafting strategy 'cubic'; expected one of linear",
        ),
        (
            Batch(commands=[Germinate(layer=A, seed=0)] * 2),
            "commands[1]: seed 0 of layers/0 is asked twice in one batch",
        ),
    ],
)
def test_what_can_never_be_carried_out_is_refused_by_name(
    run: Run, command: Any, said: str
) -> None:
    [id] = run.send(command)
    run.service.asked()
    assert run.service.outbox.flush(10)
    outcome, reason = run.answer(id)
    assert outcome == "INVALID"
    assert reason.startswith(said)


def test_what_cannot_be_read_is_put_aside_and_stops_nothing(run: Run) -> None:
    report = encode(run_started(), "x", "r")
    for data in (b"", b"\xff\x00", b"[" * 100_000, b"x" * 2_000_000, report):
        run.bus.put(data)
    run.bus.put(b'{"id": "m", "type": "esper_jax.Move.v7", "data": {}}')
    [last] = run.send(Germinate(layer=A, seed=0))
    run.tick()
    dead = [json.loads(data) for data in run.bus.dead()]
    assert [d["bytes"] for d in dead[:5]] == [0, 2, 100_000, 2_000_000, len(report)]
    assert all(len(d["begins"]) <= 1000 for d in dead)
    assert run.answer("m")[1] == (
        "type: expected version 1 of Move, got 'esper_jax.Move.v7': this program is "
        "older or newer than its sender"
    )
    assert run.answer("r")[1].startswith("type: expected a command (Germinate, ")
    assert run.answer(last)[0] == "OK"


def run_started() -> RunStarted:
    return RunStarted(tick=0, step=0, layers={})


def test_a_command_is_carried_out_once_whatever_comes_twice(
    program: Any, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "commands.jsonl"
    run = Run(program, path)
    off = encode(Enable(on=False), "me", "off")
    germinate = encode(Germinate(layer=A, seed=1), "me", "once")
    for data in (off, germinate, germinate):
        run.bus.put(data)
    run.tick()
    assert run.answer("once")[0] == "OK"  # one answer for both
    cancel = encode(Move(layer=A, seed=1, stage="CANCELLED"), "me", "gone")
    for data in (germinate, cancel):
        run.bus.put(data)
    run.tick(2)
    run.bus.put(germinate)
    run.tick()
    assert run.stages(A)[1] == D  # it did not germinate again
    answers = [e for e in run.bus.messages(Acknowledged) if e.id == "ack-once"]
    assert len(answers) == 3  # whoever asks again is answered again
    assert all(e.message == answers[0].message for e in answers)
    run.service.close()
    # A process that goes on from the record knows it, too.
    with path.open("ab") as file:
        file.write(b'{"tick": 9, "half a li')  # it was killed
    again = Run(program, path)
    for data in (germinate, off):
        again.bus.put(data)
    again.service.asked(7)
    assert again.service.outbox.flush(10)
    assert again.answer("once") == ("OK", "seed 1: DORMANT -> GERMINATED")
    assert len(read_record(path)) == 3
    again.service.close()


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_order_of_a_layer_is_kept(run: Run, count: int) -> None:
    """Commands, some twice: carried out once each, in their order by layer."""
    rng = np.random.default_rng(0)
    order: dict[str, list[str]] = {A: [], B: []}
    for number in range(count):
        layer = [A, B][int(rng.integers(2))]
        seed = int(rng.integers(4))
        strategy = ["linear", "momentum"][number % 2]
        command = SetStrategy(layer=layer, seed=seed, strategy=strategy)
        id = f"{number}"
        order[layer].append(id)
        data = encode(command, "me", id)
        for _ in range(1 + int(rng.integers(2))):
            run.bus.put(data)
    report, joined, ticks = jax.device_get(run.tick()), run.done, 1
    while len(joined) < count + 1:  # `Enable` came first
        run.service.asked()
        joined += run.service.ticked(report, events=[])
        ticks += 1
    assert ticks < 2 * count
    assert not any(np.any(np.asarray(c.strategy) >= 0) for c in run.asked())
    for ids in order.values():
        mine = set(ids)
        assert [done.id for done in joined if done.id in mine] == ids
    assert run.service.outbox.flush(10)
    answers = [e.message.command for e in run.bus.messages(Acknowledged)]
    assert len(answers) == len(set(answers)) == count + 1


def test_a_report_of_another_tick_is_refused_by_name(run: Run) -> None:
    """As where the commands were not given to the tick."""
    report = jax.device_get(run.tick())
    run.send(Germinate(layer=A, seed=1))
    run.service.asked()
    with pytest.raises(ValueError, match="nothing of seed 1 of layers/0, of which Ger"):
        run.service.ticked(report)


def test_a_command_that_is_replayed_is_not_carried_out_a_second_time() -> None:
    """The same one comes over the bus, too, and is answered at its tick."""
    command = SetStrategy(layer="a", seed=0, strategy="momentum")
    answer = Acknowledged(command="x", outcome="OK", reason="", tick=2)
    record = Record(replayed=[Done(command, 2, 0, answer)])
    bus = Local()
    with Service({"a": Layer(1, ("b",))}, bus, record=record) as service:
        bus.send(command, "x")
        asked = [service.asked(), service.asked()]
        assert [int(of.commands["a"].strategy[0]) for of in asked] == [-1, 2]
        service.ticked(a_report(2, {"a": [0]}))
        assert int(service.asked().commands["a"].strategy[0]) == -1
        assert service.outbox.flush(10)
    [found] = bus.messages(Acknowledged)
    assert (found.message.command, found.message.tick) == ("x", 2)


def test_a_tick_that_was_undone_refuses_what_joined_it(run: Run) -> None:
    born, stop, off = run.send(
        Germinate(layer=A, seed=0), StopAndSave(), Enable(on=False)
    )
    outside = run.service.asked(1, 0)
    assert int(outside.commands[A].target[0]) == Stage.GERMINATED
    done = run.service.undone(
        Rollback(1, 1, 0, Fault.JUMP, "the loss is nan", layers={})
    )
    assert {d.id: d.answer.outcome for d in done}[born] == "UNDONE"
    outside = run.service.asked(1, 1)
    assert int(outside.commands[A].target[0]) == -1
    assert not outside.germination
    assert not run.service.stop_asked
    run.tick()
    assert run.service.stop_asked
    [stopped] = run.service.stopped()
    assert run.service.outbox.flush(10)
    assert run.answer(born) == (
        "UNDONE",
        "the governor undid tick 1: the loss is nan",
    )
    assert run.answer(off)[0] == "OK"
    assert run.answer(stop) == ("OK", "the run ended after tick 1, saved")
    assert stopped.id == stop
    assert run.bus.messages(RolledBack)[0].message.number == 1


def test_the_outcomes_are_the_lifecycle_s() -> None:
    doc = Acknowledged.__doc__ or ""
    source = pathlib.Path(__file__).parents[1] / "esper_jax" / "bus" / "messages.py"
    text = source.read_text() + doc
    assert all(o.name in text for o in Outcome if o > Outcome.NONE)


def test_slots_that_a_loop_gives_back_are_told_of() -> None:
    bus = Local()
    with Service({A: Layer(4, ("a",)), B: Layer(4, ("a",))}, bus) as service:
        service.ticked(a_report(7, {A: [0] * 4, B: [0] * 4}), events=[])
        service.shrunk({A: (4, 1), B: (3, 0)})
        assert service.outbox.flush(10)
    told = bus.messages(CapacityChanged)
    assert [(e.id, e.message.tick, e.message.layer) for e in told] == [
        ("slots-0-7-0", 7, A),
        ("slots-0-7-1", 7, B),
    ]
    assert [(e.message.before, e.message.after) for e in told] == [(4, 1), (3, 0)]
    assert told[0].message.text.startswith("gives back 3 of 4 slots, since nothing")


def test_no_more_is_taken_in_than_can_be_decided(monkeypatch: Any) -> None:
    monkeypatch.setattr("esper_jax.bus.service.MOST_PARTS", 10)
    bus = Local()
    with Service({A: Layer(4, ("a",))}, bus) as service:
        names = [f"{n}" for n in range(8)]
        for name in names:
            two = [Move(layer=A, seed=n, stage="CULLED") for n in (0, 1)]
            bus.send(Batch(commands=two), id=name)
        taken = []
        for tick in range(1, 9):
            service.asked(tick)
            taken.append(len(service._waiting) + len(service._admitted.now))
            refused = a_layer(
                [0] * 4, source=[0] * 4, target=[8, 8, -1, -1], outcome=[1, 1, 0, 0]
            )
            service.ticked(a_report(tick, {A: refused}))
        assert service.outbox.flush(10)
    assert taken[0] == 4  # of three requests' worth each: the batch and its two
    assert [e.message.command for e in bus.messages(Acknowledged)] == names


def test_a_strategy_is_not_what_moves_a_seed() -> None:
    bus = Local()
    with Service({A: Layer(4, ("a",))}, bus) as service:
        bus.send(SetStrategy(layer=A, seed=0, strategy="momentum"), id="style")
        bus.send(Move(layer=A, seed=1, stage="CULLED"), id="move")
        service.asked(1)
        assert service.asking() == {(A, 1): "move"}


def test_a_rollback_counts_where_nobody_says_so() -> None:
    bus, record = Local(), Record()
    with Service({A: Layer(1, ("a",))}, bus, record=record) as service:
        service.asked()
        service.undone(Rollback(1, 1, 0, Fault.JUMP, "the loss is nan", layers={}))
        bus.send(Enable(on=False), id="off")
        service.asked()
        [done] = service.ticked(a_report(1, {A: [0]}))
    assert done.at == (1, 1)


def test_a_damaged_message_contradicts_no_answer() -> None:
    bus = Local()
    with Service({A: Layer(4, ("a",))}, bus) as service:
        bus.send(Enable(on=False), id="x")
        service.asked()
        service.ticked(a_report(1, {A: [0] * 4}))
        bus.put(json.dumps({"id": "x", "type": "esper_jax.Enable.v9"}).encode())
        service.asked()
        assert service.outbox.flush(10)
    assert [e.message.outcome for e in bus.messages(Acknowledged)] == ["OK"]
    assert len(bus.dead()) == 1
