"""Messages on the wire, and the one table that lists them."""

import contextlib
import inspect
import json
import pathlib
import re
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reports import report, seeds

from esper_jax.bus import (
    Acknowledged,
    Batch,
    CapacityChanged,
    Enable,
    Germinate,
    LayerHealth,
    MessageError,
    Move,
    SeedMoved,
    StopAndSave,
    decode,
    encode,
)
from esper_jax.bus.envelope import MOST_BYTES, decode_command
from esper_jax.bus.messages import COMMANDS, MESSAGES
from esper_jax.bus.telling import events_told, tick_told

ROOT = pathlib.Path(__file__).parents[1]
MOVE = Move(layer="layers/0", seed=3, stage="CULLED")
_NAMES = {
    msgspec.inspect.IntType: "integer",
    msgspec.inspect.FloatType: "number",
    msgspec.inspect.StrType: "string",
    msgspec.inspect.BoolType: "boolean",
    msgspec.inspect.NoneType: "null",
}


def described(kind: Any) -> str:
    """A type in the words of the table."""
    match kind:
        case msgspec.inspect.Metadata():
            return described(kind.type)
        case msgspec.inspect.ListType():
            return f"array of {described(kind.item_type)}"
        case msgspec.inspect.DictType():
            return f"object of {described(kind.value_type)}"
        case msgspec.inspect.StructType():
            return "object"
        case msgspec.inspect.UnionType():
            return " or ".join(dict.fromkeys(map(described, kind.types)))
    return _NAMES[type(kind)]


def test_the_table_lists_every_message_and_field() -> None:
    wanted = []
    for name, message in MESSAGES.items():
        fields = msgspec.inspect.type_info(message).fields
        rows = [(f.encode_name, described(f.type)) for f in fields] or [("", "")]
        wanted += [(name, *row) for row in rows]
    page = (ROOT / "docs" / "bus.md").read_text()
    _, _, table = page.partition("| message | field | type | meaning |\n")
    found, name = [], ""
    for row in table.partition("\n\n")[0].splitlines()[1:]:
        cells = [cell.strip().strip("`") for cell in row.strip("|").split("|")]
        name = cells[0] or name
        found.append((name, *cells[1:3]))
        assert cells[3], row
    assert found == wanted


def test_a_field_that_may_be_left_out_says_so() -> None:
    page = (ROOT / "docs" / "bus.md").read_text()
    _, _, table = page.partition("| message | field | type | meaning |\n")
    rows = table.partition("\n\n")[0].splitlines()
    for message in MESSAGES.values():
        for field in msgspec.inspect.type_info(message).fields:
            said = [r for r in rows if f"| `{field.encode_name}` |" in r]
            assert field.required or any("by default" in row for row in said)


def test_a_message_comes_back_as_it_was() -> None:
    batch = Batch(commands=[MOVE, Germinate(layer="b", seed=0)], atomic=False)
    moved = SeedMoved(
        tick=1,
        layer="a",
        seed=2,
        source="DORMANT",
        to="GERMINATED",
        outcome="OK",
        measured={"worth": None},
        by="POLICY",
        text="…",
    )
    for message in (MOVE, batch, moved, Enable(on=True), StopAndSave()):
        data = encode(message, "test", "7")
        assert b"\n" not in data
        found = decode(data)
        assert (found.message, found.id, found.source) == (message, "7", "test")
        wire = json.loads(data)
        assert wire["type"] == f"esper_jax.{type(message).__name__}.v1"
        assert wire["specversion"] == "1.0"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", wire["time"])


def test_what_is_not_finite_is_null_on_the_wire() -> None:
    nan, inf = float("nan"), float("inf")
    health = LayerHealth(
        tick=1, layer="a", stage=[0], health=[nan], alpha=[inf], worth=[-inf]
    )
    found = decode(encode(health, "test")).message
    assert (found.health, found.alpha, found.worth) == ([None], [None], [None])


def test_numbers_are_short_on_the_wire_and_lose_nothing() -> None:
    random = np.random.default_rng(0)
    some = random.normal(size=5000) * 10.0 ** random.integers(-45, 38, 5000)
    values = np.array([*some, 0.0, np.nan, np.inf, 0.1, 1 / 3], np.float32)
    layer = seeds([0] * len(values), alpha=values)
    [_, health] = tick_told(report(1, {"a": layer}))
    back = decode(encode(health, "test")).message.alpha
    found = np.array([np.nan if x is None else x for x in back])
    finite = np.isfinite(values)
    np.testing.assert_array_equal(found[finite].astype(np.float32), values[finite])
    assert np.isnan(found[~finite]).all()
    assert back[-2:] == [0.100000001, 0.333333343]


def test_unknown_fields_are_passed_over_and_few_are_needed() -> None:
    data = {"layer": "layers/0", "seed": 3, "stage": "CULLED", "why": "curious"}
    wire = {"id": "7", "type": "esper_jax.Move.v1", "data": data, "traceparent": "00"}
    assert decode_command(json.dumps(wire).encode()).message == MOVE


def wire(type: Any = "esper_jax.Move.v1", **more: Any) -> bytes:
    return json.dumps({"id": "7", "type": type, "data": {}} | more).encode()


@pytest.mark.parametrize(
    ("data", "said", "id"),
    [
        (b"", "not a message: Input data was truncated", None),
        (b"\xff\xfe", "not a message: JSON is malformed", None),
        (b"[" * 500_000, "not a message: Expected `object`, got `array`", None),
        (
            b'{"id": "7", "data":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
            "not a message: too deeply nested",
            None,
        ),
        (b" " * (MOST_BYTES + 1), "a message of 1048577 bytes: expected at most", None),
        (
            wire("esper_jax.StopAndSave.v1", id="x" * 201),
            "id: expected 1 to 200 characters, got 201",
            "x" * 201,
        ),
        (
            b'{"id": "7", "data": ' + b" " * MOST_BYTES,
            "bytes: expected at most 1048576",
            "7",
        ),
        (wire(time=None), "time: expected a string, got null", "7"),
        (wire(source=5), "source: expected a string, got 5", "7"),
        (wire(specversion=1), "specversion: expected a string, got 1", "7"),
        (wire(id=7), "id: expected a string, got 7", None),
        (wire(id=""), "id: expected 1 to 200 characters, got 0", ""),
        (wire(specversion="2.0"), "specversion: expected 1.0 of CloudEvents", "7"),
        (wire("Move"), "type: expected one of esper_jax.TickReported.v1, ", "7"),
        (wire("esper_jax.Fly.v1"), "got 'esper_jax.Fly.v1'", "7"),
        (wire("esper_jax.Move.v2"), "expected version 1 of Move, got 'esper_j", "7"),
        (wire(3), "type: expected a string, got 3", "7"),
        (wire(), "Move: Object missing required field `layer`", "7"),
        (
            wire(data={"layer": "a", "seed": "3", "stage": "CULLED"}),
            "Move: Expected `int`, got `str` - at `$.seed`",
            "7",
        ),
        (
            wire(data={"layer": "a", "seed": -1, "stage": "CULLED"}),
            "Move: Expected `int` >= 0 - at `$.seed`",
            "7",
        ),
        (
            wire("esper_jax.Batch.v1", data={"commands": []}),
            "Batch: Expected `array` of length >= 1 - at `$.commands`",
            "7",
        ),
        (
            wire("esper_jax.Batch.v1", data={"commands": [{"kind": "StopAndSave"}]}),
            "Batch: Invalid value 'StopAndSave' - at `$.commands[0].kind`",
            "7",
        ),
        (
            wire("esper_jax.RunEnded.v1", data={"tick": 1, "step": 1, "reason": ""}),
            "type: expected a command (Germinate, Move, ",
            "7",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(
    data: bytes, said: str, id: str | None
) -> None:
    with pytest.raises(MessageError) as caught:
        decode_command(data)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 600
    assert caught.value.id == (caught.value.id if id is None else id)


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=8) | st.integers(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["id", "type", "data", "seed", "layer", "kind"]), inner
            )
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode())
)
@settings(max_examples=150, deadline=None)
def test_whatever_comes_is_a_command_or_refused(data: bytes) -> None:
    with contextlib.suppress(MessageError):  # and nothing else
        assert type(decode_command(data).message).__name__ in COMMANDS


def test_answers_and_reports_may_be_longer_than_commands() -> None:
    long = Acknowledged(command="x", outcome="OK", reason="y" * MOST_BYTES, tick=1)
    assert decode(encode(long, "test", "ack-" + 200 * "x")).message == long


def test_each_message_has_words() -> None:
    for message in MESSAGES.values():
        assert inspect.getdoc(message)


def test_events_of_seeds_and_slots_are_told_and_no_others() -> None:
    seed = {"tick": 7, "layer": "a", "seed": 0, "outcome": "OK"}
    moved = {**seed, "from": "DORMANT", "to": "GERMINATED"}
    slots = {**seed, "seed": -1, "from": "3", "to": "1", "slots": [3, 1]}
    change = {**seed, "layer": "", "seed": -1, "from": "1", "to": "2", "change": 1}
    slots["text"] = "gives back 2"
    given_back, move = events_told([slots, moved, change])
    assert (move.to, move.seed) == ("GERMINATED", 0)
    assert given_back == CapacityChanged(
        tick=7, layer="a", before=3, after=1, text="gives back 2"
    )
